"""The fit of the speed model: every published rate as numbers, and the mode of a hierarchical model of their factors.

Used by fit_speed.py, which says what is fitted and how it is scored.
"""

from collections.abc import Iterable, Sequence
from math import log
from typing import NamedTuple

import numpy as np

from qwenfit.planner.factors import HOST_BYTES_PER_S, KINDS, OWN, factors_of
from qwenfit.planner.measured import Run

Terms = dict[str, dict[str, float]]  # kind -> key -> logarithm

# Where the fit starts, and what it keeps for a kind that no run speaks of. Published orders of magnitude: efficiencies
# of a roofline, ten microseconds for an all-reduce within a box, three of four draft tokens taken.
START = {
    "read": log(0.8),
    "kv": log(0.6),
    "dense": log(0.5),
    "expert": log(0.15),
    "pair": log(0.3),
    "layer": log(80e-6),
    "pass": log(50e-6),
    "link": log(15e-6),
    "wire": log(0.4),
    "acceptance": log(0.75 / 0.25),
    "decay": log(0.87 / 0.13),
    "draft": log(1e-3),
    "host": log(0.6),
    "unpack": log(0.2),
}
# Standard deviation of a term by what its key names, times `KIND_SPREAD`. Chosen once by the held-out error.
SPREAD = {
    "root": 4.0,
    "model": 0.36,
    "link": 0.5,
    "backend": 1.0,
    "format": 0.54,
    "group": 0.54,
    "place": 0.35,
}
KIND_SPREAD = {
    "read": 0.39,
    "kv": 1.5,
    "dense": 0.72,
    "expert": 2.7,
    "pair": 2.0,
    "layer": 3.0,
    "pass": 1.8,
    "wire": 2.0,
    "link": 1.1,
    "decay": 1.8,
}
NOISE = {"decode": 0.05, "mtp": 0.15, "prefill": 0.12, "offload": 0.25, "batch": 0.25}
HUBER = 1.5
STEPS = 60


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
        run = self.run
        found = ("dense", "expert", "pair", "pass") if self.kind == "prefill" else ("read", "layer", "unpack", "kv")
        if self.kind == "batch" or (run.backend == "cpu" and self.kind != "prefill"):
            found += ("dense", "expert")
        if run.tp > 1:
            found += ("link", "wire")
        if run.mtp and self.kind != "prefill":
            found += ("acceptance", "decay", "draft", "dense", "expert")
        return (*found, "host") if run.host_share else found

    def predicted(self, terms: Terms) -> float:
        factors = factors_of(terms, self.run.keys)
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
    level = _level(key)
    return SPREAD[level] * (1.0 if level == "root" else KIND_SPREAD.get(kind, 1.0))


def _level(key: str) -> str:
    if not key or key in OWN:
        return "root"
    for sign, level in (("|", "place"), ("~", "format"), ("=", "link")):
        if sign in key:
            return level
    if "+" in key:
        return "model"
    return "group" if "/" in key else "backend"


class Design:
    """Every observation as numbers, so that a fit is a matter of arrays: what its time is made of, and how much its
    factors have in common with those of every other.

    A rate is tokens over a sum of times, each a coefficient over one factor; only reading and unpacking come together
    as in `steps.py`. Terms with Gaussian priors make factors with Gaussian priors, whose covariance over observations
    is fixed, so that the fit solves for as many numbers as there are observations.
    """

    def __init__(self, seen: Sequence[Observation]) -> None:
        self.seen = seen
        self.mean = {kind: START[kind] for kind in KINDS}
        self.shared: dict[str, np.ndarray] = {}  # covariance by kind, [n, n]
        for kind in KINDS:
            keys = list(dict.fromkeys(key for one in seen for key in one.run.keys))
            has = np.array(
                [[key in one.run.keys[: None if kind in one.kinds else 1] for key in keys] for one in seen], float
            )
            scaled = np.array(has, float) * np.array([spread(kind, key) for key in keys])
            self.shared[kind] = scaled @ scaled.T
        self.parts = {name: np.array(column, float) for name, column in _columns(seen).items()}
        self.sigma = np.array([NOISE[one.kind] / one.weight for one in seen])
        self.measured = np.log([one.measured for one in seen])

    def rates(self, rows: np.ndarray, logs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logarithms of the rates, and their derivatives by the logarithm of each kind."""
        c = {name: column[rows] for name, column in self.parts.items()}
        read, unpack = np.exp(-logs["read"]), np.exp(-logs["unpack"])
        slopes = {kind: np.zeros(len(rows)) for kind in KINDS}
        time = c["read"] * read
        slopes["read"] += time
        for where in ("dense", "expert"):
            a, u = c[f"{where}_read"] * read, c[f"{where}_unpack"] * unpack
            norm = np.maximum((a**4 + u**4) ** 0.25, 1e-30)
            slopes["read"] += a**4 / norm**3
            slopes["unpack"] += u**4 / norm**3
            time = time + norm
        for kind in ("kv", "dense", "expert", "pair", "wire", "host"):
            part = c[f"{kind}_s"] * np.exp(-logs[kind])
            slopes[kind] += part
            time = time + part
        for kind in ("layer", "pass", "link", "draft"):
            part = c[f"{kind}_n"] * np.exp(logs[kind])
            slopes[kind] -= part
            time = time + part
        slopes = {kind: slope / time for kind, slope in slopes.items()}
        tokens, slopes["acceptance"], slopes["decay"] = _advance(c["drafts"], logs["acceptance"], logs["decay"])
        return np.log(c["tokens"] * tokens / time), slopes

    def logs(self, rows: np.ndarray, fitted: np.ndarray, loads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sums of terms by kind, from what the observations `fitted` say."""
        return {kind: self.mean[kind] + self.shared[kind][np.ix_(rows, fitted)] @ loads[kind] for kind in KINDS}

    def fit(self, rows: np.ndarray, start: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """How each of these observations pulls at the factors of each kind at the mode, by Gauss-Newton, steps halved
        where they do not help."""
        shared = {kind: self.shared[kind][np.ix_(rows, rows)] for kind in KINDS}
        loads = start or {kind: np.zeros(len(rows)) for kind in KINDS}
        cost, rates, slopes, weights = self._cost(rows, shared, loads)
        for _ in range(STEPS):
            moved = {kind: shared[kind] @ loads[kind] for kind in KINDS}
            aim = self.measured[rows] - rates + sum(slopes[kind] * moved[kind] for kind in KINDS)
            covariance = np.diag(self.sigma[rows] ** 2 / weights)
            for kind in KINDS:
                covariance += slopes[kind][:, None] * shared[kind] * slopes[kind]
            pull = np.linalg.solve(covariance, aim)
            share, gain = 1.0, 0.0
            while share > 1e-3:
                trial = {kind: (1 - share) * loads[kind] + share * slopes[kind] * pull for kind in KINDS}
                found = self._cost(rows, shared, trial)
                if found[0] < cost:
                    gain, loads = cost - found[0], trial
                    cost, rates, slopes, weights = found
                    break
                share /= 2
            if gain < 1e-4 * cost:
                break
        return loads

    def _cost(self, rows: np.ndarray, shared: dict[str, np.ndarray], loads: dict[str, np.ndarray]):
        """Huber's loss and the prior's; rates, slopes and Huber's weights there."""
        moved = {kind: shared[kind] @ loads[kind] for kind in KINDS}
        prior = sum(float(loads[kind] @ moved[kind]) for kind in KINDS)
        rates, slopes = self.rates(rows, {kind: self.mean[kind] + moved[kind] for kind in KINDS})
        sizes = np.abs((rates - self.measured[rows]) / self.sigma[rows])
        weights = np.where(sizes > HUBER, HUBER / np.maximum(sizes, 1e-12), 1.0)
        loss = np.where(sizes > HUBER, HUBER * (2 * sizes - HUBER), sizes**2)
        return float(loss.sum()) + prior, rates, slopes, weights

    def terms(self, rows: np.ndarray, loads: dict[str, np.ndarray]) -> Terms:
        """The terms behind the factors."""
        found: Terms = {kind: dict.fromkeys(("", *OWN), self.mean[kind]) for kind in KINDS}
        for kind in KINDS:
            for row, load in zip(rows, loads[kind], strict=True):
                one = self.seen[row]
                for key in one.run.keys[: None if kind in one.kinds else 1]:
                    found[kind][key] = found[kind].get(key, 0.0) + spread(kind, key) ** 2 * float(load)
        return found


def _columns(seen: Sequence[Observation]) -> dict[str, list[float]]:
    """Coefficients of each observation's time, with every factor at 1."""
    rows: list[dict[str, float]] = []
    for one in seen:
        run, w = one.run, one.run.work
        drafts = w.draft_tokens if one.kind != "prefill" else 0
        tokens: float = run.batch if one.kind != "prefill" else run.row["prompt_tokens"]
        passes, seqs, pairs, last = [tokens * (1 + drafts)], tokens, 0.0, tokens * (1 + drafts)
        if one.kind == "prefill":
            whole, rest = divmod(tokens, run.chunk_tokens)
            passes = [run.chunk_tokens] * int(whole) + ([rest] if rest else [])
            pairs = tokens * run.row.get("prompt_depth_tokens", 0) + tokens * (tokens + 1) / 2
            seqs, last = 0, 0
        # As `whole_prompt_s`: pipelined stages take a share of all passes but the last, which goes through all.
        stages = w.prompt_stages if len(passes) > 1 else 1
        shares = [1 / stages] * (len(passes) - 1) + [1.0]
        pairs = pairs / stages + passes[-1] * tokens * (stages - 1) / stages if stages > 1 else pairs
        distinct = sum(
            share * (1 - (1 - w.expert_share) ** rows_in) for share, rows_in in zip(shares, passes, strict=True)
        )
        count = sum(shares)
        experts = w.expert_bytes + w.host_expert_bytes
        unpacked = w.expert_flops_per_row / (w.expert_share or 1.0) * w.expert_bytes / (experts or 1.0)
        rows_all = sum(share * rows_in for share, rows_in in zip(shares, passes, strict=True))
        bandwidth, peak = w.bandwidth_bytes_per_s, w.peak_flops_per_s
        context = seqs * run.row.get("depth_tokens", 0)
        rows.append(
            {
                "dense_read": count * (w.dense_bytes + w.head_bytes) / bandwidth,
                "dense_unpack": count * (w.dense_flops_per_row + w.head_flops_per_row) / w.vector_flops_per_s,
                "expert_read": distinct * w.expert_bytes / bandwidth,
                "expert_unpack": distinct * unpacked / w.vector_flops_per_s,
                "read": (seqs * w.state_bytes_per_seq + drafts * w.draft_bytes) / bandwidth,
                "kv_s": context * w.kv_bytes_per_token / bandwidth,
                "dense_s": (rows_all * w.dense_flops_per_row + last * w.head_flops_per_row) / peak,
                "expert_s": rows_all * w.expert_flops_per_row / peak,
                "pair_s": pairs * w.flops_per_pair / peak,
                "wire_s": rows_all * w.link_bytes_per_row / (w.link_bytes_per_s or 1.0) if w.all_reduces else 0.0,
                "host_s": distinct * w.host_expert_bytes / HOST_BYTES_PER_S,
                "layer_n": count * w.layers,
                "pass_n": count * w.layers if one.kind == "prefill" else 0,
                "link_n": count * w.all_reduces,
                "draft_n": drafts,
                "drafts": drafts,
                "tokens": tokens,
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _advance(drafts: np.ndarray, odds: np.ndarray, decay_odds: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tokens per pass as `steps.py` has them, and the slopes of their logarithm by both odds."""
    acceptance, decay = 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-decay_odds))
    tokens, taken = np.ones(len(drafts)), np.ones(len(drafts))
    by_odds, by_decay = np.zeros(len(drafts)), np.zeros(len(drafts))
    for place in range(int(drafts.max(initial=0))):
        taken = np.where(drafts > place, taken * acceptance * decay**place, 0.0)
        tokens = tokens + taken
        by_odds = by_odds + taken * (place + 1) * (1 - acceptance)
        by_decay = by_decay + taken * (place * (place + 1) / 2) * (1 - decay)
    return tokens, by_odds / tokens, by_decay / tokens


def error(one: Observation, terms: Terms) -> float:
    """log(predicted / measured)."""
    return log(one.predicted(terms) / one.measured)
