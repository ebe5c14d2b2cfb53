"""`qwen-plan receipt LOG`: an engine's boot log beside the plan of it, part by part.

0 totals lie within the tolerance and parts in it or in their intervals, 1 not so (or the engine died), 2 no answer.
"""

import sys
from collections.abc import Collection
from json import dumps
from time import strftime

from ..planner.logs.engine_log import EngineLog, read_log_file
from ..planner.plan import EnginePlan
from ..planner.receipt import Receipt, asked, receipt
from ..planner.request import Request
from ..planner.scores import PartScore, misses, worst_error
from ..profiles.errors import BadInput
from ..profiles.names import join_or
from .options import flag_of
from .output import Screen, clean, columns, quietly_closed, say, screen, wrapped, write
from .phrases import counted

GIB = 1 << 30
MIB = 1 << 20
SHARED_FACTS = ("kv_cache_tokens", "max_concurrency", "block_tokens", "state_slots")  # of logs and plans, by one name
PLANNED_FACTS = {"state_slots": "max_mamba_cache_size"}


def show_receipt(
    path: str,
    request: Request,
    given: Collection[str],
    *,
    tolerance: float,
    form: str,
    plan: str | None = None,
    output: str | None = None,
    date: str | None = None,
    source: str | None = None,
) -> int:
    """The exit status. Fields of the request that are named in `given` count more than the log's words; `output` is a
    file for the receipt, `form` what stdout gets: text or json."""
    from importlib.metadata import version

    from ..planner.receipt_file import text as file_text

    if not 0 <= tolerance < 1:
        raise BadInput(f"--tolerance {tolerance:g}: give a share of at least 0 and less than 1, such as 0.05")
    log = read_log_file(path, request.engine)
    found, notes = _from_file(plan, log, request, given) if plan else _from_log(log, request, given)
    made = receipt(found, log, _date(date), version("qwenfit"), source)
    within = not log.died and not misses(made.scores, tolerance)
    if output:
        from .matrix import save_file

        save_file(output, file_text(made))
        say(f"qwen-plan: wrote {output}")
    try:
        if form == "json":
            told = {**made.to_json(), "within_tolerance": within, "tolerance": tolerance, "notes": list(notes)}
            write(dumps(told, indent=1, allow_nan=False) + "\n")
        else:
            write(_text(made, found, notes, tolerance, within, screen(sys.stdout)))
    except BrokenPipeError:
        quietly_closed()
    return 0 if within else 1


def _from_log(log: EngineLog, request: Request, given: Collection[str]) -> tuple[EnginePlan, tuple[str, ...]]:
    from ..planner.search import search

    resolved, notes = asked(log, request, given)
    return search(resolved).best, notes


def _from_file(
    path: str, log: EngineLog, request: Request, given: Collection[str]
) -> tuple[EnginePlan, tuple[str, ...]]:
    """The plan of the log's engine in a file, which says everything else too."""
    from ..planner.plan_file import read_plan

    more = sorted(set(given) - {"engine", "calibration"})
    if more:
        raise BadInput(f"--plan says what was started: leave out {join_or([flag_of(name) for name in more])}")
    found = read_plan(path, request.engine or log.engine, request.options.calibration)
    return found.plan, ()


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
    if within:
        return f"Within {tolerance:.0%} ({worst_error(made.scores):.1%} off in all)"
    worst = max(misses(made.scores, tolerance), key=lambda one: abs(one.error))
    return f"Out of {tolerance:.0%} ({worst.place} {_name(worst)} {worst.error:+.1%})"


def _boot(log: EngineLog) -> str:
    words = [f"{log.engine} {log.version}" if log.version else log.engine]
    if log.model:
        words.append(f"of {log.model}")
    for key, unit in (("ctx_tokens", "token"), ("seqs", "sequence")):
        value = log.settings.get(key)
        if isinstance(value, int):
            words.append(counted(value, unit))
    if log.settings.get("kv_dtype"):
        words.append(f"{log.settings['kv_dtype']} cache")
    return ", ".join(words)


def _row(one: PartScore) -> tuple[str, ...]:
    planned = f"{'=' if one.planned.exact else '~'}{_size(one.planned.mid)}"
    error = f"{round(one.error, 3) + 0:+.1%}"  # + 0: no -0.0 %
    return one.place, _name(one), planned, _size(one.measured_bytes), error, "yes" if one.within else "no"


def _name(one: PartScore) -> str:
    return one.part.replace("_", " ").replace("+", " + ")


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
