"""What a run said of its plan: parts and rates beside each other, the verdict, and the document that tells of it."""

from collections.abc import Mapping

from ...profiles.frozen import dataclass
from ..logs.engine_log import EngineLog
from ..plan import EnginePlan
from ..receipt import Receipt, receipt
from ..scores import TOTAL, PartScore, misses
from ..speed import Interval, Speed

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class RateScore:
    """A rate beside its interval. `error` is the plan's, as a share of what was measured: 0.1 is a tenth too fast."""

    name: str  # decode_tokens_per_s or prefill_tokens_per_s
    planned: Interval | None  # None: the device's bandwidth is not known
    measured: float
    at_tokens: int  # of context
    seqs: int
    is_estimated: bool = False  # of a prompt that was read in part

    @property
    def error(self) -> float | None:
        return self.planned.mid / self.measured - 1 if self.planned else None

    @property
    def within(self) -> bool | None:
        return self.planned.low <= self.measured <= self.planned.high if self.planned else None

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "planned": self.planned.to_json() if self.planned else None,
            "measured": self.measured,
            "at_tokens": self.at_tokens,
            "seqs": self.seqs,
            "is_estimated": self.is_estimated,
            "error": self.error,
            "within": self.within,
        }


@dataclass(frozen=True, eq=False)
class Verification:
    """One plan, run once."""

    date: str
    qwenfit: str
    plan_sha256: str
    plan: EnginePlan  # what was run: of a slice, the slice's
    planned_layers: int  # of the whole model
    command: str
    weights: str  # "synthetic", or "checkpoint"
    machine: Mapping[str, object]
    log: EngineLog
    scores: tuple[PartScore, ...]
    rates: tuple[RateScore, ...]
    peak_bytes: int  # of the processes together, 0 where nobody could say
    tolerance: float
    memory_only: bool  # rates are told, and do not count
    notes: tuple[str, ...] = ()

    @property
    def memory_within(self) -> bool:
        """Every total within the tolerance, and what is exact exact; an engine that ran out of memory was not."""
        exact = all(one.within for one in self.scores if one.planned.exact and one.part != TOTAL)
        return not self.log.died and exact and not misses(self.scores, self.tolerance)

    @property
    def rates_within(self) -> bool | None:
        """None where none was planned."""
        told = [one.within for one in self.rates if one.within is not None]
        return all(told) if told else None

    @property
    def holds(self) -> bool:
        return self.memory_within and (self.memory_only or self.rates_within is not False)

    def to_json(self) -> dict[str, object]:
        plan, log = self.plan, self.log
        return {
            "schema": SCHEMA,
            "kind": "verification",
            "date": self.date,
            "qwenfit": self.qwenfit,
            "plan_sha256": self.plan_sha256,
            "holds": self.holds,
            "memory_within": self.memory_within,
            "rates_within": self.rates_within,
            "tolerance": self.tolerance,
            "memory_only": self.memory_only,
            "machine": dict(self.machine),
            "engine": plan.engine,
            "engine_version": log.version or plan.engine_version,
            "model": plan.setup.model.name,
            "weights": plan.weights,
            "weights_from": self.weights,
            "layers": plan.setup.model.num_layers,
            "planned_layers": self.planned_layers,
            "ctx_tokens": plan.ctx_tokens,
            "seqs": plan.seqs,
            "command": self.command,
            "scores": [one.to_json() for one in self.scores],
            "rates": [one.to_json() for one in self.rates],
            "peak_bytes": self.peak_bytes,
            "settings": dict(log.settings),
            "facts": dict(log.facts),
            "died": log.died,
            "notes": [*log.notes, *self.notes],
        }

    def receipt(self) -> Receipt:
        """The same as a receipt, for `qwen-plan calibrate`."""
        return receipt(self.plan, self.log, self.date, self.qwenfit, f"qwen-plan verify, plan {self.plan_sha256[:12]}")


def at(plan: EnginePlan, context_tokens: int, seqs: int) -> Speed | None:
    """What the plan says of so many tokens of context and so many sequences: where it was measured."""
    return EnginePlan(plan.engine, plan.setup, plan.estimate, max(1, context_tokens), seqs).speed
