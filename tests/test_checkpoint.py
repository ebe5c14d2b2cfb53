"""A folder's model has the tensors of its safetensors headers: real bytes, real dtypes, nothing dropped, nothing
invented.
"""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qwenfit.profiles.checkpoint import aggregate, stored_tensors
from qwenfit.profiles.errors import BadInput, QwenfitError, Unsupported
from qwenfit.profiles.model import stored_bytes
from qwenfit.profiles.model_catalog import model
from qwenfit.profiles.safetensors_header import HeaderTensor

CONFIGS = json.loads((Path(__file__).parent / "data" / "model_configs.json").read_text())["models"]
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "mtp_num_hidden_layers": 1,
}
TINY = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": TEXT,
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 16,
    },
    "tie_word_embeddings": False,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
TINY_MOE = TINY | {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": TEXT | EXPERTS}


def _tensors(config, tmp_path):
    """name -> (dtype, shape) of every tensor that the config promises."""
    path = tmp_path / "promise.json"
    path.write_text(json.dumps(config))
    return {name: (tensor.dtype, tensor.shape) for name, tensor in model(str(path)).expanded()}


def _write(path, tensors):
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = stored_bytes(tuple(shape), dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(position))


def _folder(tmp_path, config, tensors=None, shards=1):
    """A checkpoint with an index, its shards named the way Qwen names them."""
    folder = tmp_path / "Tiny-Qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = _tensors(config, tmp_path) if tensors is None else tensors
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        shard = f"model.safetensors-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        _write(folder / shard, part)
        weight_map |= dict.fromkeys(part, shard)
    # Qwen3.6-35B-A3B's index has its total_size as a float.
    index = {"metadata": {"total_size": 1.0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _bytes(tensors):
    return sum(stored_bytes(shape, dtype) for dtype, shape in tensors.values())


def _refused(folder, words, kind: type[QwenfitError] = BadInput):
    start = time.process_time()
    with pytest.raises(kind, match=words) as caught:
        model(str(folder))
    assert time.process_time() - start < 1
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [TINY, TINY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_has_what_its_headers_say(tmp_path, config, shards):
    tensors = _tensors(config, tmp_path)
    folder = _folder(tmp_path, config, tensors, shards)
    found = model(str(folder))
    assert found.stored == "checkpoint" and found.name == "tiny-qwen" and found.path == str(folder)
    assert found.checkpoint_bytes == _bytes(tensors)
    assert sorted((name, tensor.dtype, tensor.shape) for name, tensor in found.expanded()) == sorted(
        (name, *described) for name, described in tensors.items()
    )
    promised = model(str(tmp_path / "promise.json"))
    # Shards cut the same way through every layer: one entry per pattern, as in the list that dimensions give.
    assert sorted((t.name, t.role, t.part, t.layers, t.experts) for t in found.tensors) == sorted(
        (t.name, t.role, t.part, t.layers, t.experts) for t in promised.tensors
    )
    assert found.parameters == promised.parameters and found.has_vision and found.mtp_num_hidden_layers == 1
    with safe_open(next(folder.glob("*.safetensors")), framework="numpy") as theirs:
        assert set(theirs.keys()) <= set(tensors)


def test_without_an_index_every_file_counts(tmp_path):
    tensors = _tensors(TINY, tmp_path)
    folder = _folder(tmp_path, TINY, tensors, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    _write(folder / "adapter_model.safetensors", {"lora": ("F32", (8, 8))})
    assert model(str(folder)).checkpoint_bytes == _bytes(tensors)
    _write(folder / "model.safetensors", tensors)
    assert model(str(folder)).checkpoint_bytes == _bytes(tensors)  # it alone, as transformers loads it


def test_every_tensor_is_where_its_file_says(tmp_path):
    """The bytes at each place are those that safetensors' own reader returns."""
    folder = _folder(tmp_path, TINY, shards=3)
    for shard in folder.glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(position * 31 % 120 for position in range(len(data) - start))
        shard.write_bytes(data)
    places, seen = stored_tensors(str(folder)), 0
    assert set(places) == set(_tensors(TINY, tmp_path))
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="numpy") as theirs:
            names = [name for name in theirs.keys() if places[name].dtype == "F32"]  # noqa: SIM118
            for name in names:
                place, expected = places[name], theirs.get_tensor(name)
                found = Path(place.path).read_bytes()[place.offset_bytes :][: place.bytes]
                assert found == expected.tobytes() and place.shape == expected.shape
            seen += len(names)
    assert seen == sum(place.dtype == "F32" for place in places.values()) > 0
    with pytest.raises(BadInput, match="cannot be listed"):
        stored_tensors(str(tmp_path / "none"))


def test_a_folder_without_weights_is_its_config(tmp_path):
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["qwen3.5-9b"]))
    found = model(str(folder))
    assert found.stored is None and found.checkpoint_bytes == 19306216416


def test_a_quantized_config_without_weights_names_its_format(tmp_path):
    folder = tmp_path / "only"
    folder.mkdir()
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(CONFIGS["qwen3.5-27b"] | {"quantization_config": quantized}))
    assert model(str(folder)).stored == "fp8"


def test_parts_that_are_not_there_are_not_charged(tmp_path):
    """transformers' save_pretrained drops mtp.*, text-only re-saves the vision tower; the config still has both."""
    tensors = _tensors(TINY, tmp_path)
    text = {name: described for name, described in tensors.items() if not name.startswith(("mtp.", "model.visual."))}
    found = model(str(_folder(tmp_path, TINY, text)))
    assert found.mtp_num_hidden_layers == 0 and not found.has_vision
    assert found.parameters == sum(stored_bytes(shape, "U8") for _, shape in text.values())


@pytest.mark.parametrize("said", [True, None])
def test_whether_lm_head_is_tied_is_told_by_the_weights(tmp_path, said):
    config = TINY | {"tie_word_embeddings": said}
    if said is None:
        del config["tie_word_embeddings"]
    tensors = _tensors(TINY, tmp_path)
    del tensors["lm_head.weight"]
    assert model(str(_folder(tmp_path, config, tensors))).tie_word_embeddings


def test_a_missing_lm_head_is_noticed(tmp_path):
    tensors = _tensors(TINY, tmp_path)
    del tensors["lm_head.weight"]
    _refused(_folder(tmp_path, TINY, tensors), "has no lm_head, though config.json says tie_word_embeddings false")


GPTQ = {
    "quantization_config": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "dynamic": {"-:.*attn.*": {}},
    }
}


def _gptq(tensors):
    """The MLPs in GPTQ's four tensors, eight 4-bit codes to a word along the input, groups of 32."""
    quantized = {}
    for name, (dtype, shape) in tensors.items():
        module = name.removesuffix(".weight")
        if ".mlp." in name and "visual" not in name and len(shape) == 2 and name != module:
            out, inner = shape
            quantized[module + ".qweight"] = ("I32", (inner // 8, out))
            quantized[module + ".qzeros"] = ("I32", (inner // 32, out // 8))
            quantized[module + ".scales"] = ("F16", (inner // 32, out))
            quantized[module + ".g_idx"] = ("I32", (inner,))
        else:
            quantized[name] = (dtype, shape)
    return quantized


def test_quantized_weights_have_their_real_bytes_and_the_role_of_the_weight(tmp_path):
    plain = _tensors(TINY, tmp_path)
    tensors = _gptq(plain)
    found = model(str(_folder(tmp_path, TINY | GPTQ, tensors)))
    assert found.checkpoint_bytes == _bytes(tensors) < _bytes(plain)
    assert found.stored == "checkpoint" and found.quantization is not None and found.quantization["bits"] == 4
    assert not [tensor.name for tensor in found.tensors if tensor.role == "other"]
    up = [tensor for tensor in found.tensors if tensor.role == "mlp.up_proj" and tensor.part == "text"]
    assert {tensor.dtype for tensor in up} == {"I32", "F16"} and all(tensor.layers == (0, 1, 2, 3) for tensor in up)
    # Parameters are those of the model, not of the packed words.
    assert found.parameters == sum(stored_bytes(shape, "U8") for _, shape in plain.values())


def test_unknown_tensors_are_counted_as_other(tmp_path):
    tensors = _tensors(TINY, tmp_path) | {"model.language_model.layers.1.novelty": ("F32", (1000,))}
    found = model(str(_folder(tmp_path, TINY, tensors)))
    (other,) = [tensor for tensor in found.tensors if tensor.role == "other"]
    assert (other.part, other.layers, other.stored_bytes) == ("text", (1,), 4000)
    assert found.checkpoint_bytes == _bytes(tensors)


def test_aggregation_keeps_what_is_irregular_apart():
    """Layer 1 lacks expert 2, layer 2 has one expert in another dtype: no tensor may be lost or invented."""

    def expert(layer, number, dtype="BF16"):
        return HeaderTensor(f"model.layers.{layer}.mlp.experts.{number}.up_proj.weight", dtype, (2, 2), 0, 8)

    regular = [expert(layer, number) for layer in (0, 3) for number in (0, 1, 2)]
    found = [*regular, expert(1, 0), expert(1, 1), expert(2, 0), expert(2, 2), expert(2, 1, "F32")]
    tensors = aggregate(found)
    assert sorted(name for tensor in tensors for name in tensor.names()) == sorted(tensor.name for tensor in found)
    assert sum(tensor.count for tensor in tensors) == len(found)
    whole = next(tensor for tensor in tensors if tensor.experts == 3)
    assert whole.layers == (0, 3) and all(tensor.role == "experts.up_proj" for tensor in tensors)


def test_official_gptq_of_35b_has_its_published_size():
    """Qwen/Qwen3.5-35B-A3B-GPTQ-Int4: 24,403,162,208 bytes and 124,611 tensors; only routed experts are int4 (groups of
    128, symmetric), stored one by one; the MTP layer stays as it is.
    """

    def header():
        for name, tensor in model("35b-a3b").expanded():
            if ".mlp.experts." not in name or name.startswith("mtp."):
                yield HeaderTensor(name, tensor.dtype, tensor.shape, 0, 0)
                continue
            experts, out, inner = tensor.shape
            stem, halves = name.rpartition(".")[0], ("gate_proj", "up_proj")
            projections = halves if name.endswith("gate_up_proj") else ("down_proj",)
            out //= len(projections)
            for number in range(experts):
                for projection in projections:
                    module = f"{stem}.{number}.{projection}"
                    yield HeaderTensor(module + ".qweight", "I32", (inner // 8, out), 0, 0)
                    yield HeaderTensor(module + ".qzeros", "I32", (inner // 128, out // 8), 0, 0)
                    yield HeaderTensor(module + ".scales", "F16", (inner // 128, out), 0, 0)
                    yield HeaderTensor(module + ".g_idx", "I32", (inner,), 0, 0)

    tensors = aggregate(header())
    assert sum(tensor.count for tensor in tensors) == 124611
    assert sum(tensor.stored_bytes * tensor.count for tensor in tensors) == 24403162208
    assert len(tensors) < 100 and not [tensor.name for tensor in tensors if tensor.role == "other"]


def test_image_and_video_limits_come_from_the_preprocessors(tmp_path):
    folder = _folder(tmp_path, TINY)
    (folder / "preprocessor_config.json").write_text('{"size": {"longest_edge": 1048576, "shortest_edge": 65536}}')
    (folder / "video_preprocessor_config.json").write_text('{"size": {"longest_edge": 25165824}}')
    vision = model(str(folder)).vision
    assert vision is not None and (vision.max_image_tokens, vision.max_video_tokens) == (1024, 12288)
    (folder / "preprocessor_config.json").write_text('{"size": {"longest_edge": -3}}')
    _refused(folder, "size.longest_edge is -3, not a number of pixels")
    (folder / "preprocessor_config.json").write_text('{"max_pixels": 7}')
    assert model(str(folder)).max_image_tokens == 16384


def test_folders_that_hold_no_model(tmp_path):
    _refused(tmp_path, "has no config.json; give a checkpoint's folder")
    (tmp_path / "x.Q4_K_M.gguf").touch()
    _refused(tmp_path, r"has no config.json; give .*x\.Q4_K_M\.gguf")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    _refused(tmp_path, "has GGUF files and no safetensors; give ")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    _refused(tmp_path, "is a pickle, which qwenfit never opens; convert the checkpoint to safetensors", Unsupported)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[", "is not JSON"),
        ({}, "weight_map is not an object"),
        ({"weight_map": {}}, "weight_map is not an object"),
        ({"weight_map": ["a"]}, "weight_map is not an object"),
        ({"weight_map": {"a": 7}}, "weight_map places 'a' in 7, not in a file"),
        ({"weight_map": {"a": "../x.safetensors"}}, "which is no safetensors file of the folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is no safetensors file of the folder"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "which is no safetensors file of the folder"),
        ({"weight_map": {"a": "..\\\\x.safetensors"}}, "which is no safetensors file of the folder"),
        ({"weight_map": {"a": "model.bin"}}, "which is no safetensors file of the folder"),
        (
            {"weight_map": {"a": "missing.safetensors"}},
            "lacks 'missing.safetensors', which model.safetensors.index.json",
        ),
    ],
)
def test_hostile_indexes(tmp_path, index, words):
    folder = _folder(tmp_path, TINY)
    (tmp_path / "x.safetensors").write_bytes(b"")
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    _refused(folder, words)


def test_an_index_that_places_a_tensor_wrongly(tmp_path):
    folder = _folder(tmp_path, TINY, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model.safetensors-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    _refused(folder, "which model.safetensors.index.json places there")


def test_a_second_copy_counts_once_where_the_index_decides(tmp_path):
    """Repair tools leave the same MTP tensor in two shards; loaders take the one that the index names."""
    tensors = _tensors(TINY, tmp_path)
    folder = _folder(tmp_path, TINY, tensors)
    _write(folder / "extra.safetensors", {"novelty": ("F32", (5,)), "mtp.fc.weight": tensors["mtp.fc.weight"]})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["novelty"] = "extra.safetensors"
    path.write_text(json.dumps(index))
    assert model(str(folder)).checkpoint_bytes == _bytes(tensors) + 20
    path.unlink()
    _refused(folder, "tensor 'mtp.fc.weight' is in both")


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege there")
def test_links_as_in_the_hub_cache_are_followed_to_files_only(tmp_path):
    """snapshots/<revision>/* are links to ../../blobs/*; a link to anything but a regular file is refused, not waited
    for.
    """
    tensors = _tensors(TINY, tmp_path)
    folder = _folder(tmp_path, TINY, tensors)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shard = next(folder.glob("*.safetensors"))
    shard.rename(blobs / "abc")
    shard.symlink_to(blobs / "abc")
    assert model(str(folder)).checkpoint_bytes == _bytes(tensors)
    shard.unlink()
    shard.symlink_to("/dev/zero")
    _refused(folder, "is not a regular file")
    shard.unlink()
    shard.symlink_to(tmp_path / "nowhere")
    _refused(folder, "cannot be read")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model.language_model.layers.4.input_layernorm.weight": ("BF16", (64,))},
            "holds layer 4, but config.json has 4",
        ),
        ({"model.language_model.embed_tokens.weight": ("BF16", (64, 64))}, r"embed_tokens.weight is '\[64, 64\]'"),
        ({"model.language_model.layers.0.self_attn.q_proj.weight": ("BF16", (2, 2))}, "layer 0 holds self_attn"),
        ({"a.{layer}.b": ("BF16", (2,))}, "is no name for a tensor"),
    ],
)
def test_weights_that_contradict_the_config(tmp_path, change, words):
    _refused(_folder(tmp_path, TINY, _tensors(TINY, tmp_path) | change), words)


def test_a_folder_as_mlx_lm_writes_it(tmp_path):
    """mlx-lm 0.32.2 `quantize_model`, `save`: names of its own, codes in U32, scales and biases of bf16 beside every
    matrix, the embedding's too; no vision tower and no block of multi-token prediction; no quant_method."""
    tensors = {}
    for name, (dtype, shape) in _tensors(TINY, tmp_path).items():
        name = name.replace("model.language_model.", "language_model.model.")
        module = name.removesuffix(".weight")
        if name.startswith(("mtp", "model.visual")):
            continue
        if len(shape) == 2 and name.endswith(".weight") and shape[1] % 32 == 0:
            tensors[name] = ("U32", (shape[0], shape[1] // 8))
            tensors |= {f"{module}.{more}": ("BF16", (shape[0], shape[1] // 32)) for more in ("scales", "biases")}
        else:
            tensors[name] = (dtype, shape)
    affine = {"group_size": 32, "bits": 4, "mode": "affine"}
    folder = _folder(tmp_path, TINY | {"quantization": affine, "quantization_config": affine}, tensors)
    found = model(str(folder))
    assert found.checkpoint_bytes == _bytes(tensors)
    assert found.quantization == {"method": "mlx", "bits": 4, "group_size": 32}
    assert not found.has_vision and not found.mtp_num_hidden_layers


def test_a_layer_that_is_missing(tmp_path):
    tensors = {name: found for name, found in _tensors(TINY, tmp_path).items() if ".layers.2." not in name}
    _refused(_folder(tmp_path, TINY, tensors), r"holds no linear_attn\.\* tensors of layer 2; a shard is missing")


def test_a_truncated_shard(tmp_path):
    folder = _folder(tmp_path, TINY, shards=2)
    shard = folder / "model.safetensors-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    _refused(folder, "00002-of-00002.safetensors is cut short")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_gives_a_model_or_an_error_of_ours(tmp_path_factory, data):
    """One to three bytes replaced anywhere in the files that are read."""
    tmp_path = tmp_path_factory.mktemp("damage")
    folder = _folder(tmp_path, TINY)
    names = ["config.json", "model.safetensors.index.json", "model.safetensors-00001-of-00001.safetensors"]
    path = folder / data.draw(st.sampled_from(names))
    raw = path.read_bytes()
    at = data.draw(st.integers(0, min(len(raw), 8000) - 1))
    path.write_bytes(raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + 1 :])
    try:
        found = model(str(folder))
    except QwenfitError as refused:
        assert "\n" not in str(refused)
        return
    assert found.checkpoint_bytes > 0 and found.parameters > 0
