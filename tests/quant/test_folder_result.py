"""What a folder will hold is known beforehand, and does not depend on how many rows are rounded at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qwenfit.profiles.checkpoint import stored_tensors
from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.quant import Recipe, folder_result, quantize
from qwenfit.quant.layout import lay_out
from qwenfit.quant.modules import Module
from qwenfit.quant.pipeline import sizes
from qwenfit.quant.source import open_source

UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(bits=8, group_size=32, lm_head=8),
        Recipe(group_size=32, method="rtn", lm_head=4, symmetric=False),
        Recipe(group_size=32, method="rtn", lm_head=8, format="gptq"),
        Recipe(group_size=32, method="rtn", lm_head=4, format="awq", symmetric=False),
    ],
    ids=["int8", "int4 asymmetric", "gptq", "awq"],
)
def test_a_head_in_pieces_is_the_whole_head(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    folder = str(checkpoint("qwen3_5", **UNTIED))
    quantize(folder, str(tmp_path / "whole"), recipe)
    for name in ("BLOCK_BYTES", "STRIDED_BLOCK_BYTES"):
        monkeypatch.setattr(folder_result, name, 9000)  # 35 rows of 128 columns, of which 32 are taken
    quantize(folder, str(tmp_path / "pieces"), recipe)
    whole, pieces = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("whole", "pieces")
    )
    assert whole == pieces
    rows = list(lay_out(open_source(folder), recipe).result.row_blocks(_head(folder, recipe)))
    assert len(rows) == 16


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_entries_are_what_is_written(checkpoint: Callable[..., Path], tmp_path: Path, form: str) -> None:
    folder = str(checkpoint("qwen3_5_moe"))
    recipe = Recipe(group_size=32, method="rtn", format=form, symmetric=form != "awq")
    result = lay_out(open_source(folder), recipe).result
    summary = quantize(folder, str(tmp_path / "out"), recipe)
    written = {name: (tensor.dtype, tensor.shape) for name, tensor in stored_tensors(summary.target).items()}
    assert {entry.name: (entry.dtype, entry.shape) for entry in result.entries()} == written
    assert (
        result.total_bytes == summary.bytes == sum(tensor.bytes for tensor in stored_tensors(summary.target).values())
    )


def test_what_a_format_has_no_words_for_is_refused_beforehand(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """8 bits are symmetric, and `sym` of a GPTQ checkpoint is said once: a dry run refuses it as a run does."""
    source = str(checkpoint("qwen3_5_moe"))
    recipe = Recipe(group_size=32, symmetric=False, method="rtn", format="gptq", shared_experts=8)
    for refused in (lambda: sizes(source, recipe), lambda: quantize(source, str(tmp_path / "out"), recipe)):
        with pytest.raises(Unsupported, match="symmetric or asymmetric as a whole: take compressed-tensors"):
            refused()
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_store_is_named(checkpoint: Callable[..., Path]) -> None:
    source = open_source(str(checkpoint("qwen3_5", intermediate_size=100)))
    recipe = Recipe(group_size=-1, method="rtn", format="gptq")
    with pytest.raises(BadInput, match=r"mlp\.\w+_proj: a matrix of .* cannot be stored as GPTQ.*keep it with a rule"):
        lay_out(source, recipe)


def _head(folder: str, recipe: Recipe) -> Module:
    return next(module for module in lay_out(open_source(folder), recipe).modules if module.part == "lm_head")
