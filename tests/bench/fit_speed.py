"""Fits the speed model's factors on the published runs, and scores it on publishers that it has not seen.

    python tests/bench/fit_speed.py            # profiles/speed_runs.json -> profiles/speed_factors.json
    python tests/bench/fit_speed.py --residuals   # and every run, with what is said of it when it is held out

Each observation is a decode or prefill rate; its error is log(predicted / measured). The factors are sums of terms along
the chain of `planner/factors.py`, and the fit is the mode of a hierarchical model: Gaussian terms around nothing with
the standard deviations in `SPREAD`, Huber's loss on the errors, Gauss-Newton. What is held out together is a publisher
(nothing of the same repository, site or person is in the fit), or, where the question is how well a known engine on a
known device does, a page.
"""

import argparse
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from math import exp, log
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from qwenfit.planner.factors import KINDS, factors_of, total
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
    "draft": log(1e-3),
    "host": log(0.6),
}
# Standard deviation of a term by what its key names, times `KIND_SPREAD`. Chosen once by the held-out error.
SPREAD = {"root": 4.0, "model": 0.5, "link": 0.5, "backend": 0.5, "format": 0.15, "group": 0.3, "place": 0.2}
KIND_SPREAD = {"read": 0.5, "kv": 1.5, "dense": 1.5, "expert": 1.5, "pair": 2.0, "acceptance": 1.0}
NOISE = {"decode": 0.05, "mtp": 0.15, "prefill": 0.12, "offload": 0.25, "batch": 0.25}
HUBER = 1.5
STEPS = 25


class Observation(NamedTuple):
    run: Run
    kind: str  # decode, mtp, prefill, offload, batch
    measured: float
    weight: float

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
    names = [(kind, key) for kind in KINDS for key in dict.fromkeys(key for one in seen for key in one.run.keys)]
    place = {name: index for index, name in enumerate(names)}
    mean = np.array([START[kind] if not key else 0.0 for kind, key in names])
    precision = np.array([spread(kind, key) ** -2 for kind, key in names])
    theta = mean.copy()
    if start:
        theta = np.array([start[kind].get(key, START[kind] if not key else 0.0) for kind, key in names])
    damping = 1e-2
    cost, jacobian, errors, weights = _linearized(seen, names, place, theta, mean, precision)
    for _ in range(steps):
        scaled = jacobian * weights[:, None]
        normal = scaled.T @ jacobian + np.diag(precision * (1 + damping))
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
        spots = {kind: [place[kind, key] for key in one.run.keys] for kind in KINDS}
        logs = {kind: float(theta[spots[kind]].sum()) for kind in KINDS}
        sigma = NOISE[one.kind] / one.weight
        here = log(one.predicted(logs) / one.measured)
        errors[index] = here / sigma
        for kind in KINDS:
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


def held_out(all_of_them: Sequence[Observation], group: Callable[[Run], str], start: Terms) -> dict[int, float]:
    """Index of each observation -> its error where its group was left out of the fit."""
    found: dict[int, float] = {}
    fitted = [one for one in all_of_them if one.kind != "batch" or one.run.publisher == "qwenfit"]
    for name in dict.fromkeys(group(one.run) for one in all_of_them):
        rest = [one for one in fitted if group(one.run) != name]
        terms = fit(rest, start, steps=8)
        for index, one in enumerate(all_of_them):
            if group(one.run) == name:
                found[index] = error(one, terms)
    return found


def write(every, terms) -> None:
    runs = list(dict.fromkeys(one.run for one in every))
    cases = []
    for run in runs:
        if run.decode_tokens_per_s and run.batch == 1:
            w = run.work
            d = run.devices[0]
            from qwenfit.planner.factors import bits_of, family_of

            cases.append(
                [
                    run.id,
                    run.row["source"],
                    run.engine,
                    run.backend,
                    run.row.get("device") or d.name,
                    family_of(d),
                    d.architecture,
                    run.model.name,
                    run.weights.name,
                    bits_of(run.weights),
                    round(
                        (w.dense_bytes + w.head_bytes) * run.tp
                        + w.expert_share * (w.expert_bytes + w.host_expert_bytes) * run.tp
                    ),
                    d.memory_bandwidth_bytes_per_s,
                    len(run.devices),
                    run.mtp,
                    run.host_share > 0,
                    run.row["depth_tokens"],
                    run.decode_tokens_per_s,
                ]
            )
    seen = sorted({key for run in runs for key in run.keys if "/" in key and not {"~", "+"} & set(key)})
    document = {
        "logs": {
            kind: {key: round(value, 4) for key, value in terms[kind].items() if abs(value) >= 5e-4} for kind in KINDS
        },
        "widths": {
            "decode": {"place": 0.15, "engine": 0.35, "nothing": 0.8},
            "mtp": {"place": 0.3, "engine": 0.4, "nothing": 0.8},
            "prefill": {"place": 0.3, "engine": 0.5, "nothing": 1.0},
            "offload": 0.5,
            "batch": 0.4,
        },
        "seen": seen,
        "cases": cases,
    }
    Path(speed_data.FACTORS).write_text(json.dumps(document, indent=0) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--residuals", action="store_true")
    asked = parser.parse_args()
    every = observations(map(Run, speed_data.runs()))
    terms = fit([one for one in every if one.kind != "batch" or one.run.publisher == "qwenfit"])
    inside = [error(one, terms) for one in every]
    outside = held_out(every, lambda run: run.publisher, terms)
    pages = held_out(every, lambda run: run.page, terms)
    for kind in NOISE:
        rows = [i for i, one in enumerate(every) if one.kind == kind]
        known = [i for i in rows if _place_known(every, i)]
        m = lambda xs: median(abs(exp(x) - 1) for x in xs) if xs else float("nan")
        print(
            f"{kind:8} n {len(rows):3} inside {m([inside[i] for i in rows]):.3f} unseen {m([outside[i] for i in rows]):.3f}"
            f"  known n {len(known):3} {m([pages[i] for i in known]):.3f}"
        )
    write(every, terms)
    if asked.residuals:
        for i, one in sorted(enumerate(every), key=lambda x: (x[1].kind, x[1].run.publisher)):
            r = one.run
            print(
                f"{one.kind:8} {r.id[:44]:44} {r.engine[:9]:9} {r.backend:6} {r.devices[0].name[:14]:14} {r.model.name[4:]:12} {r.weights.name[:8]:8} m {one.measured:8.1f} in {exp(inside[i]) - 1:+.2f} out {exp(outside[i]) - 1:+.2f} page {exp(pages[i]) - 1:+.2f} {'K' if _place_known(every, i) else ''}"
            )
    for kind in KINDS:
        print(kind, {k: round(v, 2) for k, v in sorted(terms[kind].items(), key=lambda kv: -abs(kv[1]))[:14]})


def _place_known(every, index) -> bool:
    run = every[index].run
    return any(
        o.run.place == run.place
        and o.run.page != run.page
        and (o.kind == "prefill") == (every[index].kind == "prefill")
        for o in every
    )


if __name__ == "__main__":
    main()
