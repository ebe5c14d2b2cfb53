"""`qwen-plan matrix FILE`: does every cell satisfy what is asked of it, and what changed since last time.

0 every cell passes (with --against: nothing got worse), 1 not so, 2 no answer.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from ..planner.matrix import Change, Verdict, answer, changes
from ..profiles.errors import BadInput
from .output import quietly_closed, screen, write

FORMATS = ("table", "json", "markdown", "github")
OLD_LIMIT_BYTES = 32 << 20
OLD_KEYS = {"key": str, "passes": bool, "fits": bool, "failures": list}


def matrix(path: str, form: str, against: str | None, tolerance: float, save: str | None, comment: str | None) -> int:
    """The exit status. `save` and `comment` are files for the JSON and the Markdown beside what stdout gets."""
    from ..planner import plan
    from . import matrix_page
    from .matrix_file import read_matrix

    if not 0 <= tolerance < 1:
        raise BadInput(f"--tolerance {tolerance:g}: give a share of at least 0 and less than 1, such as 0.01")
    old = _read_old(against) if against else None
    where, cells = read_matrix(path)
    verdicts = answer(cells, where, plan)
    changed = changes(old, verdicts, tolerance) if old is not None else None
    worse = _failing(verdicts, changed)
    passes = not worse
    if save:
        save_file(save, matrix_page.document(where, verdicts, changed, passes))
    if comment:
        save_file(comment, matrix_page.markdown(where, verdicts, changed, passes))
    if form == "json":
        text = matrix_page.document(where, verdicts, changed, passes)
    elif form == "markdown":
        text = matrix_page.markdown(where, verdicts, changed, passes)
    elif form == "github":
        text = matrix_page.github(path, where, verdicts, changed, passes, worse)
    else:
        text = matrix_page.table(verdicts, changed, screen(sys.stdout))
    try:
        write(text)
    except BrokenPipeError:
        quietly_closed()
    return 0 if passes else 1


def _failing(verdicts: Sequence[Verdict], changed: Sequence[Change] | None) -> list[str]:
    """The keys of the cells that make the run fail."""
    if changed is None:
        return [one.cell.key for one in verdicts if not one.passes]
    return [one.key for one in changed if one.kind == "worse"]


def _read_old(path: str) -> dict[str, dict[str, Any]]:
    """The cells of an older run by key. BadInput for a file that is not one."""
    from ..profiles.json_file import read_json_object

    told = read_json_object(path, OLD_LIMIT_BYTES)
    cells = told.get("cells")
    if told.get("schema") != 1 or not isinstance(cells, list):
        raise BadInput(f"{path} is not what `qwen-plan matrix --json` writes: it has no schema 1 and list of cells")
    found: dict[str, dict[str, Any]] = {}
    for place, cell in enumerate(cells):
        if not isinstance(cell, dict) or not all(isinstance(cell.get(key), kind) for key, kind in OLD_KEYS.items()):
            raise BadInput(f"{path}: cells[{place}] is not a cell of `qwen-plan matrix --json`")
        for name in ("memory_bytes", "decode_tokens_per_s"):
            amount = cell.setdefault(name, None)
            mid = amount.get("mid") if isinstance(amount, dict) else 1
            if not isinstance(mid, int | float) or isinstance(mid, bool) or not 0 <= mid < 1e18:
                raise BadInput(f"{path}: cells[{place}].{name} is no interval of numbers")
            if not isinstance(amount, dict):
                cell[name] = None
        for name in ("engine", "weights", "kv_dtype"):
            cell[name] = cell.get(name) if isinstance(cell.get(name), str) else None
        found[cell["key"]] = cell
    return found


def save_file(path: str, text: str) -> None:
    """Whole or not at all: written beside it and renamed."""
    beside = f"{path}.part"
    try:
        with open(beside, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.replace(beside, path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a valid path"
        raise BadInput(f"{path} cannot be written: {reason}") from None
