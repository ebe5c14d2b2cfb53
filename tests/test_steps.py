"""Seconds of a pass: what the simulation and the speed model both rely on.

The figures here follow from the definitions (bytes over bandwidth, expected distinct experts), not from measurements;
those are tests/test_speed.py's.
"""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as some

from qwenfit.planner.factors import Factors
from qwenfit.planner.steps import CONSTITUENTS, StepTime, step_time
from qwenfit.planner.work import _tower, work
from qwenfit.profiles.device_names import device
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.frozen import replace
from qwenfit.profiles.model_catalog import model

STEP = StepTime(
    dense_read_s=4e-3,
    expert_read_s=8e-3,
    host_read_s=20e-3,
    expert_share=8 / 256,
    row_s=2e-5,
    head_row_s=1e-6,
    pair_s=1e-9,
    context_s=1e-8,
    seq_s=1e-5,
    overhead_s=1e-3,
    prompt_dense_read_s=5e-3,
    prompt_expert_read_s=7e-3,
    prompt_overhead_s=3e-3,
    link_s=5e-4,
    link_row_s=1e-7,
    draft_s=2e-3,
    rows_per_seq=4,
    tokens_per_seq=2.7,
)
counts = some.integers(0, 5000)


def test_an_image_takes_its_bytes_and_flops():
    """The tower of the 9B: 27 layers of 1152 and 4304, patches of 2 x 3 x 16 x 16, four to a token, merged from 4608 to
    4096. Weights are 16 bit, two FLOPs each per patch; attention four per pair of patches, element and layer."""
    nine = model("qwen3.5-9b")
    amount = work(nine, weight_format("bf16"), (device("l40s"),), "bf16")
    block = 3 * 1152**2 + 1152**2 + 2 * 1152 * 4304
    per_patch, merger = 27 * block + 1152 * 1536, 4608 * 4608 + 4608 * 4096
    assert amount.vision_flops_per_token == 2 * (4 * per_patch + merger)
    assert amount.vision_flops_per_pair == 4 * 27 * 1152 * 16
    assert amount.vision_bytes == pytest.approx(2 * (per_patch + merger + 2304 * 1152), rel=1e-3)  # and biases
    factors = Factors(0.5, 1.0, 0.4, 0.4, 0.25, 1e-6, 3e-6, 0.0, 1.0, 0.7, 1.0, 1.0, 0.0, 1e9, 0.5, 1.0, 1e-6)
    read, peak = amount.bandwidth_bytes_per_s * 0.5, amount.peak_flops_per_s
    seconds = amount.vision_bytes / read + 27 * 4e-6 + 768 * amount.vision_flops_per_token / (0.4 * peak)
    seconds += 768**2 * amount.vision_flops_per_pair / (0.25 * peak)
    step = step_time(amount, factors)
    assert step.image_s(768) == pytest.approx(seconds)
    assert step.scaled(5.0, 2.0).image_s(768) == pytest.approx(2 * seconds)
    halved = work(nine, weight_format("bf16"), (device("l40s"), device("l40s")), "bf16", tp=2)
    assert halved.vision_flops_per_token == amount.vision_flops_per_token / 2


def test_a_tower_that_a_rank_count_does_not_divide_lies_whole():
    """16 heads over 3 ranks: there is no such plan of a text model, so the rule is asked directly."""
    nine = model("qwen3.5-9b")
    assert nine.vision is not None and nine.vision.num_heads == 16
    whole, third = (_tower(nine, 10**9, ranks)["vision_flops_per_token"] for ranks in (1, 3))
    assert whole == third
    assert _tower(nine, 0, 1) == {}


@given(counts, counts, some.integers(0, 512), some.integers(0, 10**7))
def test_the_constituents_are_the_step(prefill_tokens, prefill_pairs, decode_seqs, decode_context_tokens):
    asked = prefill_tokens, prefill_pairs, decode_seqs, decode_context_tokens
    parts = STEP.constituents(*asked)
    assert tuple(parts) == CONSTITUENTS
    assert sum(parts.values()) == pytest.approx(STEP.step_s(*asked))


@given(counts, counts, some.integers(0, 512), some.integers(0, 10**7))
def test_more_of_anything_never_takes_less(prefill_tokens, prefill_pairs, decode_seqs, decode_context_tokens):
    asked = [prefill_tokens, prefill_pairs, decode_seqs, decode_context_tokens]
    before = STEP.step_s(*asked)
    for place in range(4):
        more = [*asked]
        more[place] += 1
        assert STEP.step_s(*more) >= before


@given(some.integers(1, 512), some.integers(0, 10**6), some.integers(1, 10**6))
def test_a_fixed_batch_is_linear_in_its_context(seqs, start, tokens):
    """The simulation runs from event to event with it."""
    first, second, third = (STEP.step_s(0, 0, seqs, start + n * tokens) for n in range(3))
    assert third - second == pytest.approx(second - first, abs=1e-12)


def test_experts_are_read_as_far_as_rows_need_them():
    """8 of 256 per row: one row reads 1/32, two rows 1/32 + 31/32 x 1/32, many rows all of them."""
    bare = STEP.constituents
    assert bare(1, 0, 0, 0)["host memory"] == pytest.approx(20e-3 / 32)
    assert bare(2, 0, 0, 0)["host memory"] == pytest.approx(20e-3 * (1 / 32 + 31 / 32 / 32))
    assert bare(4096, 0, 0, 0)["host memory"] == pytest.approx(20e-3)


def test_a_batch_grows_from_memory_to_arithmetic():
    few, many = STEP.constituents(1, 0, 0, 0), STEP.constituents(4096, 0, 0, 0)
    assert few["weight reads"] > 10 * few["compute"]
    assert many["compute"] > 5 * many["weight reads"]


def test_a_prompt_attends_to_all_before_it():
    """1,000 tokens behind 500: 1000 x 500 + 1000 x 1001 / 2 pairs, in two passes of 512 and 488."""
    passes = STEP.step_s(512, 0, 0, 0) + STEP.step_s(488, 0, 0, 0)
    assert STEP.whole_prompt_s(1000, 512, 500) == pytest.approx(passes + (500_000 + 500_500) * 1e-9)


def test_a_pass_of_prompts_alone_has_weights_of_its_own_and_one_of_both_the_longer():
    """4 + 8 ms and 1 ms of decoding against 5 + 7 ms and 3 ms of prompts, all experts read: 13 and 15 ms."""
    arithmetic = 10**6 * (2e-5 + 1e-7) + 20e-3 + 5e-4
    assert STEP.step_s(10**6, 0, 0, 0) == pytest.approx(15e-3 + arithmetic)
    quick = replace(STEP, prompt_dense_read_s=0.0, prompt_overhead_s=0.0)
    assert quick.step_s(10**6, 0, 0, 0) == pytest.approx(7e-3 + arithmetic)
    rows = 10**6 * (2e-5 + 1e-7) + 4 * (2e-5 + 1e-6 + 1e-7) + 1e-5 + 2e-3
    assert quick.step_s(10**6, 0, 1, 0) == pytest.approx(13e-3 + 20e-3 + 5e-4 + rows)
    assert STEP.step_s(10**6, 0, 1, 0) == pytest.approx(15e-3 + 20e-3 + 5e-4 + rows)


def test_scaled_scales_every_second():
    assert STEP.scaled(2.0).step_s(100, 1000, 3, 500) == pytest.approx(2 * STEP.step_s(100, 1000, 3, 500))
    assert STEP.scaled(1.0, 3.0).step_s(4096, 0, 0, 0) > STEP.step_s(4096, 0, 0, 0)


def test_it_travels_between_processes():
    assert pickle.loads(pickle.dumps(STEP)) == STEP
    assert hash(STEP) == hash(pickle.loads(pickle.dumps(STEP)))
