"""Reading past the page cache: the same tensors as through it, wherever they lie in the file, and whatever fails."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.kernels.layout.checkpoint import read_tensor
from qwenfit.profiles.checkpoint import StoredTensor
from qwenfit.quant.uncached import LEAST_BYTES, PAGE_BYTES, read_once

FILE_BYTES = 3 * LEAST_BYTES + 1234
DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("uncached") / "model.safetensors"
    path.write_bytes(os.urandom(FILE_BYTES))
    return str(path)


def place(path: str, offset_bytes: int, rows: int, columns: int = 512) -> StoredTensor:
    return StoredTensor(path, offset_bytes, 2 * rows * columns, "BF16", (rows, columns))


@settings(max_examples=60, deadline=None)
@given(offset_bytes=st.integers(0, 2 * PAGE_BYTES), rows=st.integers(1000, 3000))
def test_the_tensor_is_the_same_from_any_offset_on(file: str, offset_bytes: int, rows: int) -> None:
    rows = min(rows, (FILE_BYTES - offset_bytes) // 1024)
    wanted, found = (read(place(file, offset_bytes, rows)) for read in (read_tensor, read_once))
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every file that `uncached` opens; the file system itself need not know O_DIRECT."""
    asked: list[int] = []
    real = os.open

    def opened(path: str, flags: int, *mode: int) -> int:
        asked.append(flags)
        return real(path, flags & ~DIRECT, *mode)

    monkeypatch.setattr(os, "open", opened)
    return asked


@pytest.mark.skipif(not DIRECT, reason="only Linux reads past the cache")
def test_large_tensors_go_past_the_cache_and_small_ones_do_not(file: str, flags: list[int]) -> None:
    read_once(place(file, 8, 1023))
    assert not flags  # a page less than a megabyte
    read_once(place(file, 8, 1024))
    assert len(flags) == 1 and flags[0] & DIRECT
    read_once(place(file, 7, 1024))
    assert len(flags) == 1  # bf16 at an odd offset could not be a view


@pytest.mark.skipif(not DIRECT, reason="only Linux reads past the cache")
def test_a_file_system_without_it_is_read_through_the_cache(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, flags: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", refused)
    assert torch.equal(
        read_once(place(file, 64, 2000)).view(torch.int16), read_tensor(place(file, 64, 2000)).view(torch.int16)
    )


def test_a_file_that_ends_inside_a_tensor_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(LEAST_BYTES + 100))
    with pytest.raises(ValueError, match="cut short"):
        read_once(place(str(path), 8, 1100))
