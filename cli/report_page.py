"""The capacity report in words and tables, in the order in which it is read: HTML and Markdown lay out one page."""

from collections.abc import Iterator
from typing import NamedTuple

from ..planner.money import Bill
from ..planner.report import Kind, Report, pays, setup, sources
from ..planner.speed import drafts
from ..planner.whatif import Memory, WhatIf, Width

GIB = 1 << 30
Extras = tuple[Memory, tuple[Width, ...], tuple[WhatIf, ...]]


class Table(NamedTuple):
    titles: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: tuple[int, ...] = ()


class Section(NamedTuple):
    """A heading, sentences, names of charts (report_charts.py), and tables."""

    title: str
    says: list[str]
    charts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


class Page(NamedTuple):
    title: str
    verdict: str
    holds: bool
    answer: list[str]
    sections: list[Section]


def page(found: Report, extras: Extras) -> Page:
    memory, widths, what_ifs = extras
    verdict = "Yes" if found.holds and not found.slow_failures else "Yes, but only just" if found.holds else "No"
    return Page(
        found.question.title,
        verdict,
        found.holds,
        answer(found),
        [
            _latency(found),
            _breaking(found),
            _memory(found.kinds[0], memory),
            _throughput(found, widths),
            _candidates(found),
            _cost(found),
            _what_ifs(found, what_ifs),
            _assumptions(found),
        ],
    )


def answer(found: Report) -> list[str]:
    """What somebody reads who reads nothing else."""
    question, load = found.question, found.question.workload
    asked = f"{load.users:,} users" if load.users is not None else f"{load.rate_per_s:,.6g} requests a second"
    who = " and ".join(f"{kind.replicas:,} x {kind.replica.title}" for kind in found.kinds)
    verb = "serve" if sum(kind.replicas for kind in found.kinds) > 1 else "serves"
    told = [f"{who} {verb if found.holds else 'cannot serve'} {asked} of {found.model} as promised."]
    told += [f"{'Why' if place == 0 else 'And'}: {reason}." for place, reason in enumerate(found.failures)]
    for kind in found.kinds:
        seen, name = kind.measured, f"{kind.replica.title}: " if len(found.kinds) > 1 else ""
        told.append(
            f"{name}95 % of the requests have their first token within {seconds(seen.p95_ttft_s)}"
            f"{_promised(load.targets.p95_ttft_s)}, and {seconds(seen.p95_tpot_s)} per token after it"
            f"{_promised(load.targets.p95_tpot_s)}."
        )
    if found.holds and found.slow_failures:
        reasons = "; ".join(found.slow_failures)
        told.append(f"If everything is as slow as the cautious end of the speed model's interval: {reasons}.")
    told += [_fewest(kind) for kind in found.kinds if kind.fewest]
    if question.workload.targets.p95_ttft_s is None and question.workload.targets.p95_tpot_s is None:
        told.append("Nothing is promised: the answer only says that the queue does not grow.")
    return told


def _promised(target: float | None) -> str:
    return f" (promised: {seconds(target)})" if target is not None else ""


def _fewest(kind: Kind) -> str:
    fewest, slow = kind.fewest, kind.fewest_slow
    assert fewest is not None and slow is not None
    if not fewest.replicas:
        return f"No number of {kind.replica.title} keeps the promises: {fewest.reasons[0]}."
    if not slow.replicas:
        return (
            f"The fewest that keep the promises: {fewest.replicas:,} x {kind.replica.title}; at the cautious end of "
            "the interval no number does."
        )
    if slow.replicas == fewest.replicas:
        return f"The fewest that keep the promises: {fewest.replicas:,} x {kind.replica.title}."
    return (
        f"The fewest that keep the promises: {fewest.replicas:,} x {kind.replica.title}, or {slow.replicas:,} at the "
        "cautious end of the interval."
    )


def _latency(found: Report) -> Section:
    tables, says = [], []
    for kind in found.kinds:
        seen = kind.measured
        rows = [
            (what, *(seconds(value) for value in values))
            for what, values in (
                ("time to first token", seen.ttft_s),
                ("time per output token", seen.tpot_s),
                ("whole answer", seen.latency_s),
                ("of that, waiting for a seat", seen.wait_s),
            )
        ]
        tables.append(Table((f"{kind.replica.title}", "p50", "p90", "p95", "p99"), rows, (1, 2, 3, 4)))
        says.append(
            f"{kind.replicas:,} x {kind.replica.title} ({setup(kind.replica)}): each replica runs "
            f"{seen.mean_running:.1f} of its {seen.seats:,} seats on average, is busy {seen.utilization:.0%} of the "
            f"time, gives out {seen.decode_tokens_per_s:,.0f} tokens/s, had at most {seen.peak_waiting:,} waiting, "
            f"and preempted {seen.preemptions:,} times in {seen.requests:,} simulated requests."
        )
        says.append(f"Launch each with: {kind.replica.command}")
    return Section("What users see", says, ("ttft", "tpot"), tuple(tables))


def _breaking(found: Report) -> Section:
    says = []
    for kind in found.kinds:
        breaking, name = kind.breaking, f"{kind.replica.title}: " if len(found.kinds) > 1 else ""
        if breaking.factor >= 1e6:
            says.append(f"{name}{breaking.cause}.")
        elif breaking.factor <= 0:
            says.append(f"{name}no share of this load is served as promised: {breaking.promise} ({breaking.cause}).")
        else:
            says.append(
                f"{name}Up to {breaking.factor:.2f} times this load is served as promised. Beyond it the first to "
                f"break: {breaking.promise}. What runs out: {breaking.cause}."
            )
    rows = [
        (
            f"{point.factor:g}",
            seconds(point.p95_ttft_s),
            seconds(point.p95_tpot_s),
            f"{point.utilization:.0%}",
            "yes" if point.holds else "no",
        )
        for point in found.load
    ]
    titles = ("times the load", "p95 first token", "p95 per token", "busy", "as promised")
    return Section("What breaks first", says, (), (Table(titles, rows, (0, 1, 2, 3)),))


def _memory(kind: Kind, memory: Memory) -> Section:
    titles = ("context", *(f"{curve.kv_dtype}{' (chosen)' if curve.chosen else ''}" for curve in memory.curves))
    rows = [
        (f"{context:,}", *(_gib(curve.needed_bytes[place], memory.usable_bytes) for curve in memory.curves))
        for place, context in enumerate(memory.contexts_tokens)
    ]
    plan = kind.replica.plan
    says = [
        f"GiB on the fullest device for one sequence, by type of KV cache ({plan.engine}, weights {plan.weights}); "
        f"{memory.usable_bytes / GIB:.2f} GiB can be used, and what needs more is marked with an asterisk. Only the "
        "full-attention layers have a KV cache: the rest is weights and a state that does not grow."
    ]
    right = tuple(range(len(titles)))
    return Section("Memory over context", says, ("memory",), (Table(titles, rows, right),))


def _throughput(found: Report, widths: tuple[Width, ...]) -> Section:
    rows = [
        (
            f"{point.seqs:,}",
            f"{point.tokens_per_s:,.0f}",
            f"{point.low_tokens_per_s:,.0f}",
            f"{point.each_tokens_per_s:,.1f}",
        )
        for point in widths
    ]
    says = [
        f"One replica of {found.kinds[0].replica.title} that only decodes, every sequence at the mean length of "
        f"{found.mean_tokens:,} tokens."
    ]
    plan = found.kinds[0].replica.plan
    if plan.mtp:
        gained = drafts(plan, found.mean_tokens)
        says.append(
            f"With {plan.mtp} draft token{'s' if plan.mtp > 1 else ''} a pass brings {gained.tokens_per_pass:.2f} "
            f"tokens of a sequence: {pays(gained)} at that length."
        )
    titles = ("sequences", "tokens/s of all", "cautious", "tokens/s of each")
    return Section(
        "Tokens per second over concurrency", says, ("throughput", "each"), (Table(titles, rows, (0, 1, 2, 3)),)
    )


def _candidates(found: Report) -> Section:
    rows = []
    for one in found.candidates:
        owed = one.bill
        rows.append(
            (
                one.devices,
                f"{one.replicas:,}" if one.replicas else "none",
                one.setup,
                seconds(one.p95_ttft_s) if one.p95_ttft_s else "-",
                seconds(one.p95_tpot_s) if one.p95_tpot_s else "-",
                _dollars(owed.devices_usd if owed else None),
                _dollars(owed.usd_per_month if owed else None),
                one.reason or "-",
            )
        )
    titles = ("device", "fewest", "set-up", "p95 first token", "p95 per token", "devices", "a month", "why not")
    says = ["The fewest replicas of each device that keep the promises."] if rows else ["No candidates were asked for."]
    tables = (Table(titles, rows, (1, 3, 4, 5, 6)),) if rows else ()
    return Section("Which device", says, (), tables)


def _cost(found: Report) -> Section:
    owed, question = found.bill, found.question
    rows = list(_bill_rows(owed, question.tariff.term_years))
    says = []
    if owed.devices_usd is None:
        says.append("No monthly cost: money.device_price_usd does not say what these devices cost.")
    if owed.break_even_months is not None:
        says.append(f"The devices have paid for themselves after {owed.break_even_months:.1f} months of this load.")
    elif owed.usd_per_month is not None:
        says.append("At this load the energy alone costs more than the API: the devices never pay for themselves.")
    return Section("Cost", says, (), (Table(("what", "amount"), rows, (1,)),) if rows else ())


def _bill_rows(owed: Bill, years: float) -> Iterator[tuple[str, str]]:
    if owed.power_w:
        low, mid, high = owed.power_w
        yield "power, on average", f"{mid:,.0f} W ({low:,.0f} to {high:,.0f})"
    if owed.joules_per_token is not None:
        yield "energy per token given out", f"{owed.joules_per_token:.3g} J"
    for what, amount in (
        ("energy a month", owed.energy_usd_per_month),
        ("devices", owed.devices_usd),
        (f"a month, devices over {years:g} years", owed.usd_per_month),
        ("per million tokens given out", owed.usd_per_million_tokens),
    ):
        if amount is not None:
            yield what, _dollars(amount)
    low, high = owed.api_usd_per_month
    yield (
        "the same tokens from an API, a month",
        _dollars(low) if low == high else f"{_dollars(low)} to {_dollars(high)}",
    )


def _what_ifs(found: Report, what_ifs: tuple[WhatIf, ...]) -> Section:
    rows = [
        (
            one.change,
            seconds(one.p95_ttft_s) if one.p95_ttft_s else "-",
            seconds(one.p95_tpot_s) if one.p95_tpot_s else "-",
            "yes" if one.holds else "no",
            f"{one.replicas:,}" if one.replicas else "none",
            one.reason or "-",
        )
        for one in what_ifs
    ]
    kind = found.kinds[0]
    says = [
        f"One change at a time to {kind.replicas:,} x {kind.replica.title}, and the fewest replicas that would then "
        "keep the promises."
    ]
    titles = ("change", "p95 first token", "p95 per token", "as promised", "fewest", "why none")
    return Section("What if", says, (), (Table(titles, rows, (1, 2, 4)),))


def _assumptions(found: Report) -> Section:
    says = [
        "Simulated event by event with the engine's own limits; not measured on these devices. Percentiles of one load "
        "of this kind, drawn from a fixed seed. The interval of the speed model is the range that held 80 % of "
        "published measurements that it had not seen."
    ]
    return Section("Assumptions", says, (), (Table(("what", "value", "source, or why"), sources(found)),))


def seconds(value: float) -> str:
    if value <= 0:
        return "0 s"
    if value >= 10:
        return f"{value:,.0f} s"
    if value >= 1:
        return f"{value:.1f} s"
    return f"{value * 1000:.0f} ms" if value >= 0.01 else f"{value * 1000:.1f} ms"


def _gib(needed_bytes: int, usable_bytes: int) -> str:
    return f"{needed_bytes / GIB:.2f}{'*' if needed_bytes > usable_bytes else ''}"


def _dollars(amount: float | None) -> str:
    if amount is None:
        return "-"
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:,.2f}" if amount >= 0.1 else f"${amount:.4f}"
