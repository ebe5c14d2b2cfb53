"""By the system's calls and without them (as on Windows): the same bytes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwenfit.quant import positioned
from qwenfit.quant.positioned import BINARY, claim, free_bytes, read_at, sync, take_room, taken_bytes, write_at

NAMES = ("_pread", "_pwrite", "_fallocate")


@pytest.mark.parametrize("has_calls", [True, False])
def test_threads_read_and_write_each_their_part(
    has_calls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in () if has_calls else NAMES:
        monkeypatch.setattr(positioned, name, None)
    parts = [bytes([number]) * 4096 for number in range(64)]
    path = tmp_path / "file"
    file = os.open(path, os.O_RDWR | os.O_CREAT | BINARY)
    take_room(file, 64 * 4096)
    assert path.stat().st_size == 64 * 4096 and taken_bytes(file) <= 64 * 4096 + 8192
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_at(file, memoryview(parts[number]), 4096 * number), range(64)))
    sync(file)
    assert path.read_bytes() == b"".join(parts)

    def read(number: int) -> bytes:
        buffer = bytearray(4096)
        assert read_at(file, memoryview(buffer), 4096 * number) == 4096
        return bytes(buffer)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(64))) == parts
    assert read_at(file, memoryview(bytearray(8)), 64 * 4096) == 0
    os.close(file)
    assert 0 < free_bytes(str(path)) < 1 << 60


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_a_file_is_claimed_until_it_is_closed(tmp_path: Path) -> None:
    path = str(tmp_path / "claim")
    first = claim(path)
    assert first is not None and claim(path) is None
    first.close()
    second = claim(path)
    assert second is not None
    second.close()
