"""How many are needed and what breaks first, on a step time made by hand whose answers can be worked out on paper."""

import math
from dataclasses import dataclass

import pytest

from qwenfit.planner.batching import Limits
from qwenfit.planner.capacity import (
    _quantiles,
    breaks_first,
    broken,
    carries,
    measure,
    mixed_shares,
    scaled,
    smallest,
)
from qwenfit.planner.workload import Images, Lengths, Part, Targets, Workload
from qwenfit.profiles.frozen import replace

HUNDRED = Lengths((Part(1.0, 100, 100),))


@dataclass(frozen=True)
class Row:
    """10 ms for a step, 0.1 ms more for every prompt token: an answer of 100 tokens behind 100 takes about a second.
    `row_s` more for every row that decodes."""

    row_s: float = 0.0
    rows_per_seq: int = 1
    tokens_per_seq: float = 1.0

    def step_s(self, prefill: int, pairs: int, seqs: int, context: float) -> float:
        return 0.01 + prefill * 1e-4 + seqs * self.rows_per_seq * self.row_s

    def image_s(self, image_tokens: int) -> float:
        return image_tokens * 0.01


def chat(rate: float | None = None, users: int | None = None, **targets: float) -> Workload:
    return Workload(HUNDRED, HUNDRED, rate_per_s=rate, users=users, targets=Targets(**targets))


def test_quantiles_are_by_nearest_rank() -> None:
    assert _quantiles([float(value) for value in range(1, 101)]) == (50.0, 90.0, 95.0, 99.0)
    assert _quantiles([3.0]) == (3.0,) * 4


def test_a_replica_carries_its_seats_over_its_service_time() -> None:
    """Eight seats, 100 steps of 10 ms, and for each of eight prompts 10 ms more: 8 / (1.0 + 8 x 0.01) a second."""
    assert carries(Row(), Limits(8, 2048), chat(1.0), 0) == pytest.approx(8 / 1.08, rel=0.02)


@pytest.mark.parametrize(("seats", "gain"), [(1, 1.961), (16, 1.568), (50, 1.2), (100, 1.0), (400, 0.769)])
def test_drafts_stop_paying_where_rows_cost_as_much_as_the_pass(seats: int, gain: float) -> None:
    """A pass of R = 10 ms and r = 0.1 ms a row; with two drafts 3 rows for 2 tokens: 2 (R + n r) / (R + 3 n r), which
    is 1 at n = R / r = 100 sequences. The prompt is one token of a thousand, so it hardly counts."""
    load = Workload(Lengths((Part(1.0, 1, 1),)), Lengths((Part(1.0, 1001, 1001),)), users=1)
    limits = Limits(seats, 8192)
    plain = carries(Row(1e-4), limits, load, 0)
    assert carries(Row(1e-4, 3, 2.0), limits, load, 0) / plain == pytest.approx(gain, rel=0.01)


def test_a_tower_that_takes_most_of_the_time_is_what_breaks() -> None:
    """A second for every image and for every answer: one seat carries one request in two seconds."""
    seeing = replace(chat(0.4, p95_ttft_s=30.0), images=Images(100, 1.0))
    assert carries(Row(), Limits(1, 2048), seeing, 0) == pytest.approx(1 / 2.02, rel=0.01)
    seeing = replace(chat(0.4, p95_ttft_s=5.0), images=Images(200, 1.0))
    assert "vision tower" in breaks_first(Row(), Limits(8, 2048), seeing, 0, 1.0, 2000).cause


@pytest.mark.parametrize(("rate", "replicas"), [(1.0, 1), (30.0, 5), (300.0, 42)])
def test_the_fewest_replicas(rate: float, replicas: int) -> None:
    """At 7.4 requests a second each, the load of n replicas must be below 7.4 n and its queue short enough."""
    found = smallest(Row(), Limits(8, 2048), chat(rate, p95_ttft_s=0.5), 0)
    assert abs(found.replicas - replicas) <= max(1, 0.03 * replicas) and found.replicas >= rate / (8 / 1.08)
    assert found.measured.p95_ttft_s <= 0.5 and not found.reasons


def test_more_load_never_needs_fewer() -> None:
    counts = [smallest(Row(), Limits(4, 512), chat(rate, p95_ttft_s=1.0), 0).replicas for rate in (2.0, 8.0, 32.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_a_promise_that_no_number_keeps_is_told_with_its_reason() -> None:
    found = smallest(Row(), Limits(8, 2048), chat(1.0, p95_tpot_s=0.009), 0)
    assert found.replicas == 0 and "even with a replica to itself" in found.reasons[0]
    assert "time per output token is 0.01 s, promised 0.009 s" in found.reasons[0]


def test_users_never_need_more_replicas_than_they_are() -> None:
    found = smallest(Row(), Limits(1, 2048), chat(users=3, p95_ttft_s=0.03), 0)
    assert found.replicas == 3


def test_a_queue_that_grows_is_seen_and_one_that_does_not_is_not() -> None:
    assert measure(Row(), Limits(8, 2048), chat(8.5), 0).grows
    assert not measure(Row(), Limits(8, 2048), chat(6.0), 0).grows


def test_what_runs_out() -> None:
    seats = breaks_first(Row(), Limits(4, 2048), chat(1.0, p95_ttft_s=0.5), 0, 1.0)
    assert "seats" in seats.cause and 1.5 < seats.factor < 3.7
    blocks = breaks_first(Row(), Limits(64, 2048, 16, 60), chat(1.0, p95_ttft_s=0.5), 0, 1.0)
    assert "blocks" in blocks.cause
    prefill = Workload(Lengths((Part(1.0, 2000, 2000),)), Lengths((Part(1.0, 2, 2),)), rate_per_s=1.0)
    assert "prefill" in breaks_first(Row(), Limits(256, 2048), prefill, 0, 1.0).cause


def test_requests_that_cannot_fit_break_the_promise() -> None:
    seen = measure(Row(), Limits(8, 2048, 16, 10), chat(1.0), 0)
    assert seen.refused == seen.requests and "longer than the cache can hold" in broken(seen, chat(1.0))[0]


def test_a_mix_deals_in_proportion_to_what_each_carries() -> None:
    shares = mixed_shares((2.0, 6.0), (3, 1))
    assert shares == (2 / 12, 6 / 12) and math.isclose(shares[0] * 3 + shares[1], 1.0)


def test_scaled_loads() -> None:
    assert scaled(chat(3.0), 2).rate_per_s == 6.0 and scaled(chat(users=3), 0.1).users == 1


def test_the_same_question_has_the_same_answer() -> None:
    measure.cache_clear()
    once = measure(Row(), Limits(8, 2048), chat(5.0), 0)
    measure.cache_clear()
    assert measure(Row(), Limits(8, 2048), chat(5.0), 0) == once
