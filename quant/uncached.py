"""Tensors of a checkpoint that is read once, past the system's page cache where the file system lets them.

Out of the cache every byte is copied once more: 0.6 to 1 CPU-second per GB where reading past it took 0.1 (ext4 on
Linux 6, blocks of 16 MB), and a checkpoint of 20 GB pushes out everything else that was cached. Linux alone has
O_DIRECT; it wants offsets, lengths and memory in whole pages (open(2)).
"""

import os

import torch
from torch import Tensor

from ..kernels.layout.checkpoint import DTYPES, read_tensor
from ..profiles.checkpoint import StoredTensor
from .positioned import read_at

PAGE_BYTES = 4096
LEAST_BYTES = 1 << 20
"""Below that, whole pages and waiting for the disk cost more than the copy."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def read_once(place: StoredTensor) -> Tensor:
    """`read_tensor`, past the cache where that can be: the same tensor, the same ValueError."""
    dtype = DTYPES[place.dtype]
    if not _DIRECT or place.bytes < LEAST_BYTES or place.offset_bytes % dtype.itemsize:
        return read_tensor(place)
    start_bytes = place.offset_bytes // PAGE_BYTES * PAGE_BYTES
    wanted_bytes = place.offset_bytes - start_bytes + place.bytes
    pages = _whole_pages(-(-wanted_bytes // PAGE_BYTES) * PAGE_BYTES)
    if _fill(place.path, pages, start_bytes) < wanted_bytes:
        return read_tensor(place)  # which says what is wrong with the file, if anything is
    return pages[wanted_bytes - place.bytes : wanted_bytes].view(dtype).view(place.shape)


def _whole_pages(size_bytes: int) -> Tensor:
    """uint8 [size_bytes] at the beginning of a page."""
    memory = torch.empty(size_bytes + PAGE_BYTES, dtype=torch.uint8)
    first = -memory.data_ptr() % PAGE_BYTES
    return memory[first : first + size_bytes]


def _fill(path: str, pages: Tensor, start_bytes: int) -> int:
    """How many bytes of the file there are in `pages`; none where the file system has no such reading."""
    buffer = pages.numpy().data
    filled = 0
    try:
        file = os.open(path, os.O_RDONLY | _DIRECT)
        try:
            while filled < len(buffer) and filled % PAGE_BYTES == 0:  # the end of the file is seldom that of a page
                count = read_at(file, buffer[filled:], start_bytes + filled)
                if not count:
                    break
                filled += count
        finally:
            os.close(file)
    except OSError:
        return 0
    return filled
