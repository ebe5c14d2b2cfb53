"""Fits the speed model's factors on the published runs, and scores it on pages and publishers that it has not seen.

    python tests/bench/fit_speed.py    # two minutes: profiles/speed_factors.json, tests/data/speed_held_out.json
    python tests/bench/accuracy.py     # then: docs/accuracy.md

Each observation is a decode or prefill rate; its error is log(predicted / measured). The factors are sums of terms along
the chain of `planner/factors.py`, and the fit is the mode of a hierarchical model: Gaussian terms around nothing with
the standard deviations in `SPREAD`, Huber's loss on the errors, Gauss-Newton. Held out together is a page (nothing of
it is in the fit that it is scored with); as a stricter question, everything of one publisher (a repository, a site, a
person). The intervals are the 80 % quantiles of the errors on pages held out, by how much of the engine and the device
the other pages know; their coverage is counted page by page with widths from the other pages alone.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from math import ceil, exp, log
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenfit.planner.factors import KINDS, bits_of, factors_of, family_of, total
from qwenfit.planner.measured import Run
from qwenfit.profiles import speed_data

Terms = dict[str, dict[str, float]]  # kind -> key -> logarithm

# Where the fit starts, and what it keeps for a kind that no run speaks of. Published orders of magnitude: efficiencies of
# a roofline, ten microseconds for an all-reduce within a box, three of four draft tokens taken.
START = {
    "read": log(0.8),
    "kv": log(0.6),
    "dense": log(0.5),
    "expert": log(0.15),
    "pair": log(0.3),
    "layer": log(80e-6),
    "link": log(15e-6),
    "wire": log(0.4),
    "acceptance": log(0.75 / 0.25),
    "decay": log(0.87 / 0.13),
    "draft": log(1e-3),
    "host": log(0.6),
    "unpack": log(0.2),
}
# Standard deviation of a term by what its key names, times `KIND_SPREAD`. Chosen once by the held-out error.
SPREAD = {"root": 4.0, "model": 0.2, "link": 0.5, "backend": 1.0, "format": 0.3, "group": 0.3, "place": 0.2}
KIND_SPREAD = {"read": 0.5, "kv": 1.5, "dense": 1.5, "expert": 1.5, "pair": 2.0, "layer": 3.0, "wire": 2.0, "link": 2.0}
NOISE = {"decode": 0.05, "mtp": 0.15, "prefill": 0.12, "offload": 0.25, "batch": 0.25}
HUBER = 1.5
STEPS = 25
LEVELS = ("place", "engine", "nothing")
INSIDE = 0.8
MIN_ROWS = 8  # below it a level borrows from the others
HELD_OUT = Path(__file__).parent.parent / "data" / "speed_held_out.json"


class Observation(NamedTuple):
    run: Run
    kind: str  # decode, mtp, prefill, offload, batch
    measured: float
    weight: float

    @property
    def is_fitted(self) -> bool:
        """Totals of a batch through an engine that is not planned for are only looked at."""
        return self.kind != "batch" or not self.run.engine.startswith("tensorrt")

    @property
    def is_scored(self) -> bool:
        """This project's own machines help the fit, and are no test of it."""
        return not self.run.publisher.startswith("qwenfit")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that its rate can depend on."""
        run, found = self.run, ("read", "layer", "unpack")
        found += ("dense", "expert", "pair") if self.kind == "prefill" else ("kv",)
        if self.kind == "batch" or (run.backend == "cpu" and self.kind != "prefill"):
            found += ("dense", "expert")
        if run.tp > 1:
            found += ("link", "wire")
        if run.mtp and self.kind != "prefill":
            found += ("acceptance", "decay", "draft", "dense", "expert")
        return (*found, "host") if run.host_share else found

    def predicted(self, logs: dict[str, float]) -> float:
        factors = factors_of(logs)
        return self.run.prefill(factors) if self.kind == "prefill" else self.run.decode(factors)


def observations(runs: Iterable[Run]) -> list[Observation]:
    """Every rate of every run; one publisher's many rows of a kind count as the root of their number."""
    found: list[tuple[Run, str, float]] = []
    for run in runs:
        if run.decode_tokens_per_s:
            found.append((run, _kind(run), run.decode_tokens_per_s))
        if run.prefill_tokens_per_s:
            found.append((run, "prefill", run.prefill_tokens_per_s))
    counts: dict[tuple[str, str], int] = {}
    for run, kind, _ in found:
        counts[run.publisher, kind] = counts.get((run.publisher, kind), 0) + 1
    return [Observation(run, kind, rate, counts[run.publisher, kind] ** -0.25) for run, kind, rate in found]


def _kind(run: Run) -> str:
    if run.batch > 1:
        return "batch"
    if run.host_share:
        return "offload"
    return "mtp" if run.mtp else "decode"


def spread(kind: str, key: str) -> float:
    return SPREAD[_level(key)] * (KIND_SPREAD.get(kind, 1.0) if key else 1.0)


def _level(key: str) -> str:
    if not key:
        return "root"
    for sign, level in (("|", "place"), ("~", "format"), ("=", "link")):
        if sign in key:
            return level
    if "+" in key:
        return "model"
    return "group" if "/" in key else "backend"


def fit(seen: Sequence[Observation], start: Terms | None = None, steps: int = STEPS) -> Terms:
    """The terms' mode. `start`: terms to begin from."""
    names = list(dict.fromkeys((kind, key) for one in seen for kind in one.kinds for key in one.run.keys))
    names += [(kind, "") for kind in KINDS if (kind, "") not in names]
    place = {name: index for index, name in enumerate(names)}
    mean = np.array([START[kind] if not key else 0.0 for kind, key in names])
    precision = np.array([spread(kind, key) ** -2 for kind, key in names])
    theta = mean.copy()
    if start:
        theta = np.array([start[kind].get(key, START[kind] if not key else 0.0) for kind, key in names])
    damping = 1e-3
    cost, jacobian, errors, weights = _linearized(seen, names, place, theta, mean, precision)
    for _ in range(steps):
        scaled = jacobian * weights[:, None]
        normal = scaled.T @ jacobian + np.diag(precision)
        normal[np.diag_indices_from(normal)] *= 1 + damping
        step = np.linalg.solve(normal, scaled.T @ errors + precision * (theta - mean))
        step = np.clip(step, -1.0, 1.0)
        trial = theta - step
        found = _linearized(seen, names, place, trial, mean, precision)
        if found[0] < cost:
            gain, theta = cost - found[0], trial
            cost, jacobian, errors, weights = found
            damping = max(damping / 4, 1e-6)
            if gain < 1e-4 * (1 + cost):
                break
        else:
            damping = min(damping * 8, 1e6)
    terms: Terms = {kind: {} for kind in KINDS}
    for (kind, key), value in zip(names, theta, strict=True):
        terms[kind][key] = float(value)
    return terms


def _linearized(seen, names, place, theta, mean, precision):
    """Cost, jacobian, errors in units of their noise, and Huber's weights."""
    width = 1e-4
    errors, jacobian = np.zeros(len(seen)), np.zeros((len(seen), len(names)))
    for index, one in enumerate(seen):
        spots = {kind: [place[kind, key] for key in one.run.keys if (kind, key) in place] for kind in KINDS}
        logs = {kind: float(theta[spots[kind]].sum()) for kind in KINDS}
        sigma = NOISE[one.kind] / one.weight
        here = log(one.predicted(logs) / one.measured)
        errors[index] = here / sigma
        for kind in one.kinds:
            moved = log(one.predicted({**logs, kind: logs[kind] + width}) / one.measured)
            if moved != here:
                jacobian[index, spots[kind]] = (moved - here) / width / sigma
    sizes = np.abs(errors)
    weights = np.where(sizes > HUBER, HUBER / np.maximum(sizes, 1e-12), 1.0)
    loss = np.where(sizes > HUBER, HUBER * (2 * sizes - HUBER), errors**2)
    return loss.sum() + (precision * (theta - mean) ** 2).sum(), jacobian, errors, weights


def error(one: Observation, terms: Terms) -> float:
    """log(predicted / measured)."""
    logs = {kind: total(terms[kind], one.run.keys) for kind in KINDS}
    return log(one.predicted(logs) / one.measured)


def held_out(seen: Sequence[Observation], group: Callable[[Run], str], start: Terms) -> list[float]:
    """Error of each observation where its group was left out of the fit."""
    found = [0.0] * len(seen)
    for name in dict.fromkeys(group(one.run) for one in seen):
        terms = fit([one for one in seen if one.is_fitted and group(one.run) != name], start, steps=8)
        for index, one in enumerate(seen):
            if group(one.run) == name:
                found[index] = error(one, terms)
    return found


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
            tables[page] = widths(*([column[index] for index in rest] for column in (kinds, levels, errors)))
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
    terms = fit([one for one in seen if one.is_fitted])
    pages, publishers = (held_out(seen, group, terms) for group in (attrgetter("page"), attrgetter("publisher")))
    kinds, levels = [one.kind for one in seen], [level(one, seen) for one in seen]
    scored = [index for index, one in enumerate(seen) if one.is_scored]
    columns = [[column[index] for index in scored] for column in (kinds, levels, pages)]
    covered = dict(zip(scored, inside(*columns, [seen[index].run.page for index in scored]), strict=True))
    table = widths(*columns)
    groups = {key for one in seen if one.is_fitted for key in one.run.keys if "/" in key and not {"~", "+"} & set(key)}
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
