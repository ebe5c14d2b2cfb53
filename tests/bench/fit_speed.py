"""Fits the speed model's factors on the published runs, and scores it on pages and publishers that it has not seen.

    python tests/bench/fit_speed.py    # two minutes: profiles/speed_factors.json, tests/data/speed_held_out.json
    python tests/bench/accuracy.py     # then: docs/accuracy.md

Each observation is a decode or prefill rate; its error is log(predicted / measured). The factors are sums of terms
along the chain of `planner/factors.py`, and the fit is the mode of a hierarchical model: Gaussian terms around nothing
with the standard deviations in `SPREAD`, Huber's loss on the errors, Gauss-Newton. Held out together is a page (nothing
of it is in the fit that it is scored with); as a stricter question, everything of one publisher (a repository, a site,
a person). The intervals are the 80 % quantiles of the errors on pages held out, by how much of the engine and the
device the other pages know; their coverage is counted page by page with widths from the other pages alone.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from math import ceil, exp
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from speed_design import Design, Observation, error, observations

from qwenfit.planner.factors import KINDS, bits_of, family_of
from qwenfit.planner.measured import Run
from qwenfit.profiles import speed_data

LEVELS = ("place", "engine", "nothing")
INSIDE = 0.8
MIN_ROWS = 8  # below it a level borrows from the others
HELD_OUT = Path(__file__).parent.parent / "data" / "speed_held_out.json"


def held_out(
    design: Design, group: Callable[[Run], str], rows: np.ndarray, loads: dict[str, np.ndarray]
) -> list[float]:
    """Error of each observation where its group was left out of the fit; that begins where the fit of `rows` ended."""
    names = np.array([group(one.run) for one in design.seen])
    fitted = np.array([one.is_fitted for one in design.seen])
    found = np.zeros(len(names))
    for name in dict.fromkeys(names):
        rest, out = np.flatnonzero(fitted & (names != name)), np.flatnonzero(names == name)
        kept = np.isin(rows, rest)
        logs = design.logs(out, rest, design.fit(rest, {kind: loads[kind][kept] for kind in KINDS}))
        found[out] = design.rates(out, logs)[0] - design.measured[out]
    return [float(one) for one in found]


def level(one: Observation, seen: Sequence[Observation]) -> str:
    """What pages other than its own know: the engine on this device, the engine on another, or nothing."""
    others = [other.run for other in seen if other.run.page != one.run.page and other.is_fitted]
    others = [run for run in others if (run.prefill_tokens_per_s if one.kind == "prefill" else run.decode_tokens_per_s)]
    places = {run.place for run in others}
    if one.run.place in places:
        return "place"
    return "engine" if one.run.place[:2] in {place[:2] for place in places} else "nothing"


def widths(kinds: Sequence[str], levels: Sequence[str], errors: Sequence[float]) -> dict[str, Any]:
    """Half widths as logarithms: by level for what was measured often, one figure for the rest."""
    sizes: dict[tuple[str, str], list[float]] = {}
    for kind, one, off in zip(kinds, levels, errors, strict=True):
        sizes.setdefault((kind, one), []).append(abs(off))
        sizes.setdefault((kind, "all"), []).append(abs(off))
    found: dict[str, Any] = {}
    for kind in ("decode", "mtp", "prefill"):
        least, found[kind] = 0.0, {}
        for one in LEVELS:
            rows = sizes.get((kind, one), [])
            rows = rows if len(rows) >= MIN_ROWS else rows + sizes.get((kind, "all"), [])
            least = max(least, _quantile(rows))
            found[kind][one] = round(least, 4)
    for kind in ("offload", "batch"):
        found[kind] = round(_quantile(sizes.get((kind, "all"), [1.0])), 4)
    return found


def width(table: dict[str, Any], kind: str, one: str) -> float:
    return table[kind] if kind in ("offload", "batch") else table[kind][one]


def _quantile(sizes: Sequence[float]) -> float:
    """The conformal one: of n errors, the one below which 0.8 (n + 1) lie."""
    ordered = sorted(sizes)
    return ordered[min(len(ordered), ceil(INSIDE * (len(ordered) + 1))) - 1]


def inside(kinds: Sequence[str], levels: Sequence[str], errors: Sequence[float], pages: Sequence[str]) -> list[bool]:
    """Whether each observation lies in the interval that the other pages' errors give."""
    found: list[bool] = []
    tables: dict[str, dict[str, Any]] = {}
    for kind, one, off, page in zip(kinds, levels, errors, pages, strict=True):
        if page not in tables:
            rest = [index for index, other in enumerate(pages) if other != page]
            kept = ([kinds[index] for index in rest], [levels[index] for index in rest])
            tables[page] = widths(*kept, [errors[index] for index in rest])
        found.append(abs(off) <= width(tables[page], kind, one))
    return found


def cases(seen: Sequence[Observation]) -> list[list[object]]:
    """What `planner/nearest.py` searches: the runs of one sequence, as plain values."""
    found: list[list[object]] = []
    for run in dict.fromkeys(one.run for one in seen):
        if run.decode_tokens_per_s and run.batch == 1:
            amount, device = run.work, run.devices[0]
            experts = amount.expert_share * (amount.expert_bytes + amount.host_expert_bytes)
            found.append(
                [
                    run.id,
                    run.row["source"],
                    run.engine,
                    run.backend,
                    run.row.get("device") or device.name,
                    family_of(device),
                    device.architecture,
                    run.model.name,
                    run.weights.name,
                    bits_of(run.weights),
                    round((amount.dense_bytes + amount.head_bytes + experts) * run.tp),
                    device.memory_bandwidth_bytes_per_s,
                    len(run.devices),
                    run.mtp,
                    run.host_share > 0,
                    run.row["depth_tokens"],
                    run.decode_tokens_per_s,
                ]
            )
    return found


def main() -> None:
    seen = observations(map(Run, speed_data.runs()))
    design = Design(seen)
    fitted = np.flatnonzero([one.is_fitted for one in seen])
    loads = design.fit(fitted)
    terms = design.terms(fitted, loads)
    by = attrgetter("page"), attrgetter("publisher")
    pages, publishers = (held_out(design, group, fitted, loads) for group in by)
    kinds, levels = [one.kind for one in seen], [level(one, seen) for one in seen]
    scored = [index for index, one in enumerate(seen) if one.is_scored]
    columns = (
        [kinds[index] for index in scored],
        [levels[index] for index in scored],
        [pages[index] for index in scored],
    )
    covered = dict(zip(scored, inside(*columns, [seen[index].run.page for index in scored]), strict=True))
    table = widths(*columns)
    keys = {key for one in seen if one.is_fitted for key in one.run.keys}
    groups = {key for key in keys if "/" in key and not {"~", "+"} & set(key)}
    document = {
        "digest": digest(),
        "widths": table,
        "seen": sorted(groups),
        "logs": {
            kind: {key: round(term, 4) for key, term in terms[kind].items() if abs(term) >= 5e-4} for kind in KINDS
        },
        "cases": cases(seen),
    }
    _write(Path(speed_data.FACTORS), document)
    rows = [
        {
            "id": one.run.id,
            "kind": one.kind,
            "level": levels[index],
            "scored": one.is_scored,
            "measured": one.measured,
            "fitted": round(one.measured * exp(error(one, document["logs"])), 4),
            "page": round(pages[index], 4),
            "publisher": round(publishers[index], 4),
            "inside": covered.get(index),
        }
        for index, one in enumerate(seen)
    ]
    _write(HELD_OUT, {"digest": digest(), "rows": rows})


def digest() -> str:
    """Of the runs: an edit that was not fitted is noticed."""
    data = Path(speed_data.RUNS).read_bytes().replace(b"\r\n", b"\n")
    return f"{zlib.crc32(data):08x}-{len(data)}"


def _write(path: Path, document: dict[str, Any]) -> None:
    """One value of a list or table per line: differences can be read."""
    parts = []
    for key, value in document.items():
        if isinstance(value, list):
            body = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
        elif isinstance(value, dict):
            body = "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()) + "\n}"
        else:
            body = json.dumps(value)
        parts.append(f"{json.dumps(key)}: {body}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
