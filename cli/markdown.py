"""The answer as Markdown: for a pull request, a wiki, a job summary."""

from collections.abc import Iterable, Sequence

from ..planner.plan import Plan
from . import phrases
from .output import clean


def markdown(plan: Plan, notes: tuple[str, ...] = ()) -> str:
    best = plan.best
    lines = [
        f"### {phrases.verdict(plan)}: {escaped(phrases.question(plan))}",
        "",
        f"{'Best' if plan.fits else 'Nearest'}: {escaped(phrases.setup(best))}",
        "",
    ]
    lines += _list([*(f"Why: {reason}" for reason in best.reasons), *notes])
    for count, share in phrases.shares(best):
        lines += [f"**{escaped(phrases.held(count, share))}**", ""]
        rows = [(part.title, part.amount, part.sure) for part in phrases.parts(share.memory)]
        lines += [*grid(("part", "memory", "how sure (GiB)"), rows, right=(1,)), ""]
    host = phrases.host(best)
    lines += [f"{host}.", ""] if host else []
    lines += [phrases.limits(best), ""]
    lines += _section("Speed", list(phrases.speed(best)))
    lines += _section("Energy and money", list(phrases.costs(best)))
    lines += _section("Warnings", best.warnings)
    lines += _section("What to change", [_advice(one.change, one.fits, one.effect) for one in plan.advice])
    lines += [
        "Launch it with:" if plan.fits else "This would run out of memory:",
        "",
        *_fenced(best.command),
        "",
    ]
    for node, line in enumerate(phrases.launches(best)[1:], 1):
        lines += [f"and in box {node}:", "", *_fenced(line), ""]
    others = [phrases.runner_up(other) for other in plan.plans[1:] if other.fits]
    if others:
        lines += ["**Also fits**", "", *grid(phrases.RUNNER_UP_TITLES, others, right=(3, 4, 5, 6)), ""]
    lines += _section("Ruled out", [f"{who}: {why}" for who, why in phrases.refusals(plan)])
    return "\n".join([*lines, f"<sub>{escaped(phrases.HOW_SURE)}</sub>", ""])


def grid(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    flush = set(right)
    rule = ["---:" if column in flush else "---" for column in range(len(titles))]
    return [_row(titles), _row(rule), *(_row([escaped(cell) for cell in row]) for row in rows)]


def escaped(text: str) -> str:
    """`text` as Markdown shows it literally."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#~" else char for char in clean(text)).replace("&", "&amp;")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _advice(change: str, fits: bool, effect: str) -> str:
    return f"{change} ({'fits' if fits else 'not enough'}): {effect}"


def _section(title: str, entries: Sequence[str]) -> list[str]:
    return [f"**{title}**", "", *_list(entries)] if entries else []


def _list(entries: Sequence[str]) -> list[str]:
    return [*(f"- {escaped(entry)}" for entry in entries), ""] if entries else []


def _fenced(command: str) -> list[str]:
    """A code block whose fence is longer than any run of backticks in it."""
    fence = "```"
    while fence in command:
        fence += "`"
    return [f"{fence}sh", clean(command), fence]
