"""llama.cpp's choice of type per tensor, against what llama-quantize printed (`data/gguf_*`)."""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from qwenfit.profiles.gguf_mixture import FILE_TYPES, gguf_tensors
from qwenfit.profiles.model import Model
from qwenfit.profiles.model_catalog import model
from qwenfit.profiles.storage import plain, storage_bytes

DATA = Path(__file__).parent / "data"
SIZES = [json.loads(line) for line in (DATA / "gguf_sizes.jsonl").read_text().splitlines()][1:]
TYPES = json.loads((DATA / "gguf_types_q4_k_m.json").read_text())

GGUF_NAMES = {
    "model.language_model.embed_tokens.weight": "token_embd.weight",
    "model.language_model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def types_of(
    found: Model, file_type: str, role: str, part: str = "text", mtp: bool = False
) -> dict[str, tuple[int, ...]]:
    return {
        item.type: item.layers
        for item in gguf_tensors(found, file_type, mtp)
        if item.role == role and item.source.part == part
    }


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row['model']}-{row['format']}")
def test_bytes_by_type_are_those_of_llama_quantize(row: dict) -> None:
    by_type: Counter[str] = Counter()
    for item in gguf_tensors(model(row["model"]), row["format"].upper()):
        if item.source.part == "text":
            count = max(1, len(item.layers)) * (item.source.experts or 1)
            by_type[item.type] += storage_bytes(item.shape, plain(item.type)) * count
    assert by_type == row["by"]
    assert by_type.total() == row["bytes"]


@pytest.mark.parametrize("name", ["qwen3.5-0.8b", "qwen3.5-9b"])
def test_q4_k_m_tensor_by_tensor(name: str) -> None:
    found: defaultdict[str, dict[str, list[int]]] = defaultdict(dict)
    for item in gguf_tensors(model(name), "Q4_K_M"):
        if item.source.part == "text":
            own = item.source.name
            gguf = GGUF_NAMES.get(own) or "blk.{layer}." + GGUF_NAMES[own.partition("{layer}.")[2]]
            found[gguf][item.type] = list(item.layers)
    assert found == TYPES[name]


def test_two_bit_types_count_ffn_down_tensors_not_layers() -> None:
    """35B-A3B: 40 layers // 8 = 5 tensors, and each layer has a routed and a shared one."""
    moe = model("qwen3.5-35b-a3b")
    assert types_of(moe, "IQ2_M", "experts.down_proj")["IQ3_S"] == (0, 1, 2)
    assert types_of(moe, "IQ2_M", "shared_expert.down_proj")["IQ3_S"] == (0, 1)
    assert types_of(model("qwen3.5-9b"), "IQ2_M", "mlp.down_proj")["IQ3_S"] == (0, 1, 2, 3)
    assert types_of(moe, "Q2_K_S", "shared_expert.down_proj")["Q4_K"] == (0, 1, 2, 3, 4)


def test_iq3_xs_saves_in_the_middle() -> None:
    dense = model("qwen3.5-9b")
    assert types_of(dense, "IQ3_XS", "mlp.up_proj")["IQ3_XXS"] == tuple(range(4, 28))
    assert types_of(dense, "IQ3_XS", "mlp.up_proj")["IQ3_S"] == (0, 1, 2, 3, 28, 29, 30, 31)
    assert set(types_of(dense, "IQ3_XS", "self_attn.q_proj")) == {"IQ3_XXS"}


def test_embedding_stands_in_for_a_missing_lm_head() -> None:
    assert set(types_of(model("qwen3.5-4b"), "Q4_K_S", "embedding")) == {"Q6_K"}
    assert set(types_of(model("qwen3.5-9b"), "Q4_K_S", "embedding")) == {"Q4_K"}
    assert set(types_of(model("qwen3.5-9b"), "IQ2_XXS", "embedding")) == {"Q2_K"}
    assert set(types_of(model("qwen3.5-4b"), "IQ2_XXS", "embedding")) == {"Q5_K"}


def test_few_shared_heads_keep_the_base() -> None:
    many = model("qwen3.5-9b")
    few = replace(many, num_key_value_heads=many.num_attention_heads // 2)
    assert set(types_of(many, "IQ4_XS", "linear_attn.in_proj_qkv")) == {"Q5_K"}
    assert set(types_of(few, "IQ4_XS", "linear_attn.in_proj_qkv")) == {"IQ4_XS"}
    assert set(types_of(few, "Q2_K", "self_attn.v_proj")) == {"Q3_K"}


def test_rows_that_no_block_divides_fall_back() -> None:
    """llama-quant.cpp tensor_type_fallback: 256 -> 32 -> F16."""
    dense = model("qwen3.5-9b")

    def with_columns(columns: int) -> Model:
        tensors = [
            replace(tensor, shape=(tensor.shape[0], columns)) if tensor.role == "mlp.down_proj" else tensor
            for tensor in dense.tensors
        ]
        return replace(dense, tensors=tuple(tensors))

    for file_type, at_32, at_16 in (
        ("Q4_K_S", {"Q5_0", "Q5_1"}, {"F16"}),
        ("Q6_K", {"Q8_0"}, {"F16"}),
        ("Q3_K_S", {"Q4_0"}, {"F16"}),
        ("IQ3_S", {"IQ4_NL"}, {"F16"}),
    ):
        assert set(types_of(with_columns(4320), file_type, "mlp.down_proj")) == at_32
        assert set(types_of(with_columns(4304), file_type, "mlp.down_proj")) == at_16


def test_qwen3_next_is_split_and_loses_its_mtp() -> None:
    """llama.cpp conversion/qwen.py, Qwen3NextModel: in_proj_qkvz becomes attn_qkv and attn_gate, mtp.* is dropped."""
    found = model("qwen3-next-80b")
    shapes = {
        item.role: item.shape for item in gguf_tensors(found, "Q4_K_M") if item.role.startswith("linear_attn.in_")
    }
    assert shapes["linear_attn.in_proj_qkv"] == (8192, 2048)
    assert shapes["linear_attn.in_proj_z"] == (4096, 2048)
    assert len(types_of(found, "Q4_K_M", "linear_attn.in_proj_qkv")) == 2
    assert not [item for item in gguf_tensors(found, "Q4_K_M") if item.source.part == "mtp"]


def test_mtp_block_is_one_more_layer() -> None:
    """Its attn_v is the last of 33, so it gets more bits; mtp.fc (nextn.eh_proj) stays at the base."""
    dense = model("qwen3.5-9b")
    assert set(types_of(dense, "Q4_K_M", "self_attn.v_proj", part="mtp")) == {"Q6_K"}
    assert set(types_of(dense, "Q4_K_M", "mtp.fc", part="mtp")) == {"Q4_K"}
    large = model("qwen3.5-397b-a17b")  # 60 // 8 = 7: layer 52 is in the last eighth of 60 layers, not of 61
    assert 52 in types_of(large, "Q4_K_M", "experts.down_proj")["Q6_K"]
    assert 52 not in types_of(large, "Q4_K_M", "experts.down_proj", mtp=True)["Q6_K"]


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_covers_every_layer_once(file_type: str) -> None:
    for name in ("qwen3.5-0.8b", "qwen3.5-35b-a3b", "qwen3-next-80b"):
        found = model(name)
        covered: Counter[tuple[int, str]] = Counter()
        for item in gguf_tensors(found, file_type):
            covered.update((id(item.source), item.role + str(layer)) for layer in item.layers or (0,))
        assert set(covered.values()) == {1}


def test_mmproj_is_f16_with_vectors_and_positions_in_f32() -> None:
    vision = [item for item in gguf_tensors(model("qwen3.5-9b"), "Q4_K_M") if item.source.part == "vision"]
    elements = sum(item.source.elements * item.source.count for item in vision)
    assert elements == 456_010_480
    whole = sum(storage_bytes(item.shape, plain(item.type)) * item.source.count for item in vision)
    wide = sum(item.source.elements * item.source.count for item in vision if item.type == "F32")
    assert wide == 2304 * 1152 + sum(
        item.source.elements * item.source.count for item in vision if len(item.source.shape) == 1
    )
    assert whole == 2 * elements + 2 * wide
