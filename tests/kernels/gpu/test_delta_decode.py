# pyright: reportCallIssue=false
# Arguments travel as lists here, whose lengths pyright does not know.
"""The decode step of the gated delta rule in Triton against float64: 1 to 8 tokens, every slot where it should be."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
import triton.language as tl  # noqa: E402

from qwenfit.kernels.gpu import delta_decode  # noqa: E402
from qwenfit.kernels.gpu.target import TARGETS  # noqa: E402
from qwenfit.kernels.reference import delta as reference_delta  # noqa: E402

pytestmark = pytest.mark.usefixtures("walls")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

UNIT = 2.0**-24
"""A rounding of float32: where both errors are of that size their ratio is chance."""


def rms_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def inputs(
    batch: int, tokens: int, heads: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """qkv, a, b [batch, tokens, ..] among NaN, A_log, dt_bias; heads: (NK, NV), size: (DK, DV)."""
    generator = torch.Generator().manual_seed(seed)
    per_token = []
    for width in (2 * heads[0] * size[0] + heads[1] * size[1], heads[1], heads[1]):
        wide = torch.full((batch, tokens, width + 16), torch.nan, dtype=dtype)
        wide[..., :width] = torch.randn(batch, tokens, width, generator=generator).to(dtype)
        per_token.append(wide.to(DEVICE)[..., :width])
    A_log, dt_bias = (torch.randn(heads[1], generator=generator).to(DEVICE) for _ in range(2))
    return [*per_token, A_log, dt_bias - 1]


@triton.jit
def write_softplus(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, delta_decode.softplus(tl.load(x + at)))


def test_softplus_keeps_its_digits() -> None:
    """Relative to itself, not to 1: log(1 + e^x) would lose all of it from -17 on. A GPU's e^x is 2^(1.44 x), which is
    as good as the product in the exponent."""
    x = torch.cat([torch.linspace(-80, 80, 4093), torch.tensor([0.0, 1e30, -torch.inf])]).to(DEVICE)
    found = torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
    write_softplus[(1,)](x, found, SIZE=4096)
    truth = torch.nn.functional.softplus(x.double(), threshold=1000)
    assert ((found.double() - truth).abs() <= 2.0**-21 * truth * x.double().abs().clamp(1, 80)).all()


def random_state(slots: int, value_heads: int, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(slots)
    return (torch.randn(slots, value_heads, size[1], size[0], generator=generator) * 0.3).to(dtype).to(DEVICE)


@QUICK
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 8),
    heads=st.sampled_from(((1, 1), (1, 3), (2, 4))),
    size=st.sampled_from(((32, 32), (64, 32), (32, 64), (128, 128), (16, 16))),
    dtype=st.sampled_from(DTYPES),
    state_dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 1000),
)
def test_errors_are_those_of_torch(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    seed: int,
) -> None:
    """A slot per token, the last of which is the source again, as speculation has them (`runtime/memory.py`)."""
    given_inputs = inputs(batch, tokens, heads, size, dtype, seed)
    state = random_state(batch * tokens + 1, heads[1], size, state_dtype)
    source = int32(*range(0, batch * tokens, tokens))
    target = torch.stack([source + (1 + token) % tokens for token in range(tokens)], 1).contiguous()
    where = (source, target, heads[0])
    twin_state, true_state, before = state.clone(), state.double(), state.clone()
    truth = reference_delta.gated_delta_rule_step(*(x.double() for x in given_inputs), true_state, *where)
    twin = reference_delta.gated_delta_rule_step(*given_inputs, twin_state, *where)
    found = delta_decode.gated_delta_rule_step(*given_inputs, state, *where)
    assert found.dtype == dtype and rms_error(found, truth) <= 1.5 * rms_error(twin, truth) + UNIT
    assert rms_error(state, true_state) <= 1.5 * rms_error(twin_state, true_state) + UNIT
    assert torch.equal(state[-1], before[-1])


def test_several_tokens_are_one_after_the_other() -> None:
    """To the bit, with a float32 state: a draft that is accepted leaves what a plain step would have left."""
    given_inputs = inputs(1, 5, (1, 2), (32, 32), torch.bfloat16)
    state = random_state(7, 2, (32, 32))
    single, several = state.clone(), state.clone()
    steps = [
        delta_decode.gated_delta_rule_step(
            *(x[:, token : token + 1] for x in given_inputs[:3]), *given_inputs[3:], single, int32(6), int32(6)[None], 1
        )
        for token in range(5)
    ]
    where = (int32(6), int32(0, 1, 2, 3, 4)[None], 1)
    found = delta_decode.gated_delta_rule_step(*given_inputs, several, *where)
    assert torch.equal(found, torch.cat(steps, 1))
    assert torch.equal(several[4], single[6])
    assert torch.equal(several[5:], state[5:])


def test_a_batch_has_no_order() -> None:
    given_inputs = inputs(3, 2, (1, 2), (32, 32), torch.bfloat16)
    state = random_state(6, 2, (32, 32))
    source, target = int32(4, 0, 2), torch.tensor([[5, 4], [1, 0], [3, 2]], dtype=torch.int32, device=DEVICE)
    turned = state.clone()
    found = delta_decode.gated_delta_rule_step(*given_inputs, state, source, target, 1)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    again = delta_decode.gated_delta_rule_step(
        *(x[order] for x in given_inputs[:3]), *given_inputs[3:], turned, source[order], target[order], 1
    )
    assert torch.equal(again, found[order]) and torch.equal(turned, state)


def test_without_strength_the_state_only_fades_and_without_a_gate_it_is_gone() -> None:
    """beta = 0: S' = e^g S and o = e^g S q. g = -inf: S' = d k^T, d = beta v. Neither makes NaN of an infinity."""
    qkv, a, b, A_log, dt_bias = inputs(1, 1, (1, 1), (32, 32), torch.float32)
    state = random_state(2, 1, (32, 32))
    q, k, v, g, beta = reference_delta.delta_inputs(*(x.double() for x in (qkv, a, b, A_log, dt_bias)), 32, 32, 1)
    none = torch.full_like(b, -200.0)
    out = delta_decode.gated_delta_rule_step(qkv, a, none, A_log, dt_bias, state, int32(0), int32(1)[None], 1)
    faded = state[0].double() * g[0, 0].exp()[:, None, None]
    torch.testing.assert_close(state[1].double(), faded, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[0, 0].double(), (faded @ q[0, 0, :, :, None])[..., 0], rtol=1e-5, atol=1e-6)
    for large in (1e4, 1e38):
        gone = torch.full_like(a, large)
        out = delta_decode.gated_delta_rule_step(qkv, gone, b, A_log, dt_bias, state, int32(0), int32(1)[None], 1)
        written = beta[0, 0, :, None] * v[0, 0]
        torch.testing.assert_close(state[1, 0].double(), written[0, :, None] * k[0, 0], rtol=1e-5, atol=1e-7)
        assert out.isfinite().all()


def test_a_negative_slot_is_a_fresh_sequence_that_nobody_keeps() -> None:
    given_inputs = inputs(1, 2, (1, 2), (32, 32), torch.bfloat16)
    state = random_state(3, 2, (32, 32))
    before, fresh = state.clone(), torch.zeros_like(state)
    expected = delta_decode.gated_delta_rule_step(*given_inputs, fresh, int32(0), int32(1, 2)[None], 1)
    found = delta_decode.gated_delta_rule_step(*given_inputs, state, int32(-1), int32(-1, 1)[None], 1)
    assert torch.equal(found, expected) and torch.equal(state[1], fresh[2])
    assert torch.equal(state[::2], before[::2])


@pytest.mark.parametrize("state_bytes", [2, 4])
def test_every_target_has_whole_tiles(state_bytes: int) -> None:
    """Rows divide DV, pieces divide DK and 128 bytes of a row lie together, for every size that is let in."""
    for target in TARGETS:
        for size in (16, 32, 64, 128, 256):
            use = delta_decode.step_configuration(target, size, size, state_bytes)
            assert size % use.rows == 0 and size % use.inner == 0
            assert use.inner * state_bytes == min(128, size * state_bytes)
        assert len(delta_decode.compile_cases(target)) == 3


def test_what_the_kernel_cannot_read_is_refused() -> None:
    given_inputs = inputs(1, 1, (1, 2), (32, 32), torch.bfloat16)
    state, where = random_state(2, 2, (32, 32)), (int32(0), int32(0)[None], 1)
    with pytest.raises(ValueError, match=r"state is torch.float16 .* give contiguous float32 or bfloat16"):
        delta_decode.gated_delta_rule_step(*given_inputs, state.half(), *where)
    with pytest.raises(ValueError, match="the state's DK is 24: the delta kernels take powers of two from 16 to 256"):
        delta_decode.gated_delta_rule_step(*given_inputs, state[..., :24].contiguous(), *where)
    with pytest.raises(ValueError, match="2 value heads on 3 key heads: give a divisor"):
        delta_decode.gated_delta_rule_step(*given_inputs, state, *where[:2], 3)
    with pytest.raises(ValueError, match="give bf16, fp16 or fp32 with 192 channels"):
        delta_decode.gated_delta_rule_step(*given_inputs, state, *where[:2], 2)
    with pytest.raises(ValueError, match=r"b is torch.bfloat16 \[1, 1, 1\]: give \[1, 1, 2\] floats"):
        delta_decode.gated_delta_rule_step(
            *given_inputs[:2], given_inputs[2][..., :1], *given_inputs[3:], state, *where
        )
    with pytest.raises(ValueError, match=r"A_log is torch.float32 \[1\]: give contiguous \[2\] floats"):
        delta_decode.gated_delta_rule_step(*given_inputs[:3], torch.zeros(1), given_inputs[4], state, *where)
    with pytest.raises(ValueError, match="a step takes"):
        delta_decode.gated_delta_rule_step(*(x[0] for x in given_inputs[:3]), *given_inputs[3:], state, *where)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the interpreter's tests stand for it")
def test_real_shapes_on_a_gpu() -> None:
    for state_dtype in (torch.float32, torch.bfloat16):
        given_inputs = inputs(16, 4, (16, 32), (128, 128), torch.bfloat16)
        state = random_state(64, 32, (128, 128), state_dtype)
        source = int32(*range(0, 64, 4))
        where = (source, torch.stack([source + (1 + token) % 4 for token in range(4)], 1).contiguous(), 16)
        twin_state, true_state = state.clone(), state.double()
        truth = reference_delta.gated_delta_rule_step(*(x.double() for x in given_inputs), true_state, *where)
        twin = reference_delta.gated_delta_rule_step(*given_inputs, twin_state, *where)
        found = delta_decode.gated_delta_rule_step(*given_inputs, state, *where)
        assert rms_error(found, truth) <= 1.5 * rms_error(twin, truth) + UNIT
        assert rms_error(state, true_state) <= 1.5 * rms_error(twin_state, true_state) + UNIT
