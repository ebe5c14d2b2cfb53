"""The machine that we run on, as devices: what `--gpu auto` plans with.

`probe()` says what is here; a GPU that the catalog has keeps the catalog's figures and gets the memory that is free now
(what other processes hold is not), and one that it does not have gets what the driver tells. Without a GPU it is the
CPU, with the memory that its control groups leave. Nothing here raises: a machine that cannot be asked is a CPU box.
QWENFIT_PROFILE=here.yaml adds what `qwen-plan probe --measure --output here.yaml` measured.
"""

import os
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any, NamedTuple

from .device import Device
from .device_names import devices
from .errors import BadInput
from .frozen import replace
from .machine import Gpu, Machine, machine_record

GIB = 1 << 30
MEMORY_TOLERANCE = 0.08  # drivers keep some of what is sold back, and 80 GB is sometimes 80 GiB
NOISE = frozenset({"nvidia", "geforce", "tesla", "gpu", "generation", "edition", "hbm2", "hbm2e", "hbm3", "hbm3e"})
VARIANTS = frozenset({"ti", "super", "laptop", "max", "pro", "ultra", "ada", "blackwell", "pcie", "nvl"})
UNKNOWN_BANDWIDTH = 0  # not measured
LEAST_USABLE_BYTES = 64 << 20  # of which a device file speaks; nothing fits there anyway
COMPUTE_SLICES, MEMORY_SLICES = 7, 8  # of a GPU in MIG mode (NVIDIA, MIG user guide)
# Bytes per second and lane, one direction, by generation of PCIe: transfers times their encoding.
LANE_BYTES_PER_S = {1: 250e6, 2: 500e6, 3: 984.6e6, 4: 1969e6, 5: 3938e6, 6: 7563e6}


class Here(NamedTuple):
    """A device of this machine, and the GPU that it is; None: the CPU."""

    device: Device
    gpu: Gpu | None


def this_machine() -> tuple[Device, ...]:
    """One `Device` per accelerator, or one for the CPU. `usable_bytes` is what is free at this moment.

    Devices that are the same in everything are one object, as they are of a catalog name. `BadInput` only for a
    QWENFIT_PROFILE that cannot be used.
    """
    from .probe import probe

    here = tuple(one.device for one in devices_here(probe()))
    profile = os.environ.get("QWENFIT_PROFILE")
    return with_profile(here, profile) if profile else here


def machine_json(machine: Machine | None = None) -> dict[str, Any]:
    """This machine, or that one, as verification files and receipts carry it (see `machine_record`)."""
    from .probe import probe

    return machine_record(machine or probe())


def free_host_bytes() -> int:
    """Memory of the host that this process can take now: /proc/meminfo, within its control groups. 0: not known."""
    from .probe import probe

    return probe(nvml=None).ram.usable_bytes


def devices_here(machine: Machine) -> tuple[Here, ...]:
    """What `--gpu auto` plans with: GPUs that a process may use, NVIDIA's before AMD's and Apple's; else the CPU."""
    for vendor, made in (("nvidia", _nvidia), ("amd", _amd), ("apple", _apple)):
        gpus = [gpu for gpu in machine.gpus if gpu.vendor == vendor and gpu.visible]
        found = [Here(device, gpu) for gpu in gpus if (device := made(gpu, machine)) is not None]
        if found:
            return _shared(found)
    return (Here(_cpu(machine), None),)


def with_profile(here: tuple[Device, ...], path: str) -> tuple[Device, ...]:
    """The devices with the speeds that the file at `path` has of them; their memory stays what is free now.

    `BadInput` where the file cannot be read or is about other devices.
    """
    from .box import devices_of

    measured = {(one.name, one.title): one for one in devices_of(path)}
    if not any((one.name, one.title) in measured for one in here):
        raise BadInput(
            f"QWENFIT_PROFILE={path}: none of its devices is here ({', '.join(one.name for one in here)}): "
            "write it anew with `qwen-plan probe --measure --output FILE`"
        )
    changed: dict[Device, Device] = {}
    for one in here:
        found = measured.get((one.name, one.title))
        if found is not None and one not in changed:
            changed[one] = replace(
                one,
                memory_bandwidth_bytes_per_s=found.memory_bandwidth_bytes_per_s,
                flops_per_s=found.flops_per_s,
                host_link_bytes_per_s=found.host_link_bytes_per_s,
                measured={**found.measured, **one.measured},
            )
    return tuple(changed.get(one, one) for one in here)


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


def _nvidia(gpu: Gpu, machine: Machine) -> Device | None:
    whole = next((one for one in machine.gpus if gpu.mig and one.index == gpu.mig.gpu_index and not one.mig), gpu)
    catalog = [device for device in devices() if device.vendor == "nvidia"]
    total_bytes, free_bytes = whole.memory_bytes, gpu.free_bytes
    if gpu.kind == "unified":
        total_bytes, free_bytes = machine.ram.usable_total_bytes or None, machine.ram.usable_bytes
    if total_bytes is None:
        known = _alone_in_name(whole.title, catalog)
        return _seen(known, known.usable_bytes, "as if idle: its memory could not be seen", gpu) if known else None
    known = matching(whole.title, total_bytes, catalog) or _unknown_nvidia(whole, total_bytes)
    if gpu.mig:
        known, total_bytes = _part(known, gpu, total_bytes), gpu.memory_bytes or total_bytes
    if free_bytes is None:
        return _seen(known, known.usable_bytes, "as if idle: what is free could not be seen", gpu, total_bytes)
    return _seen(known, min(known.usable_bytes, free_bytes), _taken(gpu), gpu, total_bytes, free_bytes)


def _alone_in_name(title: str, catalog: list[Device]) -> Device | None:
    """The one device of that name, where its memory is not known."""
    found = {known.name: known for one in catalog if (known := matching(title, one.memory_bytes, catalog))}
    return next(iter(found.values())) if len(found) == 1 else None


def _unknown_nvidia(gpu: Gpu, total_bytes: int) -> Device:
    """A GPU that no catalog has. Two transfers per clock of the memory, as NVML counts its clocks."""
    bandwidth = UNKNOWN_BANDWIDTH
    if gpu.max_memory_clock_hz and gpu.memory_bus_bits:
        bandwidth = min(gpu.max_memory_clock_hz * 2 * gpu.memory_bus_bits // 8, 10**15)
    capability = gpu.compute_capability
    return Device(
        name=_name(gpu.title),
        title=gpu.title,
        vendor="nvidia",
        architecture=f"sm{capability.replace('.', '')}" if capability else "unknown",
        kind=gpu.kind,
        memory_bytes=total_bytes,
        usable_bytes=total_bytes,
        memory_bandwidth_bytes_per_s=bandwidth if bandwidth >= 10**9 else UNKNOWN_BANDWIDTH,
        flops_per_s={},
        source="NVML",
        checked=date.today().isoformat(),
        compute_capability=capability,
        power_w=round(gpu.power_limit_w) if gpu.power_limit_w else None,
    )


def _part(known: Device, gpu: Gpu, total_bytes: int) -> Device:
    """The share of a GPU that a MIG instance is: eighths of the memory and its bandwidth, sevenths of the rest."""
    assert gpu.mig is not None
    own_bytes = gpu.memory_bytes or total_bytes
    memory = (gpu.mig.memory_slices or MEMORY_SLICES) / MEMORY_SLICES
    compute = (gpu.mig.compute_slices or COMPUTE_SLICES) / COMPUTE_SLICES

    def share(rates: Mapping[str, int]) -> dict[str, int]:
        return {dtype: int(rate * compute) for dtype, rate in rates.items()}

    return replace(
        known,
        name=f"{known.name}-mig-{gpu.mig.compute_slices or 'x'}g.{round(own_bytes / GIB)}gb",
        title=gpu.title,
        memory_bytes=own_bytes,
        usable_bytes=own_bytes,
        memory_bandwidth_bytes_per_s=int(known.memory_bandwidth_bytes_per_s * memory),
        flops_per_s=share(known.flops_per_s),
        sparse_flops_per_s=share(known.sparse_flops_per_s),
        interconnect=None,
        interconnect_bytes_per_s=None,
        measured={},
        power_w=None,
        source=f"NVML; {gpu.mig.memory_slices or '?'} of 8 memory slices, {gpu.mig.compute_slices or '?'} of 7 compute "
        f"slices of {known.name}",
    )


def _amd(gpu: Gpu, machine: Machine) -> Device | None:
    """By its target and its memory, which tell most apart; a small GPU inside a CPU is none to plan for."""
    catalog = [device for device in devices() if device.vendor == "amd"]
    alike = [device for device in catalog if device.compute_capability in (gpu.compute_capability, None)]
    if gpu.kind == "unified":
        sold = max(machine.ram.total_bytes or 0, gpu.memory_bytes or 0)
        larger = [one for one in alike if one.kind == "unified" and one.memory_bytes >= sold]
        known = min(larger, key=lambda one: one.memory_bytes, default=None)
        if known is None or gpu.free_bytes is None or gpu.memory_bytes is None:
            return None
        own_bytes = gpu.memory_bytes - (gpu.shared_bytes or 0)
        free_bytes = min(gpu.free_bytes, own_bytes + machine.ram.usable_bytes)
        return _seen(known, free_bytes, _taken(gpu), gpu, gpu.memory_bytes, free_bytes)
    if gpu.memory_bytes is None:
        return None
    near = [one for one in alike if abs(one.memory_bytes / gpu.memory_bytes - 1) <= MEMORY_TOLERANCE]
    known = near[0] if len(near) == 1 else matching(gpu.title, gpu.memory_bytes, near or catalog)
    known = known or _unknown_amd(gpu, gpu.memory_bytes)
    if gpu.free_bytes is None:
        return _seen(known, known.usable_bytes, "as if idle: what is free could not be seen", gpu, gpu.memory_bytes)
    return _seen(known, min(known.usable_bytes, gpu.free_bytes), _taken(gpu), gpu, gpu.memory_bytes, gpu.free_bytes)


def _unknown_amd(gpu: Gpu, total_bytes: int) -> Device:
    return Device(
        name=_name(gpu.title),
        title=gpu.title,
        vendor="amd",
        architecture=gpu.compute_capability or "unknown",
        kind="discrete",
        memory_bytes=total_bytes,
        usable_bytes=total_bytes,
        memory_bandwidth_bytes_per_s=UNKNOWN_BANDWIDTH,
        flops_per_s={},
        source="the amdgpu driver",
        checked=date.today().isoformat(),
        compute_capability=gpu.compute_capability,
        power_w=round(gpu.power_limit_w) if gpu.power_limit_w else None,
    )


def _apple(gpu: Gpu, machine: Machine) -> Device | None:
    memory_bytes = gpu.memory_bytes or 0
    known = matching(gpu.title, memory_bytes, [device for device in devices() if device.vendor == "apple"])
    if known is None or gpu.free_bytes is None:
        return known
    return replace(known, usable_bytes=min(gpu.free_bytes, known.memory_bytes), usable_source="iogpu.wired_limit_mb")


def _cpu(machine: Machine) -> Device:
    from platform import machine as instruction_set

    cpu, ram = machine.cpu, machine.ram
    architecture = cpu.architecture if cpu.architecture != "unknown" else instruction_set() or "unknown"
    limited = ram.limit_bytes is not None
    return Device(
        name="this-cpu",
        title=cpu.title or f"this machine's CPU ({architecture})",
        vendor="cpu",
        architecture=cpu.microarchitecture or architecture,
        kind="cpu",
        memory_bytes=ram.usable_total_bytes,
        usable_bytes=ram.usable_bytes,
        memory_bandwidth_bytes_per_s=UNKNOWN_BANDWIDTH,
        flops_per_s={},
        source="the operating system",
        checked=date.today().isoformat(),
        usable_source=f"free now{', within the limit of its control groups' if limited else ''}",
    )


def _seen(
    known: Device,
    usable_bytes: int,
    usable_source: str,
    gpu: Gpu,
    total_bytes: int | None = None,
    free_bytes: int | None = None,
) -> Device:
    """A device with what is free now, what the driver told, and the link of the slot that it sits in."""
    told = {"total_bytes": total_bytes, "free_bytes": free_bytes}
    by = "NVML" if gpu.vendor == "nvidia" else "the amdgpu driver"
    on = date.today().isoformat()
    measured = {
        name: {"value": value, "by": by, "on": on, "source": "this machine"} for name, value in told.items() if value
    }
    return replace(
        known,
        usable_bytes=max(LEAST_USABLE_BYTES, usable_bytes),
        usable_source=usable_source,
        host_link_bytes_per_s=_host_link(known, gpu),
        measured={**known.measured, **measured},
    )


def _taken(gpu: Gpu) -> str:
    """Where the free memory comes from, and who has the rest."""
    if not gpu.processes:
        return "free now"
    count = len(gpu.processes)
    held = sum(process.memory_bytes or 0 for process in gpu.processes)
    amount = f"; {held / GIB:.2f} GiB are held by" if held else "; beside"
    return f"free now{amount} {count} other process{'es' if count > 1 else ''}"


def _host_link(known: Device, gpu: Gpu) -> int | None:
    """The vendor's link, or that of the slot where it has fewer lanes or an older generation."""
    slot = gpu.pcie
    if slot is None or slot.max_generation not in LANE_BYTES_PER_S or not slot.max_lanes:
        return known.host_link_bytes_per_s
    here = int(LANE_BYTES_PER_S[slot.max_generation] * slot.max_lanes)
    return min(known.host_link_bytes_per_s or here, here)


def _name(title: str) -> str:
    """A name as device files take it, from what a driver says."""
    words = "".join(char if char.isascii() and char.isalnum() else " " for char in title.lower()).split()
    return "-".join(words)[:64].strip("-") or "gpu"


def _shared(found: list[Here]) -> tuple[Here, ...]:
    """The same, with one object for devices that are equal in every figure: engines ask whether ranks are alike."""
    kept: dict[str, Device] = {}
    return tuple(Here(kept.setdefault(repr(one.device), one.device), one.gpu) for one in found)
