"""What this machine is: `probe()` asks every source there is, and says what it could not see. Nothing raises.

nvidia.py (NVML)  amd.py (sysfs, rocm-smi)  apple.py (sysctl)  cpu.py (/proc/cpuinfo, affinity, NUMA)
cgroup.py (limits of containers)  system.py (memory, disks, operating system)
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..machine import Cpu, Gpu, Machine, Ram, System
from .amd import amd_gpus, other_gpus
from .apple import apple_gpus
from .cgroup import Limits, cgroup_limits
from .cpu import linux_cpu, mac_cpu, other_cpu
from .nvidia import nvidia_gpus
from .system import (
    disks,
    hub_cache,
    linux_ram,
    linux_system,
    mac_ram,
    other_ram,
    other_system,
)
from .tree import Tree
from .values import Unseen, listed, why

SECONDS_OF_A_TOOL = 10
SYSCTL = "/usr/sbin/sysctl"


def probe(
    root: str = "/",
    nvml: Any = ...,
    environment: Mapping[str, str] | None = None,
    run: Callable[[list[str]], str] | None = None,
    system: str = sys.platform,
    places: Mapping[str, str] | None = None,
) -> Machine:
    """This machine, or the one whose /proc and /sys lie below `root`.

    nvml: the module to ask instead of pynvml; None for none. environment: instead of os.environ. run: what runs a tool
    and gives its output. system: as sys.platform. places: {what it is for: path} of the disks.
    """
    unseen, tree = Unseen(), Tree(root)
    environment = os.environ if environment is None else environment
    run = run or _run
    machine = _Sources(tree, unseen, environment, run, system)
    gpus, drivers, notes = machine.gpus(_pynvml(unseen) if nvml is ... else nvml)
    limits = machine.guarded("control groups", lambda: cgroup_limits(tree), Limits()) if machine.is_linux else Limits()
    cpu = machine.guarded("CPU", lambda: machine.cpu(limits), Cpu(None, "unknown"))
    ram = machine.guarded("host memory", lambda: machine.ram(limits), Ram())
    if places is None:
        places = {"hub cache": hub_cache(environment), "current folder": "."}
    return Machine(
        system=machine.guarded("operating system", lambda: machine.system(limits), System(system, None, "unknown")),
        cpu=cpu,
        ram=ram,
        disks=machine.guarded("disks", lambda: disks(places, unseen), ()),
        gpus=gpus,
        drivers=drivers,
        notes=notes,
        unseen=unseen.sentences(),
    )


class _Sources:
    """The sources of one operating system."""

    def __init__(
        self,
        tree: Tree,
        unseen: Unseen,
        environment: Mapping[str, str],
        run: Callable[[list[str]], str],
        name: str,
    ) -> None:
        self.tree, self.unseen, self.environment, self.run, self.name = tree, unseen, environment, run, name
        self.is_linux = name.startswith("linux")

    def guarded(self, what: str, look: Callable[[], Any], otherwise: Any) -> Any:
        """What `look` finds. Each source catches what it expects; whatever else goes wrong is a sentence, too."""
        try:
            return look()
        except Exception as error:
            self.unseen.add(what, f"{type(error).__name__}: {why(error)}")
            return otherwise

    def sysctl(self, name: str) -> str:
        return self.run([SYSCTL, "-n", name]).strip()

    def gpus(self, nvml: Any) -> tuple[tuple[Gpu, ...], dict[str, str], tuple[str, ...]]:
        tree, unseen, environment = self.tree, self.unseen, self.environment
        none: tuple[tuple[Gpu, ...], dict[str, str]] = ((), {})
        found, drivers, notes = (), {}, ()
        if nvml is not None:
            found, drivers = self.guarded(
                "NVIDIA GPUs", lambda: nvidia_gpus(nvml, environment, os.getpid(), unseen), none
            )
            notes = _cuda_notes(found, environment)
        if self.is_linux:
            more, versions = self.guarded("AMD GPUs", lambda: amd_gpus(tree, self.run, environment, unseen), none)
            found, drivers = (*found, *more), {**drivers, **versions}
            self.guarded("other GPUs", lambda: other_gpus(tree, {gpu.vendor for gpu in found}, unseen), None)
        elif self.name == "darwin":
            more, limit_bytes = self.guarded("Apple's GPU", lambda: apple_gpus(self.sysctl, unseen), ((), None))
            if more and limit_bytes:
                notes = (*notes, f"iogpu.wired_limit_mb is set: the GPU may take {limit_bytes >> 20:,} MiB")
                more = tuple(_limited(gpu, limit_bytes) for gpu in more)
            found = (*found, *more)
        return found, drivers, notes

    def cpu(self, limits: Limits) -> Cpu:
        if self.is_linux:
            return linux_cpu(self.tree, limits.cpus, self.unseen)
        if self.name == "darwin":
            return mac_cpu(self.sysctl, self.unseen)
        return other_cpu(os.cpu_count(), self.environment, self.unseen)

    def ram(self, limits: Limits) -> Ram:
        if self.is_linux:
            return linux_ram(self.tree, limits, self.unseen)
        return mac_ram(self.sysctl, self.unseen) if self.name == "darwin" else other_ram(self.unseen)

    def system(self, limits: Limits) -> System:
        if self.is_linux:
            return linux_system(self.tree, limits.container, self.environment, self.unseen)
        return other_system(self.name)


def _limited(gpu: Gpu, limit_bytes: int) -> Gpu:
    from ..frozen import replace

    return replace(gpu, free_bytes=limit_bytes)


def _cuda_notes(found: tuple[Gpu, ...], environment: Mapping[str, str]) -> tuple[str, ...]:
    """What the choice of devices hides from whoever reads the plan."""
    notes = []
    parts = [gpu for gpu in found if gpu.mig]
    if parts:
        shown = next((gpu.uuid for gpu in parts if gpu.visible and gpu.uuid), None)
        which = f"this one has {shown}" if shown else "name one by CUDA_VISIBLE_DEVICES"
        notes.append(f"{len(parts)} MIG instances; CUDA gives one to a process: {which}")
    hidden = [str(gpu.index) for gpu in found if not gpu.visible and not gpu.mig and not gpu.mig_enabled]
    asked = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden and asked is not None:
        notes.append(f"CUDA_VISIBLE_DEVICES hides GPU {listed(hidden)}")
    unlike = len({gpu.title for gpu in found if gpu.mig is None}) > 1
    if unlike and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        notes.append(
            "unlike GPUs: CUDA counts the fastest first, and here they stand in the order of the PCI bus; "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID makes both the same"
        )
    return tuple(notes)


def _pynvml(unseen: Unseen) -> Any:
    try:
        import pynvml
    except Exception as error:  # ImportError, or a broken file of that name
        unseen.add("NVIDIA GPUs", f"the package nvidia-ml-py cannot be imported ({why(error)}): install it")
        return None
    return pynvml


def _run(command: list[str]) -> str:
    from subprocess import DEVNULL, run

    done = run(
        command, stdin=DEVNULL, capture_output=True, text=True, timeout=SECONDS_OF_A_TOOL, check=True, errors="replace"
    )
    return done.stdout[: 1 << 20]
