"""`qwen-plan calibrate RECEIPTS`: estimated constants refitted from receipts, with the errors before and after.

0 done, 2 no answer.
"""

import sys
from json import dumps

from ..planner.calibration import Calibration, Factor, HeldOut, fit, held_out, witnesses
from ..planner.calibration_file import text as file_text
from ..planner.receipt import Receipt
from ..planner.receipt_file import read_receipts
from .output import clean, columns, quietly_closed, say, screen, wrapped, write


def calibrate(paths: list[str], output: str | None, form: str) -> int:
    """The exit status. `output` is a file for the constants; `form` is what stdout gets: text or json."""
    receipts = read_receipts(paths)
    made = fit(receipts, output or "receipts")
    content = file_text(made)
    errors = held_out(receipts)
    if output:
        from .matrix import save_file

        save_file(output, content)
        say(f"qwen-plan: wrote {output}")
    try:
        if form == "json":
            write(dumps(_document(receipts, made, errors), indent=1, allow_nan=False) + "\n")
        else:
            write(_text(receipts, made, errors, screen(sys.stdout).width))
    except BrokenPipeError:
        quietly_closed()
    return 0


def _document(receipts: list[Receipt], made: Calibration, errors: tuple[HeldOut, ...]) -> dict[str, object]:
    return {
        "schema": 1,
        "receipts": len(receipts),
        "sources": len({one.group for one in receipts}),
        "factors": [{name: getattr(one, name) for name in one.__slots__} for one in made.factors],
        "held_out": [{name: getattr(one, name) for name in one.__slots__} for one in errors],
    }


def _text(receipts: list[Receipt], made: Calibration, errors: tuple[HeldOut, ...], width: int) -> str:
    sources = len({one.source for one in witnesses(receipts)})
    lines = wrapped(
        f"{_counted(len(receipts), 'receipt')} of {_counted(sources, 'source')} speak of estimated constants.", width
    )
    rows = [("engine", "part", "for", "receipts", "built-in times", "interval"), *map(_factor_row, made.factors)]
    lines += ["", *columns(rows, right=(3, 4)), ""]
    told = [("engine", "part", "receipts", "error before", "held out", "worst before", "held out", "in the interval")]
    told += [
        (
            one.engine,
            one.part,
            str(one.receipts),
            f"{one.before:.1%}",
            f"{one.after:.1%}",
            f"{one.worst_before:.1%}",
            f"{one.worst_after:.1%}",
            f"{one.within:.0%}",
        )
        for one in errors
    ]
    lines += [*columns(told, right=(2, 3, 4, 5, 6, 7)), ""]
    lines += wrapped("Held out: every source predicted from the others alone; median and worst over receipts.", width)
    worse = [one for one in errors if one.after > one.before]
    for one in worse:
        sentence = f"{one.engine}'s {one.part} is predicted no better with it: the receipts disagree, or are too few"
        lines += wrapped(clean(sentence), width, first="note: ", rest="  ")
    return "\n".join([*lines, ""])


def _factor_row(one: Factor) -> tuple[str, ...]:
    where = " ".join(filter(None, (one.versions, one.architecture))) or "all"
    interval = f"{one.factor * one.low:.2f} to {one.factor * one.high:.2f}"
    return one.engine, one.part, where, str(one.receipts), f"{one.factor:.2f}", interval


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
