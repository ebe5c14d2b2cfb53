"""Formats by name, and the sizes of published files (`data/release_sizes.jsonl`)."""

import json
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.profiles.errors import UnknownName, Unsupported
from qwenfit.profiles.formats import (
    PLACES,
    checkpoint_bytes,
    formats,
    pieces,
    storage_of,
    tensor_bytes,
    weight_format,
)
from qwenfit.profiles.model import Model, Tensor
from qwenfit.profiles.model_catalog import model, models

DATA = Path(__file__).parent / "data"
RELEASES = [json.loads(line) for line in (DATA / "release_sizes.jsonl").read_text().splitlines()][1:]
UNITS = {"B": 1, "GB": 10**9, "GiB": 2**30}


@pytest.mark.parametrize("row", [row for row in RELEASES if "limit" in row], ids=lambda row: row["id"])
def test_published_size(row: dict) -> None:
    """Within the row's limit and half a unit of the last printed digit."""
    found, fmt = model(row["model"]), weight_format(row["format"])
    size = checkpoint_bytes(found, fmt)
    if fmt.family == "gguf" and row["what"] == "tensors":
        size = sum(piece.bytes for piece in pieces(found, fmt) if piece.part == "text")
    figure, unit = Decimal(row["figure"]), UNITS[row["unit"]]
    exponent = figure.as_tuple().exponent
    assert isinstance(exponent, int)
    precision = 0 if row["unit"] == "B" else unit * Decimal(10) ** exponent / 2
    assert abs(size - figure * unit) <= figure * unit * Decimal(str(row["limit"])) + precision


def test_rows_out_of_scope_say_why() -> None:
    assert all(("limit" in row) != ("out_of_scope" in row) for row in RELEASES)


# GB of weights with bf16 embeddings, lm_head, MTP and vision, computed from the module rules apart from this code
TABLE = {
    "gptq-int4-official": (1.36, 3.21, 5.97, 12.16, 30.24, 24.40, 78.84, 235.66),
    "int4-sym": (1.01, 2.51, 4.03, 9.05, 19.45, 22.00, 71.26, 221.72),
    "int8": (1.26, 3.20, 5.81, 12.50, 31.62, 38.81, 131.52, 418.79),
}


@pytest.mark.parametrize("name", TABLE)
def test_table_of_sizes(name: str) -> None:
    sizes = [checkpoint_bytes(found, weight_format(name)) / 1e9 for found in models()[:8]]
    assert sizes == pytest.approx(TABLE[name], abs=0.0051, rel=2e-4)


def tensors_in_files(found: Model, name: str, per_matrix: int) -> int:
    """Files hold experts one by one and gate apart from up; a quantized matrix is `per_matrix` tensors."""
    total = 0
    for piece in pieces(found, weight_format(name)):
        quantized = bool(piece.storage.group_columns)
        count = max(1, len(piece.layers)) * piece.per_layer
        if quantized and len(piece.shape) == 3:
            count *= piece.shape[0] * piece.storage.matrices
        total += count * (per_matrix if quantized else 1)
    return total


def test_number_of_tensors_in_official_releases() -> None:
    """Index of Qwen3.5-35B-A3B-GPTQ-Int4, shards of Qwen3.6-35B-A3B-FP8 (0xBakeer/inference-atlas pull request 145)"""
    assert tensors_in_files(model("qwen3.5-35b-a3b"), "gptq-int4-official", per_matrix=4) == 124_611
    assert tensors_in_files(model("qwen3.6-35b-a3b"), "fp8", per_matrix=2) == 64_196


def test_bf16_is_the_published_total() -> None:
    for found in models():
        assert checkpoint_bytes(found, weight_format("bf16")) == found.checkpoint_bytes


def test_mlx_quantizes_every_linear_and_embedding() -> None:
    """mlx-lm 0.32.2: 4.5 bits with groups of 64; what is left of the 9B text are vectors and the convolutions."""
    found = model("qwen3.5-9b")
    whole = [tensor for tensor in found.tensors if tensor.part == "text"]
    kept = [tensor for tensor in whole if len(tensor.shape) != 2]
    matrices = sum(tensor.elements * tensor.count for tensor in whole if len(tensor.shape) == 2)
    expected = matrices * 9 // 16 + sum(tensor.stored_bytes * tensor.count for tensor in kept)
    assert checkpoint_bytes(found, weight_format("mlx-4bit")) == expected
    routers = [
        tensor for tensor in model("qwen3.5-35b-a3b").tensors if tensor.role == "mlp.gate" and tensor.part == "text"
    ]
    fmt = weight_format("mlx-4bit")
    assert {storage_of(tensor, fmt, model("qwen3.5-35b-a3b")).bits for tensor in routers} == {8}


def test_gguf_file_is_text_and_metadata() -> None:
    found, plain, with_mtp = model("qwen3.5-9b"), weight_format("q4_k_m"), weight_format("q4_k_m-mtp")
    assert checkpoint_bytes(found, plain) - 5_618_141_184 == pytest.approx(11e6, rel=0.02)  # gguf_sizes.jsonl
    assert 0.14e9 < checkpoint_bytes(found, with_mtp) - checkpoint_bytes(found, plain) < 0.16e9
    vision = next(tensor for tensor in found.tensors if tensor.role == "vision.attn.qkv")
    assert storage_of(vision, plain, found).name == "F16"


def test_nvfp4_follows_nvidia_where_there_is_a_release() -> None:
    fmt = weight_format("nvfp4")

    def stored(name: str) -> dict[str, str]:
        found = model(name)
        return {piece.role: piece.storage.name for piece in pieces(found, fmt) if piece.part == "text"}

    experts_only, mixed = stored("qwen3.5-122b-a10b"), stored("qwen3.6-35b-a3b")
    assert experts_only["experts.down_proj"] == mixed["experts.down_proj"] == "nvfp4"
    assert (experts_only["lm_head"], mixed["lm_head"]) == ("BF16", "nvfp4")
    assert (experts_only["self_attn.q_proj"], mixed["self_attn.q_proj"]) == ("BF16", "fp8-tensor")
    assert (experts_only["shared_expert.up_proj"], mixed["shared_expert.up_proj"]) == ("BF16", "nvfp4")
    assert mixed["linear_attn.in_proj_a"] == mixed["linear_attn.A_log"] == "BF16"
    assert fmt.is_released(model("qwen3.6-27b"))
    assert not fmt.is_released(model("qwen3.5-9b"))
    own = replace(model("qwen3.5-122b-a10b"), name="mine", quantization={"algorithm": "NVFP4"})
    assert checkpoint_bytes(own, fmt) == checkpoint_bytes(model("qwen3.5-122b-a10b"), fmt)


NEVER = {"norm", "linear_attn.norm", "linear_attn.conv1d", "linear_attn.A_log", "linear_attn.dt_bias", "mtp.fc"}
NEVER_IN_SAFETENSORS = NEVER | {
    *("linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba", "mlp.gate", "shared_expert_gate"),
    *("vision.patch_embed", "vision.pos_embed", "vision.norm", "vision.bias"),
}


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-35b-a3b", "qwen3-next-80b"])
def test_what_is_never_quantized(name: str) -> None:
    found = model(name)
    everything = [weight_format("int4-head4-embed4-mtp4-vision4"), *formats()]
    for fmt in everything:
        for piece in pieces(found, fmt):
            kept = NEVER_IN_SAFETENSORS if fmt.family == "safetensors" else NEVER - {"mtp.fc"}
            if piece.role in kept:
                assert piece.storage.bits >= 16, (fmt.name, piece.role)


def test_int4_covers_attention_and_delta_net_and_nothing_beside_the_text() -> None:
    found, fmt = model("qwen3.5-9b"), weight_format("int4")
    quantized = {piece.role for piece in pieces(found, fmt) if piece.storage.bits < 16}
    assert quantized == {
        *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    }
    assert {piece.part for piece in pieces(found, fmt) if piece.storage.bits < 16} == {"text"}


def test_pieces_that_are_asked_for() -> None:
    found = model("qwen3.5-27b")
    whole = checkpoint_bytes(found, weight_format("int4"))
    embedding = 248320 * 5120
    with_head = checkpoint_bytes(found, weight_format("int4-head8"))
    scales = 248320 * (5120 // 128) * 2
    assert whole - with_head == embedding * 2 - (embedding + scales + 16)
    vision = [piece for piece in pieces(found, weight_format("int4-vision8")) if piece.part == "vision"]
    assert {piece.role for piece in vision if piece.storage.bits == 8} == {
        role for role, place in PLACES.items() if place == "vision"
    }
    mtp = [piece for piece in pieces(found, weight_format("int4-mtp8")) if piece.part == "mtp"]
    assert {piece.role for piece in mtp if piece.storage.bits == 16} == {"norm", "mtp.fc"}


def test_tied_embedding_is_governed_by_embed() -> None:
    found = model("qwen3.5-4b")
    assert checkpoint_bytes(found, weight_format("int4-head8")) == checkpoint_bytes(found, weight_format("int4"))
    assert checkpoint_bytes(found, weight_format("int4-embed8")) < checkpoint_bytes(found, weight_format("int4"))


def test_tensor_bytes_sum_to_the_checkpoint() -> None:
    found = model("qwen3.5-35b-a3b")
    for fmt in map(weight_format, ("bf16", "int4", "gptq-int4-official", "nvfp4")):
        assert sum(tensor_bytes(tensor, fmt, found) for tensor in found.tensors) == checkpoint_bytes(found, fmt)
    vision = next(tensor for tensor in found.tensors if tensor.part == "vision")
    assert tensor_bytes(vision, weight_format("mlx-4bit"), found) == 0
    with pytest.raises(Unsupported, match="files hold no"):
        storage_of(vision, weight_format("mlx-4bit"), found)


def test_storage_of_a_layer() -> None:
    found, fmt = model("qwen3.5-9b"), weight_format("q4_k_m")
    down = next(tensor for tensor in found.tensors if tensor.role == "mlp.down_proj" and tensor.part == "text")
    assert [storage_of(down, fmt, found, layer).name for layer in (3, 4, 6)] == ["Q6_K", "Q4_K", "Q6_K"]


def test_checkpoint_is_what_the_headers_say() -> None:
    """A made-up folder: packed codes beside scales, an FP8 matrix, and an unquantized original for other formats."""
    whole = model("qwen3.5-0.8b")
    stored = (
        Tensor("model.layers.{layer}.mlp.up_proj.weight_packed", (3584, 128), "I32", "text", "mlp.up_proj", (0, 1)),
        Tensor("model.layers.{layer}.mlp.up_proj.weight_scale", (3584, 8), "BF16", "text", "mlp.up_proj", (0, 1)),
        Tensor("model.layers.{layer}.mlp.down_proj.weight", (1024, 3584), "F8_E4M3", "text", "mlp.down_proj", (0, 1)),
        Tensor("blk.{layer}.ffn_gate.weight", (3584, 1024), "Q6_K", "text", "mlp.gate_proj", (0, 1)),
    )
    read = replace(whole, tensors=stored, original=whole.tensors, stored="checkpoint")
    expected = 2 * (3584 * 128 * 4 + 3584 * 8 * 2 + 1024 * 3584 + 3584 * 4 * 210)
    assert checkpoint_bytes(read, weight_format("checkpoint")) == read.checkpoint_bytes == expected
    assert checkpoint_bytes(read, weight_format("int4")) == checkpoint_bytes(whole, weight_format("int4"))


@pytest.mark.parametrize(
    ("spelled", "canonical"),
    [
        ("INT4", "int4"),
        ("int4-g128-asym", "int4"),
        ("int4-sym-g64", "int4-g64-sym"),
        ("int8-g128-sym-embed16", "int8"),
        ("int4-vision8-head8-mtp8-embed8-g128", "int4-head8-embed8-mtp8-vision8"),
        ("int4-channel", "int4-channel"),
        ("awq", "int4-awq"),
        ("gptq", "int4-gptq"),
        ("int4-gptq-g128-sym", "int4-gptq"),
        ("Q4_K_M", "q4_k_m"),
        ("q4-k-m", "q4_k_m"),
        ("gguf-q4_k_m", "q4_k_m"),
        ("Q4_K_M-MTP", "q4_k_m-mtp"),
        ("gguf-bf16-mtp", "gguf-bf16-mtp"),
        ("f16", "gguf-f16"),
        (" GPTQ-Int4 ", "gptq-int4-official"),
        ("MXFP4-MOE", "mxfp4_moe"),
        ("mlx-8bit", "mlx-8bit"),
    ],
)
def test_one_object_per_format_however_spelled(spelled: str, canonical: str) -> None:
    assert weight_format(spelled).name == canonical
    assert weight_format(spelled) is weight_format(canonical)


@pytest.mark.parametrize(
    "name", ["", "q4_k_n", "int3", "int4-g48", "int4-head7", "int4-", "ggml", "x" * 10_000, "int4-g٤"]
)
def test_unknown_name(name: str) -> None:
    with pytest.raises(UnknownName) as caught:
        weight_format(name)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_did_you_mean() -> None:
    with pytest.raises(UnknownName, match="did you mean q4_k_m"):
        weight_format("q4km")


@pytest.mark.parametrize(
    ("name", "word"),
    [("int4-gptq-head8", "head"), ("int8-awq", "AWQ"), ("int4-awq-sym", "AWQ"), ("ud-q4_k_xl", "recipe")],
)
def test_words_that_do_not_go_together(name: str, word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        weight_format(name)


def test_catalog_is_ranked_and_prices_every_model() -> None:
    catalog = formats()
    assert len({fmt.name for fmt in catalog}) == len(catalog) > 40
    assert [fmt.divergence for fmt in catalog] == sorted(fmt.divergence for fmt in catalog)
    for found in models():
        bf16 = checkpoint_bytes(found, weight_format("bf16"))
        for fmt in catalog:
            assert 0 < checkpoint_bytes(found, fmt) <= bf16 + 20_000_000, (found.name, fmt.name)
            assert weight_format(fmt.name) is fmt


groups = st.sampled_from(["g32", "g64", "g128", "g256", "channel"])
kinds = st.sampled_from(["sym", "asym"])
extras = st.sets(
    st.sampled_from(["head8", "head4", "embed8", "embed4", "mtp8", "mtp4", "vision8", "vision4"]), max_size=3
)
any_model = st.sampled_from([found.name for found in models()])


@settings(deadline=None)
@given(any_model, groups, kinds, extras)
def test_more_bits_never_take_less(name: str, group: str, kind: str, extra: set[str]) -> None:
    words = "-".join([group, kind, *sorted(extra)])
    four, eight = weight_format(f"int4-{words}"), weight_format(f"int8-{words}")
    assert checkpoint_bytes(model(name), four) <= checkpoint_bytes(model(name), eight)
    assert checkpoint_bytes(model(name), eight) <= checkpoint_bytes(model(name), weight_format("bf16"))
    assert four.divergence >= eight.divergence


@settings(deadline=None)
@given(any_model, kinds, st.sampled_from([("g32", "g64"), ("g64", "g128"), ("g128", "g256"), ("g256", "channel")]))
def test_finer_groups_never_take_less(name: str, kind: str, sizes: tuple[str, str]) -> None:
    fine, coarse = (weight_format(f"int4-{size}-{kind}-embed8-vision8") for size in sizes)
    assert checkpoint_bytes(model(name), fine) >= checkpoint_bytes(model(name), coarse)
    assert fine.divergence <= coarse.divergence


@settings(deadline=None)
@given(any_model, st.sampled_from(["head", "embed", "mtp", "vision"]), groups)
def test_quantizing_a_piece_more_never_takes_more(name: str, piece: str, group: str) -> None:
    formats_ = [weight_format(f"int4-{group}-{piece}{bits}") for bits in (16, 8, 4)]
    sizes = [checkpoint_bytes(model(name), fmt) for fmt in formats_]
    assert sizes == sorted(sizes, reverse=True)
    assert [fmt.divergence for fmt in formats_] == sorted(fmt.divergence for fmt in formats_)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_format_or_a_sentence(text: str) -> None:
    try:
        weight_format(text)
    except (UnknownName, Unsupported) as error:
        assert str(error)


def test_import_is_light() -> None:
    """The planner's fast path imports this module on every call."""
    heavy = {"numpy", "torch", "pydantic", "yaml", "difflib"}
    code = f"import sys, qwenfit.profiles.formats; print(*{heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
