"""Shards: what safetensors reads from them, and the same bytes whatever the order of writing."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qwenfit.profiles.checkpoint import stored_tensors
from qwenfit.profiles.errors import BadInput
from qwenfit.quant.shards import INDEX, Entry, Shards
from qwenfit.quant.source import open_source

WORDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8}
WORDS |= {"I32": torch.int32, "I64": torch.int64}


def made() -> dict[str, Any]:
    """Odd sizes first, so that a layout without care would put int64 and int32 at odd places."""
    torch.manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2,), "d": (11, 13), "e": (), "f": (5, 3, 2), "ü": (1, 1)}
    dtypes = ["I8", "BF16", "I64", "F32", "F32", "F16", "I32"]
    return {
        name: (torch.randn(shape) * 100).to(WORDS[dtype])
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }


def entries_of(tensors: dict[str, Any]) -> list[Entry]:
    words = {dtype: word for word, dtype in WORDS.items()}
    return [Entry(name, words[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def written(folder: Path, tensors: dict[str, Any], order: list[str], shard_bytes: int = 10**9) -> dict[str, str]:
    folder.mkdir()
    shards = Shards(str(folder), entries_of(tensors), shard_bytes)
    for name in order:
        shards.write(name, tensors[name])
    shards.finish()
    return digests(folder)


@pytest.mark.parametrize("shard_bytes", [10**9, 400])
def test_the_library_reads_what_was_written(tmp_path: Path, shard_bytes: int) -> None:
    tensors = made()
    files = written(tmp_path / "a", tensors, list(tensors), shard_bytes)
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) == (1 if shard_bytes > 400 else 3) and set(files) == {*shards, INDEX}
    found = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "a" / shard).items()}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        with safe_open(tmp_path / "a" / index["weight_map"][name], framework="pt") as file:
            assert file.metadata() == {"format": "pt"} and name in file.keys()  # noqa: SIM118
    # Our own reader is as strict about offsets, and says where a tensor lies: aligned to its size.
    for place in stored_tensors(str(tmp_path / "a")).values():
        assert place.offset_bytes % WORDS[place.dtype].itemsize == 0


def test_the_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    tensors = made()
    names = list(tensors)
    first = written(tmp_path / "first", tensors, names, 400)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert written(tmp_path / str(seed), tensors, names, 400) == first


def test_an_interrupted_run_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = made()
    first = written(tmp_path / "first", tensors, list(tensors), 400)
    (tmp_path / "second").mkdir()
    shards = Shards(str(tmp_path / "second"), entries_of(tensors), 400)
    for name in list(tensors)[:3]:
        shards.write(name, tensors[name])
    shards.close()
    for file in (tmp_path / "second").iterdir():  # what is half done does not load
        with pytest.raises(SafetensorError):
            load_file(file)
        with pytest.raises(BadInput):
            stored_tensors(str(tmp_path / "second"))
    shards = Shards(str(tmp_path / "second"), entries_of(tensors), 400, resume=True)
    for name in list(tensors)[2:]:
        shards.write(name, tensors[name])
    shards.finish()
    assert digests(tmp_path / "second") == first


def test_rows_by_themselves(tmp_path: Path) -> None:
    tensors = made()
    expected = written(tmp_path / "whole", tensors, list(tensors))
    (tmp_path / "rows").mkdir()
    shards = Shards(str(tmp_path / "rows"), entries_of(tensors))
    for name, tensor in tensors.items():
        for start in range(len(tensor) if tensor.dim() else 0):
            shards.write(name, tensor[start : start + 1], start)
    shards.write("e", tensors["e"])
    shards.finish()
    assert digests(tmp_path / "rows") == expected


def test_columns_by_themselves(tmp_path: Path) -> None:
    tensors = made()
    expected = written(tmp_path / "whole", tensors, list(tensors))
    (tmp_path / "columns").mkdir()
    shards = Shards(str(tmp_path / "columns"), entries_of(tensors))
    flat = 0
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            shards.write(name, tensor, dimension=1)
            continue
        flat += 1
        for start in reversed(range(0, tensor.shape[1], 2)):
            shards.write(name, tensor[:, start : start + 2], start, dimension=1)
    assert flat
    shards.finish()
    assert digests(tmp_path / "columns") == expected


def test_a_copy_is_the_source(checkpoint: Any, tmp_path: Path) -> None:
    source = open_source(str(checkpoint("qwen3_5_moe")))
    shards = Shards(str(tmp_path), [Entry(name, source.dtype(name), source.shape(name)) for name in source.names()])
    for name in source.names():
        shards.copy(name, source)
    shards.finish()
    expected = load_file(f"{source.folder}/model.safetensors")
    found = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    shards = Shards(str(tmp_path), [Entry("a", "BF16", (4, 2))])
    right = torch.zeros(4, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="b is not among the tensors that were announced"):
        shards.write("b", right)
    for wrong, start in ((right.float(), 0), (right.T.contiguous(), 0), (right, 1), (right[0], 0)):
        with pytest.raises(ValueError, match=r"a was announced as BF16 \[4, 2\]"):
            shards.write("a", wrong, start)
    for wrong, start in ((right, 1), (right[:3], 0), (right[:, :1].float(), 0)):
        with pytest.raises(ValueError, match=r"a was announced as BF16 \[4, 2\].* from column"):
            shards.write("a", wrong, start, dimension=1)
    with pytest.raises(ValueError, match="a is announced twice"):
        Shards(str(tmp_path), [Entry("a", "BF16", (4, 2)), Entry("a", "F32", (4, 2))])
