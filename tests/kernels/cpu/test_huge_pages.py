"""Memory in huge pages: what is asked for, and what a system without them gives."""

import gc
import mmap
import sys
import weakref
from pathlib import Path

import pytest
import torch

from qwenfit.kernels.cpu import huge_pages
from qwenfit.kernels.cpu.huge_pages import HugePages

HUGE = 2 << 20


def test_rooms_follow_one_another_and_do_not_overlap() -> None:
    pages = HugePages()
    rooms = [pages.room(size) for size in (1, 100, 64, 0, 5000)]
    for value, room in enumerate(rooms):
        room.fill_(value)
    assert [room.numel() for room in rooms] == [1, 100, 64, 0, 5000]
    assert all(bool((room == value).all()) for value, room in enumerate(rooms))
    starts = [room.data_ptr() - rooms[0].data_ptr() for room in rooms if room.numel()]
    assert starts == [0, 64, 192, 256] and rooms[0].data_ptr() % HUGE == 0


def test_what_is_larger_than_a_piece_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_CHUNK_BYTES", HUGE)
    pages = HugePages()
    small, large, behind, last = (pages.room(size) for size in (64, 3 * HUGE, 64, HUGE))
    assert behind.data_ptr() == small.data_ptr() + 64  # what was left of the first piece is still used
    assert len({room.untyped_storage().data_ptr() for room in (small, large, last)}) == 3


def test_memory_is_given_back_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    piece_of = huge_pages._piece_of

    def watched(size: int) -> torch.Tensor:
        piece = piece_of(size)
        made.append(weakref.ref(piece))
        return piece

    monkeypatch.setattr(huge_pages, "_piece_of", watched)
    pages = HugePages()
    room = pages.room(100)
    del pages
    room.fill_(1)
    del room
    gc.collect()
    assert [piece() for piece in made] == [None]


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
def test_the_system_is_asked_for_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system gives none")
    room = HugePages().room(4 * HUGE).fill_(1)
    flags = _mapping_flags(room.data_ptr())
    assert "hg" in flags  # MADV_HUGEPAGE, as /proc/self/smaps writes it (Linux, Documentation/filesystems/proc.rst)


def _mapping_flags(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("the mapping is not there")


def test_a_system_without_them_gives_memory_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    room = HugePages().room(1000).fill_(3)
    assert int(room.sum()) == 3000


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
def test_a_system_that_refuses_gives_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # no kernel knows it: EINVAL
    room = HugePages().room(1000).fill_(3)
    assert int(room.sum()) == 3000
