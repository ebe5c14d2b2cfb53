"""Where malloc takes a CPU's tensors from, on Linux with glibc: memory as planned, or half as much again.

glibc gives a block above a threshold pages of its own, which go back to the system when it is freed, and takes smaller
ones from a heap that shrinks only at its end. The threshold starts at 128 KiB and rises, up to 32 MiB, to the size of
whatever is freed. So a loader that frees its temporaries gets its weights from the heap, with holes between them:
57 MB of holes in 222 MB of int4 weights, and 483 MB in 835 MB of bf16 in every second run. With a fixed threshold it
was 16 to 18 MB: the largest matrices twice (measured, torch 2.13, glibc 2.36).

Generation is the other way round: every layer of every chunk frees and takes the same few blocks again, and the system
would have to zero pages of their own each time: 340,000 page faults and a fifth of the CPU time of three prompts of 512
tokens (0.8B, int4). There the heap keeps them: it is the arena of a CPU.

Other systems and C libraries: nothing happens, for there is nothing to set.
"""

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PAGES_BYTES = 128 << 10
_HEAP_BYTES = 32 << 20  # the most that glibc takes for a threshold (64-bit)
_KEPT_BYTES = (1 << 31) - 1


@contextmanager
def weights_in_pages() -> Iterator[None]:
    """Inside: blocks of 128 KiB and more have pages of their own, for weights stay and what they are made from goes.

    Afterwards: blocks of up to 32 MiB come from the heap, which is not given back, for scratch comes and goes.
    """
    _set(_M_MMAP_THRESHOLD, _PAGES_BYTES)
    try:
        yield
    finally:
        _set(_M_MMAP_THRESHOLD, _HEAP_BYTES)
        _set(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _set(parameter: int, value: int) -> None:
    mallopt = _mallopt()
    if mallopt is not None:
        mallopt(parameter, value)


@functools.cache
def _mallopt() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
