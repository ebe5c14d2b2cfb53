"""Reading a checkpoint: every tensor as safetensors reads it, one sentence for every way in which it may be broken."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenfit.profiles.errors import BadInput, QwenfitError, UnknownName, Unsupported
from qwenfit.quant.source import open_source

Checkpoint = Callable[..., Path]


@pytest.fixture
def copied(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoint("qwen3_5"), tmp_path / "source"))


def spoiled(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_tensors_are_those_of_the_file(name: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name)
    expected = load_file(folder / "model.safetensors")
    source = open_source(str(folder))
    assert set(source.names()) == set(expected)
    for label, tensor in expected.items():
        assert source.shape(label) == tuple(tensor.shape)
        assert source.bytes(label) == tensor.numel() * tensor.element_size()
        found = source.tensor(label)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        blocks = list(source.row_blocks(label, 4096))
        assert torch.equal(torch.cat([source.tensor(label, rows) for rows in blocks]), tensor)
        assert len(blocks) >= min(len(tensor), source.bytes(label) // 4096)
    assert source.config["model_type"] == f"{name}_text"
    assert source.model.num_layers == 4 and source.model.mtp_num_hidden_layers == 1


def test_rows_of_a_stack_are_experts(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3_5_moe")
    name = "model.layers.1.mlp.experts.down_proj"
    expected = load_file(folder / "model.safetensors")[name]
    assert torch.equal(open_source(str(folder)).tensor(name, slice(3, 5)), expected[3:5])


def test_the_source_is_never_touched(copied: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(copied.rglob("*"))}
    source = open_source(str(copied))
    for name in source.names():
        source.tensor(name).zero_()
    source.fingerprint()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(copied.rglob("*"))} == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_finite_is_named(copied: Path, value: float, dtype: Any) -> None:
    name = "model.layers.2.mlp.up_proj.weight"

    def change(tensor: Any) -> Any:
        tensor = tensor.to(dtype)
        tensor[-1, -1] = value
        return tensor

    spoiled(copied, name, change)
    source = open_source(str(copied))
    with pytest.raises(BadInput, match=f"'{name}' holds NaN or infinity; .* download it anew"):
        source.tensor(name)
    source.tensor(name, slice(0, 8))  # the rest is sound


def test_the_largest_numbers_are_finite(copied: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        spoiled(copied, name, lambda tensor, dtype=dtype: torch.full(tensor.shape, torch.finfo(dtype).min, dtype=dtype))
        assert bool((open_source(str(copied)).tensor(name) < -60000).all())


def test_a_truncated_shard(copied: Path) -> None:
    path = copied / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(BadInput, match=r"model\.safetensors is cut short"):
        open_source(str(copied))


def test_a_shard_that_is_truncated_while_it_is_read(copied: Path) -> None:
    source = open_source(str(copied))
    with open(copied / "model.safetensors", "r+b") as file:
        file.truncate(9000)
    with pytest.raises(BadInput, match=r"cut short.*the source changed while it was read"):
        for name in source.names():
            source.tensor(name)


@pytest.mark.parametrize(
    ("shard", "sentence"),
    [
        ("../model.safetensors", "which is no safetensors file of the folder"),
        ("gone.safetensors", "finish the download"),
    ],
)
def test_an_index_that_points_elsewhere(copied: Path, shard: str, sentence: str) -> None:
    shutil.copy(copied / "model.safetensors", copied.parent / "model.safetensors")
    names = open_source(str(copied)).names()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=sentence):
        open_source(str(copied))


def test_pickles_are_never_opened(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin is a pickle, which qwenfit never opens"):
        open_source(str(copied))


def test_a_layer_that_is_missing(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layers.1." not in name}, copied / "model.safetensors")
    with pytest.raises(BadInput, match=r"holds no linear_attn\.\* tensors of layer 1; a shard is missing"):
        open_source(str(copied))


def test_what_is_quantized_already(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(
        Unsupported, match=r"is quantized already \('gptq'\); give the checkpoint that it was made from"
    ):
        open_source(str(copied))
    (copied / "config.json").write_text(json.dumps(config))
    spoiled(copied, "model.layers.2.mlp.up_proj.weight", lambda tensor: tensor.to(torch.float8_e4m3fn))
    with pytest.raises(Unsupported, match=r"up_proj.weight' is stored as F8_E4M3; qwen-quant takes BF16, F16, F32"):
        open_source(str(copied))


@pytest.mark.parametrize("text", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/x"])
def test_paths_that_are_not_there(text: str) -> None:
    with pytest.raises(UnknownName, match=r"is not a folder; give a checkpoint's folder or a repository"):
        open_source(text)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(QwenfitError, match=r"qwen3\.5-9c"):
        open_source("qwen3.5-9c")


def test_the_fingerprint_tells_one_source_from_another(copied: Path) -> None:
    first = open_source(str(copied)).fingerprint()
    assert first == open_source(str(copied)).fingerprint()
    found = {first}
    os.utime(copied / "model.safetensors", (time.time(), time.time() + 5))
    found.add(open_source(str(copied)).fingerprint())
    status = (copied / "model.safetensors").stat()
    spoiled(copied, "model.norm.weight", lambda tensor: tensor.float())  # same values, another header
    os.utime(copied / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    found.add(open_source(str(copied)).fingerprint())
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    found.add(open_source(str(copied)).fingerprint())
    (copied / "tokenizer.json").write_text("{}")
    found.add(open_source(str(copied)).fingerprint())
    assert len(found) == 5
