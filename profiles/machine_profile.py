"""The devices of a machine as YAML that `--gpu FILE` takes, with what was measured on them.

`memory_bandwidth_bytes_per_s` and `flops_per_s` stay the vendor's where the catalog has them, for the speed model was
fitted to those; what was measured stands beside them under `measured`. Where nobody else knows them, they are what was
measured; so they are where a device reads less than SLOW of what it is sold for (a slice of a GPU, a power limit).
"""

from collections.abc import Iterator, Mapping, Sequence
from json import dumps

from .device import Device
from .frozen import dataclass, field, fields, replace

SLOW = 0.8  # measured reads reach 85 to 95 % of the vendor's figure on a device that is whole
DISTURBED = 1.25  # between rounds, and between CPU time wanted and got; where nothing else runs it is less
RATES = (10**9, 10**15)  # what a device file takes, as bytes per second
FLOPS = (10**9, 10**18)
SKIPPED = frozenset({"path"})


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device reached: `how` says by what, in one clause. Bytes and operations per second; None: not measured.

    copy_bytes_per_s counts what is read and what is written. flops_per_s by dtype: fp32, fp16, bf16, int8.
    """

    read_bytes_per_s: float | None
    copy_bytes_per_s: float | None
    host_to_device_bytes_per_s: float | None = None
    flops_per_s: Mapping[str, float] = field(default_factory=dict)
    read_range_bytes_per_s: tuple[float, float] = (0.0, 0.0)  # of the slowest and the fastest round
    cpu_share: float | None = None  # of the CPU time that its threads could use, what they got
    how: str = ""
    not_measured: tuple[str, ...] = ()  # a sentence each

    @property
    def is_disturbed(self) -> bool:
        """Whether other work ran beside: rounds far apart, or less CPU time than there should be."""
        low, high = self.read_range_bytes_per_s
        return high > DISTURBED * low or (self.cpu_share is not None and self.cpu_share < 1 / DISTURBED)

    def to_json(self) -> dict[str, object]:
        return {
            "read_bytes_per_s": self.read_bytes_per_s and round(self.read_bytes_per_s),
            "read_range_bytes_per_s": [round(rate) for rate in self.read_range_bytes_per_s],
            "copy_bytes_per_s": self.copy_bytes_per_s and round(self.copy_bytes_per_s),
            "host_to_device_bytes_per_s": self.host_to_device_bytes_per_s and round(self.host_to_device_bytes_per_s),
            "flops_per_s": {dtype: round(rate) for dtype, rate in self.flops_per_s.items()},
            "cpu_share": self.cpu_share and round(self.cpu_share, 3),
            "how": self.how,
            "not_measured": list(self.not_measured),
        }


def with_ceilings(device: Device, found: Ceilings, on: str) -> Device:
    """The device with what was measured on it on that day (ISO)."""
    bandwidth = device.memory_bandwidth_bytes_per_s
    read = _bounded(found.read_bytes_per_s, RATES)
    if read and read < (SLOW * bandwidth if bandwidth else RATES[1]):
        bandwidth = read
    link, host_link = _bounded(found.host_to_device_bytes_per_s, RATES), device.host_link_bytes_per_s
    amounts = {
        "memory_bandwidth_bytes_per_s": read,
        "copy_bytes_per_s": _bounded(found.copy_bytes_per_s, RATES),
        "host_link_bytes_per_s": link,
        **{f"{dtype}_flops_per_s": _bounded(rate, FLOPS) for dtype, rate in found.flops_per_s.items()},
    }
    by = found.how or "qwen-plan probe --measure"
    measured = {
        name: {"value": value, "by": by, "on": on, "source": "qwen-plan probe --measure, on this machine"}
        for name, value in amounts.items()
        if value
    }
    return replace(
        device,
        memory_bandwidth_bytes_per_s=bandwidth,
        flops_per_s=device.flops_per_s or _worth_having(found.flops_per_s),
        flops_source=device.flops_source if device.flops_per_s else by,
        host_link_bytes_per_s=min(link, host_link) if link and host_link else link or host_link,
        measured={**device.measured, **measured},
    )


def profile_yaml(devices: Sequence[Device], head: Sequence[str] = ()) -> str:
    """The text of the file: `head` as comments, then the one device, or a list of them with their counts."""
    lines = [f"# {line}" for line in head]
    kinds = dict.fromkeys(devices)
    if len(devices) == 1:
        return "\n".join([*lines, *_lines(devices[0]), ""])
    lines.append("devices:")
    for device in kinds:
        first, *rest = _lines(device)
        lines += [f"  - {first}", *(f"    {line}" for line in rest)]
        count = sum(one is device for one in devices)
        if count > 1:
            lines.append(f"    count: {count}")
    return "\n".join([*lines, ""])


def _lines(device: Device) -> Iterator[str]:
    """Every key of a device that has a value. Text is quoted: nothing in it means anything to YAML."""
    for one in fields(device):
        value = getattr(device, one.name)
        if one.name == "memory_bandwidth_bytes_per_s":
            yield f"{one.name}: {value or 'null  # not known: qwen-plan probe --measure'}"
        elif isinstance(value, Mapping):
            if value:
                yield f"{one.name}:"
                yield from _nested(value, "  ")
        elif value is not None and one.name not in SKIPPED:
            yield f"{one.name}: {_scalar(value)}"


def _scalar(value: object) -> str:
    """Numbers as they are, text in quotes; what is not plain ASCII by its number, as YAML writes it (JSON's pairs of
    surrogates would be two characters there)."""
    if not isinstance(value, str):
        return dumps(value)
    marks = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(marks.get(c, c) if " " <= c <= "~" else f"\\U{ord(c):08X}" for c in value) + '"'


def _nested(values: Mapping[str, object], indent: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _nested(value, f"{indent}  ")
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _worth_having(rates: Mapping[str, float]) -> dict[str, int]:
    """What a planner may count on: a 16-bit type only where it is faster than float32, to which engines turn else."""
    found = {dtype: int(rate) for dtype, rate in rates.items() if _bounded(rate, FLOPS)}
    floor = found.get("fp32", 0)
    return {dtype: rate for dtype, rate in found.items() if dtype == "fp32" or rate > floor}


def _bounded(value: float | None, bounds: tuple[int, int]) -> int | None:
    return int(value) if value is not None and bounds[0] <= value <= bounds[1] else None
