"""Links between boxes: `interconnects.json`, and how `--interconnect` names one.

`ib-ndr` is one port per box, `8xib-ndr` are eight, `25GB/s` and `200Gb/s` a rate that the asker knows.
"""

import os
from functools import lru_cache
from json import loads
from typing import Any

from .device import Device
from .errors import BadInput, UnknownName
from .frozen import dataclass
from .names import did_you_mean, quote

FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "interconnects.json")
MAX_PORTS = 64
RATES = {"gb/s": 1e9, "gbit/s": 0.125e9, "mb/s": 1e6, "mbit/s": 0.125e6, "tb/s": 1e12}
FAST_BYTES_PER_S = 12.5e9  # 100 Gb/s: below it tensor parallelism over boxes is not offered unasked
SOCKET_LATENCY_S, RDMA_LATENCY_S = 4e-5, 8e-6


@dataclass(frozen=True, slots=True)
class Interconnect:
    """What one box has towards the others."""

    name: str  # ib-ndr, 8xib-ndr, 25GB/s
    title: str
    bytes_per_s: float  # of the box, one direction, all ports together
    latency_s: float  # of one hop of a small message between two boxes
    rdma: bool
    source: str
    assumed: bool = False  # nobody named it: what such boxes are sold with

    @property
    def takes_tensor_parallelism(self) -> bool:
        """Fast enough for an all-reduce per half layer, each of which waits for the last."""
        return self.rdma and self.bytes_per_s >= FAST_BYTES_PER_S


@lru_cache
def interconnects() -> tuple[dict[str, Any], ...]:
    """Every row of the file, as it stands there."""
    return tuple(_file()["interconnects"])


@lru_cache(maxsize=256)
def interconnect(text: str) -> Interconnect:
    """The link that `--interconnect` names. UnknownName for a name that is none; BadInput for a bad count or rate."""
    wanted = text.strip().lower()
    rate = rate_of(wanted)
    if rate is not None:
        latency = RDMA_LATENCY_S if rate >= FAST_BYTES_PER_S else SOCKET_LATENCY_S
        return Interconnect(wanted, f"a link of {rate / 1e9:g} GB/s", rate, latency, rate >= FAST_BYTES_PER_S, "asked")
    before, x, name = wanted.partition("x")
    count = 1
    if x and before.isascii() and before.isdigit():
        wanted = name
        if len(before) > 4 or not 1 <= int(before) <= MAX_PORTS:
            raise BadInput(f"{quote(text)}: a box has 1 to {MAX_PORTS} ports")
        count = int(before)
    names = {alias: row for row in interconnects() for alias in (row["name"], *row["aliases"])}
    if wanted not in names:
        near = did_you_mean(wanted, names)
        raise UnknownName(
            f"no interconnect {quote(text)}: {near}there are {', '.join(row['name'] for row in interconnects())}, "
            "with a number of ports before them (8xib-ndr), or a rate such as 25GB/s or 200Gbit/s"
        )
    return _made(names[wanted], count)


def assumed_interconnect(box: tuple[Device, ...]) -> Interconnect:
    """What a box of these devices is sold with; 10 Gb/s Ethernet where nobody says."""
    device, file = box[0], _file()
    known = {row.get("device") or row["link"]: row for row in file["assumed"]}
    row = known.get(device.name) or known.get(device.interconnect or "") or file["otherwise"]
    link = next(one for one in interconnects() if one["name"] == row["interconnect"])
    return _made(link, row.get("ports_per_box") or len(box), assumed=True)


def _made(row: dict[str, Any], count: int, assumed: bool = False) -> Interconnect:
    ports = f"{count}x" if count > 1 else ""
    title = f"{count} x {row['title']}" if count > 1 else row["title"]
    return Interconnect(
        ports + row["name"], title, count * row["bytes_per_s"], row["latency_s"], row["rdma"], row["source"], assumed
    )


def rate_of(text: str) -> float | None:
    """Bytes per second, from `25GB/s` or `200Gbit/s`; None for what is no rate."""
    text = text.strip().lower()
    unit = text.lstrip("0123456789.")
    number = text[: len(text) - len(unit)]
    scale = RATES.get(unit.strip())
    if scale is None:
        return None
    whole, point, fraction = number.partition(".")
    if not (whole + fraction).isdigit() or not whole or bool(point) != bool(fraction) or len(number) > 12:
        raise BadInput(f"{quote(text)} is no rate: write it like 25GB/s or 200Gbit/s")
    rate = float(number) * scale
    if not 1e6 <= rate <= 1e14:
        raise BadInput(f"{quote(text)}: give a rate between 1MB/s and 100TB/s")
    return rate


@lru_cache
def _file() -> dict[str, Any]:
    with open(FILE, encoding="utf-8") as file:
        return loads(file.read())
