"""Roles are told from names, whatever the tool that wrote them; what is not known is counted as other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.profiles.model_catalog import models
from qwenfit.profiles.roles import classify, classify_gguf, pattern_of


@pytest.mark.parametrize("found", models(), ids=lambda found: found.name)
def test_names_lead_back_to_the_tensors(found):
    """The list that was built from dimensions and the classifier of names agree on every tensor of the catalog."""
    for tensor in found.tensors:
        name = next(tensor.names())
        pattern, layer, expert = pattern_of(name)
        assert (pattern, layer, expert) == (
            tensor.name,
            tensor.layers[0] if tensor.layers else None,
            0 if tensor.experts else None,
        )
        assert classify(pattern) == (tensor.part, tensor.role)


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.model.", "language_model.", ""])
@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("layers.{layer}.self_attn.q_proj.qweight", "self_attn.q_proj"),
        ("layers.{layer}.self_attn.q_proj.qzeros", "self_attn.q_proj"),
        ("layers.{layer}.self_attn.q_proj.scales", "self_attn.q_proj"),
        ("layers.{layer}.self_attn.q_proj.g_idx", "self_attn.q_proj"),
        ("layers.{layer}.self_attn.qkv_proj.weight", "self_attn.qkv_proj"),
        ("layers.{layer}.linear_attn.in_proj_qkv.weight_packed", "linear_attn.in_proj_qkv"),
        ("layers.{layer}.linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_qkvz"),
        ("layers.{layer}.linear_attn.in_proj_z.weight_scale", "linear_attn.in_proj_z"),
        ("layers.{layer}.linear_attn.out_proj.weight_shape", "linear_attn.out_proj"),
        ("layers.{layer}.mlp.down_proj.weight_zero_point", "mlp.down_proj"),
        ("layers.{layer}.mlp.down_proj.weight_g_idx", "mlp.down_proj"),
        ("layers.{layer}.mlp.up_proj.weight_scale_inv", "mlp.up_proj"),
        ("layers.{layer}.mlp.up_proj.input_scale", "mlp.up_proj"),
        ("layers.{layer}.mlp.gate_up_proj.weight", "mlp.gate_up_proj"),
        ("layers.{layer}.mlp.gate.weight", "mlp.gate"),
        ("layers.{layer}.mlp.experts.{expert}.up_proj.weight_scale_2", "experts.up_proj"),
        ("layers.{layer}.mlp.experts.gate_up_proj", "experts.gate_up_proj"),
        ("layers.{layer}.mlp.experts.gate_up_proj_scale_inv", "experts.gate_up_proj"),
        ("layers.{layer}.mlp.experts.down_proj_weight_scale", "experts.down_proj"),
        ("layers.{layer}.mlp.switch_mlp.gate_proj.biases", "experts.gate_proj"),
        ("layers.{layer}.mlp.shared_expert.up_proj.qweight", "shared_expert.up_proj"),
        ("layers.{layer}.mlp.shared_expert_gate.weight", "shared_expert_gate"),
        ("layers.{layer}.input_layernorm.weight", "norm"),
        ("layers.{layer}.self_attn.k_scale", "other"),
        ("layers.{layer}.novelty.weight", "other"),
        ("embed_tokens.weight", "embedding"),
        ("embed_tokens.scales", "embedding"),
        ("lm_head.qweight", "lm_head"),
        ("norm.weight", "norm"),
        ("something_else", "other"),
    ],
)
def test_what_a_quantizer_stores_has_the_role_of_its_weight(prefix, name, role):
    assert classify(prefix + name) == ("text", role)


@pytest.mark.parametrize(
    ("name", "part", "role"),
    [
        ("mtp.fc.weight", "mtp", "mtp.fc"),
        ("language_model.mtp.layers.{layer}.mlp.up_proj.qweight", "mtp", "mlp.up_proj"),
        ("mtp.layers.{layer}.mlp.experts.gate_up_proj", "mtp", "experts.gate_up_proj"),
        ("mtp.pre_fc_norm_hidden.weight", "mtp", "norm"),
        ("mtp.novelty.weight", "mtp", "other"),
        ("model.visual.blocks.{layer}.attn.qkv.weight", "vision", "vision.attn.qkv"),
        ("visual.blocks.{layer}.attn.qkv.bias", "vision", "vision.bias"),
        ("vision_tower.merger.linear_fc1.weight", "vision", "vision.merger.fc1"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "vision", "other"),
    ],
)
def test_parts_are_told_by_prefix(name, part, role):
    assert classify(name) == (part, role)


def test_numbers_are_taken_out_of_names():
    assert pattern_of("mtp.layers.0.mlp.experts.255.up_proj.weight") == (
        "mtp.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        0,
        255,
    )
    assert pattern_of("blk.64.nextn.eh_proj.weight") == ("blk.{layer}.nextn.eh_proj.weight", 64, None)
    for odd in ("a.layers.007.b", "a.layers.1234567.b", "layers.3", "layers.-1.b", "layers.x.b", "relayers.1.b"):
        assert pattern_of(odd) == (odd, None, None)


@given(st.text(alphabet="ablayersexpertsblocks.0123456789{}", max_size=60))
def test_any_name_is_classified(name):
    pattern, layer, expert = pattern_of(name)
    assert classify(pattern)[1] and classify_gguf(pattern)
    if "{" not in name:
        rebuilt = pattern.replace("{layer}", str(layer), 1).replace("{expert}", str(expert), 1)
        assert rebuilt == name


def test_every_name_of_a_gguf_has_a_role():
    """gguf-py's own list of names for the three architectures."""
    import gguf

    for kind in (gguf.MODEL_ARCH.QWEN35, gguf.MODEL_ARCH.QWEN35MOE, gguf.MODEL_ARCH.QWEN3NEXT):
        for tensor in gguf.MODEL_TENSORS[kind]:
            name = gguf.TENSOR_NAMES[tensor].replace("{bid}", "{layer}")
            for suffix in ("", ".weight", ".bias"):
                assert classify_gguf(name + suffix) != "other", name
    assert classify_gguf("blk.{layer}.nextn.eh_proj.weight") == "mtp.fc"
    assert classify_gguf("blk.{layer}.novelty.weight") == classify_gguf("rope_freqs.weight") == "other"
