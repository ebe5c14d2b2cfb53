"""Memory for weights in huge pages, where the system has them.

A weight is read once per token from its first byte to its last, and every page of 4 KiB costs the processor a walk
through the page tables; of 2 MiB pages there are 512 times fewer. On Zen 4 a core reads int4 weights 1.05 to 1.13 times
as fast (docs/cpu.md). Linux gives them to who asks (`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or
`always`); elsewhere, or where it says no, this is memory as any other.
"""

import contextlib
import mmap

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 256 << 20  # address space; memory is taken page by page as it is written
_ALIGNMENT = 64


class HugePages:
    """Room for tensors, one behind the other in large pieces of memory, each of which lives as long as one of its
    tensors. At most one huge page of a piece is taken beyond what is in use."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)

    def room(self, bytes: int) -> Tensor:
        """uint8 [bytes], unwritten, at a multiple of 64 bytes."""
        taken = -(-bytes // _ALIGNMENT) * _ALIGNMENT
        if taken > _CHUNK_BYTES:
            return _piece_of(taken)[:bytes]
        if taken > self._piece.numel():
            self._piece = _piece_of(_CHUNK_BYTES)
        room, self._piece = self._piece[:bytes], self._piece[taken:]
        return room


def _piece_of(bytes: int) -> Tensor:
    """uint8 [bytes] from the beginning of a huge page on."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, bytes + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _PAGE_BYTES :][:bytes]
