"""Distributions, arrivals and prefix reuse: sampled figures against their definitions."""

import math
from itertools import pairwise
from random import Random
from statistics import mean, median, quantiles, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.planner.arrivals import arrival_times, sampled
from qwenfit.planner.workload import Images, Lengths, Part, Prefix, Workload, check, lognormal
from qwenfit.profiles.errors import BadInput
from qwenfit.profiles.frozen import replace

ONE = Lengths((Part(1.0, 100, 100),))
CHAT = Workload(ONE, ONE, rate_per_s=2.0)


def test_a_lognormal_part_has_the_median_and_the_percentile_that_were_asked_for() -> None:
    drawn = Lengths((lognormal(1.0, 800, 4000, 65536),)).sample(Random(1), 40_000)
    assert median(drawn) == pytest.approx(800, rel=0.02)
    assert quantiles(drawn, n=20)[-1] == pytest.approx(4000, rel=0.04)
    assert max(Lengths((lognormal(1.0, 800, 4000, 5000),)).sample(Random(1), 10_000)) == 5000


def test_a_mixture_has_the_shares_that_were_asked_for() -> None:
    """Thinking mode: most answers are short, some are 65,536 tokens long."""
    drawn = Lengths((Part(0.9, 10, 20), Part(0.1, 65536, 65536))).sample(Random(2), 20_000)
    assert sum(one == 65536 for one in drawn) / len(drawn) == pytest.approx(0.1, abs=0.01)
    assert min(drawn) >= 10 and set(drawn) <= {*range(10, 21), 65536}


@pytest.mark.parametrize("shape", [0.25, 1.0, 16.0])
def test_gaps_are_gamma_distributed(shape: float) -> None:
    times = arrival_times(Random(3), 5.0, shape, 40_000)
    gaps = [b - a for a, b in pairwise(times)]
    assert mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert stdev(gaps) / mean(gaps) == pytest.approx(1 / math.sqrt(shape), rel=0.04)


def test_a_replica_of_four_gets_every_fourth_request() -> None:
    """Dealt in turn: a quarter of the rate, and gaps that are sums of four."""
    times = sampled(CHAT, 20_000, 1, 1, 0.25).times_s
    assert times is not None
    gaps = [b - a for a, b in pairwise(times)]
    assert mean(gaps) == pytest.approx(2.0, rel=0.03) and stdev(gaps) / mean(gaps) == pytest.approx(0.5, rel=0.04)


@pytest.mark.parametrize(("block", "cached", "new"), [(1, 3000, 100), (528, 2640, 460), (4096, 0, 3100), (0, 0, 3100)])
def test_a_shared_prefix_is_reused_in_whole_blocks(block: int, cached: int, new: int) -> None:
    load = sampled(replace(CHAT, prefix=Prefix(3000, 1.0)), 10, 1, block)
    assert set(load.cached_tokens) == {cached} and set(load.new_tokens) == {new}


def test_images_are_prompt_tokens_of_some_requests() -> None:
    load = sampled(replace(CHAT, images=Images(768, 0.5)), 4000, 1, 1)
    assert set(load.new_tokens) == {100, 868}
    assert sum(one == 868 for one in load.new_tokens) / 4000 == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("block", "seen"), [(1, ()), (528, ()), (4096, (768,)), (0, (768,))])
def test_an_image_in_the_prefix_is_seen_where_it_is_not_cached(block: int, seen: tuple[int, ...]) -> None:
    """3,000 tokens that begin with an image of 768: five blocks of 528 hold it, one of 4,096 is never filled."""
    load = sampled(replace(CHAT, prefix=Prefix(3000, 1.0, 768)), 10, 1, block)
    assert (load.images or [()])[0] == seen
    both = sampled(replace(CHAT, prefix=Prefix(3000, 1.0, 768), images=Images(512, 1.0, 2)), 10, 1, block)
    assert both.images == [(*seen, 256, 256)] * 10
    assert both.new_tokens[0] + both.cached_tokens[0] == 100 + 3000 + 512


def test_users_keep_to_their_replica() -> None:
    load = sampled(Workload(ONE, ONE, users=200, think_s=30), 5000, 1, 1, 0.25)
    assert load.users == 50 and load.times_s is None and load.think_s is not None
    assert mean(load.think_s) == pytest.approx(30, rel=0.05)


@pytest.mark.parametrize(
    "changed",
    [
        {"rate_per_s": 0.0}, {"rate_per_s": -1.0}, {"rate_per_s": math.inf}, {"rate_per_s": math.nan},
        {"rate_per_s": None}, {"users": 5}, {"burstiness": 0.0}, {"think_s": -1.0}, {"think_s": math.nan},
        {"prompt_tokens": Lengths(())}, {"prompt_tokens": Lengths((Part(0.5, 1, 2),))},
        {"output_tokens": Lengths((Part(1.0, 5, 2),))}, {"output_tokens": Lengths((Part(1.0, 0, 2),))},
        {"prefix": Prefix(10, 1.5)}, {"prefix": Prefix(0, 0.5)}, {"images": Images(100, 0.0)},
        {"prefix": Prefix(10, 0.5, 11)},
    ],
)  # fmt: skip
def test_what_no_service_could_be_asked_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        check(replace(CHAT, **changed))


@given(st.integers(1, 1000), st.integers(1, 5000), st.floats(0.01, 1.0), st.integers(0, 4096))
def test_what_is_drawn_is_what_was_asked(count: int, tokens: int, share: float, block: int) -> None:
    load = sampled(replace(CHAT, prefix=Prefix(tokens, share)), count, 7, block)
    assert len(load.new_tokens) == len(load.cached_tokens) == len(load.output_tokens) == count
    for new, cached in zip(load.new_tokens, load.cached_tokens, strict=True):
        assert new >= 1 and new + cached in (100, 100 + tokens) and (not cached or cached % block == 0)
