"""Tables beside the answer: memory over context for every cache type, tokens over concurrency, and what-if."""

from collections.abc import Iterator
from typing import Any

from ..profiles.errors import QwenfitError
from ..profiles.frozen import dataclass, replace
from .advice import pinned
from .batching import Limits
from .candidates import engine_module
from .capacity import Sizing, broken, measure, scaled, smallest
from .plan import MAX_CTX_TOKENS, EnginePlan
from .replica import Replica, replica, serving_plan
from .report import Kind, Report, Search, slowed
from .request import Request
from .search import variant
from .speed import step_time
from .workload import Lengths, Part, Workload

CONTEXTS = (*(1024 << power for power in range(10)), MAX_CTX_TOKENS)
WITHIN = 0.04  # of large numbers of replicas
DRAFT_TOKENS = 2  # what if


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Bytes that the fullest device needs for one sequence, over `CONTEXTS`, with one type of cache."""

    kv_dtype: str
    needed_bytes: tuple[int, ...]
    chosen: bool


@dataclass(frozen=True, slots=True)
class Memory:
    usable_bytes: int
    contexts_tokens: tuple[int, ...]
    curves: tuple[MemoryCurve, ...]


@dataclass(frozen=True, slots=True)
class Width:
    """Tokens per second with so many sequences, each at the mean length: middle, and the interval of all together."""

    seqs: int
    tokens_per_s: float
    low_tokens_per_s: float
    each_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One change: the same deployment's figures, and the fewest replicas that keep the promises (0: none, and why)."""

    change: str
    p95_ttft_s: float
    p95_tpot_s: float
    holds: bool
    replicas: int
    reason: str


def memory(kind: Kind, search: Search) -> Memory:
    """Of the plan's engine and weights, for each cache type that the engine has there."""
    plan = kind.replica.plan
    request = _pinned(kind.replica, search)
    share = max(plan.devices, key=lambda one: one.memory.total.mid / one.usable_bytes)
    curves = []
    for kv_dtype in engine_module(plan.engine).kv_dtypes(plan.setup.devices[0], plan.setup.version):
        try:
            found = search(variant(request, kv_dtype=kv_dtype, ctx_tokens=CONTEXTS[0], seqs=1)).best
        except QwenfitError:
            continue
        needed = tuple(found.devices[0].usable_bytes + found.estimate.shortfall_bytes(ctx, 1) for ctx in CONTEXTS)
        curves.append(MemoryCurve(kv_dtype, needed, kv_dtype == plan.kv_dtype))
    return Memory(share.usable_bytes, CONTEXTS, tuple(curves))


def throughput(kind: Kind, mean_tokens: int) -> tuple[Width, ...]:
    """Decoding alone, over the number of sequences up to the replica's seats."""
    one, seats = kind.replica, kind.replica.limits.max_num_seqs
    slow = slowed(one.plan, seats, one.step)
    points = []
    for seqs in [*(1 << power for power in range(seats.bit_length()) if 1 << power < seats), seats]:
        seconds, slowly = (step.step_s(0, 0, seqs, seqs * mean_tokens) for step in (one.step, slow))
        tokens = one.step.tokens_per_seq
        points.append(Width(seqs, seqs * tokens / seconds, seqs * tokens / slowly, tokens / seconds))
    return tuple(points)


def what_ifs(found: Report, search: Search) -> tuple[WhatIf, ...]:
    """One change at a time to the first kind of replica and its load."""
    kind, load = found.kinds[0], found.question.workload
    one = kind.replica
    told = [_what_if("as asked", one, load, kind, one.limits)]
    told += [_what_if(change, one, changed, kind, one.limits) for change, changed in _other_loads(load)]
    if one.limits.max_num_seqs > 1:
        half = replace(one.limits, max_num_seqs=one.limits.max_num_seqs // 2)
        told.append(_what_if(f"{half.max_num_seqs} seats instead of {one.limits.max_num_seqs}", one, load, kind, half))
    for change, request in _other_plans(one.plan, _pinned(one, search)):
        try:
            plan = serving_plan(search(request))
            other = replica(one.devices, plan, step_time(plan), found.mean_tokens)
        except QwenfitError as reason:
            told.append(WhatIf(change, 0.0, 0.0, False, 0, str(reason)))
            continue
        told.append(_what_if(change, other, load, kind, other.limits))
    return tuple(told)


def _pinned(one: Replica, search: Search) -> Request:
    """The request that leads to this replica's plan and no other."""
    plan = one.plan
    asked = Request(
        model=plan.setup.model.path or plan.setup.model.name,
        devices=(one.devices,),
        ctx_tokens=plan.ctx_tokens,
        vision=plan.vision,
        mtp=plan.mtp,
        nodes=plan.nodes,
        **_sizes(plan),
    )
    return pinned(search(asked), plan)


def _sizes(plan: EnginePlan) -> dict[str, Any]:
    """Parallel sizes of a plan over boxes or replicas; another is searched anew, as it was."""
    setup = plan.setup
    if setup.nodes == setup.dp == setup.ep == 1:
        return {}
    link = setup.interconnect
    return {"tp": setup.tp, "pp": setup.pp, "dp": setup.dp, "interconnect": link.name if link else None}


def _other_loads(load: Workload) -> Iterator[tuple[str, Workload]]:
    yield "half the load", scaled(load, 0.5)
    yield "twice the load", scaled(load, 2)
    yield "answers half as long", replace(load, output_tokens=_stretched(load.output_tokens, 0.5))
    yield "prompts twice as long", replace(load, prompt_tokens=_stretched(load.prompt_tokens, 2))
    if load.prefix:
        yield (
            "no shared prefix (the same prompts, each its own)",
            replace(
                load,
                prefix=None,
                prompt_tokens=_longer(load.prompt_tokens, round(load.prefix.tokens * load.prefix.share)),
            ),
        )
    if load.images:
        yield "no images", replace(load, images=None)
    if load.burstiness == 1 and load.rate_per_s is not None:
        yield "bursts (gamma, shape 0.25)", replace(load, burstiness=0.25)


def _other_plans(plan: EnginePlan, request: Request) -> Iterator[tuple[str, Request]]:
    module, device = engine_module(plan.engine), plan.setup.devices[0]
    for kv_dtype in module.kv_dtypes(device, plan.setup.version):
        if kv_dtype != plan.kv_dtype:
            yield f"KV cache in {kv_dtype}", variant(request, kv_dtype=kv_dtype)
    if plan.mtp:
        yield "no draft tokens", variant(request, mtp=0)
    elif plan.setup.model.mtp_num_hidden_layers:
        yield f"{DRAFT_TOKENS} draft tokens (multi-token prediction)", variant(request, mtp=DRAFT_TOKENS)
    if plan.setup.model.stored:
        return
    for weights in module.weight_formats(plan.setup.model, device):
        if weights in ("int4", "fp8", "bf16", "q4_k_m", "q8_0") and weights != plan.weights:
            yield f"weights in {weights}", variant(request, weights=weights)


def _what_if(change: str, one: Replica, load: Workload, kind: Kind, limits: Limits) -> WhatIf:
    seen = measure(one.step, limits, load, one.reuse_tokens, kind.share)
    fewest: Sizing = smallest(one.step, limits, load, one.reuse_tokens, within=WITHIN)
    holds = not broken(seen, load)
    return WhatIf(change, seen.p95_ttft_s, seen.p95_tpot_s, holds, fewest.replicas, "; ".join(fewest.reasons))


def _stretched(lengths: Lengths, factor: float) -> Lengths:
    parts = (
        Part(part.share, max(1, round(part.low * factor)), max(1, round(part.high * factor)), part.sigma)
        for part in lengths.parts
    )
    return Lengths(tuple(parts))


def _longer(lengths: Lengths, tokens: int) -> Lengths:
    parts = (Part(part.share, part.low + tokens, part.high + tokens, part.sigma) for part in lengths.parts)
    return Lengths(tuple(parts))
