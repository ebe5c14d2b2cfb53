"""The text of a log that somebody else wrote: bounded, decoded, without what terminals, shells and containers add.

A boot log is a few thousand lines, but the file may go on with weeks of requests, so of a large one only the beginning
and the end are read. Lines are cut at a length that no engine reaches.
"""

import os
import re
import stat
import sys
from collections import deque
from json import JSONDecodeError, loads
from typing import BinaryIO, NamedTuple

from ...profiles.errors import BadInput

END_BYTES = 4 << 20  # read at the beginning and at the end
PIPE_LIMIT_BYTES = 256 << 20  # of standard input: what comes from a pipe cannot be skipped
CHUNK_BYTES = 1 << 16
SHORTEST_LINE = 8  # characters: no engine says anything in fewer
LINE_LIMIT = 32 << 10  # characters; vLLM and SGLang print their settings in one line of up to 10,000
STRANGE_SHARE = 0.05  # of characters, from which on a file is no text

_ANSI = re.compile(
    r"\x1b\[[0-9;?]{0,32}[ -/]{0,4}[@-~]"  # colours and cursor
    r"|\x1b\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)?"  # titles and links
    r"|\x1b[@-Z\\-_]"
    r"|\[(?:\d{1,3}(?:;\d{1,3}){0,4})?m(?=[^\]]|$)"  # colours whose escape was lost when they were pasted
)
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
_STRANGE = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")


class LogText(NamedTuple):
    """Lines without decoration, and how many bytes between the beginning and the end were not read."""

    lines: tuple[str, ...]
    skipped_bytes: int


def read_log_text(path: str) -> LogText:
    """The lines of a file, or of standard input where `path` is `-`. BadInput for what is no text."""
    if path == "-":
        return clean_lines(*_piped(sys.stdin.buffer), "standard input")
    where = _shown(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for a writer, and a device never ends
            raise BadInput(f"{where} is not a regular file: give a log file, or - to read standard input")
        with open(path, "rb") as file:
            if status.st_size <= 2 * END_BYTES:
                return clean_lines(file.read(2 * END_BYTES), b"", 0, where)
            first = file.read(END_BYTES)
            file.seek(-END_BYTES, os.SEEK_END)
            return clean_lines(first, file.read(END_BYTES), status.st_size - 2 * END_BYTES, where)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a valid path"
        raise BadInput(f"{where} cannot be read: {reason}") from None


def clean_lines(first: bytes, last: bytes, skipped_bytes: int, where: str) -> LogText:
    """The lines of a beginning and an end. BadInput, beginning with `where`, for what is empty or binary."""
    codec = _codec(first)
    lines: list[str] = []
    for place, data in enumerate((first, last)):
        if data:
            text = _text(data, codec, where)
            found = _lines(text)
            lines += found[1:] if place and skipped_bytes else found  # the end may begin in the middle of a line
    if not lines:
        raise BadInput(f"{where} holds no text")
    return LogText(tuple(_clean(line) for line in lines), skipped_bytes)


def text_lines(text: str) -> tuple[str, ...]:
    """The lines of a text that is already decoded."""
    return tuple(map(_clean, _lines(text[: 2 * END_BYTES].replace("\r\n", "\n").replace("\r", "\n"))))


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if len(line) >= SHORTEST_LINE and not line.isspace()]


def _piped(stream: BinaryIO) -> tuple[bytes, bytes, int]:
    first = stream.read(END_BYTES)
    if first and not first.strip(b"\0"):
        return first, b"", 0
    kept: deque[bytes] = deque()
    held = total = 0
    while chunk := stream.read(CHUNK_BYTES):
        kept.append(chunk)
        held += len(chunk)
        total += len(chunk)
        if total > PIPE_LIMIT_BYTES:
            raise BadInput(f"standard input goes on beyond {PIPE_LIMIT_BYTES >> 20} MiB: give the log as a file")
        while held - len(kept[0]) >= END_BYTES:
            held -= len(kept.popleft())
    last = b"".join(kept)
    skipped = total - held
    return (first, last, skipped) if skipped else (first + last, b"", 0)


def _codec(data: bytes) -> str:
    """UTF-8, or the UTF-16 that PowerShell writes when it redirects."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16-le" if data[0] == 0xFF else "utf-16-be"
    sample = data[:4096]
    half = len(sample) // 2
    if half > 8:
        for codec, zeros in (("utf-16-le", sample[1::2]), ("utf-16-be", sample[::2])):
            others = sample[::2] if codec == "utf-16-le" else sample[1::2]
            if zeros.count(0) > 0.9 * half and others.count(0) < 0.1 * half:
                return codec
    return "utf-8"


def _text(data: bytes, codec: str, where: str) -> str:
    if codec == "utf-8":
        data = data.replace(b"\0", b"")  # a rotated file begins with a hole
    text = data.decode(codec, "replace").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip("\n\t \0"):
        return ""
    sample = text[:CHUNK_BYTES] + text[-CHUNK_BYTES:]
    if len(_STRANGE.findall(sample)) > STRANGE_SHARE * len(sample):
        raise BadInput(f"{where} is not a text file: give what the engine printed while it started")
    return text


def _clean(line: str) -> str:
    line = line[:LINE_LIMIT]
    if line.startswith('{"log":'):  # the json-file driver of Docker
        try:
            inner = loads(line)
            line = str(inner["log"])
        except (JSONDecodeError, RecursionError, ValueError, LookupError, TypeError):
            pass
    if "\x1b" in line or ("m" in line and "[" in line):
        line = _ANSI.sub("", line)
    return line if line.isprintable() else line.translate(_CONTROL)


def _shown(path: str) -> str:
    return path[:300] if path.isprintable() else ascii(path[:300])
