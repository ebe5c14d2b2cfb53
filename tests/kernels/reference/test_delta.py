"""The plain delta rule against transformers' own, against its recurrence and against what must hold for any input."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.kernels.reference.delta import (
    delta_inputs,
    gated_delta_rule_chunked,
    gated_delta_rule_prefill,
    gated_delta_rule_recurrent,
    gated_delta_rule_step,
)
from qwenfit.kernels.reference.dense import causal_conv1d_prefill, causal_conv1d_update, gated_rms_norm

QUICK = settings(max_examples=20, deadline=None)


@pytest.fixture(scope="module")
def modeling():
    module = "transformers.models.qwen3_5.modeling_qwen3_5"
    return pytest.importorskip(module, reason="pip install 'transformers>=5.23' to compare with its Qwen3.5")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sequence(tokens: int, heads: int, size: int, seed: int = 0, strength: float = 1.0):
    """q, k, v, g, beta of one sequence and a state, as `delta_inputs` makes them, in float64."""
    qkv, a, b = (randn(tokens, width, seed=seed + i) for i, width in enumerate((3 * heads * size, heads, heads)))
    A_log = (randn(heads, seed=seed + 3) * 0.5) + torch.tensor(strength).log()
    inputs = delta_inputs(qkv, a, b, A_log, randn(heads, seed=seed + 4), size, size, heads)
    return *inputs, randn(heads, size, size, seed=seed + 5)


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 150])
def test_both_forms_are_those_of_transformers(modeling, tokens: int) -> None:
    """transformers computes in float32 whatever comes in, and keeps the state [key, value]."""
    heads, key_heads, size = 4, 2, 16
    qkv = randn(tokens, (2 * key_heads + heads) * size)
    a, b, A_log, dt_bias = (randn(tokens, heads, seed=1), randn(tokens, heads, seed=2), randn(heads), randn(heads))
    state = randn(heads, size, size, seed=3)
    q, k, v = (
        part.unflatten(-1, (-1, size)) for part in qkv.split([key_heads * size, key_heads * size, heads * size], -1)
    )
    g = -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)
    options = {"initial_state": state.mT[None], "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    ours = delta_inputs(qkv, a, b, A_log, dt_bias, size, size, key_heads)
    for theirs, form in (
        (modeling.torch_chunk_gated_delta_rule, gated_delta_rule_chunked),
        (modeling.torch_recurrent_gated_delta_rule, gated_delta_rule_recurrent),
    ):
        # their recurrent form repeats query heads only, so keys come repeated to both
        repeated = (x.repeat_interleave(heads // key_heads, dim=1)[None] for x in (q, k))
        expected, their_state = theirs(*repeated, v[None], g=g[None], beta=b.sigmoid()[None], **options)
        out, after = form(*ours, state=state)
        torch.testing.assert_close(out.float(), expected[0].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after.float(), their_state[0].mT, rtol=1e-5, atol=1e-5)


@QUICK
@given(
    st.integers(1, 40), st.integers(1, 17), st.integers(0, 40), st.integers(0, 99), st.sampled_from([0.05, 1.0, 40.0])
)
def test_chunks_of_any_size_and_a_cut_anywhere_are_the_recurrence(
    tokens: int, chunk: int, cut: int, seed: int, strength: float
) -> None:
    *inputs, state = sequence(tokens, 2, 8, seed, strength)
    expected, after = gated_delta_rule_recurrent(*inputs, state=state)
    out, last = gated_delta_rule_chunked(*inputs, state=state, chunk=chunk)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(last, after, rtol=1e-9, atol=1e-10)
    first, middle = gated_delta_rule_chunked(*(x[:cut] for x in inputs), state=state, chunk=chunk)
    second, last = gated_delta_rule_chunked(*(x[cut:] for x in inputs), state=middle, chunk=chunk)
    torch.testing.assert_close(torch.cat((first, second)), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(last, after, rtol=1e-9, atol=1e-10)


def test_without_strength_the_state_only_decays() -> None:
    q, k, v, g, beta, state = sequence(70, 3, 8)
    for form in (gated_delta_rule_recurrent, gated_delta_rule_chunked):
        out, after = form(q, k, v, g, torch.zeros_like(beta), state)
        torch.testing.assert_close(after, state * g.sum(0).exp()[:, None, None], rtol=1e-10, atol=0)
        decayed = g.cumsum(0).exp()[..., None, None] * state
        torch.testing.assert_close(out, (decayed @ q[..., None]).squeeze(-1), rtol=1e-10, atol=1e-14)


def test_without_decay_and_at_full_strength_a_key_returns_its_newest_value() -> None:
    """Delta rule proper: with beta = 1 and a key of length 1 the old value of that key is replaced, not added to."""
    _, k, v, g, beta, state = sequence(66, 2, 8)
    k = k / k.norm(dim=-1, keepdim=True)
    out, after = gated_delta_rule_chunked(k, k, v, torch.zeros_like(g), torch.ones_like(beta), state)
    torch.testing.assert_close(out, v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((after @ k[-1, :, :, None]).squeeze(-1), v[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reset", [-1e3, -1e30, float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_reset_forgets_everything_and_loses_no_digits(reset: float, dtype: torch.dtype) -> None:
    *inputs, state = (x.to(dtype) for x in sequence(100, 2, 8))
    inputs[3][40] = reset
    inputs[3][41:50:3] = reset
    # token 47 is the last reset: nothing before it is left
    expected, after = gated_delta_rule_recurrent(*(x[47:] for x in inputs), state=torch.zeros_like(state))
    out, got = gated_delta_rule_chunked(*inputs, state=state)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    assert out.isfinite().all()
    torch.testing.assert_close(out[47:], expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got, after, rtol=tolerance, atol=tolerance)


def test_float32_chunks_are_as_exact_as_float32_tokens() -> None:
    *inputs, state = sequence(300, 4, 32, strength=0.1)
    truth, _ = gated_delta_rule_recurrent(*inputs, state=state)
    narrow = [x.float() for x in inputs]
    errors = [
        (form(*narrow, state=state.float())[0] - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        for form in (gated_delta_rule_recurrent, gated_delta_rule_chunked)
    ]
    assert errors[1] < max(1.5 * errors[0], 3e-7)


CALL = {"heads": 4, "key_heads": 2, "key": 8, "value": 12}


def call_inputs(tokens: int, seed: int = 0):
    heads, keys, values = CALL["heads"], CALL["key_heads"] * CALL["key"], CALL["heads"] * CALL["value"]
    widths = (2 * keys + values, heads, heads)
    return *(randn(tokens, width, seed=seed + i) for i, width in enumerate(widths)), randn(heads), randn(heads, seed=9)


@QUICK
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 99))
def test_sequences_side_by_side_are_sequences_alone_in_any_order(counts: list[int], seed: int) -> None:
    qkv, a, b, A_log, dt_bias = call_inputs(sum(counts), seed)
    states = randn(6, CALL["heads"], CALL["value"], CALL["key"], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    slots, order = (
        torch.randperm(6, generator=generator)[: len(counts)],
        torch.randperm(len(counts), generator=generator),
    )
    together, shuffled = states.clone(), states.clone()
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    out = gated_delta_rule_prefill(qkv, a, b, A_log, dt_bias, together, slots, bounds, CALL["key_heads"])
    parts = (torch.cat([x.split(counts)[i] for i in order]) for x in (qkv, a, b))
    rest: dict[str, Any] = {"A_log": A_log, "dt_bias": dt_bias, "slots": slots[order], "key_heads": CALL["key_heads"]}
    new_bounds = torch.tensor([0, *(counts[i] for i in order)]).cumsum(0).int()
    other = gated_delta_rule_prefill(*parts, state=shuffled, cu_seqlens=new_bounds, **rest)
    # not to the bit: torch's vector loops round differently at another alignment
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(together, shuffled, **close)
    torch.testing.assert_close(torch.cat([out.split(counts)[i] for i in order]), other, **close)
    for i, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        alone = delta_inputs(qkv[begin:end], a[begin:end], b[begin:end], A_log, dt_bias, CALL["key"], CALL["value"], 2)
        expected, after = gated_delta_rule_recurrent(*alone, state=states[slots[i]])
        torch.testing.assert_close(out[begin:end], expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(together[slots[i]], after, rtol=1e-9, atol=1e-10)
    untouched = [slot for slot in range(6) if slot not in slots.tolist()]
    assert torch.equal(together[untouched], states[untouched])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_steps_go_on_where_prefill_stopped_and_leave_a_state_per_draft(state_dtype: torch.dtype) -> None:
    qkv, a, b, A_log, dt_bias = call_inputs(13)
    states = torch.zeros(6, CALL["heads"], CALL["value"], CALL["key"], dtype=torch.float64)
    expected = gated_delta_rule_prefill(
        qkv, a, b, A_log, dt_bias, states, torch.tensor([0]), torch.tensor([0, 13]), CALL["key_heads"]
    )
    stepped = torch.zeros(states.shape, dtype=state_dtype)
    gated_delta_rule_prefill(
        qkv[:10], a[:10], b[:10], A_log, dt_bias, stepped, torch.tensor([1]), torch.tensor([0, 10]), CALL["key_heads"]
    )
    before, rows = stepped.clone(), slice(10, 13)
    target = torch.tensor([[1, 4, 5]])
    out = gated_delta_rule_step(
        qkv[None, rows],
        a[None, rows],
        b[None, rows],
        A_log,
        dt_bias,
        stepped,
        torch.tensor([1]),
        target,
        CALL["key_heads"],
    )
    tolerance = 1e-5 if state_dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out[0], expected[rows], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stepped[5].double(), states[0], rtol=tolerance, atol=tolerance)
    for s in range(3):
        alone = before.clone()
        part, place = slice(10, 11 + s), torch.tensor([1])
        gated_delta_rule_step(
            qkv[None, part], a[None, part], b[None, part], A_log, dt_bias, alone, place, place.expand(1, s + 1), 2
        )
        assert torch.equal(stepped[target[0, s]], alone[1])
    assert torch.equal(stepped[[0, 2, 3]], before[[0, 2, 3]])


def test_convolution_rule_and_norm_are_the_layer_of_transformers(modeling) -> None:
    """The whole Gated DeltaNet layer but its matmuls, prefill of 70 tokens and then two more one by one."""
    from transformers import DynamicCache, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        hidden_size=64,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    torch.manual_seed(0)
    layer = modeling.Qwen3_5GatedDeltaNet(config, 0).eval()
    layer.A_log.data, layer.dt_bias.data = torch.randn(4), torch.randn(4)
    layer.norm.weight.data = torch.randn(16)
    x, cache = torch.randn(1, 72, 64), DynamicCache(config=config)
    with torch.no_grad():
        expected = torch.cat([layer(part, cache_params=cache) for part in x.split([70, 1, 1], dim=1)], dim=1)
        projected = [getattr(layer, f"in_proj_{name}")(x[0]) for name in ("qkv", "a", "b")]
        z = layer.in_proj_z(x[0]).unflatten(-1, (4, 16))
        taps, columns = layer.conv1d.weight[:, 0], torch.zeros(1, 128, 3)
        rest: dict[str, Any] = {
            "A_log": layer.A_log,
            "dt_bias": layer.dt_bias,
            "state": torch.zeros(1, 4, 16, 16),
            "key_heads": 2,
        }
        slot, bounds = torch.tensor([0]), torch.tensor([0, 70])
        head = [rows[:70] for rows in projected]
        head[0] = causal_conv1d_prefill(head[0], taps, columns, slot, bounds)
        parts = [gated_delta_rule_prefill(*head, slots=slot, cu_seqlens=bounds, **rest)]
        for t in (70, 71):
            token = [rows[None, t : t + 1] for rows in projected]
            token[0] = causal_conv1d_update(token[0], taps, columns, slot, slot[None])
            parts.append(gated_delta_rule_step(*token, source=slot, target=slot[None], **rest)[0])
        normed = gated_rms_norm(torch.cat(parts), z, layer.norm.weight, config.rms_norm_eps)
        result = layer.out_proj(normed.flatten(-2))
    torch.testing.assert_close(result, expected[0], rtol=1e-5, atol=1e-6)


def test_channels_that_do_not_fit_the_heads_are_refused() -> None:
    qkv, a, b, A_log, dt_bias = call_inputs(3)
    with pytest.raises(ValueError, match="qkv has 80 channels"):
        delta_inputs(qkv, a, b, A_log, dt_bias, 8, 8, 2)
