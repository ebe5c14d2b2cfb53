"""The capacity report as data: the answer, and everything that it rests on. Renderings only lay it out.

Every simulated figure is given at the middle of the speed model's interval; `slow` figures repeat it with every step as
slow as the interval's cautious end.
"""

from collections.abc import Callable, Iterator, Mapping
from math import exp
from random import Random
from typing import Any

from ..profiles.errors import QwenfitError, Unsupported
from ..profiles.frozen import dataclass, fields, replace
from .batching import Limits, Step
from .capacity import Breaking, Measured, Sizing, breaks_first, broken, carries, measure, mixed_shares, scaled, smallest
from .money import Bill, Tariff, assumptions, bill
from .plan import EnginePlan, Plan
from .replica import Replica, replica, serving_plan
from .request import Request
from .search import variant
from .speed import DRAFT_SEQS, Drafts, basis, drafts, step_time, widths
from .workload import Workload

LOAD_FACTORS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
SAMPLE = 4000  # draws that the mean request is taken from
Search = Callable[[Request], Plan]


@dataclass(frozen=True, slots=True)
class Site:
    """One kind of replica as asked for. None: the fewest replicas; the most seats that fit."""

    devices: str
    replicas: int | None
    seats: int | None


@dataclass(frozen=True, slots=True)
class Question:
    """What a report is asked: `ctx_tokens` of the request is the longest that prompt and answer can be."""

    title: str
    source: str  # the file that asks
    request: Request
    sites: tuple[Site, ...]
    candidates: tuple[str, ...]
    workload: Workload
    tariff: Tariff


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of replica in the deployment, and what it does with its share of the load."""

    replica: Replica
    replicas: int
    share: float  # of the load, for one replica
    measured: Measured
    slow: Measured
    fewest: Sizing | None  # of this kind alone; None in a mix
    fewest_slow: Sizing | None
    breaking: Breaking


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """The slowest kind of replica at a multiple of the load."""

    factor: float
    p95_ttft_s: float
    p95_tpot_s: float
    utilization: float
    holds: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """The fewest of one device that keep the promises; 0 with the reason where none do."""

    devices: str
    replicas: int
    device_count: int
    setup: str
    p95_ttft_s: float
    p95_tpot_s: float
    bill: Bill | None
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    question: Question
    model: str
    mean_tokens: int
    kinds: tuple[Kind, ...]
    failures: tuple[str, ...]  # promises that do not hold; empty where the answer is yes
    slow_failures: tuple[str, ...]
    load: tuple[LoadPoint, ...]
    candidates: tuple[Candidate, ...]
    bill: Bill
    tokens_per_s: float  # given out by the whole deployment

    @property
    def holds(self) -> bool:
        return not self.failures


def report(question: Question, search: Search) -> Report:
    """Unsupported where no engine whose batching is known can serve the longest request on the first devices."""
    mean = mean_tokens(question.workload)
    replicas = tuple(_replica(question, site, mean, search) for site in question.sites)
    sized = [_sizing(question, site, one) for site, one in zip(question.sites, replicas, strict=True)]
    counts = [site.replicas or max(1, found.replicas) for site, found in zip(question.sites, sized, strict=True)]
    shares = _shares(question, replicas, counts)
    kinds = tuple(
        _kind(question, one, count, share, found if len(replicas) == 1 else None)
        for one, count, share, found in zip(replicas, counts, shares, sized, strict=True)
    )
    failures = _failures(question, kinds, lambda kind: kind.measured)
    if len(kinds) == 1 and sized[0].reasons and question.sites[0].replicas is None:
        failures = sized[0].reasons
    tokens_per_s = sum(kind.measured.decode_tokens_per_s * kind.replicas for kind in kinds)
    return Report(
        question=question,
        model=replicas[0].plan.setup.model.name,
        mean_tokens=mean,
        kinds=kinds,
        failures=failures,
        slow_failures=_failures(question, kinds, lambda kind: kind.slow),
        load=_load_points(question, min(kinds, key=lambda kind: kind.breaking.factor)),
        candidates=tuple(_candidate(question, name, mean, search) for name in question.candidates),
        bill=_bill(question, [(kind.replica, kind.replicas, kind.measured) for kind in kinds]),
        tokens_per_s=tokens_per_s,
    )


def mean_tokens(workload: Workload) -> int:
    """Prompt, prefix, images and answer of the mean request."""
    rng = Random(1)
    drawn = sum(workload.prompt_tokens.sample(rng, SAMPLE)) + sum(workload.output_tokens.sample(rng, SAMPLE))
    shared = sum(one.tokens * one.share for one in (workload.prefix, workload.images) if one)
    return round(drawn / SAMPLE + shared)


def slowed(plan: EnginePlan, seats: int, step: Any) -> Step:
    """The step at the cautious end of the speed model's interval."""
    decode, prefill = widths(replace(plan, seqs=seats))
    return step.scaled(exp(decode), exp(prefill))


def _replica(question: Question, site: Site, mean: int, search: Search) -> Replica:
    plan = serving_plan(search(variant(question.request, devices=(site.devices,))))
    return replica(site.devices, plan, step_time(plan), mean, site.seats)


def _sizing(question: Question, site: Site, one: Replica) -> Sizing:
    return smallest(one.step, one.limits, question.workload, one.reuse_tokens)


def _shares(question: Question, replicas: tuple[Replica, ...], counts: list[int]) -> tuple[float, ...]:
    if len(replicas) == 1:
        return (1 / counts[0],)
    rates = [carries(one.step, one.limits, question.workload, one.reuse_tokens) for one in replicas]
    return mixed_shares(rates, counts)


def _kind(question: Question, one: Replica, count: int, share: float, fewest: Sizing | None) -> Kind:
    load, reuse = question.workload, one.reuse_tokens
    slow = slowed(one.plan, one.limits.max_num_seqs, one.step)
    return Kind(
        replica=one,
        replicas=count,
        share=share,
        measured=measure(one.step, one.limits, load, reuse, share),
        slow=measure(slow, one.limits, load, reuse, share),
        fewest=fewest,
        fewest_slow=smallest(slow, one.limits, load, reuse) if fewest else None,
        breaking=breaks_first(one.step, one.limits, load, reuse, share),
    )


def _failures(question: Question, kinds: tuple[Kind, ...], figures: Callable[[Kind], Measured]) -> tuple[str, ...]:
    found = []
    for kind in kinds:
        prefix = f"{kind.replica.title}: " if len(kinds) > 1 else ""
        found += [prefix + reason for reason in broken(figures(kind), question.workload)]
    return tuple(found)


def _load_points(question: Question, kind: Kind) -> tuple[LoadPoint, ...]:
    points: list[LoadPoint] = []
    tried: list[Workload] = []
    for factor in LOAD_FACTORS:
        load = scaled(question.workload, factor)
        if load in tried:  # few users come in whole ones
            continue
        tried.append(load)
        if load.users and question.workload.users:
            factor = load.users / question.workload.users
        seen = measure(kind.replica.step, kind.replica.limits, load, kind.replica.reuse_tokens, kind.share)
        holds = not broken(seen, load)
        points.append(LoadPoint(factor, seen.p95_ttft_s, seen.p95_tpot_s, seen.utilization, holds))
    return tuple(points)


def _candidate(question: Question, devices: str, mean: int, search: Search) -> Candidate:
    try:
        one = _replica(question, Site(devices, None, None), mean, search)
    except QwenfitError as reason:
        return Candidate(devices, 0, 0, "-", 0.0, 0.0, None, str(reason))
    found = smallest(one.step, one.limits, question.workload, one.reuse_tokens)
    seen, count = found.measured, max(1, found.replicas)
    owed = _bill(question, [(one, count, seen)]) if found.replicas else None
    reason = "; ".join(found.reasons)
    return Candidate(
        devices, found.replicas, found.replicas * one.device_count, setup(one), seen.p95_ttft_s, seen.p95_tpot_s, owed,
        reason,
    )  # fmt: skip


def setup(one: Replica) -> str:
    plan = one.plan
    split = f", tensor parallel {plan.tp}" if plan.tp > 1 else f", over {plan.pp} devices" if plan.pp > 1 else ""
    split += f", pipeline parallel {plan.pp}" if plan.tp > 1 and plan.pp > 1 else ""
    split += f", data parallel {plan.dp}" if plan.dp > 1 else ""
    split += f", experts over {plan.ep} ranks" if plan.ep > 1 else ""
    split += f", {plan.nodes} boxes over {plan.setup.interconnect.name}" if plan.setup.interconnect else ""
    return f"{plan.engine} {plan.engine_version}, {plan.weights}, KV cache {plan.kv_dtype}{split}"


def _bill(question: Question, parts: list[tuple[Replica, int, Measured]]) -> Bill:
    devices = [(device, count, seen.utilization) for one, count, seen in parts for device in one.plan.setup.devices]
    tokens_per_s = sum(seen.decode_tokens_per_s * count for _, count, seen in parts)
    return bill(devices, tokens_per_s, question.tariff)


def sources(found: Report) -> list[tuple[str, str, str]]:
    """What the figures assume: (what, value, source or reason)."""
    question, told = found.question, []
    for kind in found.kinds:
        one, plan = kind.replica, kind.replica.plan
        decode, prefill = (exp(width) for width in widths(replace(plan, seqs=one.limits.max_num_seqs)))
        told += [
            (f"speed of {one.title}, decode", f"x {1 / decode:.2f} to x {decode:.2f}", basis(plan)),
            (f"speed of {one.title}, prefill", f"x {1 / prefill:.2f} to x {prefill:.2f}", basis(plan)),
            (
                f"{one.title}: seats, tokens per step, blocks",
                _limits_told(one.limits),
                f"{setup(one)}: {one.command}",
            ),
            (f"{one.title}: prefix reuse", _reuse_told(one), "the engine's cache of recurrent states"),
        ]
        told += [*_drafts_told(kind, found.mean_tokens), *_tower_told(kind, question.workload)]
        told += [
            (
                device.title,
                f"{device.memory_bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
                f"{device.source} ({device.checked})",
            )
            for device in dict.fromkeys(plan.setup.devices)
        ]
    told += [
        *(
            (f"{kind.replica.title}: between boxes", link.title, link.source)
            for kind in found.kinds
            if (link := kind.replica.plan.setup.interconnect)
        ),
        (
            "batching",
            "first come first served, chunked prefill, preemption by recomputation",
            "vLLM 0.32 v1/core/sched/scheduler.py",
        ),
        ("routing", "in turn to equal replicas; in a mix in proportion to what each carries", "assumed"),
        ("arrivals", _arrivals_told(question.workload), question.source),
        (
            "cost",
            f"devices over {question.tariff.term_years:g} years, and energy",
            "no hosts, racks, cooling or staff",
        ),
    ]
    return told + assumptions(question.tariff)


def _drafts_told(kind: Kind, mean_tokens: int) -> Iterator[tuple[str, str, str]]:
    plan = kind.replica.plan
    if plan.mtp:
        yield (
            f"{kind.replica.title}: draft tokens",
            f"{plan.mtp} per pass, which then brings {kind.replica.step.tokens_per_seq:.2f} tokens; "
            f"{pays(drafts(plan, mean_tokens))}",
            "the mean of published runs, the same in every pass of the simulation and for every text: percentiles lack "
            "what texts differ by, the speed model's interval has it",
        )


def pays(gained: Drafts) -> str:
    """From and up to how many sequences drafts bring more than they cost, in words."""
    first, last = gained.pays_from_seqs, gained.pays_up_to_seqs
    if not last:
        return "they pay with no number of sequences"
    since = f"from {first:,} " if first > 1 else ""
    return f"they pay {since}up to {last:,} sequences{' (as far as was looked)' if last == DRAFT_SEQS[-1] else ''}"


def _tower_told(kind: Kind, workload: Workload) -> Iterator[tuple[str, str, str]]:
    sizes = {*(workload.images.sizes if workload.images else ())}
    if workload.prefix and workload.prefix.image_tokens:
        sizes.add(workload.prefix.image_tokens)
    for tokens in sorted(sizes):
        yield (
            f"{kind.replica.title}: vision tower",
            f"{kind.replica.step.image_s(tokens) * 1000:.3g} ms per image of {tokens:,} tokens, once, in the step that "
            f"begins its prompt; busy with images {kind.measured.tower:.1%} of the time",
            "FLOPs and bytes of its tensors, at the share of the device's rates that text prompts reach: no time of a "
            "tower was published; an image within a cached prefix is not seen again",
        )


def _limits_told(limits: Limits) -> str:
    blocks = f", {limits.num_blocks:,} blocks of {limits.block_tokens:,} tokens" if limits.num_blocks else ""
    return f"{limits.max_num_seqs:,} sequences, {limits.max_num_batched_tokens:,} tokens per step{blocks}"


def _reuse_told(one: Replica) -> str:
    if not one.reuse_tokens:
        return "none: a shared prefix is computed again"
    return f"whole blocks of {one.reuse_tokens:,} tokens" if one.reuse_tokens > 1 else "every token"


def _arrivals_told(workload: Workload) -> str:
    if workload.users is not None:
        return f"{workload.users:,} users, who think {workload.think_s:g} s on average (exponential) between answers"
    shape = "Poisson" if workload.burstiness == 1 else f"gamma, shape {workload.burstiness:g}"
    return f"{workload.rate_per_s:g} requests/s, {shape}"


def plain(value: Any) -> Any:
    """Values of this room as JSON's: tuples are lists, frozen values objects."""
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, float) and not -1e300 < value < 1e300:
        return None
    return value


__all__ = ["Question", "Report", "Site", "Unsupported", "plain", "report", "sources"]
