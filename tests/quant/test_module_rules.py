"""Rules that mean the same modules under the names of the files and under those of the engines."""

import re

import pytest

from qwenfit.quant.module_rules import KEPT, check_fused, covered, kept_rules, named_rules, rules
from qwenfit.quant.quantized import Scheme

INT4, INT8 = Scheme(4, 128, True), Scheme(8, -1, True)
PREFIXES = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.")


def matched(patterns: list[str], module: str) -> bool:
    return any(re.match(pattern, module) for pattern in patterns)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_parts_and_wholes_match_in_their_layers_only(prefix: str) -> None:
    found = rules([f"{prefix}{layer}.linear_attn.in_proj_qkv" for layer in (1, 12)])
    assert len(found) == 1
    for other in PREFIXES:
        for layer in (1, 12):
            for leaf in ("in_proj_qkv", "in_proj_z", "in_proj_qkvz"):
                assert matched(found, f"{other}{layer}.linear_attn.{leaf}")
            for leaf in ("in_proj_a", "in_proj_ba", "in_proj_qkvzx", "out_proj"):
                assert not matched(found, f"{other}{layer}.linear_attn.{leaf}")
        for layer in (0, 2, 11, 121):
            assert not matched(found, f"{other}{layer}.linear_attn.in_proj_qkvz")


def test_every_fused_name_of_vllm() -> None:
    """packed_modules_mapping of vLLM 0.32's Qwen3_5ForCausalLM, and its fused experts."""
    wholes = {
        "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.shared_expert.gate_up_proj": ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
        "linear_attn.in_proj_qkvz": ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"],
        "mlp.experts": [f"mlp.experts.{e}.{p}_proj" for e in (0, 7) for p in ("gate", "up", "down")],
    }
    for whole, parts in wholes.items():
        found = rules([f"model.layers.3.{part}" for part in parts])
        assert len(found) == 1
        for name in (whole, *parts):
            assert matched(found, f"language_model.model.layers.3.{name}"), (found, name)
    assert matched(list(KEPT), "model.layers.0.linear_attn.in_proj_ba")
    assert not matched(rules(["model.layers.3.mlp.experts.0.up_proj"]), "model.layers.3.mlp.shared_expert.up_proj")


def test_the_router_is_not_the_gate_projection() -> None:
    assert covered("model.layers.0.mlp.gate", KEPT) and covered("x.layers.0.mlp.shared_expert_gate", KEPT)
    for module in ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.experts"):
        assert not covered(module, KEPT)


def test_fused_modules_have_one_scheme() -> None:
    same = {f"model.layers.0.self_attn.{p}_proj": INT4 for p in "qkv"}
    check_fused(same, ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"])
    check_fused({**same, "mtp.layers.0.self_attn.q_proj": INT8})
    with pytest.raises(ValueError, match=r"self_attn\.q_proj and .*self_attn\.v_proj are fused by engines"):
        check_fused({**same, "model.layers.0.self_attn.v_proj": INT8})
    with pytest.raises(ValueError, match="need one scheme"):
        check_fused({"model.layers.0.linear_attn.in_proj_z": INT4}, ["model.layers.0.linear_attn.in_proj_qkv"])
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj and model\.layers\.0\.mlp\.experts\.1\.down_proj"):
        check_fused({"model.layers.0.mlp.experts.0.up_proj": INT4, "model.layers.0.mlp.experts.1.down_proj": INT8})


def test_what_is_kept_and_what_is_not() -> None:
    schemes = {"model.layers.0.mlp.up_proj": INT4, "model.layers.0.mlp.gate_proj": INT4}
    found = kept_rules(schemes, ["model.layers.1.mlp.up_proj", "model.layers.0.linear_attn.in_proj_a"])
    assert matched(found, "lm_head") and matched(found, "language_model.lm_head")  # in no file where it is tied
    assert matched(found, "model.layers.1.mlp.gate_up_proj") and not matched(found, "model.layers.0.mlp.gate_up_proj")
    assert len(found) == len(KEPT) + 2
    assert not matched(kept_rules({**schemes, "lm_head": INT8}, []), "lm_head")


def test_prediction_layers_have_the_numbers_of_others() -> None:
    schemes = {"mtp.layers.0.mlp.down_proj": INT8, "model.layers.0.mlp.down_proj": INT4}
    eight, four = named_rules(schemes, INT8), named_rules(schemes, INT4)
    for name in ("mtp.layers.0.mlp.down_proj", "model.mtp.layers.0.mlp.down_proj"):
        assert matched(eight, name) and not matched(four, name)
    assert matched(four, "model.layers.0.mlp.down_proj") and not matched(eight, "model.layers.0.mlp.down_proj")
    assert not matched(kept_rules(schemes, ["mtp.fc"]), "mtp.layers.0.mlp.down_proj")
    assert matched(kept_rules(schemes, ["mtp.fc"]), "mtp.fc")
