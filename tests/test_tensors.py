"""The tensor lists are those of the published checkpoints: names, shapes, dtypes, counts, and sizes to the byte.

`data/tensor_lists.json` and `data/published_sizes.json` say where their figures come from.
"""

import json
from pathlib import Path

import pytest

from qwenfit.profiles.model_catalog import model
from qwenfit.profiles.tensors import layer_kinds

DATA = Path(__file__).parent / "data"
LISTS = json.loads((DATA / "tensor_lists.json").read_text())["models"]
PUBLISHED = json.loads((DATA / "published_sizes.json").read_text())["models"]


@pytest.mark.parametrize("name", LISTS)
def test_tensors_are_those_of_the_checkpoint(name):
    def extract_name(tensor):
        layer = "0" if tensor.part == "mtp" else "N"
        return tensor.name.replace("{layer}", layer).replace("{expert}", "N")

    ours = sorted(
        (extract_name(tensor), list(tensor.shape), tensor.dtype, tensor.count) for tensor in model(name).tensors
    )
    assert ours == sorted(map(tuple, LISTS[name]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    published, found = PUBLISHED[name], model(name)
    assert found.checkpoint_bytes == (published["total_size"] or found.checkpoint_bytes)
    assert found.parameters == (published["parameters"] or found.parameters)
    assert sum(tensor.count for tensor in found.tensors) == (published["tensors"] or len(list(found.expanded())))


def test_releases_without_a_published_total_are_all_bf16():
    """Qwen3.6-27B has the shapes of Qwen3.8-27B, whose total_size is 55562855904: two bytes for every parameter."""
    assert model("qwen3.6-27b").checkpoint_bytes == 55562855904
    assert model("qwen3-next-80b").checkpoint_bytes == 2 * 81324862720


def test_vision_towers_as_published():
    """456,010,480 parameters at 397B (audit of its shard headers); 27B's tower is as deep and ends in its hidden
    size.
    """
    counts = {
        name: sum(tensor.elements * tensor.count for tensor in model(name).tensors if tensor.part == "vision")
        for name in ("0.8b", "397b", "27b", "qwen3-next-80b")
    }
    assert counts == {"0.8b": 100592896, "397b": 456010480, "27b": 460730096, "qwen3-next-80b": 0}


def test_multi_token_prediction_as_published():
    """6,595,568,128 parameters at 397B (audit of its shard headers), 15 tensors in a dense model, 1553 with 512
    experts.
    """
    found = {
        name: [tensor for tensor in model(name).tensors if tensor.part == "mtp"]
        for name in ("9b", "397b", "qwen3.6-35b-a3b", "qwen3-next-80b")
    }
    assert sum(tensor.elements * tensor.count for tensor in found["397b"]) == 6595568128
    counts = {name: sum(tensor.count for tensor in tensors) for name, tensors in found.items()}
    assert counts == {"9b": 15, "397b": 1553, "qwen3.6-35b-a3b": 19, "qwen3-next-80b": 1553}


def test_qwen3_next_stores_fused_projections_and_single_experts():
    tensors = {tensor.name: tensor for tensor in model("qwen3-next-80b").tensors}
    assert tensors["model.layers.{layer}.linear_attn.in_proj_qkvz.weight"].shape == (12288, 2048)
    assert tensors["model.layers.{layer}.linear_attn.in_proj_ba.weight"].shape == (64, 2048)
    expert = tensors["model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
    assert (expert.shape, expert.count) == ((512, 2048), 48 * 512)
    assert not [name for name in tensors if "in_proj_z" in name or "visual" in name]


def test_layer_kinds():
    assert layer_kinds(8, 4) == (*["linear_attention"] * 3, "full_attention") * 2
    assert layer_kinds(2, 2) == ("linear_attention", "full_attention")
    assert layer_kinds(3, 1) == ("full_attention",) * 3
