"""NVIDIA's GPUs by NVML: every figure asked for by itself, so that one that fails takes no other with it.

Names and units are those of NVML's API reference (nvml.h): memory in bytes, clocks in MHz, power in mW. An instance of
MIG is a device of its own, with its own handle and memory. What a process may use is what CUDA_VISIBLE_DEVICES leaves
(CUDA C++ programming guide, environment variables): indices, UUIDs or unambiguous beginnings of them; the list ends at
the first that is wrong; and with MIG one instance per process (MIG user guide, "CUDA device enumeration").
"""

import re
from collections.abc import Mapping
from typing import Any

from ..frozen import replace
from ..machine import Gpu, Mig, Pcie, Process
from .values import Unseen, plain_text, whole, why

MAX_GPUS = 1024
MAX_INSTANCES = 64
MAX_PROCESSES = 64
LEAST_BYTES = 64 << 20
MAX_BYTES = 64 << 40
NOT_SUPPORTED = 3  # NVML_ERROR_NOT_SUPPORTED
UUID = re.compile(r"(GPU|MIG)-[0-9A-Za-z/-]{1,96}", re.ASCII)
UNSET = object()


class Nvml:
    """The module `pynvml`, asked so that nothing raises: a failure is None, and a note of what and why."""

    def __init__(self, module: Any, unseen: Unseen) -> None:
        self.module, self.unseen, self.last_error = module, unseen, None

    def ask(self, what: str, where: str, function: str, *arguments: Any, quiet: tuple[int, ...] = ()) -> Any:
        """What the function gives; None where it fails, with a note unless the error's number is in `quiet`."""
        self.last_error: Exception | None = None
        try:
            return getattr(self.module, function)(*arguments)
        except Exception as error:  # NVMLError; or an older pynvml that lacks the function
            self.last_error = error
            if getattr(error, "value", None) not in quiet:
                self.unseen.add(what, f"NVML says {why(error)}", where)
            return None

    def sane(self, what: str, where: str, value: Any, low: int, high: int) -> int | None:
        """The value if it can be; a note where it cannot. None stays None."""
        if value is None:
            return None
        found = whole(value, low, high)
        if found is None:
            self.unseen.add(what, f"NVML gives {plain_text(repr(value), 40)}, which cannot be", where)
        return found

    def number(self, what: str, where: str, low: int, high: int, function: str, *arguments: Any) -> int | None:
        return self.sane(what, where, self.ask(what, where, function, *arguments), low, high)


def nvidia_gpus(
    module: Any, environment: Mapping[str, str], own_pid: int, unseen: Unseen
) -> tuple[tuple[Gpu, ...], dict[str, str]]:
    """All GPUs and MIG instances, which of them a process here may use, and the versions of the driver and CUDA."""
    nvml = Nvml(module, unseen)
    nvml.ask("NVIDIA GPUs", "", "nvmlInit")
    if nvml.last_error is not None:
        return (), {}
    try:
        drivers = _drivers(nvml)
        count = nvml.number("NVIDIA GPUs", "", 0, MAX_GPUS, "nvmlDeviceGetCount") or 0
        found = [gpu for index in range(count) for gpu in _with_instances(nvml, index, own_pid)]
    finally:
        nvml.ask("the end of NVML", "", "nvmlShutdown")
    return tuple(_seen_by_cuda(found, environment)), drivers


def _drivers(nvml: Nvml) -> dict[str, str]:
    found: dict[str, str] = {}
    driver = plain_text(nvml.ask("version of the NVIDIA driver", "", "nvmlSystemGetDriverVersion"), 40)
    if driver:
        found["nvidia"] = driver
    cuda = nvml.number("version of CUDA", "", 1000, 1_000_000, "nvmlSystemGetCudaDriverVersion")
    if cuda:
        found["cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
    return found


def _with_instances(nvml: Nvml, index: int, own_pid: int) -> list[Gpu]:
    """The GPU, and behind it the MIG instances that it is cut into."""
    where = f"GPU {index}"
    handle = nvml.ask("everything", where, "nvmlDeviceGetHandleByIndex", index)
    if nvml.last_error is not None:
        return []
    whole_gpu = _gpu(nvml, handle, index, where, own_pid)
    mode = nvml.ask("MIG mode", where, "nvmlDeviceGetMigMode", handle, quiet=(NOT_SUPPORTED,))
    if not isinstance(mode, list | tuple) or not mode or not whole(mode[0], 1, 1):
        return [replace(whole_gpu, mig_enabled=False if nvml.last_error is None else None)]
    most = nvml.number("MIG instances", where, 0, MAX_INSTANCES, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    parts = [_instance(nvml, handle, whole_gpu, place) for place in range(most)]
    return [replace(whole_gpu, mig_enabled=True), *(part for part in parts if part)]


def _gpu(nvml: Nvml, handle: Any, index: int, where: str, own_pid: int) -> Gpu:
    title = plain_text(nvml.ask("name", where, "nvmlDeviceGetName", handle)) or "NVIDIA GPU"
    kind, (total, used, free) = _memory(nvml, handle, where)
    capability = nvml.ask("compute capability", where, "nvmlDeviceGetCudaComputeCapability", handle)
    clocks = {
        (name, kind_of): _clock_hz(nvml, what, where, name, handle, kind_of)
        for what, name, kind_of in (
            ("clock", "nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            ("highest clock", "nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
            ("memory clock", "nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
            ("highest memory clock", "nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_MEM"),
        )
    }
    power_mw = nvml.number("power limit", where, 1000, 10**8, "nvmlDeviceGetEnforcedPowerLimit", handle)
    return Gpu(
        index=index,
        vendor="nvidia",
        title=title,
        kind=kind,
        memory_bytes=total,
        used_bytes=used,
        free_bytes=free,
        compute_capability=_capability(nvml, where, capability),
        uuid=_uuid(nvml, handle, where),
        clock_hz=clocks["nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"],
        max_clock_hz=clocks["nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"],
        memory_clock_hz=clocks["nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"],
        max_memory_clock_hz=clocks["nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_MEM"],
        memory_bus_bits=nvml.number(
            "width of the memory bus", where, 8, 1 << 17, "nvmlDeviceGetMemoryBusWidth", handle
        ),
        power_limit_w=power_mw / 1000 if power_mw else None,
        pcie=_pcie(nvml, handle, where),
        processes=_processes(nvml, handle, where, own_pid),
    )


def _memory(nvml: Nvml, handle: Any, where: str) -> tuple[str, tuple[int | None, int | None, int | None]]:
    """("discrete", (total, used, free)); "unified" where NVML says that it has no figure of its own: GB10, Jetson."""
    memory = nvml.ask("memory", where, "nvmlDeviceGetMemoryInfo", handle, quiet=(NOT_SUPPORTED,))
    if memory is None:
        supported = getattr(nvml.last_error, "value", None) != NOT_SUPPORTED
        return ("discrete" if supported else "unified"), (None, None, None)
    total = nvml.sane("memory", where, getattr(memory, "total", UNSET), LEAST_BYTES, MAX_BYTES)
    if total is None:
        return "discrete", (None, None, None)
    free = nvml.sane("free memory", where, getattr(memory, "free", UNSET), 0, total)
    used = whole(getattr(memory, "used", None), 0, total)
    if used is None and free is not None:
        used = total - free
    return "discrete", (total, used, free)


def _clock_hz(nvml: Nvml, what: str, where: str, function: str, handle: Any, kind: str) -> int | None:
    which = getattr(nvml.module, kind, None)
    mhz = nvml.ask(what, where, function, handle, which, quiet=(NOT_SUPPORTED,))
    found = nvml.sane(what, where, mhz, 0, 100_000)
    return found * 1_000_000 if found else None


def _capability(nvml: Nvml, where: str, found: Any) -> str | None:
    if found is None:
        return None
    pair = list(found) if isinstance(found, list | tuple) else []
    if len(pair) == 2 and whole(pair[0], 1, 99) is not None and whole(pair[1], 0, 9) is not None:
        return f"{pair[0]}.{pair[1]}"
    nvml.unseen.add("compute capability", f"NVML gives {plain_text(repr(found), 40)}, which cannot be", where)
    return None


def _uuid(nvml: Nvml, handle: Any, where: str) -> str | None:
    found = plain_text(nvml.ask("UUID", where, "nvmlDeviceGetUUID", handle))
    return found if found and UUID.fullmatch(found) else None


def _pcie(nvml: Nvml, handle: Any, where: str) -> Pcie | None:
    def figure(what: str, high: int, function: str) -> int | None:
        found = nvml.ask(what, where, function, handle, quiet=(NOT_SUPPORTED,))
        return nvml.sane(what, where, found, 0, high) or None

    found = Pcie(
        figure("PCIe generation", 15, "nvmlDeviceGetCurrPcieLinkGeneration"),
        figure("PCIe lanes", 64, "nvmlDeviceGetCurrPcieLinkWidth"),
        figure("highest PCIe generation", 15, "nvmlDeviceGetMaxPcieLinkGeneration"),
        figure("most PCIe lanes", 64, "nvmlDeviceGetMaxPcieLinkWidth"),
    )
    return found if any((found.generation, found.lanes, found.max_generation, found.max_lanes)) else None


def _processes(nvml: Nvml, handle: Any, where: str, own_pid: int) -> tuple[Process, ...]:
    found: dict[int, Process] = {}
    for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        running = nvml.ask("processes", where, function, handle, quiet=(NOT_SUPPORTED,))
        for one in list(running)[:MAX_PROCESSES] if isinstance(running, list | tuple) else ():
            pid = whole(getattr(one, "pid", None), 1, 1 << 32)
            if pid is None or pid == own_pid:
                continue
            memory = whole(getattr(one, "usedGpuMemory", None), 0, MAX_BYTES)
            found[pid] = Process(pid, _program(nvml, pid), memory)
    return tuple(found.values())


def _program(nvml: Nvml, pid: int) -> str | None:
    """The program's name without folder and arguments, which are nobody's business."""
    told = nvml.ask("names of processes", "", "nvmlSystemGetProcessName", pid)
    path = (plain_text(told, 300) or "").partition(" ")[0]
    return re.split(r"[/\\]", path)[-1][:40] or None


def _instance(nvml: Nvml, handle: Any, parent: Gpu, place: int) -> Gpu | None:
    """The MIG instance at that place; None where the place is empty."""
    where = f"MIG instance {place} of GPU {parent.index}"
    try:
        own = nvml.module.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
    except Exception as error:  # NVML_ERROR_NOT_FOUND: most places are empty
        if "notfound" not in type(error).__name__.lower() and "not found" not in str(error).lower():
            nvml.unseen.add("MIG instances", f"NVML says {why(error)}", f"GPU {parent.index}")
        return None
    _, (total, used, free) = _memory(nvml, own, where)
    told = nvml.ask("shares", where, "nvmlDeviceGetAttributes", own)
    compute = whole(getattr(told, "gpuInstanceSliceCount", None), 1, 7)
    eighths = min(8, max(1, round(8 * total / parent.memory_bytes))) if total and parent.memory_bytes else None
    title = plain_text(nvml.ask("name", where, "nvmlDeviceGetName", own)) or f"{parent.title} MIG"
    return replace(
        parent,
        title=title if "MIG" in title else f"{title} MIG",
        memory_bytes=total,
        used_bytes=used,
        free_bytes=free,
        uuid=_uuid(nvml, own, where),
        mig_enabled=None,
        mig=Mig(parent.index, compute, eighths),
        processes=(),
    )


def _seen_by_cuda(found: list[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """The same, each with whether CUDA gives it to a process started here, those in the order that CUDA gives them."""
    order = _cuda_order(found, environment.get("CUDA_VISIBLE_DEVICES"))
    first_part = next((gpu for gpu in order if gpu.mig), None)
    if first_part is not None:  # one instance for a process, and no whole GPU beside it
        order = [first_part]
    rest = [gpu for gpu in found if not any(gpu is one for one in order)]
    return [replace(gpu, visible=True) for gpu in order] + [replace(gpu, visible=False) for gpu in rest]


def _cuda_order(found: list[Gpu], asked: str | None) -> list[Gpu]:
    """What CUDA_VISIBLE_DEVICES names, in its order; a GPU in MIG mode stands for its first instance."""
    gpus = [gpu for gpu in found if gpu.mig is None]
    if asked is None:
        named: list[Gpu] = list(gpus)
    else:
        named = []
        for word in asked[:65536].split(","):
            match = _named(found, gpus, word.strip())
            if match is None:
                break
            if any(match is one for one in named):  # CUDA gives nothing at all then
                return []
            named.append(match)
    return [gpu for gpu in (_first_instance(one, found) for one in named) if gpu is not None]


def _first_instance(gpu: Gpu, found: list[Gpu]) -> Gpu | None:
    if not gpu.mig_enabled or gpu.mig:
        return gpu
    return next((part for part in found if part.mig and part.mig.gpu_index == gpu.index), None)


def _named(found: list[Gpu], gpus: list[Gpu], word: str) -> Gpu | None:
    if word.isascii() and word.isdigit():
        return next((gpu for gpu in gpus if gpu.index == int(word[:9])), None)
    if not word.upper().startswith(("GPU-", "MIG-")):
        return None
    matches = [gpu for gpu in found if gpu.uuid and gpu.uuid.lower().startswith(word.lower())]
    exact = [gpu for gpu in matches if gpu.uuid and gpu.uuid.lower() == word.lower()]
    matches = exact or matches
    return matches[0] if len(matches) == 1 else None
