"""A file that is written in any order, and what is said where the disk says no."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from qwenfit.profiles.errors import BadInput
from qwenfit.quant.placed_file import PlacedFile


def test_any_order_and_any_thread_give_the_same_bytes(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    file = PlacedFile(str(tmp_path / "a"), 100_000, 1000)
    starts = [*range(1000, 100_000, 990)]
    threads = [
        threading.Thread(target=file.write, args=(start, content[start : start + 990])) for start in reversed(starts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes()[:1000] == bytes(1000)  # no header: it does not load before it is finished
    file.finish(content[:1000])
    assert (tmp_path / "a").read_bytes() == content


def test_a_later_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    first = PlacedFile(path, 50, 10)
    first.write(10, b"x" * 20)
    first.close()
    second = PlacedFile(path, 50, 10, resume=True)
    second.write(30, b"y" * 20)
    second.finish(b"h" * 10)
    assert Path(path).read_bytes() == b"h" * 10 + b"x" * 20 + b"y" * 20
    with pytest.raises(BadInput, match="has 50 bytes where this run writes 60; start anew"):
        PlacedFile(path, 60, 10, resume=True)
    with pytest.raises(BadInput, match="cannot be written: File exists"):
        PlacedFile(path, 50, 10)


def test_nothing_is_written_outside_the_data(tmp_path: Path) -> None:
    file = PlacedFile(str(tmp_path / "a"), 50, 10)
    for offset, data in ((9, b"x"), (49, b"xy")):
        with pytest.raises(ValueError, match="outside the data"):
            file.write(offset, data)
    with pytest.raises(ValueError, match="a header of 9 bytes where 10 were kept"):
        file.finish(b"h" * 9)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk is full; free some space and start again with --resume"),
        (errno.EROFS, "the file system is read-only; give another target"),
        (errno.EACCES, "writing there is not permitted; give another target"),
    ],
)
@pytest.mark.parametrize(
    "call", ["placed_file.os.open", "positioned._fallocate", "positioned._pwrite", "positioned._fsync"]
)
def test_what_the_disk_refuses(
    number: int, sentence: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"qwenfit.quant.{call}", refuse)
    with pytest.raises(BadInput, match=f"a cannot be written: {sentence}"):
        file = PlacedFile(str(tmp_path / "a"), 50, 10)
        file.write(10, b"x" * 40)
        file.finish(b"h" * 10)


def test_the_room_is_taken_before_the_work(tmp_path: Path) -> None:
    PlacedFile(str(tmp_path / "a"), 1 << 20, 10).close()
    assert (tmp_path / "a").stat().st_blocks * 512 >= 1 << 20


def test_a_disk_without_room_is_noticed_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is a made one: a real one that is filled to the brim fails whatever else runs on the machine."""
    asked: list[int] = []
    monkeypatch.setattr("qwenfit.quant.placed_file.free_bytes", lambda _: 40960)
    monkeypatch.setattr("qwenfit.quant.positioned._fallocate", lambda *args: asked.append(args[2]))
    with pytest.raises(BadInput, match="a cannot be written: the disk is full; free some space"):
        PlacedFile(str(tmp_path / "a"), 40961, 10)
    assert not asked and (tmp_path / "a").stat().st_size == 0
    PlacedFile(str(tmp_path / "b"), 40960, 10).close()
    assert asked == [40960]


def test_a_disk_that_others_fill_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """posix_fallocate keeps what it could get: that is given back."""

    def half(descriptor: int, *_: int) -> None:
        os.ftruncate(descriptor, 500)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwenfit.quant.positioned._fallocate", half)
    with pytest.raises(BadInput, match="the disk is full"):
        PlacedFile(str(tmp_path / "a"), 1000, 10)
    assert (tmp_path / "a").stat().st_size == 0
