# pyright: reportCallIssue=false
# Arguments travel as lists here, whose lengths pyright does not know.
"""The delta rule of the CPU path against its twin in float64: any cut, any gate, any slot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenfit.kernels.cpu.delta import gated_delta_rule_prefill, gated_delta_rule_step
from qwenfit.kernels.cpu.library import available_isas
from qwenfit.kernels.reference import delta as reference_delta

pytestmark = pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")
FEW = settings(max_examples=25, deadline=None)
KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 4, 32, 48
WIDTH = 2 * KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """qkv, a, b, A_log, dt_bias."""
    qkv, a, b = randn(*shape, WIDTH), randn(*shape, HEADS, seed=1), randn(*shape, HEADS, seed=2)
    return qkv.to(dtype), a.to(dtype), b.to(dtype), randn(HEADS, seed=3).float(), randn(HEADS, seed=4).float()


def rms_error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def wide(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.double() for value in values)


LIMITS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}  # what rounding the result costs, times 1.5


@FEW
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(6, 150)), min_size=1, max_size=3),
    dtype=st.sampled_from(sorted(LIMITS, key=str)),
    state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_prompts(lengths: list[int], dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    ends, slots = torch.tensor([0, *lengths]).cumsum(0).int(), torch.arange(len(lengths), 0, -1).int()
    values = inputs(int(ends[-1]), dtype=dtype)
    state = randn(len(lengths) + 2, HEADS, VALUE_DIM, KEY_DIM, seed=5).to(state_dtype)
    before, exact_state = state.clone(), state.double()
    y = gated_delta_rule_prefill(*values, state, slots, ends, KEY_HEADS)
    exact = reference_delta.gated_delta_rule_prefill(*wide(values), exact_state, slots, ends, KEY_HEADS)
    if ends[-1]:
        assert rms_error(y, exact) < LIMITS[dtype]
    assert rms_error(state, exact_state) < LIMITS[state_dtype]
    assert torch.equal(state[0], before[0]) and torch.equal(state[-1], before[-1])


@FEW
@given(batch=st.integers(1, 3), steps=st.integers(1, 8), state_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_steps(batch: int, steps: int, state_dtype: torch.dtype) -> None:
    values = inputs(batch, steps)
    state = randn(batch * (steps + 1), HEADS, VALUE_DIM, KEY_DIM, seed=5).to(state_dtype)
    source = torch.arange(batch).int() * (steps + 1)
    target = source[:, None] + torch.arange(1, steps + 1).int() % (steps + 1)
    exact_state = state.double()
    y = gated_delta_rule_step(*values, state, source, target, KEY_HEADS)
    exact = reference_delta.gated_delta_rule_step(*wide(values), exact_state, source, target, KEY_HEADS)
    # A bfloat16 state is rounded after every token, as the twin's would be.
    assert rms_error(y, exact) < (1e-6 if state_dtype == torch.float32 else 1e-2)
    assert rms_error(state, exact_state) < (1e-6 if state_dtype == torch.float32 else 1e-2)


def test_where_a_prompt_is_cut_changes_no_bit() -> None:
    qkv, a, b, *rest = inputs(70)
    slot = torch.zeros(1).int()
    whole_state = randn(1, HEADS, VALUE_DIM, KEY_DIM, seed=5).float()
    cut_state, step_state = whole_state.clone(), whole_state.clone()
    whole = gated_delta_rule_prefill(qkv, a, b, *rest, whole_state, slot, torch.tensor([0, 70]).int(), KEY_HEADS)
    for cut in (1, 15, 16, 17, 33):
        state = cut_state.clone()
        parts = [
            gated_delta_rule_prefill(q, x, y, *rest, state, slot, torch.tensor([0, q.shape[0]]).int(), KEY_HEADS)
            for q, x, y in zip(
                qkv.split([cut, 70 - cut]), a.split([cut, 70 - cut]), b.split([cut, 70 - cut]), strict=True
            )
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(state, whole_state)
    steps = [
        gated_delta_rule_step(
            qkv[None, t : t + 1], a[None, t : t + 1], b[None, t : t + 1], *rest, step_state, slot, slot[None], KEY_HEADS
        )
        for t in range(70)
    ]
    assert torch.equal(torch.cat(steps).view(70, HEADS, VALUE_DIM), whole)


def test_gates_at_their_ends() -> None:
    qkv, a, _, A_log, dt_bias = inputs(40)
    slot, ends = torch.zeros(1).int(), torch.tensor([0, 40]).int()
    state = randn(1, HEADS, VALUE_DIM, KEY_DIM, seed=5).float()
    closed = state.clone()  # beta = 0: the state only fades
    gated_delta_rule_prefill(qkv, a, torch.full_like(a, -200), A_log, dt_bias, closed, slot, ends, KEY_HEADS)
    g = (-A_log.double().exp() * torch.nn.functional.softplus(a.double() + dt_bias.double())).sum(0)
    torch.testing.assert_close(closed[0].double(), state[0].double() * g.exp()[:, None, None], rtol=1e-4, atol=1e-9)
    forgotten = state.clone()  # g = -inf: what was before leaves no trace, and no NaN
    y = gated_delta_rule_prefill(qkv, a + 1e4, a, A_log + 5, dt_bias, forgotten, slot, ends, KEY_HEADS)
    fresh = torch.zeros_like(state)
    assert torch.equal(y, gated_delta_rule_prefill(qkv, a + 1e4, a, A_log + 5, dt_bias, fresh, slot, ends, KEY_HEADS))
    assert bool(y.isfinite().all()) and torch.equal(forgotten, fresh)


def test_threads_change_no_bit() -> None:
    values, slot, ends = inputs(33), torch.zeros(1).int(), torch.tensor([0, 33]).int()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            state = torch.zeros(1, HEADS, VALUE_DIM, KEY_DIM)
            results.append((gated_delta_rule_prefill(*values, state, slot, ends, KEY_HEADS), state))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0][0]) and torch.equal(s, results[0][1]) for y, s in results)
