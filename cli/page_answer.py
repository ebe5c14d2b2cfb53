"""What the page shows of one answer, laid out for its template: words from phrases.py, bars as numbers for SVG.

Nothing is computed here but where a bar ends; every figure and every sentence is the command's.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ..planner.engines.engine import DeviceShare
from ..planner.offers import Offer, Offers
from ..planner.plan import MAX_SEQS, EnginePlan, Plan
from . import phrases

BAR_UNITS = 1000  # the width of a bar in its own coordinates
STATES = {"Fits": "yes", "Fits, but only just": "tight", "Does not fit": "no"}
OFFER_TITLES = ("device", "price", "tokens/s", "max tokens", "engine", "weights", "KV cache")
UNKNOWN = "not known"


class Segment(NamedTuple):
    """A part of a bar: which, where it begins and how wide it is, of `BAR_UNITS`."""

    key: str
    start: float
    width: float


class Share(NamedTuple):
    """The memory of one kind of device. `edge` is where the usable memory ends, for a bar that goes beyond it."""

    name: str
    title: str
    segments: tuple[Segment, ...]
    edge: float | None
    parts: tuple[phrases.Part, ...]
    note: str | None


class Figure(NamedTuple):
    """A number that people look for first, and what to read beside it."""

    title: str
    value: str
    says: str


class View(NamedTuple):
    verdict: str
    state: str
    says: str  # the answer in one line, for a screen reader too
    question: str
    setup: str
    reasons: tuple[str, ...]
    figures: tuple[Figure, ...]
    shares: tuple[Share, ...]
    host: str | None
    limits: str
    commands: tuple[str, ...]  # of every box, the one that serves first
    lists: tuple[tuple[str, list[str]], ...]
    runners_up: list[tuple[str, ...]]
    refusals: list[str]


def view(plan: Plan) -> View:
    best, verdict = plan.best, phrases.verdict(plan)
    advice = [f"{one.change} ({'fits' if one.fits else 'not enough'}): {one.effect}" for one in plan.advice]
    lists = (
        ("What to change", advice),
        ("Warnings", list(best.warnings)),
        ("Speed", list(phrases.speed(best))),
        ("Energy and money", list(phrases.costs(best))),
    )
    return View(
        verdict=verdict,
        state=STATES[verdict],
        says=_says(best, verdict),
        question=phrases.question(plan),
        setup=phrases.setup(best),
        reasons=best.reasons,
        figures=tuple(_figures(best)),
        shares=tuple(_share(count, share) for count, share in phrases.shares(best)),
        host=phrases.host(best),
        limits=phrases.limits(best),
        commands=phrases.launches(best),
        lists=tuple((title, entries) for title, entries in lists if entries),
        runners_up=[phrases.runner_up(other) for other in plan.plans[1:] if other.fits],
        refusals=[f"{who}: {why}" for who, why in phrases.refusals(plan)],
    )


def _says(best: EnginePlan, verdict: str) -> str:
    """`Fits: ~10.72 of 11.63 GiB, ~45 tokens/s`"""
    fullest = min(best.devices, key=lambda share: share.free_bytes)
    where = f" on {fullest.device.title}" if len(best.devices) > 1 else ""
    words = [f"{verdict}: {phrases.mid(fullest.memory.total)} of {phrases.gib(fullest.usable_bytes)}{where}"]
    if best.speed:
        words.append(f"~{phrases.figure(best.speed.start.decode_tokens_per_s.mid)} tokens/s")
    return ", ".join(words)


def _figures(best: EnginePlan) -> Iterator[Figure]:
    found = best.speed
    if found is None:
        yield Figure("Decodes", UNKNOWN, "the device's bandwidth is not known")
        yield Figure("First token", UNKNOWN, "the device's bandwidth is not known")
    else:
        start, full = found.start, found.full
        rate, later = start.decode_tokens_per_s, full.decode_tokens_per_s
        at_full = f"; ~{phrases.between(later)} at {full.context_tokens:,}" if full != start else ""
        together = ", all sequences together" if best.seqs > 1 else ""
        yield Figure(
            "Decodes",
            f"~{phrases.figure(rate.mid)} tokens/s",
            f"{phrases.figure(rate.low)} to {phrases.figure(rate.high)} behind {start.context_tokens:,} tokens"
            f"{at_full}{together}",
        )
        wait = f"; ~{phrases.seconds(full.ttft_s.mid)} of {full.context_tokens:,}" if full != start else ""
        yield Figure(
            "First token",
            f"~{phrases.seconds(start.ttft_s.mid)}",
            f"of a prompt of {start.context_tokens:,} tokens{wait}",
        )
    longest, most = best.limits.max_ctx_tokens, best.limits.max_seqs
    with_seqs = phrases.counted(best.seqs, "sequence")
    yield Figure("Longest context", f"{longest:,}" if longest else "none", f"tokens with {with_seqs}")
    more = " or more" if most == MAX_SEQS else ""
    yield Figure("Most sequences", f"{most:,}{more}" if most else "none", f"at {best.ctx_tokens:,} tokens each")


def _share(count: int, share: DeviceShare) -> Share:
    total = share.memory.total.mid
    whole = max(total, share.usable_bytes, 1)
    segments, start_bytes = [], 0
    for key, amount in share.memory.parts.items():
        if amount.mid:
            start = BAR_UNITS * start_bytes / whole
            segments.append(Segment(key, round(start, 2), round(BAR_UNITS * amount.mid / whole, 2)))
            start_bytes += amount.mid
    return Share(
        name=share.device.title,
        title=phrases.held(count, share),
        segments=tuple(segments),
        edge=round(BAR_UNITS * share.usable_bytes / whole, 2) if total > share.usable_bytes else None,
        parts=tuple(phrases.parts(share.memory)),
        note=share.device.note,
    )


def offer_rows(offers: Offers) -> list[tuple[str, ...]]:
    """A row per offer, under `OFFER_TITLES`."""
    return [_offer_row(one) for one in offers.found]


def _offer_row(one: Offer) -> tuple[str, ...]:
    engine, weights, kv_dtype, speed, *_ = phrases.runner_up(one.plan)
    name = one.price.device.title
    return (
        f"{one.count} x {name}" if one.count > 1 else name,
        f"${one.usd:,}",
        *(speed, f"{one.limits.max_ctx_tokens:,}", engine, weights, kv_dtype),
    )


def offer_sources(offers: Offers) -> list[str]:
    """Where the prices stand, one sentence each, every price once."""
    told = {
        one.price.device.name: f"{one.price.device.title}: ${one.price.usd:,}, {one.price.what} ({one.price.source})"
        for one in offers.found
    }
    return list(told.values())
