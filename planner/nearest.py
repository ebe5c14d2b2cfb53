"""The published run that is nearest to a plan: what a figure can be held against."""

from functools import lru_cache
from math import log
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from ..profiles.device import Device
from ..profiles.formats import WeightFormat
from ..profiles.model import Model
from ..profiles.speed_data import fitted
from .factors import RELATIVES, backend_of, bits_of, family_of
from .work import work

if TYPE_CHECKING:
    from .engines.engine import Setup


class Case(NamedTuple):
    """A published run, as `fit_speed.py` compiled it."""

    id: str
    source: str
    engine: str
    backend: str
    device: str  # as --gpu takes it
    family: str
    architecture: str
    model: str
    weights: str
    bits: str
    read_bytes: int  # weights read per token
    bandwidth_bytes_per_s: int
    devices: int
    mtp: int
    offloads: bool
    depth_tokens: int
    decode_tokens_per_s: float

    def to_json(self) -> dict[str, object]:
        names = ("id", "source", "engine", "device", "model", "weights", "mtp", "depth_tokens", "decode_tokens_per_s")
        return {name: getattr(self, name) for name in names}


def nearest_case(engine: str, setup: "Setup", offloads: bool) -> Case | None:
    """The nearest run of one sequence: by engine and device first, then by what a token reads, format and drafts."""
    devices = setup.devices
    return _nearest(engine, setup.model, setup.weights, devices[0], len(devices), bool(setup.mtp), offloads)


@lru_cache(maxsize=1024)
def _nearest(
    engine: str, model: Model, weights: WeightFormat, device: Device, devices: int, drafts: bool, offloads: bool
) -> Case | None:
    amount = work(model, weights, (device,), "auto")
    reads = amount.dense_bytes + amount.head_bytes + amount.expert_share * amount.expert_bytes
    relative, backend = RELATIVES.get(engine, engine), backend_of(engine, device)
    family, bits = family_of(device), bits_of(weights)

    def distance(case: Case, apart: float) -> float:
        return (
            apart
            + (0.0 if case.family == family else 1.0 if case.architecture == device.architecture else 1.5)
            + 0.5 * abs(log(case.bandwidth_bytes_per_s / device.memory_bandwidth_bytes_per_s))
            + 0.7 * abs(log(case.read_bytes / reads))
            + 0.3 * (case.bits != bits)
            + 0.8 * (bool(case.mtp) != drafts)
            + 1.0 * (case.offloads != offloads)
            + 0.3 * abs(log(case.devices / devices))
            + 0.2 * (case.model != model.name)
        )

    groups = [
        (2.0 * (one != relative) + 1.0 * (other != backend), cases)
        for (one, other), cases in _cases_by_engine().items()
    ]
    nearest: tuple[float, int, Case] | None = None
    for apart, cases in sorted(groups, key=itemgetter(0)):
        if nearest and apart > nearest[0]:
            break
        found = min((distance(case, apart), place, case) for place, case in cases)  # of equals the first in the file
        nearest = min(nearest, found) if nearest else found
    return nearest[2] if nearest else None


@lru_cache(maxsize=1)
def _cases_by_engine() -> dict[tuple[str, str], list[tuple[int, Case]]]:
    """Places in the file and runs, by engine or the one that stands for it, and backend."""
    found: dict[tuple[str, str], list[tuple[int, Case]]] = {}
    for place, row in enumerate(fitted()["cases"]):
        case = Case(*row)
        found.setdefault((RELATIVES.get(case.engine, case.engine), case.backend), []).append((place, case))
    return found
