"""Apple's GPU by sysctl: the chip's name, the memory that it shares with the CPU, and the limit of what it may wire.

hw.memsize and machdep.cpu.brand_string are sysctl(3)'s; iogpu.wired_limit_mb is the driver's, 0 where its
default holds.
"""

from collections.abc import Callable

from ..machine import Gpu
from .values import Unseen, parsed, plain_text, why

LEAST_BYTES = 1 << 30
MAX_BYTES = 64 << 40


def apple_gpus(sysctl: Callable[[str], str], unseen: Unseen) -> tuple[tuple[Gpu, ...], int | None]:
    """The GPU of a Mac with Apple's own chip, and the bytes that it may wire where somebody set that; () on an Intel
    Mac."""
    try:
        title = plain_text(sysctl("machdep.cpu.brand_string"))
        memory_bytes = parsed(sysctl("hw.memsize"), LEAST_BYTES, MAX_BYTES)
    except Exception as error:  # no sysctl, or a sandbox that forbids it
        unseen.add("Apple's GPU", f"sysctl: {why(error)}")
        return (), None
    if not title or not title.startswith("Apple"):
        unseen.add("Apple's GPU", "the CPU is not Apple's own, and other GPUs of Macs are not asked")
        return (), None
    if memory_bytes is None:
        unseen.add("memory", "sysctl hw.memsize gives nothing that can be", title)
    try:
        limit_mib = parsed(sysctl("iogpu.wired_limit_mb"), 1, MAX_BYTES >> 20)
    except Exception:  # before macOS 14 there is no such name
        limit_mib = None
    gpu = Gpu(0, "apple", title, "unified", memory_bytes)
    return (gpu,), limit_mib << 20 if limit_mib else None
