"""The simulation against closed-form queues, against a simulation of every single step, and against conservation laws.

Queues: with one seat and a fixed step time a replica is an M/G/1 queue (Pollaczek-Khinchine), with c seats and
exponential answers an M/M/c queue (Erlang C). The reference below shares no code with the simulation: it walks step by
step, and counts every sequence's blocks anew.
"""

import math
from dataclasses import dataclass, replace
from random import Random
from statistics import mean, stdev
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.batching import Limits, Served, _steps_until, simulate
from qwenfit.planner.workload import Load


@dataclass(frozen=True)
class Fixed:
    """Every step takes as long, whatever is in it."""

    seconds: float
    rows_per_seq: int = 1
    tokens_per_seq: float = 1.0

    def step_s(self, *_: float) -> float:
        return self.seconds

    def image_s(self, image_tokens: int) -> float:
        return image_tokens * 0.01


@dataclass(frozen=True)
class Roofline:
    """Bound by memory or by arithmetic, with a kink between them."""

    read_s: float = 0.01
    row_s: float = 1e-4
    pair_s: float = 1e-8
    context_s: float = 3e-5
    overhead_s: float = 0.001
    rows_per_seq: int = 1
    tokens_per_seq: float = 1.0

    def step_s(self, prefill: int, pairs: int, seqs: int, context: float) -> float:
        memory_s = self.read_s + context * self.context_s
        rows = prefill + seqs * self.rows_per_seq
        return max(memory_s, rows * self.row_s * 5 + 0.012) + pairs * self.pair_s + self.overhead_s

    def image_s(self, image_tokens: int) -> float:
        return image_tokens * 0.001


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
    running: list[dict[str, Any]] = []
    now, arrived, preemptions = 0.0, 0, 0
    rows, advance = step.rows_per_seq, step.tokens_per_seq
    seen: set[int] = set()
    assert load.times_s is not None

    def held(sequence: dict[str, Any], ahead: int) -> int:
        return limits.blocks((sequence["goal"] if sequence["left"] else math.floor(sequence["there"])) + ahead * rows)

    def free(ahead: int) -> int:
        return (limits.num_blocks or 10**9) - sum(held(one, ahead) for one in running)

    while True:
        while arrived < count and load.times_s[arrived] <= now:
            total = load.new_tokens[arrived] + load.cached_tokens[arrived] + load.output_tokens[arrived]
            if limits.num_blocks is None or limits.blocks(total + rows - 1) <= limits.num_blocks:
                waiting.append(arrived)
            arrived += 1
        if not running and not waiting:
            if arrived == count:
                return first, finish, preemptions
            now = load.times_s[arrived]
            continue
        decoding = [one for one in running if not one["left"]]
        budget = limits.max_num_batched_tokens - len(decoding) * rows - sum(one["left"] for one in running)
        while waiting and budget > 0 and len(running) < limits.max_num_seqs:
            request = waiting[0]
            new = load.new_tokens[request] + given_out[request]
            goal = new + load.cached_tokens[request]
            if limits.num_blocks is not None and limits.blocks(goal + rows) > free(1) and running:
                break
            running.append({"id": waiting.pop(0), "left": new, "there": goal - new, "goal": goal})
            budget -= new
        while limits.num_blocks is not None and free(1) < 0:
            victim = running.pop()
            waiting.insert(0, victim["id"])
            preemptions += 1
        decoding = [one for one in running if not one["left"]]
        budget, tokens, pairs = max(1, limits.max_num_batched_tokens - len(decoding) * rows), 0, 0
        context = sum(one["there"] for one in decoding)
        completed = []
        for one in running:
            if one["left"] and budget > tokens:
                if load.images and one["id"] not in seen:
                    seen.add(one["id"])
                    now += sum(step.image_s(size) for size in load.images[one["id"]])
                chunk = min(one["left"], budget - tokens)
                pairs += chunk * (one["there"] + (chunk + 1) // 2)
                one["left"] -= chunk
                one["there"] += chunk
                tokens += chunk
                if not one["left"]:
                    completed.append(one)
        now += step.step_s(tokens, pairs, len(decoding), context)
        for one in completed:
            one["there"] += 1
            one["tokens"] = float(given_out[one["id"]] + 1)
            if first[one["id"]] < 0:
                first[one["id"]] = now
        for one in decoding:
            one["there"] += advance
            one["tokens"] += advance
        for one in decoding + completed:
            given_out[one["id"]] = math.floor(one["tokens"])
            if given_out[one["id"]] >= load.output_tokens[one["id"]]:
                finish[one["id"]] = now
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
    st.sampled_from([(1, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0)]),
    st.booleans(),
)
def test_skipping_ahead_equals_walking_every_step(
    asked: list[tuple[float, int, int, int]], seats: int, budget: int, block: int, blocks: int | None, state: int,
    drafts: tuple[int, float], images: bool,
) -> None:  # fmt: skip
    """Also with draft tokens that are taken in whole ones, and with images before every other prompt."""
    times = [sum(gap for gap, *_ in asked[: place + 1]) for place in range(len(asked))]
    seen = [(16,) * (place % 2) for place in range(len(asked))] if images else None
    load = Load(
        [one[1] for one in asked], [one[2] for one in asked], [one[3] for one in asked], times_s=times, images=seen
    )
    limits = Limits(seats, budget, block, blocks and blocks * 16 // block, state)
    step = Roofline(rows_per_seq=drafts[0], tokens_per_seq=drafts[1])
    served = simulate(step, limits, load)
    first, finish, preemptions = stepwise(step, limits, load)
    assert served.first_token_s == pytest.approx(first, rel=1e-9, abs=1e-9)
    assert served.finish_s == pytest.approx(finish, rel=1e-9, abs=1e-9)
    assert served.preemptions == preemptions
    assert limits.num_blocks is None or served.peak_blocks <= limits.num_blocks


@settings(max_examples=100, deadline=None)
@given(LOADS, st.integers(1, 8), st.sampled_from([1.25, 1.5, 2.75]))
def test_shares_of_draft_tokens_are_summed_as_they_are_walked(
    asked: list[tuple[float, int, int, int]], seats: int, advance: float
) -> None:
    """Tokens per pass that are no whole number, in slots: shares of which binary floats are exact."""
    times = [sum(gap for gap, *_ in asked[: place + 1]) for place in range(len(asked))]
    load = Load([one[1] for one in asked], [one[2] for one in asked], [one[3] for one in asked], times_s=times)
    step = Roofline(rows_per_seq=4, tokens_per_seq=advance)
    first, finish, _ = stepwise(step, Limits(seats, 64), load)
    served = simulate(step, Limits(seats, 64), load)
    assert served.first_token_s == pytest.approx(first, rel=1e-9, abs=1e-9)
    assert served.finish_s == pytest.approx(finish, rel=1e-9, abs=1e-9)


@given(st.integers(1, 400), st.integers(1, 5000), st.floats(1, 5))
def test_one_sequence_with_drafts_takes_its_passes_and_no_more(prompt: int, output: int, advance: float) -> None:
    """The prompt's pass gives one token, and each pass after it `advance`: 1 + ceil((n - 1) / advance) passes."""
    step = replace(Fixed(0.25), rows_per_seq=4, tokens_per_seq=advance)
    served = simulate(step, Limits(8, 512), Load([prompt], [0], [output], times_s=[0.0]))
    assert served.finish_s == pytest.approx([0.25 * (1 + math.ceil((output - 1) / advance - 1e-9))])
    assert served.decode_tokens == output


def test_a_batch_with_drafts_is_as_much_faster_as_its_passes_are_fewer() -> None:
    """All seats taken and long answers: tokens per second are seats x tokens per pass / seconds of a pass, and the pass
    is priced with the rows and the contexts that the drafts bring: here 4 rows each, contexts of 40 to 40 + 6,000."""
    step = Roofline(rows_per_seq=4, tokens_per_seq=2.5)
    served = simulate(step, Limits(8, 4096), Load([39] * 8, [0] * 8, [6001] * 8, times_s=[0.0] * 8))
    passes = range(2400)
    expected = sum(step.step_s(0, 0, 8, 8 * (40 + 2.5 * done)) for done in passes) + step.step_s(312, 8 * 39 * 20, 0, 0)
    assert served.end_s == pytest.approx(expected, rel=1e-9)
    assert served.steps == 2401


def test_each_image_is_seen_once_and_before_the_first_token() -> None:
    """A tower that takes 10 ms a token: images of 16 and 8 tokens delay their own request by 0.24 s, and the one that
    decodes beside it, by the same step. What was preempted is not encoded again."""
    load = Load([5, 5], [0, 0], [400, 1], times_s=[0.0, 10.0], images=[(), (16, 8)])
    served = simulate(Fixed(1.0), Limits(4, 64), load)
    assert served.first_token_s == pytest.approx([1.0, 11.24]) and served.tower_s == pytest.approx(0.24)
    assert served.finish_s == pytest.approx([400.24, 11.24])
    crowded = Load([8] * 6, [0] * 6, [40] * 6, times_s=[0.0] * 6, images=[(16,)] * 6)
    served = simulate(Fixed(1.0), Limits(6, 64, 16, 9), crowded)
    assert served.preemptions and served.tower_s == pytest.approx(6 * 0.16)


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
