"""The simulation against closed-form queues, against a simulation of every single step, and against conservation laws.

Queues: with one seat and a fixed step time a replica is an M/G/1 queue (Pollaczek-Khinchine), with c seats and
exponential answers an M/M/c queue (Erlang C). The reference below shares no code with the simulation: it walks step by
step, and counts every sequence's blocks anew.
"""

import math
from dataclasses import dataclass
from random import Random
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.batching import Limits, Served, _steps_until, simulate
from qwenfit.planner.workload import Load


@dataclass(frozen=True)
class Fixed:
    """Every step takes as long, whatever is in it."""

    seconds: float

    def step_s(self, *_: int) -> float:
        return self.seconds


@dataclass(frozen=True)
class Roofline:
    """Bound by memory or by arithmetic, with a kink between them."""

    read_s: float = 0.01
    row_s: float = 1e-4
    pair_s: float = 1e-8
    context_s: float = 3e-5
    overhead_s: float = 0.001

    def step_s(self, prefill: int, pairs: int, seqs: int, context: int) -> float:
        memory_s = self.read_s + context * self.context_s
        return max(memory_s, (prefill + seqs) * self.row_s * 5 + 0.012) + pairs * self.pair_s + self.overhead_s


def load_of(rng: Random, count: int, rate: float, outputs: list[int], prompts: list[int] | None = None) -> Load:
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return Load(prompts or [1] * count, [0] * count, outputs, times_s=times)


def mean_wait(served: Served) -> tuple[float, float]:
    """The mean wait, and four of its standard errors by batch means (waits are correlated)."""
    waits = [a - b for a, b in zip(served.admitted_s, served.arrival_s, strict=True)][len(served.arrival_s) // 20 :]
    batch = len(waits) // 20
    means = [mean(waits[place * batch : (place + 1) * batch]) for place in range(20)]
    return mean(waits), 4 * stdev(means) / math.sqrt(20)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_seat_and_equal_answers_are_an_m_d_1_queue(load: float) -> None:
    seconds, tokens, count = 0.002, 50, 60_000
    service_s = seconds * tokens
    served = simulate(Fixed(seconds), Limits(1, 64), load_of(Random(1), count, load / service_s, [tokens] * count))
    wait, error = mean_wait(served)
    assert wait == pytest.approx(load * service_s / (2 * (1 - load)), abs=error)
    assert error < 0.2 * wait


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_seat_and_exponential_answers_are_an_m_m_1_queue(load: float) -> None:
    rng, seconds, count = Random(2), 0.001, 60_000
    outputs = [max(1, math.ceil(rng.expovariate(1 / 100))) for _ in range(count)]
    service_s = seconds * 100
    served = simulate(Fixed(seconds), Limits(1, 64), load_of(rng, count, load / service_s, outputs))
    wait, error = mean_wait(served)
    assert wait == pytest.approx(load * service_s / (1 - load), abs=error + 0.01 * service_s)


@pytest.mark.parametrize(("seats", "load"), [(4, 0.7), (16, 0.85)])
def test_seats_and_exponential_answers_are_an_m_m_c_queue(seats: int, load: float) -> None:
    rng, seconds, count = Random(3), 0.001, 80_000
    outputs = [max(1, math.ceil(rng.expovariate(1 / 300))) for _ in range(count)]
    service_s, offered = seconds * 300, seats * load
    served = simulate(Fixed(seconds), Limits(seats, 64), load_of(rng, count, offered / service_s, outputs))
    top = offered**seats / math.factorial(seats) / (1 - load)
    waits_share = top / (sum(offered**k / math.factorial(k) for k in range(seats)) + top)
    wait, error = mean_wait(served)
    # A seat is freed at the end of a step, and taken at the start of the next: up to one step of 1/300 of the service.
    assert wait == pytest.approx(waits_share * service_s / (seats * (1 - load)), abs=error + 2 * seconds)


def stepwise(step: Roofline | Fixed, limits: Limits, load: Load) -> tuple[list[float], list[float], int]:
    """The same rules, one step at a time: (first token, finish, preemptions)."""
    count = len(load.new_tokens)
    first, finish, given_out = [-1.0] * count, [-1.0] * count, [0] * count
    waiting: list[int] = []
    running: list[dict[str, int]] = []
    now, arrived, preemptions = 0.0, 0, 0
    assert load.times_s is not None

    def held(sequence: dict[str, int], ahead: int) -> int:
        tokens = sequence["goal"] + 1 if sequence["left"] else sequence["there"] + ahead
        return limits.blocks(tokens)

    def free(ahead: int) -> int:
        return (limits.num_blocks or 10**9) - sum(held(one, ahead) for one in running)

    while True:
        while arrived < count and load.times_s[arrived] <= now:
            total = load.new_tokens[arrived] + load.cached_tokens[arrived] + load.output_tokens[arrived]
            if limits.num_blocks is None or limits.blocks(total) <= limits.num_blocks:
                waiting.append(arrived)
            arrived += 1
        if not running and not waiting:
            if arrived == count:
                return first, finish, preemptions
            now = load.times_s[arrived]
            continue
        decoding = [one for one in running if not one["left"]]
        budget = limits.max_num_batched_tokens - len(decoding) - sum(one["left"] for one in running)
        while waiting and budget > 0 and len(running) < limits.max_num_seqs:
            request = waiting[0]
            new = load.new_tokens[request] + given_out[request]
            goal = new + load.cached_tokens[request]
            if limits.num_blocks is not None and limits.blocks(goal + 1) > free(1) and running:
                break
            running.append({"id": waiting.pop(0), "left": new, "there": goal - new, "goal": goal})
            budget -= new
        while limits.num_blocks is not None and free(1) < 0:
            victim = running.pop()
            waiting.insert(0, victim["id"])
            preemptions += 1
        decoding = [one for one in running if not one["left"]]
        budget, tokens, pairs = max(1, limits.max_num_batched_tokens - len(decoding)), 0, 0
        context = sum(one["there"] for one in decoding)
        completed = []
        for one in running:
            if one["left"] and budget > tokens:
                chunk = min(one["left"], budget - tokens)
                pairs += chunk * (one["there"] + (chunk + 1) // 2)
                one["left"] -= chunk
                one["there"] += chunk
                tokens += chunk
                if not one["left"]:
                    completed.append(one)
        now += step.step_s(tokens, pairs, len(decoding), context)
        for one in decoding + completed:
            one["there"] += 1
            request = one["id"]
            given_out[request] += 1
            if first[request] < 0:
                first[request] = now
            if given_out[request] == load.output_tokens[request]:
                finish[request] = now
        running = [one for one in running if finish[one["id"]] < 0]


LOADS = st.lists(
    st.tuples(st.floats(0, 0.3), st.integers(1, 60), st.sampled_from([0, 0, 16, 32]), st.integers(1, 40)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(
    LOADS,
    st.integers(1, 8),
    st.sampled_from([8, 32, 128]),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([None, 12, 30, 200]),
    st.integers(0, 2),
)
def test_skipping_ahead_equals_walking_every_step(
    asked: list[tuple[float, int, int, int]], seats: int, budget: int, block: int, blocks: int | None, state: int
) -> None:
    times = [sum(gap for gap, *_ in asked[: place + 1]) for place in range(len(asked))]
    load = Load([one[1] for one in asked], [one[2] for one in asked], [one[3] for one in asked], times_s=times)
    limits = Limits(seats, budget, block, blocks and blocks * 16 // block, state)
    served = simulate(Roofline(), limits, load)
    first, finish, preemptions = stepwise(Roofline(), limits, load)
    assert served.first_token_s == pytest.approx(first, rel=1e-9, abs=1e-9)
    assert served.finish_s == pytest.approx(finish, rel=1e-9, abs=1e-9)
    assert served.preemptions == preemptions
    assert limits.num_blocks is None or served.peak_blocks <= limits.num_blocks


@settings(max_examples=100, deadline=None)
@given(LOADS, st.integers(1, 8))
def test_nothing_is_lost(asked: list[tuple[float, int, int, int]], seats: int) -> None:
    """Tokens and time are conserved, and Little's law holds: seats in use over time are what the requests sat there."""
    times = [sum(gap for gap, *_ in asked[: place + 1]) for place in range(len(asked))]
    load = Load([one[1] for one in asked], [one[2] for one in asked], [one[3] for one in asked], times_s=times)
    served = simulate(Roofline(), Limits(seats, 64), load)
    assert served.decode_tokens == sum(load.output_tokens)
    assert served.prefill_tokens == sum(load.new_tokens)
    sat = sum(b - a for a, b in zip(served.admitted_s, served.finish_s, strict=True))
    assert served.running_s == pytest.approx(sat)
    assert served.busy_s <= served.end_s * (1 + 1e-12)
    for arrival, admitted, first, finish in zip(
        served.arrival_s, served.admitted_s, served.first_token_s, served.finish_s, strict=True
    ):
        assert arrival <= admitted < first <= finish


def test_users_wait_for_their_answers() -> None:
    """Three users without a pause keep three seats busy: 30 requests of 10 steps take 100 steps, whatever the order."""
    load = Load([1] * 30, [0] * 30, [10] * 30, think_s=[0.0] * 30, users=3)
    served = simulate(Fixed(0.5), Limits(8, 64), load)
    assert served.end_s == pytest.approx(50.0) and served.peak_waiting == 3
    assert mean(b - a for a, b in zip(served.arrival_s, served.finish_s, strict=True)) == pytest.approx(5.0)


def test_users_obey_the_response_time_law() -> None:
    """N = X (R + Z): users are throughput times response and think time together."""
    rng, users, count = Random(5), 12, 20_000
    think = [rng.expovariate(1 / 2.0) for _ in range(count)]
    served = simulate(
        Fixed(0.01), Limits(4, 64), Load([1] * count, [0] * count, [50] * count, think_s=think, users=users)
    )
    response = mean(b - a for a, b in zip(served.arrival_s, served.finish_s, strict=True))
    assert count / served.end_s * (response + 2.0) == pytest.approx(users, rel=0.02)


def test_a_request_that_can_never_fit_is_refused_and_the_rest_is_served() -> None:
    load = Load([10, 1000, 10], [0] * 3, [5] * 3, times_s=[0.0, 0.0, 0.0])
    served = simulate(Fixed(1.0), Limits(4, 64, 16, 10), load)
    assert [finish >= 0 for finish in served.finish_s] == [True, False, True]


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1.0), st.floats(0, 0.1))
def test_steps_until_is_the_fewest(gap: float, first: float, slope: float) -> None:
    count = _steps_until(gap, first, slope)
    took = lambda n: n * first + slope * n * (n - 1) / 2  # noqa: E731
    assert count >= 1 and took(count) >= gap * (1 - 1e-9)
    assert count == 1 or took(count - 1) <= gap * (1 + 1e-9)
