"""An answer in words: what every rendering for people says in the same way. It lays nothing out."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ..planner.engines.engine import DeviceShare
from ..planner.memory import Amount, Memory
from ..planner.plan import MAX_SEQS, EnginePlan, Plan
from ..planner.speed import Interval

GIB = 1 << 30
TITLES = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "recurrent_state": "recurrent state",
    "activation": "activations",
    "graph": "graphs",
    "runtime": "runtime",
}
HOW_SURE = "exact: the engine's own arithmetic; ~: estimated, with the interval that it lies in"


class Part(NamedTuple):
    """One part of a device's memory: its key, its name, how much, and how sure that is."""

    key: str
    title: str
    amount: str
    sure: str


def verdict(plan: Plan) -> str:
    if not plan.fits:
        return "Does not fit"
    return "Fits, but only just" if plan.best.tight else "Fits"


def question(plan: Plan) -> str:
    request = plan.request
    names = [device.name for device in plan.devices[: len(plan.devices) // request.nodes]]
    devices = ", ".join(
        f"{names.count(name)}x{name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    )
    where = boxes(request.nodes, devices)
    return f"{plan.model.name} on {where}, {request.ctx_tokens:,} tokens x {counted(request.seqs, 'sequence')}"


def boxes(nodes: int, devices: str) -> str:
    """`2 boxes of 8xa100-80gb`; of one box, what is in it."""
    return f"{nodes} boxes of {devices}" if nodes > 1 else devices


def setup(plan: EnginePlan) -> str:
    words = [
        f"{plan.engine} {plan.engine_version}",
        f"weights {plan.weights}",
        f"KV cache {plan.kv_dtype}",
        f"state {plan.state_dtype}",
    ]
    if plan.tp > 1:
        words.append(f"tensor parallel {plan.tp}")
    if plan.pp > 1:
        words.append(f"split by layers over {plan.pp}" if plan.tp == 1 else f"pipeline parallel {plan.pp}")
    if plan.dp > 1:
        words.append(f"data parallel {plan.dp}")
    if plan.ep > 1:
        words.append(f"experts over {plan.ep} ranks")
    if plan.nodes > 1 and plan.setup.interconnect:
        words.append(f"{plan.nodes} boxes over {plan.setup.interconnect.name}")
    if plan.mtp:
        words.append(counted(plan.mtp, "draft token"))
    words.append("with vision" if plan.vision else "text only")
    return ", ".join(words)


def shares(plan: EnginePlan) -> list[tuple[int, DeviceShare]]:
    """Devices of which the same would be told are told once, with how many they are."""
    found: dict[object, tuple[int, DeviceShare]] = {}
    for share in plan.devices:
        told = _told(share)
        count, first = found.get(told, (0, share))
        found[told] = count + 1, first
    return list(found.values())


@lru_cache(maxsize=256)
def _told(share: DeviceShare) -> tuple[object, ...]:
    return share.device, held(1, share), *parts(share.memory)


def held(count: int, share: DeviceShare) -> str:
    """`GeForce RTX 3060 (rtx3060): ~10.23 of 11.63 GiB, 1.40 GiB free`."""
    device, total = share.device, share.memory.total
    name = device.title if device.title == device.name else f"{device.title} ({device.name})"
    who = f"{count} x {name}, each" if count > 1 else name
    if share.free_bytes >= 0:
        taken = mid(total).removesuffix(" GiB")
        return f"{who}: {taken} of {gib(share.usable_bytes)}, {gib(share.free_bytes)} free"
    return f"{who}: {mid(total)} needed, {gib(share.usable_bytes)} usable, {gib(-share.free_bytes)} short"


def parts(memory: Memory) -> list[Part]:
    """The parts that take anything, and the total."""
    told = [Part(key, TITLES[key], mid(amount), sure(amount)) for key, amount in memory.parts.items() if amount.high]
    return [*told, Part("total", "total", mid(memory.total), sure(memory.total))]


def host(plan: EnginePlan) -> str | None:
    """What lies in the host's memory, in one sentence; None where nothing does."""
    if not plan.host.total.high:
        return None
    told = [f"{TITLES[key]} {mid(amount)}" for key, amount in plan.host.parts.items() if amount.high]
    return f"Host memory: {mid(plan.host.total)} ({', '.join(told)})"


def limits(plan: EnginePlan) -> str:
    longest, most = plan.limits.max_ctx_tokens, plan.limits.max_seqs
    with_seqs = counted(plan.seqs, "sequence")
    at_ctx = f"{plan.ctx_tokens:,} tokens"
    native = plan.setup.model.native_context_tokens
    scaled = f" (beyond {native:,} with rope scaling)" if longest > native else ""
    first = f"Up to {longest:,} tokens{scaled} with {with_seqs}" if longest else f"No context fits with {with_seqs}"
    if not most:
        return f"{first}; no sequence fits at {at_ctx}."
    more = " or more" if most == MAX_SEQS else ""
    return f"{first}; up to {counted(most, 'sequence')}{more} at {at_ctx}."


def speed(plan: EnginePlan) -> Iterator[str]:
    """How fast, what bounds it, what that rests on, and what it costs: one sentence each."""
    found = plan.speed
    if found is None:
        yield (
            "Not known before somebody measured it: `qwen-plan probe --measure --output here.yaml` here, "
            "then `--gpu here.yaml`"
        )
        return
    start, full = found.start, found.full
    total = " of all sequences together" if plan.seqs > 1 else ""
    yield (
        f"Decodes ~{between(start.decode_tokens_per_s)} tokens/s{total} behind {start.context_tokens:,} tokens"
        + (f", ~{between(full.decode_tokens_per_s)} at {full.context_tokens:,}" if full != start else "")
        + f"; bound by {start.bound_by}"
        + (f", then {full.bound_by}" if full.bound_by != start.bound_by else "")
    )
    first = f"first token of a prompt of {start.context_tokens:,} after ~{seconds(start.ttft_s.mid)}"
    yield (
        f"Reads prompts at ~{between(start.prefill_tokens_per_s)} tokens/s: {first}"
        + (f", of {full.context_tokens:,} after ~{seconds(full.ttft_s.mid)}" if full != start else "")
    )
    drafts = found.drafts
    if drafts:
        until = (
            f"pays up to {counted(drafts.pays_up_to_seqs, 'sequence')}" if drafts.pays_up_to_seqs else "does not pay"
        )
        yield (
            f"Multi-token prediction advances by ~{drafts.tokens_per_pass:.1f} tokens a pass, {drafts.gain:.2f} x the "
            f"rate without it, and {until}"
        )
    yield f"How sure: {found.basis}; 80 % of runs held out lay between the figures in brackets"
    case = found.nearest
    if case:
        with_drafts = f", {counted(case.mtp, 'draft token')}" if case.mtp else ""
        yield (
            f"Nearest measured: {case.decode_tokens_per_s:g} tokens/s, {case.model} {case.weights} on {case.device} "
            f"with {case.engine}{with_drafts}, {case.depth_tokens:,} tokens deep ({case.source})"
        )


def costs(plan: EnginePlan) -> Iterator[str]:
    """Energy and money, beside an API."""
    found = plan.energy
    if found is None:
        yield "Energy: nobody says what these devices draw; --device-watts does"
        return
    low, high = found.api_usd_per_million_tokens
    api = usd(low) if low == high else f"{low:.2f} to {high:.2f} USD"
    yield (
        f"Draws ~{figure(found.watts.mid)} W, ~{figure(found.joules_per_token.mid)} J per token: "
        f"{usd(found.usd_per_million_tokens.mid)} per million tokens, {api} at an API"
    )
    if found.break_even_tokens and found.break_even_days:
        days = f"{found.break_even_days:,.0f} days" if found.break_even_days < 3650 else "more than ten years"
        yield f"Paid for after {found.break_even_tokens / 1e6:,.0f} million tokens: {days} of decoding without pause"
    elif found.device_usd_per_million_tokens is not None:
        yield "Never paid for: the energy alone costs as much as the API"
    if found.job:
        job = found.job
        yield (
            f"A job of {job.tokens:,} tokens: ~{between(job.hours)} hours, ~{figure(job.kwh.mid)} kWh, "
            f"{usd(job.usd.mid)}; at the API {api_job(found.api_usd_per_million_tokens, job.tokens)}"
        )
    yield f"Assumed: {'; '.join(found.assumptions)}" if found.assumptions else "Nothing was assumed about prices"


def api_job(api_usd_per_million: tuple[float, float], tokens: int) -> str:
    low, high = (price * tokens / 1e6 for price in api_usd_per_million)
    return usd(low) if low == high else f"{low:,.2f} to {high:,.2f} USD"


def between(interval: Interval) -> str:
    return f"{figure(interval.mid)} ({figure(interval.low)} to {figure(interval.high)})"


def figure(value: float) -> str:
    """Two or three digits that mean something: 0.71, 7.4, 35, 2,880."""
    if value >= 100:
        step = 10 ** (len(str(int(value))) - 3)
        return f"{round(value / step) * step:,}"
    return f"{value:.0f}" if value >= 20 else f"{value:.2g}"


def seconds(value: float) -> str:
    if value < 120:
        return f"{figure(value)} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def usd(value: float) -> str:
    return f"{value:,.2f} USD" if value >= 0.1 else f"{value:.2g} USD"


def launches(plan: EnginePlan) -> tuple[str, ...]:
    """The launch line of each box, the one that serves first."""
    found = plan.detail.get("node_commands")
    return tuple(map(str, found)) if isinstance(found, list) else (plan.command,)


def runner_up(plan: EnginePlan) -> tuple[str, ...]:
    return (
        f"{plan.engine} {plan.engine_version}",
        plan.weights,
        plan.kv_dtype,
        f"~{figure(plan.speed.start.decode_tokens_per_s.mid)}" if plan.speed else "",
        f"{gib(-plan.shortfall_bytes)}{' (tight)' if plan.tight else ''}",
        f"{plan.limits.max_ctx_tokens:,}",
        f"{plan.limits.max_seqs:,}",
    )


RUNNER_UP_TITLES = ("engine", "weights", "KV cache", "tokens/s", "to spare", "max tokens", "max sequences")


def refusals(plan: Plan) -> Iterator[tuple[str, str]]:
    """Who else does not make it, and why: the plans that do not fit, then the engines that have none."""
    for other in plan.plans[1:]:
        if not other.fits:
            why = other.reasons[0] if other.reasons else f"{gib(other.shortfall_bytes)} short"
            yield f"{other.engine} ({other.weights}, KV cache {other.kv_dtype})", why
    for skipped in plan.skipped:
        yield skipped.engine, skipped.reason


def gib(amount_bytes: int) -> str:
    return f"{amount_bytes / GIB:.2f} GiB"


def mid(amount: Amount) -> str:
    return gib(amount.mid) if amount.exact else f"~{gib(amount.mid)}"


def sure(amount: Amount) -> str:
    low, high = f"{amount.low / GIB:.2f}", f"{amount.high / GIB:.2f}"
    if amount.exact:
        return "exact"
    return "estimated" if low == high else f"{low} to {high}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
