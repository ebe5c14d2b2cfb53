"""The plain twins of matmul, convolution and norms, against transformers' own functions and their definitions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize, quantize_rtn
from qwenfit.kernels.reference.dense import (
    add_rms_norm,
    causal_conv1d_prefill,
    causal_conv1d_update,
    expert_matmul,
    gated_rms_norm,
    quantized_matmul,
    rms_norm,
)

QUICK = settings(max_examples=25, deadline=None)
lengths = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def modeling():
    module = "transformers.models.qwen3_5.modeling_qwen3_5"
    return pytest.importorskip(module, reason="pip install 'transformers>=5.23' to compare with its Qwen3.5")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_one_hot_input_picks_the_exact_column(bits: int, symmetric: bool) -> None:
    weight = quantize_rtn(randn(40, 200), bits, 64, symmetric)
    columns = quantized_matmul(torch.eye(200, dtype=torch.float64), weight)
    assert torch.equal(columns.T, dequantize(weight))


def test_a_matmul_accumulates_in_float32_and_rounds_once() -> None:
    weight, x, bias = quantize_rtn(randn(48, 256), 4, 32), randn(3, 5, 256), randn(48)
    exact = x @ dequantize(weight).T + bias
    torch.testing.assert_close(quantized_matmul(x, weight, bias), exact, rtol=1e-12, atol=1e-12)
    rounded = quantized_matmul(x.bfloat16(), weight, bias.bfloat16())
    wide = x.bfloat16().float() @ dequantize(weight, torch.float32).T + bias.bfloat16().float()
    assert rounded.shape == (3, 5, 48)
    assert torch.equal(rounded, wide.bfloat16())


@QUICK
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.booleans())
def test_each_row_meets_the_matrix_of_its_expert(counts: list[int], quantized: bool) -> None:
    stack = randn(len(counts), 24, 128)
    weight = quantize_rtn(stack, 8, 128) if quantized else stack
    matrices = dequantize(weight) if isinstance(weight, QuantizedWeight) else stack
    x = randn(sum(counts), 128, seed=1)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected = torch.einsum("rk,rnk->rn", x, matrices[expert])
    torch.testing.assert_close(expert_matmul(x, weight, ends(counts)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_a_fresh_convolution_is_that_of_transformers(modeling, taps: int) -> None:
    x, weight = randn(11, 6, dtype=torch.float32), randn(6, taps, seed=1, dtype=torch.float32)
    expected = modeling.causal_conv1d_fn(x.T[None], weight, activation="silu")[0].T
    state = torch.zeros(1, 6, taps - 1)
    result = causal_conv1d_prefill(x, weight, state, torch.tensor([0]), ends([11]))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(state[0], x[-(taps - 1) :].T)


def test_a_convolution_step_is_that_of_transformers(modeling) -> None:
    x, weight, history = (randn(*shape, dtype=torch.float32) for shape in ((1, 5, 6), (6, 4), (2, 6, 3)))
    their_state = history[1:].clone()
    expected = modeling.causal_conv1d_update(x.mT, their_state, weight, activation="silu").mT
    state = history.clone()
    result = causal_conv1d_update(x, weight, state, torch.tensor([1]), torch.full((1, 5), 1))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(state[1:], their_state)
    assert torch.equal(state[0], history[0])


@QUICK
@given(lengths, st.integers(2, 4), st.integers(0, 99))
def test_sequences_side_by_side_convolve_as_alone_and_as_token_by_token(
    counts: list[int], taps: int, seed: int
) -> None:
    channels, slots = 5, torch.randperm(7, generator=torch.Generator().manual_seed(seed))[: len(counts)]
    x, weight = randn(sum(counts), channels, seed=seed), randn(channels, taps, seed=1)
    state = randn(7, channels, taps - 1, seed=2)
    together, stepwise = state.clone(), state.clone()
    result = causal_conv1d_prefill(x, weight, together, slots, ends(counts))
    for part, slot in zip(result.split(counts), slots.tolist(), strict=True):
        rows = x.split(counts)[slots.tolist().index(slot)]
        for token, row in zip(rows, part, strict=True):
            place = torch.tensor([[slot]])
            out = causal_conv1d_update(token[None, None], weight, stepwise, place[0], place)
            torch.testing.assert_close(out[0, 0], row, rtol=1e-12, atol=1e-12)
    assert torch.equal(together, stepwise)
    untouched = [slot for slot in range(7) if slot not in slots.tolist()]
    assert torch.equal(together[untouched], state[untouched])


def test_every_draft_leaves_its_own_state() -> None:
    x, weight, state = randn(2, 3, 4), randn(4, 4), randn(8, 4, 3)
    before = state.clone()
    target = torch.tensor([[0, 4, 5], [1, 6, 7]])
    result = causal_conv1d_update(x, weight, state, torch.tensor([0, 1]), target)
    for b in range(2):
        for s in range(3):
            alone = before.clone()
            place = torch.tensor([b])
            prefix = causal_conv1d_update(x[b : b + 1, : s + 1], weight, alone, place, place.expand(1, s + 1))
            torch.testing.assert_close(result[b, : s + 1], prefix[0])
            assert torch.equal(state[target[b, s]], alone[b])
    assert torch.equal(state[2:4], before[2:4])


def test_the_norms_are_those_of_transformers(modeling) -> None:
    x, gate, weight = (randn(4, 7, 32, seed=seed, dtype=torch.float32) for seed in range(3))
    plain, gated = modeling.Qwen3_5RMSNorm(32, eps=1e-6), modeling.Qwen3_5RMSNormGated(32, eps=1e-6)
    for norm in (plain, gated):
        norm.weight.data = weight[0, 0]
    close: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(rms_norm(x, weight[0, 0], 1e-6), plain(x).detach(), **close)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight[0, 0], 1e-6), gated(x, gate).detach(), **close)
    normed, total = add_rms_norm(x.bfloat16(), gate.bfloat16(), weight[0, 0], 1e-6)
    assert torch.equal(total, gate.bfloat16() + x.bfloat16())
    assert torch.equal(normed, plain(total).detach().bfloat16())


def test_a_norm_of_zeros_and_of_huge_numbers_is_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [3e4, -3e4]], dtype=torch.float16)
    result = rms_norm(x, torch.zeros(2), 1e-6)
    assert torch.equal(result, torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float16))
