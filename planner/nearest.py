"""The published run that is nearest to a plan: what a figure can be held against."""

from math import log
from typing import TYPE_CHECKING, NamedTuple

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
    device = setup.devices[0]
    amount = work(setup.model, setup.weights, setup.devices[:1], "auto")
    reads = amount.dense_bytes + amount.head_bytes + amount.expert_share * amount.expert_bytes
    relative, backend = RELATIVES.get(engine, engine), backend_of(engine, device)
    family, bits = family_of(device), bits_of(setup.weights)

    def distance(case: Case) -> float:
        return (
            2.0 * (RELATIVES.get(case.engine, case.engine) != relative)
            + 1.0 * (case.backend != backend)
            + (0.0 if case.family == family else 1.0 if case.architecture == device.architecture else 1.5)
            + 0.5 * abs(log(case.bandwidth_bytes_per_s / device.memory_bandwidth_bytes_per_s))
            + 0.7 * abs(log(case.read_bytes / reads))
            + 0.3 * (case.bits != bits)
            + 0.8 * (bool(case.mtp) != bool(setup.mtp))
            + 1.0 * (case.offloads != offloads)
            + 0.3 * abs(log(case.devices / len(setup.devices)))
            + 0.2 * (case.model != setup.model.name)
        )

    cases = [Case(*row) for row in fitted()["cases"]]
    return min(cases, key=distance) if cases else None
