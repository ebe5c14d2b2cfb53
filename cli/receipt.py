"""`qwen-plan receipt LOG`: an engine's boot log beside the plan of it, part by part.

0 every total lies within the tolerance, 1 not so (or the engine died), 2 no answer.
"""

import sys
from collections.abc import Collection
from json import dumps
from time import strftime

from ..planner.logs.engine_log import EngineLog, read_log_file
from ..planner.plan import EnginePlan
from ..planner.receipt import Receipt, asked, receipt
from ..planner.request import Request
from ..planner.scores import TOTAL, PartScore, worst_error
from ..profiles.errors import BadInput
from .output import Screen, clean, columns, quietly_closed, say, screen, wrapped, write

GIB = 1 << 30
MIB = 1 << 20
SHARED_FACTS = ("kv_cache_tokens", "max_concurrency", "block_tokens", "state_slots")  # of logs and plans, by one name
PLANNED_FACTS = {"state_slots": "max_mamba_cache_size"}


def show_receipt(
    path: str,
    request: Request,
    given: Collection[str],
    tolerance: float,
    output: str | None,
    form: str,
    date: str | None,
    source: str | None,
) -> int:
    """The exit status. Fields of the request that are named in `given` count more than the log's words; `output` is a
    file for the receipt, `form` what stdout gets: text or json."""
    from importlib.metadata import version

    from ..planner.receipt_file import text as file_text

    if not 0 <= tolerance < 1:
        raise BadInput(f"--tolerance {tolerance:g}: give a share of at least 0 and less than 1, such as 0.05")
    log = read_log_file(path, request.engine)
    resolved, notes = asked(log, request, given)
    plan = _plan(resolved)
    made = receipt(plan, log, _date(date), version("qwenfit"), source)
    within = not log.died and worst_error(made.scores) <= tolerance
    if output:
        from .matrix import save_file

        save_file(output, file_text(made))
        say(f"qwen-plan: wrote {output}")
    try:
        if form == "json":
            told = {**made.to_json(), "within_tolerance": within, "tolerance": tolerance, "notes": list(notes)}
            write(dumps(told, indent=1, allow_nan=False) + "\n")
        else:
            write(_text(made, plan, notes, tolerance, within, screen(sys.stdout)))
    except BrokenPipeError:
        quietly_closed()
    return 0 if within else 1


def _plan(request: Request) -> EnginePlan:
    from ..planner.search import search

    return search(request).best


def _date(given: str | None) -> str:
    told = given or strftime("%Y-%m-%d")
    numbers = told.split("-")
    if [len(number) for number in numbers] != [4, 2, 2] or not all(map(str.isdecimal, numbers)):
        raise BadInput(f"--date {clean(told)[:40]}: write it like 2026-11-22")
    return told


def _text(made: Receipt, plan: EnginePlan, notes: tuple[str, ...], tolerance: float, within: bool, seen: Screen) -> str:
    log = made.log
    lines = wrapped(clean(f"{_verdict(made, tolerance, within)}: {_boot(log)}"), seen.width, rest="  ")
    if log.died:
        lines += wrapped(clean(f"It ran out of memory: {log.died}"), seen.width, first="  ", rest="    ")
    lines.append("")
    if made.scores:
        rows = [("", "part", "planned", "logged", "error", "in its interval"), *map(_row, made.scores)]
        lines += [*columns(rows, right=(2, 3, 4)), ""]
    lines += _facts(log, plan)
    for note in (*log.notes, *notes):
        lines += wrapped(clean(f"note: {note}"), seen.width, rest="  ")
    return "\n".join([*lines, ""])


def _verdict(made: Receipt, tolerance: float, within: bool) -> str:
    if made.log.died:
        return "Died at boot"
    worst = worst_error(made.scores)
    return f"{'Within' if within else 'Out of'} tolerance ({worst:.1%} off at most, {tolerance:.0%} allowed)"


def _boot(log: EngineLog) -> str:
    words = [f"{log.engine} {log.version}" if log.version else log.engine]
    if log.model:
        words.append(f"of {log.model}")
    for key, unit in (("ctx_tokens", "tokens"), ("seqs", "sequences"), ("kv_dtype", "cache")):
        value = log.settings.get(key)
        if value is not None:
            words.append(f"{value:,} {unit}" if isinstance(value, int) else f"{value} {unit}")
    return ", ".join(words)


def _row(one: PartScore) -> tuple[str, ...]:
    mark = "=" if one.planned.exact else "~"
    within = "yes" if one.within else "no"
    place = "" if one.part != TOTAL else "total"
    name = one.part.replace("_", " ").replace("+", " + ") if not place else "total"
    return (
        one.place,
        name,
        f"{mark}{_size(one.planned.mid)}",
        _size(one.measured_bytes),
        f"{round(one.error, 4) + 0:+.1%}",
        within,
    )


def _size(amount_bytes: int) -> str:
    return f"{amount_bytes / GIB:.3f} GiB" if amount_bytes >= GIB // 10 else f"{amount_bytes / MIB:.2f} MiB"


def _facts(log: EngineLog, plan: EnginePlan) -> list[str]:
    """What both say in the engine's own words."""
    rows: list[tuple[str, ...]] = []
    for key in SHARED_FACTS:
        logged, planned = log.facts.get(key), plan.detail.get(PLANNED_FACTS.get(key, key))
        if isinstance(logged, int | float) and isinstance(planned, int | float):
            rows.append((key.replace("_", " "), f"{planned:,}", f"{logged:,}"))
    return [*columns([("", "planned", "logged"), *rows], right=(1, 2)), ""] if rows else []
