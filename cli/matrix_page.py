"""A matrix's answer in every rendering: table, Markdown for a pull request, JSON, GitHub's annotations and outputs."""

from collections.abc import Sequence
from json import dumps

from ..planner.matrix import GIB, Change, Interval, Verdict
from ..planner.money import Tariff
from .github import annotation, append
from .markdown import escaped, grid
from .output import Screen, clean, columns, wrapped
from .phrases import boxes

MAX_ANNOTATIONS = 9  # of one kind; GitHub shows about ten per step
MAX_JOBS = 256  # of one GitHub job matrix
MAX_SUMMARY_BYTES = 1 << 20  # of one step
MAX_ROWS = 300  # in a comment, which GitHub cuts at 65,536 characters
TITLES = ("device", "model", "context", "seqs", "verdict", "engine", "weights", "KV cache", "memory GiB", "tokens/s")
RIGHT = (2, 3, 8, 9)
JOB_TITLES = ("hours", "kWh", "USD")
MARKS = {"worse": "✗", "better": "✓", "changed": "~", "new": "+", "gone": "-"}


def document(where: str, verdicts: Sequence[Verdict], changes: Sequence[Change] | None, passes: bool) -> str:
    """The answer as JSON, one line per cell, so that two runs differ where their answers do."""
    head = {"schema": 1, "matrix": where, "passes": passes}
    lines = [f"{dumps(name)}: {dumps(value)}" for name, value in head.items()]
    if changes is not None:
        told = [{"key": one.key, "kind": one.kind, "what": one.what, "line": one.line} for one in changes]
        lines.append(f'"changes": {_listed([dumps(one) for one in told])}')
    lines.append(f'"cells": {_listed([dumps(one.to_json(), allow_nan=False) for one in verdicts])}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def table(verdicts: Sequence[Verdict], changes: Sequence[Change] | None, screen: Screen) -> str:
    titles, right, jobs = _columns(verdicts)
    lines = columns([titles, *([clean(cell) for cell in _row(one, bool(jobs))] for one in verdicts)], right)
    for one in verdicts:
        for what in (*one.failures, *one.cautions):
            told = f"{_asked(one)} (line {one.cell.line}): {clean(what)}"
            lines += wrapped(told, screen.width, first="  - ", rest="    ")
    for told in jobs:
        lines += ["", *wrapped(told, screen.width)]
    lines += ["", *wrapped(_count(verdicts), screen.width)]
    if changes is not None:
        lines += ["", clean(_changed(changes))]
        for one in changes:
            lines += wrapped(f"{one.kind}: {clean(one.key)}: {clean(one.what)}", screen.width, "  - ", "    ")
    return "\n".join([*lines, ""])


def markdown(where: str, verdicts: Sequence[Verdict], changes: Sequence[Change] | None, passes: bool) -> str:
    """For a job summary or a comment: what failed and what changed first, the whole table folded below."""
    verdict = "passes" if passes else "fails"
    lines = [f"### {'✓' if passes else '✗'} Hardware matrix {verdict}: {escaped(where)}", "", _count(verdicts), ""]
    if changes is not None:
        lines += [f"**{_changed(changes)}**", ""]
        rows = [(f"{MARKS[one.kind]} {one.kind}", one.key, one.what) for one in changes[:MAX_ROWS]]
        lines += [*grid(("", "cell", "what"), rows), ""] if rows else []
    failed = [(_asked(one), "; ".join(one.failures)) for one in verdicts if one.failures]
    if failed:
        lines += ["**Failed**", "", *grid(("cell", "why"), failed[:MAX_ROWS]), ""]
    titles, right, jobs = _columns(verdicts)
    if jobs:
        asked = [(_asked(one), *_job_row(one)) for one in verdicts if one.job_hours][:MAX_ROWS]
        lines += [*grid(("cell", *JOB_TITLES), asked, (1, 2, 3)), "", *jobs, ""]
    shown = verdicts[:MAX_ROWS]
    rest = f" (the first {MAX_ROWS} of {len(verdicts)})" if len(verdicts) > MAX_ROWS else ""
    lines += [
        f"<details><summary>All cells{rest}</summary>",
        "",
        *grid(titles, (_row(one, bool(jobs)) for one in shown), right),
        "",
        "</details>",
    ]
    return "\n".join([*lines, ""])


def github(
    path: str,
    where: str,
    verdicts: Sequence[Verdict],
    changes: Sequence[Change] | None,
    passes: bool,
    worse: Sequence[str],
) -> str:
    """Appends to $GITHUB_STEP_SUMMARY and $GITHUB_OUTPUT where they are set; returns the annotations for stdout.

    `worse` are the keys that make this run fail: they are errors, other failures warnings.
    """
    failing = set(worse)
    lines = []
    errors = [one for one in verdicts if one.cell.key in failing]
    reasons = {one.key: one.what for one in changes or ()}
    for one in errors[:MAX_ANNOTATIONS]:
        told = reasons.get(one.cell.key) or "; ".join(one.failures)
        lines.append(annotation("error", f"{_asked(one)}: {told}", "qwen-plan matrix", path, one.cell.line))
    if len(errors) > MAX_ANNOTATIONS:
        lines.append(annotation("error", f"{len(errors) - MAX_ANNOTATIONS} more cells fail: see the job summary"))
    warned = [one for one in verdicts if one.cell.key not in failing and (one.failures or one.cautions)]
    for one in warned[:MAX_ANNOTATIONS]:
        told = "; ".join((*one.failures, *one.cautions))
        lines.append(annotation("warning", f"{_asked(one)}: {told}", "qwen-plan matrix", path, one.cell.line))
    fitting = [one for one in verdicts if one.passes and one.fits]
    if len(fitting) > MAX_JOBS:
        lines.append(annotation("notice", f"matrix= names the first {MAX_JOBS} of {len(fitting)} cells that pass"))
    summary = markdown(where, verdicts, changes, passes)
    if len(summary.encode()) > MAX_SUMMARY_BYTES or not append("GITHUB_STEP_SUMMARY", summary):
        lines.append(summary)
    outputs = {
        "passes": "true" if passes else "false",
        "failed": str(sum(1 for one in verdicts if not one.passes)),
        "worse": str(len(errors)),
        "matrix": dumps({"include": [_job(one) for one in fitting[:MAX_JOBS]]}, separators=(",", ":")),
    }
    append("GITHUB_OUTPUT", "".join(f"{name}={value}\n" for name, value in outputs.items()))
    return "\n".join([*lines, _count(verdicts), ""])


def _job(verdict: Verdict) -> dict[str, object]:
    told = verdict.to_json()
    return {
        name: told[name]
        for name in ("device", "nodes", "model", "ctx_tokens", "seqs", "engine", "weights", "kv_dtype", "command")
    }


def _columns(verdicts: Sequence[Verdict]) -> tuple[tuple[str, ...], tuple[int, ...], list[str]]:
    """Titles, which of them stand to the right, and a sentence on what the columns of a job count; none, no columns."""
    asked = [one.cell.request.prices for one in verdicts if one.cell.request.prices.job_tokens]
    if not asked:
        return TITLES, RIGHT, []
    tariff = Tariff(asked[0].usd_per_kwh, (), asked[0].years, None)
    sizes = sorted({prices.job_tokens or 0 for prices in asked})
    devices = f" and the devices over {tariff.term_years:g} years of such work, where their price is given"
    told = (
        f"A job of {' or '.join(f'{size:,}' for size in sizes)} output tokens, decoded without pause: USD are energy "
        f"at {tariff.kwh:g} a kWh{devices if any(prices.device_usd is not None for prices in asked) else ' alone'}. "
        "Reading the prompts, host and cooling are not counted."
    )
    right = (*RIGHT, *range(len(TITLES), len(TITLES) + len(JOB_TITLES)))
    return (*TITLES, *JOB_TITLES), right, [told]


def _job_row(one: Verdict) -> tuple[str, ...]:
    return tuple(_interval(amount, 1, _digits(amount)) for amount in (one.job_hours, one.job_kwh, one.job_usd))


def _digits(amount: Interval | None) -> int:
    return 0 if amount is None or amount[1] >= 100 else 1 if amount[1] >= 1 else 3


def _row(one: Verdict, with_job: bool) -> tuple[str, ...]:
    request = one.cell.request
    return (
        boxes(request.nodes, ",".join(request.devices)),
        request.model,
        f"{request.ctx_tokens:,}",
        f"{request.seqs:,}",
        _verdict(one),
        one.engine or "-",
        one.weights or "-",
        one.kv_dtype or "-",
        _interval(one.memory_bytes, GIB, 2),
        _interval(one.decode_tokens_per_s, 1, 0),
        *(_job_row(one) if with_job else ()),
    )


def _verdict(one: Verdict) -> str:
    if not one.passes:
        return "fails"
    if not one.fits:
        return "does not fit"
    return "only just" if one.cautions else "passes"


def _interval(interval: Interval | None, scale: float, digits: int) -> str:
    if interval is None:
        return "-"
    low, mid, high = (f"{value / scale:,.{digits}f}" for value in interval)
    return mid if low == high else f"{mid} ({low} to {high})"


def _asked(one: Verdict) -> str:
    request = one.cell.request
    seqs = f" x {request.seqs:,}" if request.seqs > 1 else ""
    where = boxes(request.nodes, ",".join(request.devices))
    return f"{request.model} on {where}, {request.ctx_tokens:,} tokens{seqs}"


def _count(verdicts: Sequence[Verdict]) -> str:
    failed = sum(1 for one in verdicts if not one.passes)
    fitting = sum(1 for one in verdicts if one.fits)
    told = f"{failed:,} of {len(verdicts):,} cells fail" if failed else f"All {len(verdicts):,} cells pass"
    return f"{told}; {fitting:,} fit."


def _changed(changes: Sequence[Change]) -> str:
    if not changes:
        return "Nothing changed."
    counts = [(kind, sum(1 for one in changes if one.kind == kind)) for kind in MARKS]
    return "Against the older run: " + ", ".join(f"{count:,} {kind}" for kind, count in counts if count)


def _listed(lines: Sequence[str]) -> str:
    return "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"
