"""A machine as its drivers and its operating system tell it: what `qwen-plan probe` found, and what it could not see.

Plain values; `profiles/probe/` fills them, one file per source. None: not seen, and `unseen` has a sentence about it
(or the thing is not there at all: a CPU without NUMA nodes, a GPU without PCIe). Nothing here names the machine, its
user or a path; the UUIDs of GPUs do tell it apart, so `machine_record` leaves them out of what others get to read.
"""

import re
from collections.abc import Mapping
from typing import Any

from .frozen import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Process:
    """Somebody else's process on a GPU. `name` is that of the program, without its folder and its arguments."""

    pid: int
    name: str | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Pcie:
    """The slot: generation and lanes as they run now (idle ones slow down), and the most that card and slot do."""

    generation: int | None
    lanes: int | None
    max_generation: int | None
    max_lanes: int | None


@dataclass(frozen=True, slots=True)
class Mig:
    """An instance of NVIDIA's MIG: the GPU it is part of, and its share of compute (sevenths) and memory (eighths)."""

    gpu_index: int
    compute_slices: int | None
    memory_slices: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG instance of one. `index`: in the driver's order; `visible`: a process started here may use it."""

    index: int
    vendor: str  # nvidia, amd, apple
    title: str
    kind: str = "discrete"  # "unified": its memory is the host's
    memory_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None
    shared_bytes: int | None = None  # of memory_bytes, what an APU's driver may take of the host's memory
    compute_capability: str | None = None  # "8.6", "gfx1100"
    uuid: str | None = None
    clock_hz: int | None = None
    max_clock_hz: int | None = None
    memory_clock_hz: int | None = None
    max_memory_clock_hz: int | None = None
    memory_bus_bits: int | None = None
    power_limit_w: float | None = None
    pcie: Pcie | None = None
    mig_enabled: bool | None = None
    mig: Mig | None = None
    processes: tuple[Process, ...] = ()
    visible: bool = True


@dataclass(frozen=True, slots=True)
class NumaNode:
    node: int
    cpus: int  # logical ones
    memory_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class Cpu:
    """`cores`: physical ones that this process may run on; `cpus`: logical ones; `quota_cpus`: CPU time that its
    cgroups grant, in CPUs."""

    title: str | None
    architecture: str
    online_cpus: int | None = None
    cpus: int | None = None
    cores: int | None = None
    sockets: int | None = None
    quota_cpus: float | None = None
    features: tuple[str, ...] = ()
    numa: tuple[NumaNode, ...] = ()
    board: str | None = None
    microarchitecture: str | None = None  # as profiles/cpu.yaml calls it: zen4, cascade-lake, neoverse-v2

    @property
    def threads(self) -> int:
        """Threads that work at a time without standing in each other's way: cores, within the quota."""
        cores = self.cores or self.cpus or self.online_cpus or 1
        return max(1, min(cores, int(self.quota_cpus + 0.5))) if self.quota_cpus else cores


@dataclass(frozen=True, slots=True)
class Ram:
    """`total_bytes` and `available_bytes` of the host, `limit_bytes` and `limit_free_bytes` of its cgroups."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    limit_bytes: int | None = None
    limit_free_bytes: int | None = None
    swap_free_bytes: int | None = None

    @property
    def usable_total_bytes(self) -> int:
        """What this process could ever have: the host's memory or the cgroups' limit."""
        return min((amount for amount in (self.total_bytes, self.limit_bytes) if amount is not None), default=0)

    @property
    def usable_bytes(self) -> int:
        """What this process can take now; the whole where nobody says what is free."""
        amounts = (self.available_bytes, self.limit_free_bytes, self.usable_total_bytes)
        return min(amount for amount in amounts if amount is not None)


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system under a place that matters, by what it is for."""

    place: str  # "hub cache", "current folder"
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class System:
    name: str  # Debian GNU/Linux 12 (bookworm), macOS 26.1
    kernel: str | None
    python: str
    container: tuple[str, ...] = ()  # what hints at one: docker, podman, kubernetes, lxc, wsl; "virtual machine"


@dataclass(frozen=True, slots=True)
class Machine:
    system: System
    cpu: Cpu
    ram: Ram
    disks: tuple[Disk, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    drivers: Mapping[str, str] = field(default_factory=dict)  # nvidia, cuda, amdgpu
    notes: tuple[str, ...] = ()  # what somebody who plans should know
    unseen: tuple[str, ...] = ()  # what could not be seen, and why: a sentence each

    def to_json(self) -> dict[str, Any]:
        """Everything, with the unit in the key."""
        return _plain(self)


def machine_record(machine: Machine) -> dict[str, Any]:
    """The machine as verification files and receipts carry it: enough to compare figures, and nobody's name.

    No name of the host or of a user, no path, no serial number or UUID, no process; of the kernel its version only.
    """
    cpu, system = machine.cpu, machine.system
    kernel = re.match(r"\d+(\.\d+){0,3}", system.kernel or "")
    return {
        "system": system.name,
        "kernel": kernel.group() if kernel else None,
        "python": system.python,
        "container": list(system.container),
        "cpu": {
            "title": cpu.title,
            "architecture": cpu.architecture,
            "microarchitecture": cpu.microarchitecture,
            "cpus": cpu.cpus,
            "cores": cpu.cores,
            "sockets": cpu.sockets,
            "quota_cpus": cpu.quota_cpus,
            "features": list(cpu.features),
            "numa_nodes": len(cpu.numa),
        },
        "ram": {"total_bytes": machine.ram.total_bytes, "limit_bytes": machine.ram.limit_bytes},
        "gpus": [
            {
                "title": gpu.title,
                "vendor": gpu.vendor,
                "memory_bytes": gpu.memory_bytes,
                "compute_capability": gpu.compute_capability,
                "power_limit_w": gpu.power_limit_w,
                "mig": gpu.mig is not None,
                "visible": gpu.visible,
            }
            for gpu in machine.gpus
        ],
        "drivers": dict(machine.drivers),
    }


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value
