"""`qwen-plan probe`: what this machine is, what it could not see, and the profile that `--gpu FILE` takes."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from ..profiles.device import Device
from ..profiles.errors import BadInput, install_hint
from ..profiles.machine import Machine
from ..profiles.machine_profile import Ceilings, profile_yaml, with_ceilings
from ..profiles.probe import probe
from ..profiles.this_machine import Here, devices_here
from .output import say, screen, write
from .probe_page import document, page


def probe_machine(measure: bool, output: str | None, overwrite: bool, form: str) -> int:
    """Look, measure if asked, write the file if asked, and show it. Always 0: a machine is no question.

    `BadInput` where measuring was asked for and cannot be done, or the file cannot be written.
    """
    if output is not None:
        _check_output(output, overwrite)
    machine = probe()
    here = devices_here(machine)
    found: tuple[Ceilings | None, ...] = (None,) * len(here)
    if measure:
        found = _measured(machine, here)
        here = _with_all(here, found)
    if output is not None:
        disturbed = any(one.is_disturbed for one in found if one)
        _write_profile(output, overwrite, [one.device for one in here], machine, disturbed)
    if form == "json":
        write(document(machine, here, found))
    else:
        write(page(machine, here, found, screen(sys.stdout)))
    if output is not None:
        say(f"qwen-plan: wrote {output}: `qwen-plan --gpu {output}` plans with it")
    return 0


def _measured(machine: Machine, here: Sequence[Here]) -> tuple[Ceilings | None, ...]:
    """Ceilings of each device; devices of one title are measured once. None: torch does not reach this one."""
    try:
        from ..kernels.proof.machine_speed import cuda_uuids, measure_cpu, measure_cuda
    except ImportError as error:
        raise BadInput(f"--measure needs torch, and it cannot be imported ({error}): {install_hint('quant')}") from None
    say("qwen-plan: measuring for some seconds; other work slows it down")
    if here[0].gpu is None:
        return tuple(measure_cpu(machine.cpu.threads, one.device.usable_bytes) for one in here)
    uuids = cuda_uuids() if here[0].gpu.vendor != "apple" else ()
    if not uuids:
        raise BadInput(
            f"--measure: this torch does not reach {here[0].device.title}: install torch with CUDA or ROCm "
            "(https://pytorch.org/get-started), or leave --measure out"
        )
    done: dict[str, Ceilings] = {}
    found: list[Ceilings | None] = []
    for place, one in enumerate(here):
        index = _index(one, place, uuids)
        if index is not None and one.device.title not in done:
            done[one.device.title] = measure_cuda(index)
        found.append(done.get(one.device.title))
    return tuple(found)


def _index(one: Here, place: int, uuids: Sequence[str]) -> int | None:
    """torch's number of the GPU: by its UUID, else by its place where nothing else is possible."""
    uuid = one.gpu.uuid if one.gpu else None
    if uuid in uuids:
        return uuids.index(uuid)
    return place if place < len(uuids) and (uuid is None or not uuids[place]) else None


def _with_all(here: Sequence[Here], found: Sequence[Ceilings | None]) -> tuple[Here, ...]:
    """Devices with what was measured on them; what was one object stays one."""
    from datetime import date

    changed: dict[Device, Device] = {}
    for one, ceilings in zip(here, found, strict=True):
        if ceilings is not None and one.device not in changed:
            changed[one.device] = with_ceilings(one.device, ceilings, date.today().isoformat())
    return tuple(Here(changed.get(one.device, one.device), one.gpu) for one in here)


def _check_output(path: str, overwrite: bool) -> None:
    if not path.lower().endswith((".yaml", ".yml")):
        raise BadInput(f"--output {path}: a profile is a .yaml file, by which --gpu knows it")
    if os.path.exists(path) and not overwrite:
        raise BadInput(f"{path} is there already: --overwrite replaces it")


def _write_profile(path: str, overwrite: bool, devices: Sequence[Device], machine: Machine, disturbed: bool) -> None:
    """Whole or not at all: written beside it, then renamed."""
    from datetime import date

    if not all(device.memory_bytes for device in devices):
        raise BadInput(f"{path} was not written: how much memory there is could not be seen")
    head = [
        f"Written by qwen-plan probe on {date.today().isoformat()}; the keys are those of a device file.",
        "usable_bytes is what was free at that moment: raise it where something else ran that will not.",
        f"{machine.system.name}, {machine.cpu.title or machine.cpu.architecture}, {machine.cpu.threads} threads",
    ]
    if disturbed:
        head.append("Other work ran beside while it was measured: the machine is faster than this when it is idle.")
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "x", encoding="utf-8", newline="\n") as file:
            file.write(profile_yaml(devices, head))
        _check_output(path, overwrite)  # it may have come while we measured
        os.replace(beside, path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # renamed, or never made
            os.unlink(beside)
