"""The one sink: results on stdout, everything else on stderr, and what the screen in front of us can show."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TextIO

from ..profiles.errors import BadInput

PIPE_WIDTH = 100
MIN_WIDTH = 40
GLYPHS = "█▓▒░▞▚·│"


class Screen(NamedTuple):
    """How wide lines may be, and whether colour and anything beyond ASCII may be used."""

    width: int
    color: bool
    unicode: bool


def screen(stream: TextIO) -> Screen:
    terminal = stream.isatty()
    return Screen(_width(stream, terminal), _color(terminal), _unicode(stream))


def write(text: str) -> None:
    """A result, on stdout, at once: a closed pipe or a full disk is found here and not at exit."""
    if sys.stdout is None:
        raise BadInput("standard output is closed: there is nowhere to write the answer")
    try:
        sys.stdout.write(_encodable(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_stdout()
        raise BadInput(f"standard output takes no more: {error.strerror or error}") from error


def say(text: str) -> None:
    """Anything that is not the result, on stderr."""
    if sys.stderr is not None:
        sys.stderr.write(_encodable(f"{text}\n", sys.stderr))


def quietly_closed() -> None:
    """Whoever read our output has gone: what Python still wants to flush at exit goes nowhere."""
    _forget_stdout()


def clean(text: str) -> str:
    """`text` without anything that a terminal would obey: control, format and line-breaking characters are escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """`text` in lines of at most `width` columns where its words allow, behind `first` and then `rest`."""
    lines: list[str] = []
    line, empty = first, True
    for word in text.split():
        if not empty and len(line) + 1 + len(word) > width:
            lines.append(line)
            line, empty = rest, True
        line += word if empty else f" {word}"
        empty = False
    return [*lines, line]


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = (), indent: str = "") -> list[str]:
    """Rows in aligned columns, two spaces apart; the columns in `right` are aligned to the right."""
    flush = set(right)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        (
            indent
            + "  ".join(
                cell.rjust(width) if column in flush else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    ]


def _width(stream: TextIO, terminal: bool) -> int:
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdigit() and int(asked[:6]) > 0:
        return max(MIN_WIDTH, int(asked[:6]))
    if terminal:
        try:
            found = os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError):
            found = 0
        if found:
            return max(MIN_WIDTH, found)
    return PIPE_WIDTH


def _color(terminal: bool) -> bool:
    """NO_COLOR wins, then FORCE_COLOR; without them a terminal gets colour unless it is dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0", "false"):
        return True
    return terminal and os.environ.get("TERM") != "dumb"


def _unicode(stream: TextIO) -> bool:
    try:
        GLYPHS.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _forget_stdout() -> None:
    """What is still buffered would fail again when Python exits, with a message of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
