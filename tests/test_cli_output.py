"""The sink: what a screen can show, and text that no terminal obeys."""

import io
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.cli.output import MIN_WIDTH, PIPE_WIDTH, clean, columns, screen, wrapped


class Stream(io.StringIO):
    def __init__(self, terminal: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self.terminal, self.named = terminal, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.named

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("terminal", "env", "color"),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "0"}, False),
        (True, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (True, {"FORCE_COLOR": "1", "TERM": "dumb"}, True),
    ],
)
def test_colour(monkeypatch: pytest.MonkeyPatch, terminal: bool, env: dict[str, str], color: bool) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert screen(Stream(terminal)).color is color


@pytest.mark.parametrize(
    ("asked", "width"),
    [("120", 120), ("5", MIN_WIDTH), ("0", PIPE_WIDTH), ("wide", PIPE_WIDTH), ("", PIPE_WIDTH), ("-3", PIPE_WIDTH)],
)
def test_width(monkeypatch: pytest.MonkeyPatch, asked: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", asked)
    assert screen(Stream(False)).width == width


@pytest.mark.parametrize(
    ("encoding", "unicode"), [("utf-8", True), ("ascii", False), ("latin-1", False), ("cp1252", False), ("odd", False)]
)
def test_blocks_only_where_they_can_be_written(encoding: str, unicode: bool) -> None:
    assert screen(Stream(True, encoding)).unicode is unicode


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert clean(text).isprintable()
    if text.isprintable():
        assert clean(text) == text


def test_escapes_are_shown() -> None:
    assert clean("a\x1b[31mb\nc\u202ed\udc80") == "a\\x1b[31mb\\nc\\u202ed\\udc80"


@given(st.text("ab ", max_size=200), st.integers(10, 60))
def test_wrapping_keeps_the_words_and_the_width(text: str, width: int) -> None:
    lines = wrapped(text, width, first="- ", rest="  ")
    assert " ".join(lines).removeprefix("- ").split() == text.split()
    assert all(len(line) <= width or len(line.split()) <= 2 for line in lines)


def test_columns() -> None:
    assert columns([("a", "b"), ("long", "1")], right=(1,), indent=" ") == [" a     b", " long  1"]


def in_a_shell(line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = f'"{sys.executable}" -m qwenfit.cli.plan'
    return subprocess.run(
        line.replace("qwen-plan", command), shell=True, capture_output=True, env={**os.environ, **env}, timeout=60
    )


@pytest.mark.skipif(os.name == "nt", reason="POSIX shell")
@pytest.mark.parametrize("arguments", ["--gpu rtx3060", "--gpu rtx3060 --json", "devices", "--help"])
def test_a_reader_who_leaves_is_no_error(arguments: str) -> None:
    done = in_a_shell(f"qwen-plan {arguments} | true")
    assert done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", ["--gpu rtx3060", "devices --json"])
def test_a_full_disk_is_said_and_is_no_answer(arguments: str) -> None:
    done = in_a_shell(f"qwen-plan {arguments} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"takes no more" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX shell")
def test_no_standard_output_at_all() -> None:
    done = in_a_shell("qwen-plan --gpu rtx3060 >&-")
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_an_ascii_terminal_gets_ascii(qwen_plan: Any) -> None:
    done = qwen_plan("--gpu", "rtx3060", env={"PYTHONIOENCODING": "ascii"})
    assert done.status == 0 and done.stdout.isascii() and "####" in done.stdout
