# pyright: reportCallIssue=false
# Arguments travel as lists here, whose lengths pyright does not know.
"""The chunked gated delta rule in Triton against float64 and against its own identities.

The bound is that of the issue, against the strictest torch there is: the twin of `reference/delta.py` computes 16-bit
inputs in float32 throughout and rounds only its output, and the kernels' error may be 1.5 times that. States stay
within one rounding of the input dtype.
"""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu import delta_prefill, delta_recurrent, delta_solve  # noqa: E402
from qwenfit.kernels.gpu.delta_decode import gated_delta_rule_step  # noqa: E402
from qwenfit.kernels.gpu.delta_prefill import gated_delta_rule_prefill, prefill_scratch_bytes  # noqa: E402
from qwenfit.kernels.gpu.target import TARGETS, target  # noqa: E402
from qwenfit.kernels.reference import delta as reference_delta  # noqa: E402

pytestmark = pytest.mark.usefixtures("walls")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHECKS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
UNIT = 2.0**-24
"""A rounding of float32: where both errors are of that size their ratio is chance."""
NOISE = 4 * UNIT
"""Two float32 numbers that are right may be so far apart: after one token a dozen roundings lie behind outputs and
state, and whose happen to cancel is chance (8.4e-8 above 1.5 times torch's is the most seen in 300 prompts)."""


def rms_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def inputs(
    tokens: int, heads: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, seed: int = 0, memory: float = 1.0
) -> list[Tensor]:
    """qkv, a, b [tokens, ..] among NaN, A_log, dt_bias; heads: (NK, NV), size: (DK, DV).

    memory: the larger, the slower the state forgets.
    """
    generator = torch.Generator().manual_seed(seed)
    per_token = []
    for width in (2 * heads[0] * size[0] + heads[1] * size[1], heads[1], heads[1]):
        wide = torch.full((tokens + 2, width + 16), torch.nan, dtype=dtype)
        values = torch.randn(tokens, width, generator=generator)
        wide[:tokens, :width] = (values * values.sigmoid() * 2 if width > heads[1] else values).to(dtype)
        per_token.append(wide.to(DEVICE)[:tokens, :width])
    A_log, dt_bias = (torch.randn(heads[1], generator=generator).to(DEVICE) for _ in range(2))
    return [*per_token, A_log, dt_bias - memory]


def random_state(slots: int, value_heads: int, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(slots)
    return (torch.randn(slots, value_heads, size[1], size[0], generator=generator) * 0.3).to(dtype).to(DEVICE)


def check_against_float64(
    given_inputs: list[Tensor], state: Tensor, slots: Tensor, bounds: Tensor, key_heads: int, times: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Runs kernel, twin and truth on the same sequences; returns what the kernel made. The state is left as it was."""
    found_state, twin_state, true_state = state.clone(), state.clone(), state.double()
    where = (slots, bounds, key_heads)
    truth = reference_delta.gated_delta_rule_prefill(*(x.double() for x in given_inputs), true_state, *where)
    twin = reference_delta.gated_delta_rule_prefill(*given_inputs, twin_state, *where)
    found = gated_delta_rule_prefill(*given_inputs, found_state, *where)
    assert found.dtype == given_inputs[0].dtype and found.shape == truth.shape
    assert rms_error(found, truth) <= times * rms_error(twin, truth) + NOISE
    within = times * rms_error(twin_state, true_state) + max(torch.finfo(given_inputs[0].dtype).eps / 4, NOISE)
    assert rms_error(found_state, true_state) <= within
    others = [slot for slot in range(state.shape[0]) if slot not in slots.tolist()]
    assert torch.equal(found_state[others], state[others])
    return found, found_state


def check_any(lengths: list[int], heads, size, dtype: torch.dtype, state_dtype: torch.dtype, memory: float, seed: int):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    given_inputs = inputs(bounds[-1], heads, size, dtype, seed, memory)
    state = random_state(4, heads[1], size, state_dtype)
    check_against_float64(given_inputs, state, int32(*[2, 0, 3][: len(lengths)]), int32(*bounds), heads[0])


ANY = {
    "heads": st.sampled_from(((1, 1), (1, 2), (1, 3), (2, 2))),
    "size": st.sampled_from(((32, 32), (64, 32), (32, 64), (64, 64), (16, 16))),
    "dtype": st.sampled_from(DTYPES),
    "state_dtype": st.sampled_from((torch.float32, torch.bfloat16)),
    "memory": st.sampled_from((0.0, 2.0, 5.0)),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=5, **CHECKS)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=2), **ANY)
def test_errors_are_those_of_torch(lengths, heads, size, dtype, state_dtype, memory, seed) -> None:
    check_any(lengths, heads, size, dtype, state_dtype, memory, seed)


ONE = {"heads": (1, 1), "dtype": torch.bfloat16, "state_dtype": torch.float32, "memory": 2.0}


@pytest.mark.slow
@settings(max_examples=40, **CHECKS)
@example(lengths=[1], size=(32, 64), seed=8, **ONE)  # 1.6 times in chunks
@example(lengths=[1], size=(64, 32), seed=260, **{**ONE, "dtype": torch.float32})
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3).filter(lambda few: 0 < sum(few) <= 300), **ANY)
def test_errors_are_those_of_torch_up_to_300_tokens(lengths, heads, size, dtype, state_dtype, memory, seed) -> None:
    check_any(lengths, heads, size, dtype, state_dtype, memory, seed)


@pytest.mark.parametrize("seed", range(8))
def test_one_token_is_as_exact_as_torch(seed: int) -> None:
    """In chunks the state is rounded to meet q, and one of five such prompts is past the bound (1.9 times seen)."""
    check_any([1], (1, 1), (16, 16), torch.bfloat16, torch.float32, 5.0, seed)


def test_short_and_long_side_by_side() -> None:
    """16 tokens are the last that go token by token, 17 the first in a chunk; rows past the last sequence are not
    written."""
    check_any([16, 17, 1], (1, 2), (32, 32), torch.bfloat16, torch.float32, 2.0, 0)
    given_inputs = inputs(40, (1, 2), (32, 32), torch.bfloat16)
    state = random_state(2, 2, (32, 32))
    alone = state.clone()
    found = gated_delta_rule_prefill(*given_inputs, state, int32(1), int32(0, 9), 1)
    expected = gated_delta_rule_prefill(
        *(x[:9] for x in given_inputs[:3]), *given_inputs[3:], alone, int32(1), int32(0, 9), 1
    )
    assert torch.equal(found[:9], expected) and torch.equal(state, alone) and found[9:].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [0.0, 5.0])
def test_errors_are_those_of_torch_in_heads_of_128(dtype: torch.dtype, memory: float) -> None:
    """The size that every release has, with the tiles that every launch has."""
    check_any([150, 64], (1, 2), (128, 128), dtype, torch.float32, memory, 0)


def check_cut(cut: int, dtype: torch.dtype, tokens: int) -> None:
    given_inputs = inputs(tokens, (1, 2), (32, 32), dtype, memory=3.0)
    state = random_state(2, 2, (32, 32))
    true_state, twin_state, found_state = state.double(), state.clone(), state.clone()
    whole = (int32(1), int32(0, tokens), 1)
    truth = reference_delta.gated_delta_rule_prefill(*(x.double() for x in given_inputs), true_state, *whole)
    twin = reference_delta.gated_delta_rule_prefill(*given_inputs, twin_state, *whole)
    parts = []
    for part in (slice(0, cut), slice(cut, tokens)):
        length = part.stop - part.start
        one = (*(x[part] for x in given_inputs[:3]), *given_inputs[3:])
        parts.append(gated_delta_rule_prefill(*one, found_state, int32(1), int32(0, length), 1))
    assert rms_error(torch.cat(parts), truth) <= 1.5 * rms_error(twin, truth) + UNIT
    assert rms_error(found_state, true_state) <= torch.finfo(dtype).eps / 4 + NOISE


@pytest.mark.parametrize(("cut", "dtype"), [(1, torch.bfloat16), (37, torch.float32), (64, torch.bfloat16)])
def test_a_prompt_may_be_cut(cut: int, dtype: torch.dtype) -> None:
    check_cut(cut, dtype, 80)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prompt_may_be_cut_anywhere(dtype: torch.dtype) -> None:
    for cut in (1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 139):
        check_cut(cut, dtype, 140)


def test_a_batch_is_a_loop_and_has_no_order() -> None:
    """To the bit: chunks are cut by sequence, and no program sees another's."""
    given_inputs = inputs(100, (1, 2), (32, 32), torch.bfloat16)
    spans, alone = ((0, 67), (67, 68), (68, 68), (68, 100)), random_state(5, 2, (32, 32))
    together, turned = alone.clone(), alone.clone()
    parts = []
    for slot, (start, end) in enumerate(spans):
        one = (*(x[start:end] for x in given_inputs[:3]), *given_inputs[3:])
        parts.append(gated_delta_rule_prefill(*one, alone, int32(slot), int32(0, end - start), 1))
    found = gated_delta_rule_prefill(*given_inputs, together, int32(0, 1, 2, 3), int32(0, 67, 68, 68, 100), 1)
    assert torch.equal(found, torch.cat(parts)) and torch.equal(together, alone)
    backwards = (
        *(torch.cat([x[start:end] for start, end in spans[::-1]]) for x in given_inputs[:3]),
        *given_inputs[3:],
    )
    found = gated_delta_rule_prefill(*backwards, turned, int32(3, 2, 1, 0), int32(0, 32, 32, 33, 100), 1)
    assert torch.equal(found, torch.cat(parts[::-1])) and torch.equal(turned, alone)


def test_without_strength_the_state_only_fades() -> None:
    """beta = 0: after t tokens the state is e^(g_1 + ... + g_t) S, and o_t reads that."""
    qkv, a, b, A_log, dt_bias = inputs(70, (1, 2), (32, 32), torch.float32, memory=4.0)
    state = random_state(1, 2, (32, 32))
    before, none = state[0].double(), torch.full_like(b, -200.0)
    q, _, _, g, _ = reference_delta.delta_inputs(*(x.double() for x in (qkv, a, b, A_log, dt_bias)), 32, 32, 1)
    found = gated_delta_rule_prefill(qkv, a, none, A_log, dt_bias, state, int32(0), int32(0, 70), 1)
    fading = g.cumsum(0).exp()
    torch.testing.assert_close(state[0].double(), fading[-1, :, None, None] * before, rtol=1e-5, atol=1e-9)
    read = fading[:, :, None] * torch.einsum("hvk,thk->thv", before, q)
    torch.testing.assert_close(found.double(), read, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("large", [1e3, 1e38])
def test_resets_leave_numbers_and_lose_none(large: float) -> None:
    """g = -1e3 and -inf at some tokens, nearly 0 at the others: what comes after a reset keeps its digits.

    A difference of two cumulative sums of float32 would not: after two resets of -128 it is good to 1e-5 only.
    """
    given_inputs = inputs(90, (1, 2), (32, 32), torch.float32, memory=6.0)
    for token in (0, 3, 40, 41, 89):
        given_inputs[1][token] = large
    state = random_state(1, 2, (32, 32))
    found, after = check_against_float64(given_inputs, state, int32(0), int32(0, 90), 1)
    assert found.isfinite().all() and after.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_keys_without_decay(dtype: torch.dtype) -> None:
    """The hardest system there is: (I + M)^-1 of a full triangle, whose powers grow to binomials of 63.

    In float32 the twin, which never makes the inverse, is 3 times as good (6e-7 here against 2e-7).
    """
    given_inputs = inputs(70, (1, 1), (32, 32), dtype, memory=12.0)
    given_inputs[0][:, 32:64] = given_inputs[0][:1, 32:64].clone()
    given_inputs[2][:] = 6.0
    times = 4.0 if dtype == torch.float32 else 1.5
    check_against_float64(given_inputs, random_state(1, 1, (32, 32)), int32(0), int32(0, 70), 1, times)


def test_a_negative_slot_is_a_fresh_sequence_that_nobody_keeps() -> None:
    given_inputs = inputs(70, (1, 1), (32, 32), torch.bfloat16)
    state, fresh = random_state(3, 1, (32, 32)), torch.zeros(3, 1, 32, 32, device=DEVICE)
    before = state.clone()
    expected = gated_delta_rule_prefill(*given_inputs, fresh, int32(0), int32(0, 70), 1)
    found = gated_delta_rule_prefill(*given_inputs, state, int32(-1), int32(0, 70), 1)
    assert torch.equal(found, expected) and torch.equal(state, before)


def test_what_the_workspace_holds_does_not_matter() -> None:
    given_inputs = inputs(70, (1, 2), (32, 32), torch.bfloat16)
    state = random_state(1, 2, (32, 32))
    again, where = state.clone(), (int32(0), int32(0, 70), 1)
    expected = gated_delta_rule_prefill(*given_inputs, state, *where)
    needed_bytes = prefill_scratch_bytes(70, 1, 1, 2, 32, 32)
    workspace = torch.randint(0, 255, (needed_bytes + 64,), dtype=torch.uint8, device=DEVICE)
    tail = workspace[needed_bytes:].clone()
    assert torch.equal(gated_delta_rule_prefill(*given_inputs, again, *where, workspace=workspace), expected)
    assert torch.equal(again, state) and torch.equal(workspace[needed_bytes:], tail)
    with pytest.raises(ValueError, match=rf"the workspace has {needed_bytes - 1} bytes on .*: give {needed_bytes}"):
        gated_delta_rule_prefill(*given_inputs, again, *where, workspace=workspace[: needed_bytes - 1])
    with pytest.raises(ValueError, match=r"the workspace is torch.float32"):
        gated_delta_rule_prefill(*given_inputs, again, *where, workspace=workspace[:1024].view(torch.float32))


def test_scratch_of_the_9b() -> None:
    """By hand from the docstring: per token 32 (28 + 4/64) + 8 x 16 + 8/64 for gates, then w, u, states."""
    per_token = 32 * 28 + 32 * 4 / 64 + 8 * 16 + 8 / 64 + 2 * 32 * 128 + 4 * 32 * 128 + 2 * 32 * 128 * 128 / 64
    assert prefill_scratch_bytes(2048, 1, 16, 32, 128, 128) == 2048 * per_token
    # `runtime/memory.py` and the planner set aside A in float32, w, u and new values in 16 bits, a state per 64 tokens,
    # gates.
    planned = 32 * (8 + 4 * 64) + 3 * 2 * 32 * 128 + 2 * 32 * 128 * 128 // 64
    assert prefill_scratch_bytes(2048, 1, 16, 32, 128, 128) <= 2048 * planned
    assert prefill_scratch_bytes(64 + 65, 2, 16, 32, 128, 128) == prefill_scratch_bytes(3 * 64, 1, 16, 32, 128, 128)


@pytest.mark.parametrize("name", ["sm_86", "gfx942", "gfx1100", "gfx1201"])
def test_every_configuration_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of other targets; sm_90 and sm_100 have those of sm_80 but for the columns of outputs, as gfx942 has them.

    The interpreter knows no bf16x3 and computes every precision in float32.
    """
    given_inputs = inputs(70, (1, 1), (64, 64), torch.bfloat16)
    monkeypatch.setattr(delta_solve, "precision", lambda where, element_bytes: "ieee")
    monkeypatch.setattr(delta_prefill, "target_of", lambda device: target(name))
    check_against_float64(given_inputs, random_state(1, 1, (64, 64)), int32(0), int32(0, 70), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_token_by_token_where_there_is_no_matrix_unit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given_inputs = inputs(24, (1, 2), (32, 64), dtype)
    name = "sm_75" if dtype == torch.float16 else "gfx1100"
    monkeypatch.setattr(delta_prefill, "target_of", lambda device: target(name))
    monkeypatch.setattr(delta_recurrent, "target_of", lambda device: target(name))
    state = random_state(5, 2, (32, 64))
    check_against_float64(given_inputs, state, int32(3, 2, 0, 1), int32(0, 20, 21, 21, 24), 1)


def test_steps_go_on_where_a_prompt_ends() -> None:
    """Prefill of 66 tokens and three steps are the prefill of 69 (float32: within a few roundings)."""
    given_inputs = inputs(69, (1, 2), (32, 32), torch.float32, memory=3.0)
    state = random_state(2, 2, (32, 32))
    stepped = state.clone()
    whole = gated_delta_rule_prefill(*given_inputs, state, int32(1), int32(0, 69), 1)
    prompt = [x[:66] for x in given_inputs[:3]]
    gated_delta_rule_prefill(*prompt, *given_inputs[3:], stepped, int32(1), int32(0, 66), 1)
    steps = [x[66:][None] for x in given_inputs[:3]]
    found = gated_delta_rule_step(*steps, *given_inputs[3:], stepped, int32(1), int32(-1, 0, 1)[None], 1)
    torch.testing.assert_close(found[0], whole[66:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stepped[1], state[1], rtol=1e-4, atol=1e-6)


def test_every_target_runs_what_it_launches() -> None:
    for where in TARGETS:
        names = [case.name for case in delta_prefill.compile_cases(where)]
        chunked = delta_prefill.chunks_refused(where, torch.bfloat16) is None
        assert ("delta_state" in names) == ("delta_recurrent/bf16" in names) == chunked
        assert ("delta_recurrent/f16" in names) == (where.name == "sm_75")
        assert ("delta_recurrent/f32" in names) == (where.name in ("gfx1100", "gfx1201"))
    assert "Triton has no matrix unit there" in (delta_prefill.chunks_refused(target("sm_75"), torch.float16) or "")
    assert "has no float32" in (delta_prefill.chunks_refused(target("gfx1201"), torch.float32) or "")


def test_what_the_kernels_cannot_read_is_refused() -> None:
    given_inputs = inputs(4, (1, 1), (32, 32), torch.bfloat16)
    state = random_state(1, 1, (32, 32))
    with pytest.raises(ValueError, match=r"qkv is \[1, 4, 96\]: the delta rule of a prompt takes \[T, C\]"):
        gated_delta_rule_prefill(given_inputs[0][None], *given_inputs[1:], state, int32(0), int32(0, 4), 1)
    with pytest.raises(ValueError, match="cu_seqlens has 2 entries for 2 slots"):
        gated_delta_rule_prefill(*given_inputs, state, int32(0, 0), int32(0, 4), 1)
    nothing = [x[:0] for x in given_inputs[:3]]
    before = state.clone()
    assert gated_delta_rule_prefill(*nothing, *given_inputs[3:], state, int32(0), int32(0, 0), 1).shape == (0, 1, 32)
    assert torch.equal(state, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the interpreter's tests stand for it")
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes_on_a_gpu(dtype: torch.dtype) -> None:
    given_inputs = inputs(2048, (16, 32), (128, 128), dtype, memory=3.0)
    state = random_state(4, 32, (128, 128))
    check_against_float64(given_inputs, state, int32(2, 0), int32(0, 1500, 2048), 16)
