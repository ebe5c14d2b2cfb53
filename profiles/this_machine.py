"""The machine that we run on, as devices: what NVML says, what macOS says, else the CPU and its memory.

A device that the catalog has keeps the catalog's figures and gets the memory that is free now; one that it does not
have gets what the driver tells. Nothing here raises: a machine that cannot be asked is a CPU box.
"""

import os
import sys
from collections.abc import Iterable
from datetime import date
from typing import Any

from .device import Device
from .device_names import devices
from .frozen import replace

GIB = 1 << 30
MEMORY_TOLERANCE = 0.08  # drivers keep some of what is sold back, and 80 GB is sometimes 80 GiB
NOISE = frozenset({"nvidia", "geforce", "tesla", "gpu", "generation", "edition", "hbm2", "hbm2e", "hbm3", "hbm3e"})
VARIANTS = frozenset({"ti", "super", "laptop", "max", "pro", "ultra", "ada", "blackwell", "pcie", "nvl"})
UNKNOWN_BANDWIDTH = 0  # not measured


def this_machine() -> tuple[Device, ...]:
    """One `Device` per accelerator, or one for the CPU. `usable_bytes` is what is free at this moment."""
    for found in (_nvidia, _apple):
        try:
            here = found()
        except Exception:  # a driver, its library or a tool that is not there or not well is no reason to fail
            here = ()
        if here:
            return here
    return (_cpu(),)


def matching(title: str, memory_bytes: int, catalog: Iterable[Device]) -> Device | None:
    """The device of the catalog that a driver calls `title`: the same model and variant, the nearest other words.

    The memory tells cards of one name apart. What a catalog title has in parentheses may be part of the name or not.
    """
    wanted = _words(title)
    best: tuple[int, float, Device] | None = None
    for device in catalog:
        off = abs(device.memory_bytes / max(memory_bytes, 1) - 1)
        if off > MEMORY_TOLERANCE:
            continue
        for words in (_words(device.title), _words(device.title.partition("(")[0])):
            distance = len(words ^ wanted)
            if words & wanted and _model(words) == _model(wanted) and (best is None or (distance, off) < best[:2]):
                best = distance, off, device
    return best[2] if best else None


def _words(title: str) -> frozenset[str]:
    """Words that tell devices apart: no vendor, no memory size, and no SXM, which is what a name without a form is."""
    spaced = "".join(char if char.isalnum() else " " for char in f"{title.lower()} ").replace(" gb ", "gb ")
    return frozenset(word for word in spaced.split() if word not in NOISE and not _is_size(word) and word[:3] != "sxm")


def _is_size(word: str) -> bool:
    return word.endswith(("gb", "g")) and word.rstrip("gb").isdigit()


def _model(words: frozenset[str]) -> frozenset[str]:
    """The words that must agree: model numbers, and what makes another chip of the same number."""
    return frozenset(word for word in words if word in VARIANTS or any(char.isdigit() for char in word))


def _nvidia() -> tuple[Device, ...]:
    import pynvml

    pynvml.nvmlInit()
    try:
        return tuple(_nvidia_device(pynvml, index) for index in _visible(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _visible(count: int) -> list[int]:
    """Indices that CUDA_VISIBLE_DEVICES leaves; all of them where it holds anything but numbers."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return list(range(count))
    words = [word.strip() for word in asked.split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() for word in words):
        return [] if words == ["-1"] else list(range(count))
    return [int(word) for word in words if int(word) < count]


def _nvidia_device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    title = _text(nvml.nvmlDeviceGetName(handle))
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        kind, total_bytes, free_bytes = "discrete", int(memory.total), int(memory.free)
    except nvml.NVMLError:  # one memory for CPU and GPU (DGX Spark, Jetson): NVML has no figure of its own
        kind, (total_bytes, free_bytes) = "unified", _host_memory()
    known = matching(title, total_bytes, [device for device in devices() if device.vendor == "nvidia"])
    if known:
        measured = {**known.measured, "free_bytes": free_bytes, "total_bytes": total_bytes}
        return replace(known, usable_bytes=min(known.usable_bytes, free_bytes), measured=measured)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        name="-".join(sorted(_words(title))) or "nvidia-gpu",
        title=title,
        vendor="nvidia",
        architecture=f"sm{major}{minor}",
        kind=kind,
        memory_bytes=total_bytes,
        usable_bytes=free_bytes,
        memory_bandwidth_bytes_per_s=_nvidia_bandwidth(nvml, handle),
        flops_per_s={},
        source="NVML",
        checked=date.today().isoformat(),
        compute_capability=f"{major}.{minor}",
    )


def _nvidia_bandwidth(nvml: Any, handle: Any) -> int:
    try:
        clock_mhz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
        return clock_mhz * 1_000_000 * 2 * nvml.nvmlDeviceGetMemoryBusWidth(handle) // 8
    except nvml.NVMLError:
        return UNKNOWN_BANDWIDTH


def _apple() -> tuple[Device, ...]:
    if sys.platform != "darwin":
        return ()
    title = _sysctl("machdep.cpu.brand_string")
    memory_bytes = int(_sysctl("hw.memsize"))
    known = matching(title, memory_bytes, [device for device in devices() if device.vendor == "apple"])
    if known is None:
        return ()
    limit_mib = int(_sysctl("iogpu.wired_limit_mb") or 0)
    return (replace(known, usable_bytes=limit_mib << 20) if limit_mib else known,)


def _sysctl(name: str) -> str:
    from subprocess import run

    return run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()


def _cpu() -> Device:
    from platform import machine

    total_bytes, free_bytes = _host_memory()
    return Device(
        name="this-cpu",
        title=f"this machine's CPU ({machine() or 'unknown'})",
        vendor="cpu",
        architecture=machine() or "unknown",
        kind="cpu",
        memory_bytes=total_bytes,
        usable_bytes=free_bytes,
        memory_bandwidth_bytes_per_s=UNKNOWN_BANDWIDTH,
        flops_per_s={},
        source="the operating system",
        checked=date.today().isoformat(),
    )


def _host_memory() -> tuple[int, int]:
    """Total and available bytes of the host, within what a container may use."""
    total_bytes, free_bytes = _meminfo() or _sysconf()
    limit_bytes = _number("/sys/fs/cgroup/memory.max")
    if limit_bytes and limit_bytes < total_bytes:
        used_bytes = _number("/sys/fs/cgroup/memory.current") or 0
        total_bytes, free_bytes = limit_bytes, max(0, min(free_bytes, limit_bytes - used_bytes))
    return total_bytes, free_bytes


def _meminfo() -> tuple[int, int] | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            told = dict(line.split(":", 1) for line in file)
        return tuple(int(told[field].split()[0]) << 10 for field in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _sysconf() -> tuple[int, int]:
    try:
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total_bytes = _windows_memory()
    return total_bytes, total_bytes


def _windows_memory() -> int:
    try:
        from ctypes import byref, c_ulonglong, windll  # type: ignore[attr-defined]

        installed_kib = c_ulonglong()
        windll.kernel32.GetPhysicallyInstalledSystemMemory(byref(installed_kib))
        return installed_kib.value << 10
    except (ImportError, AttributeError, OSError):
        return 0


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
