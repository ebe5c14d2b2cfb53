"""Seconds of a pass: what the simulation and the speed model both rely on.

The figures here follow from the definitions (bytes over bandwidth, expected distinct experts), not from measurements;
those are tests/test_speed.py's.
"""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as some

from qwenfit.planner.steps import CONSTITUENTS, StepTime

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
    prompt_s=3e-3,
    link_s=5e-4,
    link_row_s=1e-7,
    draft_s=2e-3,
    rows_per_seq=4,
    tokens_per_seq=2.7,
)
counts = some.integers(0, 5000)


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


def test_scaled_scales_every_second():
    assert STEP.scaled(2.0).step_s(100, 1000, 3, 500) == pytest.approx(2 * STEP.step_s(100, 1000, 3, 500))
    assert STEP.scaled(1.0, 3.0).step_s(4096, 0, 0, 0) > STEP.step_s(4096, 0, 0, 0)


def test_it_travels_between_processes():
    assert pickle.loads(pickle.dumps(STEP)) == STEP
    assert hash(STEP) == hash(pickle.loads(pickle.dumps(STEP)))
