"""Names and conversions of tensors, against llama.cpp's converter where it can be asked, and against the formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwenfit.profiles.errors import Unsupported
from qwenfit.profiles.roles import classify, classify_gguf, pattern_of
from qwenfit.quant.gguf_names import column_order, converted, pieces, row_order, value_head_order
from qwenfit.quant.source import Source, open_source

NAMES = ("qwen3_5", "qwen3_5_moe")


def opened(checkpoint: Any, name: str, **changes: Any) -> Source:
    return open_source(str(checkpoint(name, **changes)))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_its_place_and_role(name: str, checkpoint: Any) -> None:
    source = opened(checkpoint, name)
    found = pieces(source)
    assert {piece.source for piece in found} == set(source.names())
    for piece in found:
        assert piece.name.isascii()
        role = classify(pattern_of(piece.source)[0])[1]
        expected = classify_gguf(pattern_of(piece.name)[0])
        assert role == expected or (role, piece.name.split(".")[-2]) in {
            ("experts.gate_up_proj", "ffn_gate_exps"),
            ("experts.gate_up_proj", "ffn_up_exps"),
        }, piece


def test_the_prediction_layer_comes_after_the_others(checkpoint: Any) -> None:
    found = {piece.source: piece.name for piece in pieces(opened(checkpoint, "qwen3_5"))}
    assert found["mtp.layers.0.self_attn.q_proj.weight"] == "blk.4.attn_q.weight"
    assert found["mtp.fc.weight"] == "blk.4.nextn.eh_proj.weight"
    assert found["mtp.norm.weight"] == "blk.4.nextn.shared_head_norm.weight"
    assert found["mtp.pre_fc_norm_hidden.weight"] == "blk.4.nextn.hnorm.weight"


def test_heads_go_from_grouped_to_tiled(checkpoint: Any) -> None:
    """2 key heads with 3 value heads each: 0 1 2 | 3 4 5 becomes 0 3 | 1 4 | 2 5."""
    model = opened(checkpoint, "qwen3_5", linear_num_value_heads=6).model
    order = value_head_order(model)
    assert order is not None and order.tolist() == [0, 3, 1, 4, 2, 5]
    assert value_head_order(opened(checkpoint, "qwen3_5", linear_num_value_heads=2).model) is None


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_the_permuted_layer_computes_the_same(heads: int, checkpoint: Any) -> None:
    """What ggml computes after the permutation, with key heads repeated as a whole, is what the checkpoint means."""
    source = opened(checkpoint, "qwen3_5", linear_num_value_heads=heads)
    model, prefix = source.model, "model.layers.0.linear_attn."
    found = {piece.source: piece for piece in pieces(source)}

    def tensor(leaf: str, permuted: bool) -> Any:
        stored = source.tensor(prefix + leaf)
        return (converted(found[prefix + leaf], stored, model) if permuted else stored).float()

    x = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    key, width, keys = model.linear_key_head_dim, model.linear_value_head_dim, model.linear_num_key_heads
    results = []
    for permuted in (False, True):
        qkv = tensor("in_proj_qkv.weight", permuted) @ x
        kernel = tensor("conv1d.weight", permuted)
        qkv = qkv * kernel.reshape(len(qkv), -1)[:, -1]
        q, k, v = qkv.split([keys * key, keys * key, heads * width])
        q, k, v = q.view(keys, key), k.view(keys, key), v.view(heads, width)
        repeat = heads // keys
        q, k = (p.repeat(repeat, 1) if permuted else p.repeat_interleave(repeat, 0) for p in (q, k))
        z = (tensor("in_proj_z.weight", permuted) @ x).view(heads, width)
        a, b = tensor("in_proj_a.weight", permuted) @ x, tensor("in_proj_b.weight", permuted) @ x
        decay = tensor("A_log", permuted) if permuted else -tensor("A_log", permuted).exp()
        g = decay * torch.nn.functional.softplus(a + tensor("dt_bias", permuted))
        inner = (q * k).sum(1, keepdim=True) * v * b.sigmoid()[:, None] * g.exp()[:, None]
        inner = inner * torch.nn.functional.silu(z) * tensor("norm.weight", permuted)
        results.append(tensor("out_proj.weight", permuted) @ inner.flatten())
    assert torch.allclose(*results, rtol=1e-4, atol=1e-5)


def test_rows_and_columns_are_those_that_converted_takes(checkpoint: Any) -> None:
    source = opened(checkpoint, "qwen3_5")
    for piece in pieces(source):
        if piece.is_matrix:
            stored = source.tensor(piece.source)
            rows, columns = row_order(piece.source, source.model), column_order(piece.source, source.model)
            expected = stored if rows is None else stored[rows]
            expected = expected if columns is None else expected[:, columns]
            assert torch.equal(converted(piece, stored, source.model), expected)
            assert (columns is not None) == piece.source.endswith("out_proj.weight")


def test_norms_decays_and_convolutions(checkpoint: Any) -> None:
    source = opened(checkpoint, "qwen3_5")
    found = {piece.source: piece for piece in pieces(source)}

    def both(name: str) -> tuple[Any, Any]:
        stored = source.tensor(name)
        return stored.float(), converted(found[name], stored, source.model)

    for name in ("model.norm.weight", "model.layers.3.self_attn.q_norm.weight", "mtp.pre_fc_norm_hidden.weight"):
        stored, made = both(name)
        assert torch.equal(made, stored + 1) and made.dtype == torch.float32
    for name in ("model.layers.0.input_layernorm.weight", "mtp.norm.weight"):
        stored, made = both(name)
        assert torch.equal(made, stored + 1)
    stored, made = both("model.layers.0.linear_attn.norm.weight")
    assert torch.equal(made, stored)
    stored, made = both("model.layers.0.linear_attn.A_log")
    order = value_head_order(source.model)
    assert torch.equal(made, -stored[order].exp())
    stored, made = both("model.layers.0.linear_attn.conv1d.weight")
    assert made.shape == (stored.shape[0], 4) and stored.shape[1] == 1 and made.dtype == torch.float32


def test_experts_fused_or_one_by_one(checkpoint: Any, tmp_path: Path) -> None:
    """Stacks are cut into gate and up; single experts (as Qwen3.5 stores those of the prediction layer) are stacked."""
    source = opened(checkpoint, "qwen3_5_moe")
    found = {piece.name: piece for piece in pieces(source) if piece.source.startswith("model.layers.1.mlp.experts")}
    stack = source.tensor("model.layers.1.mlp.experts.gate_up_proj")
    assert found["blk.1.ffn_gate_exps.weight"].shape == (8, 128, 128)
    gate = converted(found["blk.1.ffn_gate_exps.weight"], stack, source.model)
    up = converted(found["blk.1.ffn_up_exps.weight"], stack, source.model)
    assert torch.equal(torch.cat((gate, up), 1), stack)
    single = next(piece for piece in pieces(source) if piece.source == "mtp.layers.0.mlp.experts.5.down_proj.weight")
    assert (single.name, single.expert, single.shape) == ("blk.4.ffn_down_exps.weight", 5, (8, 128, 128))


def test_what_has_no_place_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    source = opened(checkpoint, "qwen3_5")
    strange = Source(
        source.folder,
        source.config,
        source.model,
        {**source.tensors, "model.layers.0.extra.weight": next(iter(source.tensors.values()))},
    )
    with pytest.raises(Unsupported, match=r"'model.layers.0.extra.weight' .* has no place in a GGUF file"):
        pieces(strange)
