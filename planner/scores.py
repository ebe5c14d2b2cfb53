"""A plan beside the log of its boot: every part that the engine says, its error, and whether the plan's interval holds.

Engines differ in what they print. What a line sums is summed on the plan's side too (vLLM's pool holds attention cache
and recurrent states; Ollama counts both as its cache), and a part is named by all that is in it. What a plan counts and
no boot can show is left out: prompt-time copies of the state in host memory, and what vLLM's profile does not run.
"""

from collections.abc import Iterable

from ..profiles.frozen import dataclass
from .engines.vllm_budget import VllmEstimate
from .logs.dialect import PARTS, LoggedPart
from .logs.engine_log import EngineLog
from .memory import Amount, Memory, exactly
from .plan import EnginePlan

TOTAL = "total"


@dataclass(frozen=True, slots=True)
class PartScore:
    """One comparison. `error` is the plan's, as a share of what was logged: 0.1 is a tenth too much."""

    part: str  # "weights", or what was summed: "kv_cache+recurrent_state"; "total" of all that could be compared
    place: str
    planned: Amount
    measured_bytes: int
    resolution_bytes: int  # that the log's rounding hides
    error: float
    within: bool  # the planned interval, made wider by the resolution, holds what was logged

    def to_json(self) -> dict[str, object]:
        return {
            "part": self.part,
            "place": self.place,
            "planned_bytes": {"low": self.planned.low, "mid": self.planned.mid, "high": self.planned.high},
            "basis": "exact" if self.planned.exact else "estimated",
            "measured_bytes": self.measured_bytes,
            "resolution_bytes": self.resolution_bytes,
            "error": self.error,
            "within": self.within,
        }


def score(plan: EnginePlan, log: EngineLog) -> tuple[PartScore, ...]:
    """Every part of the log that the plan has, place by place, and a total per place with more than one."""
    found: list[PartScore] = []
    for place in sorted({part.place for part in log.parts}, key=_order):
        parts = [part for part in log.parts if part.place == place]
        memory = at_boot(plan, place)
        if memory is None:
            continue
        scored = [_scored(part, memory) for part in _disjoint(parts)]
        found += scored
        if len(scored) > 1:
            found.append(_compared(TOTAL, place, _summed(one.planned for one in scored), scored))
    return tuple(found)


def at_boot(plan: EnginePlan, place: str) -> Memory | None:
    """What the plan says of a place right after the boot, before the first prompt. None where it has no such place."""
    if place == "host":
        memory = plan.host
        return _with(memory, recurrent_state=exactly(memory.recurrent_state.low))
    number = place.removeprefix("device")
    if not number.isdecimal() or int(number) >= len(plan.devices):
        return None
    memory = plan.devices[int(number)].memory
    if isinstance(plan.estimate, VllmEstimate):
        return _profiled(memory, plan.estimate.profiled(plan.ctx_tokens, plan.seqs))
    if not memory.recurrent_state.exact:  # copies that llama-server makes while it reads prompts
        return _with(memory, recurrent_state=exactly(memory.recurrent_state.low))
    return memory


def _profiled(memory: Memory, active: Amount) -> Memory:
    """vLLM on a GPU: the pool is what the budget leaves, and so as uncertain as what stands beside it."""
    pool, graph = memory.kv_cache, memory.graph
    more = active.mid - active.low + graph.mid - graph.low
    less = active.high - active.mid + graph.high - graph.mid
    return _with(memory, activation=active, kv_cache=Amount(max(0, pool.low - less), pool.mid, pool.high + more))


def worst_error(scores: Iterable[PartScore]) -> float:
    """The largest share by which a total is off; of single parts where no total is there. 0 without any."""
    scores = tuple(scores)
    totals = [abs(one.error) for one in scores if one.part == TOTAL]
    return max(totals or [abs(one.error) for one in scores], default=0.0)


def misses(scores: Iterable[PartScore], tolerance: float) -> tuple[PartScore, ...]:
    """What is off by more than a share: totals in any case, parts where their own interval does not hold them. (vLLM's
    pool is what its budget leaves: its total comes out right whatever else is wrong.)"""
    return tuple(one for one in scores if abs(one.error) > tolerance and (one.part == TOTAL or not one.within))


def _order(place: str) -> tuple[int, str]:
    return (1, "") if place == "host" else (0, place.rjust(12))


def _with(memory: Memory, **changes: Amount) -> Memory:
    return Memory(**{**memory.parts, **changes})


def _disjoint(parts: list[LoggedPart]) -> list[LoggedPart]:
    """Without a figure whose bytes are already in another one's."""
    covered = {name for part in parts for name in part.covers}
    return sorted((part for part in parts if part.part not in covered), key=lambda part: PARTS.index(part.part))


def _scored(part: LoggedPart, memory: Memory) -> PartScore:
    names = (part.part, *part.covers)
    planned = _summed(memory.parts[name] for name in names)
    return _compared("+".join(names), part.place, planned, [part])


def _compared(name: str, place: str, planned: Amount, logged: Iterable[LoggedPart | PartScore]) -> PartScore:
    measured = doubt = 0
    for one in logged:
        measured += one.bytes if isinstance(one, LoggedPart) else one.measured_bytes
        doubt += one.resolution_bytes
    error = (planned.mid - measured) / measured if measured else (1.0 if planned.mid else 0.0)
    within = planned.low - doubt <= measured <= planned.high + doubt
    return PartScore(name, place, planned, measured, doubt, error, within)


def _summed(amounts: Iterable[Amount]) -> Amount:
    total = exactly(0)
    for amount in amounts:
        total = total + amount
    return total
