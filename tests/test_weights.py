"""Weight bytes on a rank: the whole model on one, shards on several."""

import time
from dataclasses import replace
from math import prod

import pytest

from qwenfit.planner.weights import WeightTable, weight_table
from qwenfit.profiles.errors import Unsupported
from qwenfit.profiles.formats import GGUF_METADATA_BYTES_PER_TOKEN, checkpoint_bytes, formats, pieces, weight_format
from qwenfit.profiles.model import Tensor
from qwenfit.profiles.model_catalog import model, models


def parts(table: WeightTable) -> dict[str, int]:
    return {"text": table.text, "vision": table.vision, "mtp": table.mtp + table.mtp_experts}


def test_one_rank_holds_the_checkpoint() -> None:
    for found in models():
        for fmt in formats():
            by_part = parts(weight_table(found, fmt))
            expected = checkpoint_bytes(found, fmt)
            if fmt.family == "gguf":
                expected -= found.vocab_size * GGUF_METADATA_BYTES_PER_TOKEN
            elif fmt.dialect == "gptq":  # int32 per input column of every matrix, experts and gate and up one by one
                expected -= sum(
                    4 * piece.shape[-1] * prod(piece.shape[:-2]) * piece.storage.matrices * piece.tensor.count
                    for piece in pieces(found, fmt)
                    if piece.storage.column_bytes
                )
            assert sum(by_part[part] for part in fmt.parts) == expected, (found.name, fmt.name)


def test_places_of_9b_in_bf16() -> None:
    """Parameter counts per component as published, two bytes each (A_log and the gated norm four)."""
    table = weight_table(model("qwen3.5-9b"), weight_format("bf16"))
    assert table.embedding == table.lm_head == 1_017_118_720 * 2
    assert table.vision == 456_010_480 * 2
    assert table.mtp == 243_290_624 * 2
    assert table.norm == 4096 * 2
    float32_extra = 24 * (32 + 128) * 2
    delta_net, attention, mlp, norms = 1_617_695_232, 469_766_144, 4_831_838_208, 266_240 - 4096
    assert sum(table.layers) == (delta_net + attention + mlp + norms) * 2 + float32_extra
    assert table.layers[0] > table.layers[3] == table.layers[31]
    assert set(table.experts) == {0}


def test_experts_stand_apart() -> None:
    table = weight_table(model("qwen3.5-35b-a3b"), weight_format("bf16"))
    assert sum(table.experts) == 32_212_254_720 * 2
    assert table.mtp_experts == 256 * 3 * 512 * 2048 * 2
    assert table.mtp + table.mtp_experts == 844_640_768 * 2
    assert weight_table(model("qwen3.5-4b"), weight_format("bf16")).lm_head == 0


def test_q4_k_m_differs_by_layer() -> None:
    """ffn_down and attn_qkv are Q6_K in the first and last eighth and in every third layer between."""
    table = weight_table(model("qwen3.5-9b"), weight_format("q4_k_m"))
    assert table.layers[0] > table.layers[4] < table.layers[6]


@pytest.mark.parametrize("name", ["bf16", "fp8", "int4", "int4-gptq", "int8-w8a8", "nvfp4", "gptq-int4-official"])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_together_hold_at_least_the_model(name: str, tp: int) -> None:
    for found in models():
        one, rank = weight_table(found, weight_format(name)), weight_table(found, weight_format(name), tp)
        for field in ("embedding", "lm_head", "norm", "vision", "mtp", "mtp_experts"):
            assert tp * getattr(rank, field) >= getattr(one, field) >= getattr(rank, field), (found.name, field)
        for layer in range(found.num_layers):
            assert tp * rank.layers[layer] >= one.layers[layer] >= rank.layers[layer]
            assert tp * rank.experts[layer] >= one.experts[layer]
        assert tp * rank.text < 1.05 * one.text


def test_what_every_rank_repeats() -> None:
    """27B on 2 ranks: projections, conv1d, A_log, dt_bias, MLP, embedding and head divide; the rest does not."""
    found, fmt = model("qwen3.5-27b"), weight_format("bf16")
    one, rank = weight_table(found, fmt), weight_table(found, fmt, 2)
    norms = 64 * 2 * 5120 * 2 + 16 * 2 * 256 * 2 + 48 * 128 * 4
    assert 2 * sum(rank.layers) - sum(one.layers) == norms
    assert 2 * rank.embedding == one.embedding
    assert 2 * rank.lm_head == one.lm_head
    assert rank.norm == one.norm
    fc_and_norms = (2 * 5120 * 5120 + 3 * 5120 + 2 * 5120 + 2 * 256) * 2
    assert 2 * rank.mtp - one.mtp == fc_and_norms
    tower = {role: 0 for role in ("vision.norm", "vision.patch_embed", "vision.pos_embed")}
    biases = 0
    for piece in pieces(found, fmt):
        if piece.role in tower:
            tower[piece.role] += piece.bytes
        elif piece.role == "vision.bias" and piece.tensor.name.endswith(
            (
                "norm1.bias",
                "norm2.bias",
                "merger.norm.bias",
                "attn.proj.bias",
                "linear_fc2.bias",
                "patch_embed.proj.bias",
            )
        ):
            biases += piece.bytes
    assert 2 * rank.vision - one.vision == sum(tower.values()) + biases


def test_routers_and_shared_gates_lie_on_every_rank() -> None:
    found, fmt = model("qwen3.5-35b-a3b"), weight_format("bf16")
    one, rank = weight_table(found, fmt), weight_table(found, fmt, 2)
    delta_layer = (256 * 2048 + 2048 + 2 * 2048) * 2 + 128 * 4
    assert 2 * rank.layers[0] - one.layers[0] == delta_layer
    assert 2 * rank.experts[0] == one.experts[0]


def test_key_value_heads_repeat_beyond_their_number() -> None:
    """35B-A3B has 2 key-value heads: on 4 and on 8 ranks each rank has one, [256, 2048], for keys and for values."""
    found, fmt = model("qwen3.5-35b-a3b"), weight_format("bf16")
    ranks = {tp: weight_table(found, fmt, tp).layers[3] for tp in (1, 2, 4, 8)}
    replicated = (256 * 2048 + 2048 + 2 * 2048 + 2 * 256) * 2
    head = 2 * 256 * 2048 * 2
    divided = ranks[1] - replicated - 2 * head
    assert ranks[2] == replicated + divided // 2 + head
    assert ranks[4] == replicated + divided // 4 + head
    assert ranks[8] == replicated + divided // 8 + head


def test_shards_are_priced_by_their_own_shape() -> None:
    """35B-A3B experts are 512 wide. On 8 ranks a row of down_proj is 64 codes: half a group of 128, one whole scale."""
    found = model("qwen3.5-35b-a3b")
    one, rank = (weight_table(found, weight_format("int4-sym"), tp).experts[0] for tp in (1, 8))
    gate_up = 256 * (2 * 64 * 2048 // 2 + 2 * 64 * 16 * 2 + 2 * 16)
    down = 256 * (2048 * 64 // 2 + 2048 * 1 * 2 + 16)
    assert rank == gate_up + down
    assert 8 * rank > one
    fp8 = weight_table(found, weight_format("fp8"), 8).experts[0]
    assert fp8 == 256 * (2 * (64 * 2048 + 1 * 16 * 2) + 2048 * 64 + 16 * 1 * 2)


def test_vocabulary_is_padded_to_64() -> None:
    found = replace(model("qwen3.5-9b"), vocab_size=1000)
    tensors = tuple(
        replace(tensor, shape=(1000, 4096)) if tensor.role in ("embedding", "lm_head") else tensor
        for tensor in found.tensors
    )
    table = weight_table(replace(found, tensors=tensors), weight_format("bf16"), 2)
    assert table.embedding == table.lm_head == 512 * 4096 * 2


def test_vision_tower_whose_heads_do_not_divide_is_whole() -> None:
    """0.8B's tower has 12 heads."""
    found, fmt = model("qwen3.5-0.8b"), weight_format("bf16")
    one = weight_table(found, fmt).vision
    assert weight_table(found, fmt, 4).vision < one
    assert weight_table(found, fmt, 8).vision == one


def test_decay_projections_are_whole_under_gptq_and_awq() -> None:
    """vLLM: in_proj_ba is not sharded there. 9B: [32, 4096] each for a and b."""
    found = model("qwen3.5-9b")
    rank = {name: weight_table(found, weight_format(name), 2).layers[0] for name in ("int4", "int4-awq")}
    one = {name: weight_table(found, weight_format(name)).layers[0] for name in ("int4", "int4-awq")}
    extra = {name: 2 * rank[name] - one[name] for name in rank}
    projections, shapes = 2 * 32 * 4096 * 2, 6 * 16  # int4 repeats a weight_shape per matrix instead
    assert extra["int4-awq"] - (extra["int4"] - shapes) == projections


def test_headers_are_cut_in_proportion() -> None:
    whole_model = model("qwen3.5-9b")
    stored = (
        Tensor("a.{layer}.qweight", (512, 1024), "I32", "text", "self_attn.k_proj", (3,)),
        Tensor("b.{layer}.qweight", (512, 1024), "I32", "text", "mlp.down_proj", (3,)),
        Tensor("c.{layer}.weight", (4096,), "BF16", "text", "norm", (3,)),
        Tensor("d.{layer}.qkv", (512, 1024), "I32", "text", "self_attn.qkv_proj", (3,)),
        Tensor("e.{layer}.experts", (8, 64, 64), "U8", "text", "experts.gate_up_proj", (3,)),
        Tensor("lm_head.weight", (248320, 8), "U8", "text", "lm_head"),
    )
    read = replace(whole_model, tensors=stored, original=whole_model.tensors, stored="checkpoint")
    matrix = 512 * 1024 * 4
    table = weight_table(read, weight_format("checkpoint"), 8)  # 4 key-value heads: one per rank, each on two ranks
    assert table.layers[3] == matrix // 4 + matrix // 8 + 8192 + matrix * (2 * 2 + 2) // (2 * 16 + 2 * 4) + 1
    assert table.experts[3] == 8 * 64 * 64 // 8
    assert table.lm_head == 248320
    assert weight_table(read, weight_format("checkpoint")).text == read.checkpoint_bytes


@pytest.mark.parametrize(
    ("name", "tp", "sentence"),
    [
        ("qwen3.5-27b", 16, "24 query heads; 1, 2, 4 or 8 would do"),
        ("qwen3.5-9b", 3, "16 query heads; 1, 2, 4, 8 or 16 would do"),
        ("qwen3.5-9b", 0, "1 keeps the model whole"),
        ("qwen3.5-9b", -2, "1 keeps the model whole"),
    ],
)
def test_ranks_that_do_not_divide(name: str, tp: int, sentence: str) -> None:
    with pytest.raises(Unsupported, match=sentence):
        weight_table(model(name), weight_format("int4"), tp)


def test_a_table_is_built_once_and_quickly() -> None:
    """A sweep asks for thousands. 1 to 2 ms to build and less than a microsecond when asked again, where measured;
    the bounds are for a machine that has other work."""
    found, fmt = model("qwen3.5-397b-a17b"), weight_format("q4_k_m")

    def seconds(repeat: int, cold: bool) -> float:
        best = 1.0
        for _ in range(20):
            if cold:
                weight_table.cache_clear()
                pieces.cache_clear()
            start = time.perf_counter()
            for _ in range(repeat):
                weight_table(found, fmt, 2)
            best = min(best, (time.perf_counter() - start) / repeat)
        return best

    assert seconds(1, cold=True) < 5e-3
    assert seconds(1000, cold=False) < 2.5e-6
    assert weight_table(found, fmt, 2) is weight_table(found, fmt, 2)
