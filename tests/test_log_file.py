"""A log as a file: large ones are read at their ends, text in any of its encodings, and nothing else."""

import io
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from qwenfit.planner.logs import log_file
from qwenfit.planner.logs.engine_log import read_log_file
from qwenfit.planner.logs.log_file import LINE_LIMIT, clean_lines, read_log_text
from qwenfit.profiles.errors import BadInput

BOOT = Path(__file__).parent / "data" / "logs" / "llamacpp-b11434-cpu.log"


def test_a_sparse_gigabyte_is_refused_at_once_and_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.log"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(BadInput, match="holds no text"):
        read_log_file(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_hole_before_the_text_is_skipped(tmp_path: Path) -> None:
    """What `copytruncate` leaves while the engine goes on writing at its old place."""
    path = tmp_path / "rotated.log"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 20)
        file.write(BOOT.read_bytes())
    assert read_log_file(str(path)).parts == read_log_file(str(BOOT)).parts


def test_of_a_large_log_both_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weeks.log"
    noise = b"GET /v1/completions 200\n" * (1 << 19)  # 12 MiB
    path.write_bytes(BOOT.read_bytes() + noise)
    first = read_log_file(str(path))
    assert first.parts == read_log_file(str(BOOT)).parts
    assert first.notes == ("4 MiB between the log's beginning and end were not read",)
    path.write_bytes(noise + BOOT.read_bytes())
    assert read_log_file(str(path)).parts == first.parts


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_any_usual_encoding(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "boot.log"
    path.write_bytes(BOOT.read_text(encoding="utf-8").encode(codec, "replace"))
    assert read_log_file(str(path)).parts == read_log_file(str(BOOT)).parts


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "holds no text"),
        (b"\n \n\t\n", "holds no text"),
        (bytes(range(1, 32)) * 3000, "is not a text file"),
        (os.urandom(1 << 16), "is not a text file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256)) * 400, "is not a text file"),
    ],
)
def test_what_is_no_text_is_refused(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=says):
        read_log_file(str(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, says in (
        (str(tmp_path / "no.log"), "cannot be read: No such file"),
        (str(tmp_path), "is not a regular file"),
        (str(tmp_path / "fifo"), "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(BadInput, match=says):
            read_log_text(path)


def piped(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(BOOT.read_bytes(), monkeypatch)
    assert read_log_file("-").parts == read_log_file(str(BOOT)).parts
    piped(b"x" * 5_000_000 + b"\n" + b"y\n" * 3_000_000 + BOOT.read_bytes(), monkeypatch)
    assert read_log_file("-").parts == read_log_file(str(BOOT)).parts
    piped(bytes(5_000_000), monkeypatch)
    with pytest.raises(BadInput, match="standard input holds no text"):
        read_log_file("-")


def test_an_endless_pipe_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "PIPE_LIMIT_BYTES", 8 << 20)
    piped(b"yes\n" * (5 << 20), monkeypatch)
    with pytest.raises(BadInput, match="goes on beyond 8 MiB: give the log as a file"):
        read_log_file("-")


def test_lines_are_cut_and_cleaned() -> None:
    found = clean_lines(b"a" * 100_000 + b"\n\x1b[31mred\x1b[0m \x07bell\rand over\nshort\n", b"", 0, "x").lines
    assert [len(found[0]), *found[1:]] == [LINE_LIMIT, "red bell", "and over"]
