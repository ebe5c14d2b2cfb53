"""The causal convolution in Triton against float64, against itself step by step, and against memory around it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu import conv  # noqa: E402
from qwenfit.kernels.reference import dense as reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("walls")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

UNIT = 2.0**-24
"""A rounding of float32: where both errors are of that size their ratio is chance."""


def rms_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def inputs(tokens: int, channels: int, taps: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, channels] among NaN, weight [channels, taps], state of 6 slots."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((tokens + 1, channels + 8), torch.nan, dtype=dtype)
    x[:tokens, :channels] = torch.randn(tokens, channels, generator=generator).to(dtype)
    weight = torch.randn(channels, taps, generator=generator).to(dtype)
    state = torch.randn(6, channels, taps - 1, generator=generator).to(dtype)
    return x.to(DEVICE)[:tokens, :channels], weight.to(DEVICE), state.to(DEVICE)


@QUICK
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=4),
    channels=st.sampled_from((8, 40, 256, 300)),
    taps=st.integers(2, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_a_batch_of_prompts(lengths: list[int], channels: int, taps: int, dtype: torch.dtype, seed: int) -> None:
    """Errors of torch, states to the bit, slots that no sequence names untouched."""
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    x, weight, state = inputs(bounds[-1], channels, taps, dtype, seed)
    slots, cu_seqlens = int32(*[5, 2, 4, 0][: len(lengths)]), int32(*bounds)
    expected, true_state = state.clone(), state.double()
    truth = reference.causal_conv1d_prefill(x.double(), weight.double(), true_state, slots, cu_seqlens)
    twin = reference.causal_conv1d_prefill(x, weight, expected, slots, cu_seqlens)
    found = conv.causal_conv1d_prefill(x, weight, state, slots, cu_seqlens)
    assert torch.equal(state, expected)
    if bounds[-1]:
        assert rms_error(found, truth) <= 1.5 * rms_error(twin, truth) + UNIT


@QUICK
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 8),
    channels=st.sampled_from((8, 130, 256)),
    taps=st.integers(2, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_a_step_of_several_tokens(
    batch: int, tokens: int, channels: int, taps: int, dtype: torch.dtype, seed: int
) -> None:
    """A slot per token, the last of which is the source again, as speculation has them (`runtime/memory.py`)."""
    x, weight, _ = inputs(batch * tokens, channels, taps, dtype, seed)
    x = x.unflatten(0, (batch, tokens))
    state = torch.randn(batch * tokens + 1, channels, taps - 1).to(dtype).to(DEVICE)
    source = int32(*range(0, batch * tokens, tokens))
    target = torch.stack([source + (1 + token) % tokens for token in range(tokens)], 1).contiguous()
    expected, true_state = state.clone(), state.double()
    truth = reference.causal_conv1d_update(x.double(), weight.double(), true_state, source, target)
    twin = reference.causal_conv1d_update(x, weight, expected, source, target)
    found = conv.causal_conv1d_update(x, weight, state, source, target)
    assert torch.equal(state, expected)
    assert rms_error(found, truth) <= 1.5 * rms_error(twin, truth) + UNIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prompt_is_its_tokens_one_by_one(dtype: torch.dtype) -> None:
    """To the bit: a draft that is accepted must leave what the prompt would have left. Cut at every token."""
    x, weight, state = inputs(21, 40, 4, dtype)
    once, cut, step = state.clone(), state.clone(), state.clone()
    whole = conv.causal_conv1d_prefill(x, weight, once, int32(3), int32(0, 21))
    pieces = [conv.causal_conv1d_prefill(part, weight, cut, int32(3), int32(0, len(part))) for part in x.split(5)]
    steps = [conv.causal_conv1d_update(row[None, None], weight, step, int32(3), int32(3)[None])[0] for row in x]
    assert torch.equal(torch.cat(pieces), whole) and torch.equal(cut, once)
    assert torch.equal(torch.cat(steps), whole) and torch.equal(step, once)
    four = state.clone()
    together = conv.causal_conv1d_update(x[:4][None], weight, four, int32(3), int32(0, 1, 2, 3)[None])
    assert torch.equal(together[0], whole[:4])


def test_a_batch_is_a_loop_and_has_no_order() -> None:
    x, weight, state = inputs(60, 40, 4, torch.bfloat16)
    spans = ((0, 35), (35, 37), (37, 60))
    alone = state.clone()
    parts = [
        conv.causal_conv1d_prefill(x[a:b], weight, alone, int32(slot), int32(0, b - a))
        for slot, (a, b) in enumerate(spans)
    ]
    together = state.clone()
    found = conv.causal_conv1d_prefill(x, weight, together, int32(0, 1, 2), int32(0, 35, 37, 60))
    assert torch.equal(found, torch.cat(parts)) and torch.equal(together, alone)
    turned = torch.cat([x[a:b] for a, b in reversed(spans)])
    together = state.clone()
    found = conv.causal_conv1d_prefill(turned, weight, together, int32(2, 1, 0), int32(0, 23, 25, 60))
    assert torch.equal(found, torch.cat(parts[::-1])) and torch.equal(together, alone)


def test_a_negative_slot_is_a_fresh_sequence_that_nobody_keeps() -> None:
    x, weight, state = inputs(20, 40, 4, torch.bfloat16)
    before, fresh = state.clone(), torch.zeros_like(state)
    expected = conv.causal_conv1d_prefill(x, weight, fresh, int32(0), int32(0, 20))
    assert torch.equal(conv.causal_conv1d_prefill(x, weight, state, int32(-1), int32(0, 20)), expected)
    steps = conv.causal_conv1d_update(x[:2][None], weight, state, int32(-1), int32(-1, 4)[None])
    assert torch.equal(steps[0], expected[:2])
    assert torch.equal(state[:4], before[:4]) and torch.equal(state[5], before[5])
    assert torch.equal(state[4, :, 0], torch.zeros(40, dtype=state.dtype, device=DEVICE))
    assert torch.equal(state[4, :, 1:], x[:2].T)


def test_what_the_kernels_cannot_read_is_refused() -> None:
    x, weight, state = inputs(4, 40, 4, torch.bfloat16)
    x = x.contiguous()
    with pytest.raises(ValueError, match=r"weight is \[40, 5\]: give contiguous \[40, 2..4\]"):
        conv.causal_conv1d_prefill(x, torch.zeros(40, 5), state, int32(0), int32(0, 4))
    with pytest.raises(ValueError, match=r"state is \[6, 40, 2\]: give contiguous \[slots, 40, 3\]"):
        conv.causal_conv1d_prefill(x, weight, state[..., 1:], int32(0), int32(0, 4))
    with pytest.raises(ValueError, match=r"x is \[4, 40\]: a step takes \[B, S, C\] with S from 1 to 8"):
        conv.causal_conv1d_update(x, weight, state, int32(0), int32(0)[None])
    with pytest.raises(ValueError, match=r"torch.float64"):
        conv.causal_conv1d_prefill(x.double(), weight, state, int32(0), int32(0, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the interpreter's tests stand for it")
def test_real_shapes_on_a_gpu() -> None:
    x, weight, state = inputs(2048, 8192, 4, torch.bfloat16)
    expected, true_state = state.clone(), state.double()
    where = (int32(1, 3), int32(0, 1000, 2048))
    truth = reference.causal_conv1d_prefill(x.double(), weight.double(), true_state, *where)
    twin = reference.causal_conv1d_prefill(x, weight, expected, *where)
    found = conv.causal_conv1d_prefill(x, weight, state, *where)
    assert torch.equal(state, expected)
    assert rms_error(found, truth) <= 1.5 * rms_error(twin, truth) + UNIT
