"""How many replicas a workload needs, what its users then see, and what gives way first as it grows.

A fleet deals requests to equal replicas in turn, so one replica stands for all of them: it is simulated with its share
of the load, the first fifth of the requests (filling up) and the last tenth (emptying) left out of the figures. A mix
deals in proportion to what each kind of replica can carry.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ..profiles.frozen import dataclass, replace
from .arrivals import sampled
from .batching import Limits, Served, Step, simulate
from .workload import Load, Workload

QUANTILES = (0.5, 0.9, 0.95, 0.99)
REQUESTS = 4000  # simulated per question: the 95th percentile is then known to a few percent
MAX_REQUESTS = 8_000
SETTLING = 4.0  # times the 99th percentile of the latency that the arrivals of a load must span
MAX_REPLICAS = 1 << 20
EXACTLY = 64  # up to so many replicas are told apart
SEED = 20261122


@dataclass(frozen=True, slots=True)
class Measured:
    """What one replica does under its share of the load. Percentiles in seconds, in the order of `QUANTILES`."""

    requests: int
    ttft_s: tuple[float, ...]  # from arrival to first token
    tpot_s: tuple[float, ...]  # mean time per output token after the first, per request
    latency_s: tuple[float, ...]  # from arrival to last token
    wait_s: tuple[float, ...]  # from arrival to admission
    mean_wait_s: float
    mean_latency_s: float
    requests_per_s: float  # finished
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    utilization: float  # share of the time with a step under way
    tower: float  # share of the time in the vision tower
    mean_running: float
    seatless: float  # share of the time with somebody waiting and every seat taken
    seats: int
    peak_waiting: int
    peak_blocks: int
    num_blocks: int | None
    preemptions: int
    refused: int
    grows: bool  # more comes in than goes out: the queue grows for as long as the load lasts

    @property
    def p95_ttft_s(self) -> float:
        return self.ttft_s[2]

    @property
    def p95_tpot_s(self) -> float:
        return self.tpot_s[2]


@lru_cache(maxsize=4096)  # what-ifs, candidates and load points ask for the same things again
def measure(
    step: Step, limits: Limits, workload: Workload, reuse_tokens: int, share: float = 1.0,
    requests: int = REQUESTS, seed: int = SEED,
) -> Measured:  # fmt: skip
    """One replica under `share` of a workload. More requests are drawn where the load must last longer to settle: a few
    times as long as the longest answers take."""
    while True:
        load = sampled(workload, requests, seed, reuse_tokens, share)
        served = simulate(step, limits, load)
        found = summary(served, limits, load)
        settled = served.arrival_s[-1] >= SETTLING * found.latency_s[3]
        if settled or found.grows or requests >= MAX_REQUESTS:
            return found
        requests = min(MAX_REQUESTS, requests * 2)


def summary(served: Served, limits: Limits, load: Load) -> Measured:
    """The figures of a simulated load, its first fifth and last tenth left out."""
    count = len(served.arrival_s)
    kept = [place for place in range(count // 5, count - count // 10) if served.finish_s[place] >= 0]
    kept = kept or [place for place in range(count) if served.finish_s[place] >= 0]
    arrival, first, finish, admitted = served.arrival_s, served.first_token_s, served.finish_s, served.admitted_s
    waits = [admitted[place] - arrival[place] for place in kept]
    latency = [finish[place] - arrival[place] for place in kept]
    tokens = served.output_tokens
    per_token = [(finish[p] - first[p]) / (tokens[p] - 1) for p in kept if tokens[p] > 1]
    last_arrival = max(arrival, default=0.0)
    behind = sum(1 for place in range(count) if served.finish_s[place] >= 0 and admitted[place] > last_arrival)
    end_s = served.end_s or 1e-12
    return Measured(
        requests=count,
        ttft_s=_quantiles([first[place] - arrival[place] for place in kept]),
        tpot_s=_quantiles(per_token),
        latency_s=_quantiles(latency),
        wait_s=_quantiles(waits),
        mean_wait_s=sum(waits) / max(1, len(waits)),
        mean_latency_s=sum(latency) / max(1, len(latency)),
        requests_per_s=count / end_s,
        decode_tokens_per_s=served.decode_tokens / end_s,
        prefill_tokens_per_s=served.prefill_tokens / end_s,
        utilization=served.busy_s / end_s,
        tower=served.tower_s / end_s,
        mean_running=served.running_s / end_s,
        seatless=served.seatless_s / end_s,
        seats=limits.max_num_seqs,
        peak_waiting=served.peak_waiting,
        peak_blocks=served.peak_blocks,
        num_blocks=limits.num_blocks,
        preemptions=served.preemptions,
        refused=sum(1 for finished in served.finish_s if finished < 0),
        grows=load.times_s is not None and behind > max(limits.max_num_seqs, count // 50) and _rises(waits),
    )


def _rises(waits: Sequence[float]) -> bool:
    """Whether those who came last waited clearly longer than those in the middle."""
    fifth = max(1, len(waits) // 5)
    return sum(waits[-fifth:]) > 1.3 * sum(waits[2 * fifth : 3 * fifth])


def _quantiles(values: Iterable[float]) -> tuple[float, ...]:
    """Nearest rank: the smallest value that at least that share of them does not exceed."""
    ordered = sorted(values)
    if not ordered:
        return (0.0,) * len(QUANTILES)
    return tuple(ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in QUANTILES)


def broken(measured: Measured, workload: Workload) -> tuple[str, ...]:
    """Which promises do not hold, in words; empty where all do."""
    targets, found = workload.targets, []
    if measured.refused:
        found.append(f"{measured.refused} of {measured.requests} requests are longer than the cache can hold")
    if measured.grows:
        found.append("the queue grows without end: more requests come in than can be served")
    if targets.p95_ttft_s is not None and measured.p95_ttft_s > targets.p95_ttft_s:
        found.append(f"p95 time to first token is {measured.p95_ttft_s:.3g} s, promised {targets.p95_ttft_s:g} s")
    if targets.p95_tpot_s is not None and measured.p95_tpot_s > targets.p95_tpot_s:
        found.append(f"p95 time per output token is {measured.p95_tpot_s:.3g} s, promised {targets.p95_tpot_s:g} s")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Sizing:
    """The fewest replicas that keep the promises, and what each then does. 0: no number does, and why."""

    replicas: int
    measured: Measured
    reasons: tuple[str, ...]


def smallest(
    step: Step, limits: Limits, workload: Workload, reuse_tokens: int, requests: int = REQUESTS, within: float = 0.01
) -> Sizing:
    """The fewest replicas that keep every promise; beyond `EXACTLY` of them to the share `within`.

    Where a request alone on a replica already breaks one, no number does: the answer says which.
    """

    def at(replicas: int) -> Measured:
        return measure(step, limits, workload, reuse_tokens, 1 / replicas, requests)

    alone = replace(workload, rate_per_s=None, users=1, think_s=0.0)
    idle = measure(step, limits, alone, reuse_tokens, 1.0, min(requests, 2000))
    reasons = broken(idle, workload)
    if reasons:
        return Sizing(0, idle, tuple(f"even with a replica to itself: {reason}" for reason in reasons))
    most = workload.users or MAX_REPLICAS
    high = 1 if workload.rate_per_s is None else _guess(step, limits, workload, reuse_tokens)
    high = min(most, high)
    low, found = 0, at(high)  # `low` does not do
    while broken(found, workload):
        if high >= most:
            reasons = broken(found, workload)
            return Sizing(0, found, tuple(f"even with {high:,} replicas: {reason}" for reason in reasons))
        low, high = high, min(most, high + max(1, high // 4 if high > 4 else high))
        found = at(high)
    while high - low > max(1, int(high * within) if high > EXACTLY else 1):
        # The first guess is near: the bracket below it is opened step by step.
        middle = max((low + high) // 2, high - max(1, high // 5)) if low == 0 else (low + high) // 2
        tried = at(middle)
        if broken(tried, workload):
            low = middle
        else:
            high, found = middle, tried
    return Sizing(high, found, ())


def _guess(step: Step, limits: Limits, workload: Workload, reuse_tokens: int) -> int:
    """Replicas that would just be full."""
    return max(1, math.ceil((workload.rate_per_s or 0) / carries(step, limits, workload, reuse_tokens)))


@dataclass(frozen=True, slots=True)
class Breaking:
    """The largest multiple of the load that keeps the promises, and what gives way beyond it."""

    factor: float
    promise: str
    cause: str


def breaks_first(
    step: Step, limits: Limits, workload: Workload, reuse_tokens: int, share: float, requests: int = REQUESTS
) -> Breaking:
    """What gives way first as the load grows, on replicas that each have `share` of it."""

    def at(factor: float) -> Measured:
        return measure(step, limits, scaled(workload, factor), reuse_tokens, share, requests)

    low, high = 0.0, 1.0
    while high < 1e6 and not broken(at(high), workload):
        low, high = high, high * 2
    if high >= 1e6:
        return Breaking(high, "nothing", "no load that was tried breaks a promise")
    for _ in range(6):
        middle = (low + high) / 2
        if broken(at(middle), workload):
            high = middle
        else:
            low = middle
    over = at(high)
    return Breaking(low, broken(over, workload)[0], cause(over, limits, step))


def cause(measured: Measured, limits: Limits, step: Step) -> str:
    """What an overloaded replica has run out of."""
    if measured.refused:
        return "the cache is smaller than the longest requests"
    if measured.preemptions > measured.requests // 50:
        return "KV blocks: sequences are preempted and computed again"
    waits = measured.wait_s[2] > 0.3 * measured.ttft_s[2]  # rather than its own prompt being long
    blocks = limits.num_blocks
    if waits and blocks is not None and measured.peak_blocks > 0.95 * blocks:
        return "KV blocks: requests wait until enough are free for their prompts"
    if waits and measured.seatless > 0.01:
        return f"seats: all {limits.max_num_seqs} sequences are taken, and requests wait for one to end"
    if measured.tower > 0.5 * measured.utilization:
        return "the vision tower: it takes most of the time"
    width = max(1, round(measured.mean_running))
    prefill = step.step_s(limits.max_num_batched_tokens, 0, width, 0)
    decode = step.step_s(0, 0, width, 0)
    if measured.prefill_tokens_per_s * (prefill - decode) > 0.5 * limits.max_num_batched_tokens:
        return "prefill: computing prompts takes most of the time"
    return "decoding: every further sequence makes each step longer"


def scaled(workload: Workload, factor: float) -> Workload:
    """The workload with `factor` times the requests, or users."""
    if workload.users is not None:
        return replace(workload, users=max(1, round(workload.users * factor)))
    return replace(workload, rate_per_s=(workload.rate_per_s or 0) * factor)


def carries(step: Step, limits: Limits, workload: Workload, reuse_tokens: int, requests: int = 2000) -> float:
    """Requests per second that one replica finishes when more than enough are waiting."""
    flood = replace(workload, rate_per_s=None, users=2 * limits.max_num_seqs, think_s=0.0)
    load = sampled(flood, max(requests, 8 * limits.max_num_seqs), SEED, reuse_tokens)
    ends = sorted(finished for finished in simulate(step, limits, load).finish_s if finished >= 0)
    early, late = ends[len(ends) // 5], ends[len(ends) * 4 // 5]  # neither filling up nor emptying
    return len(ends) * 0.6 / max(late - early, 1e-9)


def mixed_shares(rates: Sequence[float], counts: Sequence[int]) -> tuple[float, ...]:
    """The share of the load for one replica of each kind: in proportion to what it carries."""
    total = sum(rate * count for rate, count in zip(rates, counts, strict=True))
    return tuple(rate / total for rate in rates)
