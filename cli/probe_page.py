"""The answer of `qwen-plan probe` as a page for the screen and as one JSON document."""

from collections.abc import Iterator, Sequence
from json import dumps

from ..profiles.machine import Gpu, Machine, Pcie
from ..profiles.machine_profile import Ceilings
from ..profiles.probe.values import listed
from ..profiles.this_machine import Here
from .catalogs import device_record
from .output import Screen, clean, wrapped

GIB = 1 << 30
LABEL = 14  # columns of the names at the left
SHOWN_PROCESSES = 4
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
NOT_KNOWN = (
    "how fast it reads its memory is not known, so there is no speed: `qwen-plan probe --measure --output here.yaml`, "
    "then `--gpu here.yaml`"
)


def document(machine: Machine, here: Sequence[Here], found: Sequence[Ceilings | None]) -> str:
    """One JSON document: the machine, the devices that `--gpu auto` plans with, what was measured on each."""
    told = {
        "schema": 1,
        "machine": machine.to_json(),
        "devices": [device_record(one.device) for one in here],
        "measured": [one.to_json() if one else None for one in found],
    }
    return dumps(told, indent=2, allow_nan=False) + "\n"


def page(machine: Machine, here: Sequence[Here], found: Sequence[Ceilings | None], on: Screen) -> str:
    """What is here, what was measured, what could not be seen, and what `--gpu auto` plans with."""
    lines = [_bold("This machine", on)]
    for label, text in _machine(machine):
        lines += _entry(label, text, on)
    if machine.gpus:
        lines += ["", _bold("GPUs", on)]
        for gpu in machine.gpus:
            lines += _entry(str(gpu.index), _gpu(gpu), on)
    for title, ceilings in {one.device.title: told for one, told in zip(here, found, strict=True) if told}.items():
        lines += ["", _bold(f"Measured on {title}", on)]
        for label, text in _ceilings(ceilings):
            lines += _entry(label, text, on)
    for title, sentences in (("Worth knowing", machine.notes), ("Not seen", machine.unseen)):
        if sentences:
            lines += ["", _bold(title, on)]
            for sentence in sentences:
                lines += wrapped(clean(sentence), on.width, "  - ", "    ")
    lines += ["", _bold("`--gpu auto` plans with", on)]
    for sentence in _plans_with(here):
        lines += wrapped(clean(sentence), on.width, "  - ", "    ")
    return "\n".join([*lines, ""])


def _machine(machine: Machine) -> Iterator[tuple[str, str]]:
    system, cpu, ram = machine.system, machine.cpu, machine.ram
    container = f", in: {listed(list(system.container))}" if system.container else ""
    kernel = f", kernel {system.kernel}" if system.kernel else ""
    yield "system", f"{system.name}{kernel}, Python {system.python}{container}"
    board = f" on {cpu.board}" if cpu.board else ""
    yield "CPU", f"{cpu.title or 'not known'} ({cpu.architecture}){board}"
    yield "cores", _cores(machine)
    if cpu.features:
        yield "can", " ".join(cpu.features)
    if len(cpu.numa) > 1:
        nodes = (f"{node.node}: {node.cpus} CPUs, {_gib(node.memory_bytes)}" for node in cpu.numa)
        yield "NUMA", "; ".join(nodes)
    limit = f"; its control groups allow {_gib(ram.limit_bytes)}" if ram.limit_bytes is not None else ""
    yield "RAM", f"{_gib(ram.usable_bytes)} can be had of {_gib(ram.total_bytes)}{limit}"
    for disk in machine.disks:
        yield disk.place, f"{_gib(disk.free_bytes)} free of {_gib(disk.total_bytes)}"
    if machine.drivers:
        yield "drivers", ", ".join(f"{name} {version}" for name, version in machine.drivers.items())


def _cores(machine: Machine) -> str:
    cpu = machine.cpu
    if cpu.cpus is None:
        return "not known"
    sockets = f" in {cpu.sockets} sockets" if cpu.sockets and cpu.sockets > 1 else ""
    threads = f", {cpu.cpus} threads" if cpu.cpus != cpu.cores else ""
    others = f" (of {cpu.online_cpus} threads of the machine)" if cpu.online_cpus and cpu.online_cpus > cpu.cpus else ""
    quota = f", CPU time of {cpu.quota_cpus:g}" if cpu.quota_cpus else ""
    return f"{cpu.cores} usable{sockets}{threads}{others}{quota}"


def _gpu(gpu: Gpu) -> str:
    told = [gpu.title if gpu.visible else f"{gpu.title} (not for this process)"]
    if gpu.kind == "unified" and gpu.memory_bytes is None:
        told.append("the host's memory")
    elif gpu.memory_bytes is not None:
        told.append(f"{_gib(gpu.free_bytes)} free of {_gib(gpu.memory_bytes)}")
    if gpu.compute_capability:
        told.append(f"capability {gpu.compute_capability}")
    if gpu.max_clock_hz:
        told.append(f"{_mhz(gpu.clock_hz)} of {_mhz(gpu.max_clock_hz)} MHz")
    if gpu.max_memory_clock_hz:
        told.append(f"memory {_mhz(gpu.memory_clock_hz)} of {_mhz(gpu.max_memory_clock_hz)} MHz")
    if gpu.power_limit_w:
        told.append(f"at most {gpu.power_limit_w:g} W")
    if gpu.pcie:
        told.append(_pcie(gpu.pcie))
    if gpu.mig_enabled:
        told.append("cut into MIG instances")
    if gpu.processes:
        held = [f"{one.name or one.pid} {_gib(one.memory_bytes)}" for one in gpu.processes]
        told.append(f"beside {listed(held[:SHOWN_PROCESSES])}{' and others' if len(held) > SHOWN_PROCESSES else ''}")
    return ", ".join(told)


def _pcie(slot: Pcie) -> str:
    most = f"{slot.max_generation or '?'} x{slot.max_lanes or '?'}"
    return f"PCIe {slot.generation or '?'} x{slot.lanes or '?'} (at most {most})"


def _ceilings(found: Ceilings) -> Iterator[tuple[str, str]]:
    low, high = found.read_range_bytes_per_s
    between = f", between {_rate(low, 'B/s')} and {_rate(high, 'B/s')}" if found.is_disturbed else ""
    yield "read", _rate(found.read_bytes_per_s, "B/s") + between
    yield "copy", f"{_rate(found.copy_bytes_per_s, 'B/s')}, read and written"
    if found.host_to_device_bytes_per_s:
        yield "from host", _rate(found.host_to_device_bytes_per_s, "B/s")
    rates = ", ".join(f"{dtype} {_rate(rate, 'FLOP/s')}" for dtype, rate in found.flops_per_s.items())
    if rates:
        yield "matmul", rates
    yield "how", found.how
    if found.is_disturbed:
        got = found.cpu_share or 1.0
        share = f" and took {1 - got:.0%} of the CPU time" if got < 0.95 else ""
        yield "disturbed", f"other work ran beside{share}: measure again when the machine is idle"
    for sentence in found.not_measured:
        yield "not", sentence


def _plans_with(here: Sequence[Here]) -> Iterator[str]:
    for one in dict.fromkeys(one.device for one in here):
        count = sum(other.device is one for other in here)
        bandwidth = one.memory_bandwidth_bytes_per_s
        speed = _rate(bandwidth, "B/s") if bandwidth else NOT_KNOWN
        source = f" ({one.usable_source})" if one.usable_source else ""
        yield f"{f'{count} x ' if count > 1 else ''}{one.name}: {_gib(one.usable_bytes)} usable{source}, {speed}"


def _entry(label: str, text: str, on: Screen) -> list[str]:
    return wrapped(clean(text), on.width, f"  {label.ljust(LABEL)} ", " " * (LABEL + 3))


def _bold(text: str, on: Screen) -> str:
    return f"\x1b[1m{text}\x1b[0m" if on.color else text


def _gib(amount: int | None) -> str:
    return "?" if amount is None else f"{amount / GIB:.1f} GiB"


def _mhz(clock_hz: int | None) -> str:
    return "?" if clock_hz is None else f"{clock_hz / 1e6:,.0f}"


def _rate(rate: float | None, unit: str) -> str:
    if not rate:
        return "not measured"
    scale, prefix = next((pair for pair in UNITS if rate >= pair[0]), (1.0, ""))
    return f"{rate / scale:,.1f} {prefix}{unit}"
