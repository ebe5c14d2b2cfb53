"""The answer for a person, in the order in which it is read: the verdict, the memory, the limits, the launch line."""

from collections.abc import Callable, Iterator

from ..planner.engines.engine import DeviceShare
from ..planner.plan import Plan
from . import phrases
from .output import Screen, clean, columns, wrapped

BAR_WIDTH = 64
PLAIN = {
    "weights": "#",
    "kv_cache": "=",
    "recurrent_state": "%",
    "activation": "+",
    "graph": "*",
    "runtime": "x",
    "free": ".",
    "edge": "|",
}
BLOCKS = {
    "weights": "█",
    "kv_cache": "▓",
    "recurrent_state": "▒",
    "activation": "░",
    "graph": "▞",
    "runtime": "▚",
    "free": "·",
    "edge": "│",
}
COLORS = {
    "weights": "34",
    "kv_cache": "36",
    "recurrent_state": "35",
    "activation": "33",
    "graph": "32",
    "runtime": "37",
    "free": "90",
    "edge": "31",
    "Fits": "1;32",
    "Fits, but only just": "1;33",
    "Does not fit": "1;31",
    "heading": "1",
}
Paint = Callable[[str, str], str]


def table(plan: Plan, screen: Screen, notes: tuple[str, ...] = ()) -> str:
    """The whole answer, in lines of `screen.width` columns; only the launch line is as long as it has to be."""
    paint = _painted if screen.color else _unpainted
    lines = phrases.launches(plan.best)
    launch = [paint("heading", "Launch it with" if plan.fits else "This would run out of memory"), clean(lines[0])]
    for node, line in enumerate(lines[1:], 1):
        launch += [f"and in box {node}", clean(line)]
    advice = _advice(plan, screen, paint)
    sections = (
        _head(plan, screen, notes, paint),
        _memory(plan, screen, paint),
        wrapped(phrases.limits(plan.best), screen.width, rest="  "),
        _list("Speed", [("", line) for line in phrases.speed(plan.best)], screen, paint),
        _list("Energy and money", [("", line) for line in phrases.costs(plan.best)], screen, paint),
        _list("Warnings", [("", warning) for warning in plan.best.warnings], screen, paint),
        *((launch, advice) if plan.fits else (advice, launch)),
        _runners_up(plan, screen, paint),
        _list("Ruled out", list(phrases.refusals(plan)), screen, paint),
        wrapped(phrases.HOW_SURE, screen.width),
    )
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _head(plan: Plan, screen: Screen, notes: tuple[str, ...], paint: Paint) -> list[str]:
    verdict = phrases.verdict(plan)
    lines = wrapped(f"{verdict}: {clean(phrases.question(plan))}", screen.width, rest="  ")
    lines[0] = paint(verdict, verdict) + lines[0][len(verdict) :]
    best = "Best" if plan.fits else "Nearest"
    lines += wrapped(f"{best}: {clean(phrases.setup(plan.best))}", screen.width, rest="  ")
    for reason in plan.best.reasons:
        lines += wrapped(f"Why: {clean(reason)}", screen.width, rest="  ")
    for note in notes:
        lines += wrapped(f"Note: {clean(note)}", screen.width, rest="  ")
    return lines


def _memory(plan: Plan, screen: Screen, paint: Paint) -> list[str]:
    glyphs = BLOCKS if screen.unicode else PLAIN
    lines: list[str] = []
    for count, share in phrases.shares(plan.best):
        lines += wrapped(clean(phrases.held(count, share)), screen.width, rest="  ")
        lines.append(
            "".join(paint(key, glyphs[key] * cells) for key, cells in _bar(share, min(BAR_WIDTH, screen.width)))
        )
        told = phrases.parts(share.memory)
        rows = columns([(part.title, part.amount, part.sure) for part in told], right=(1,))
        for part, row in zip(told, rows, strict=True):
            lines.append(f"  {paint(part.key, glyphs[part.key]) if part.key in glyphs else ' '} {row}")
    for device in dict.fromkeys(share.device for share in plan.best.devices):
        if device.note:
            lines += wrapped(f"Note: {clean(device.name)}: {clean(device.note)}", screen.width, rest="  ")
    host = phrases.host(plan.best)
    return lines + wrapped(host, screen.width, rest="  ") if host else lines


def _bar(share: DeviceShare, width: int) -> Iterator[tuple[str, int]]:
    """Cells per part. The bar is the larger of need and room; where that is the need, an edge marks the room."""
    total = share.memory.total.mid
    whole = max(total, share.usable_bytes, 1)
    edge = round(width * share.usable_bytes / whole) if total > share.usable_bytes else None
    start_bytes = place = 0
    for key, amount in (*share.memory.parts.items(), ("free", None)):
        end_bytes = whole if amount is None else start_bytes + amount.mid
        end = round(width * end_bytes / whole)
        if amount is not None and amount.mid and end == place < width:
            end += 1
        if edge is not None and place <= edge < end:
            yield key, edge - place
            yield "edge", 1
            yield key, end - edge - 1
        elif end > place:
            yield key, end - place
        start_bytes, place = end_bytes, max(place, end)


def _advice(plan: Plan, screen: Screen, paint: Paint) -> list[str]:
    told = [(f"{'fits' if one.fits else 'not enough'}: {one.change}", one.effect) for one in plan.advice]
    return _list("What to change", told, screen, paint)


def _runners_up(plan: Plan, screen: Screen, paint: Paint) -> list[str]:
    others = [tuple(clean(cell) for cell in phrases.runner_up(other)) for other in plan.plans[1:] if other.fits]
    if not others:
        return []
    rows = [phrases.RUNNER_UP_TITLES, *others]
    while max(map(len, lines := columns(rows, right=(3, 4, 5, 6), indent="  "))) > screen.width and len(rows[0]) > 2:
        rows = [row[:-1] for row in rows]
    return [paint("heading", "Also fits"), *lines]


def _list(title: str, entries: list[tuple[str, str]], screen: Screen, paint: Paint) -> list[str]:
    if not entries:
        return []
    lines = [paint("heading", title)]
    for name, text in entries:
        lines += wrapped(clean(f"{name}: {text}" if name else text), screen.width, first="  - ", rest="    ")
    return lines


def _painted(key: str, text: str) -> str:
    return f"\x1b[{COLORS[key]}m{text}\x1b[0m"


def _unpainted(key: str, text: str) -> str:
    return text
