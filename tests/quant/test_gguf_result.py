"""`quantize` into one GGUF file: every matrix stands for the source's, heads in llama.cpp's order, the same bytes after
an interruption; llama.cpp itself is in test_loaders.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.quant import Recipe, Rule, quantize
from qwenfit.quant.gguf_names import converted, pieces
from qwenfit.quant.inspection import inspect
from qwenfit.quant.pipeline import sizes
from qwenfit.quant.source import open_source

gguf = pytest.importorskip("gguf", reason="GGUF files are written with it: pip install gguf")
Checkpoint = Callable[..., Path]
# The largest relative square error of a matrix of random numbers by its codes (heads in a wrong order: about 2).
LIMITS = {"Q4_0": 0.05, "Q4_1": 0.05, "Q4_K": 0.05, "Q6_K": 2e-3, "Q8_0": 1e-4}


def small(**changes: Any) -> Recipe:
    return Recipe(**{"format": "gguf", "tokens": 128, "sequence_tokens": 64, **changes})


def matrices(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """GGUF name -> (type, numbers)."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        found[tensor.name] = (tensor.tensor_type.name, numbers.view([int(n) for n in reversed(tensor.shape)]))
    return found


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("kind", ["Q4_K", "Q4_0"])
def test_what_is_written_stands_for_the_source(
    checkpoint: Checkpoint, tmp_path: Path, name: str, method: str, kind: str
) -> None:
    folder = checkpoint(name, is_wide=True)
    rules = (Rule(r"\.1\..*down_proj$", 8),)
    # Full-precision targets would move the weights from what the source has: at 8 bits by as much as rounding does.
    recipe = small(gguf_type=kind, method=method, embeddings=6, modules=rules, full_precision_targets=False)
    summary = quantize(str(folder), str(tmp_path / "out"), recipe)
    found, source = matrices(tmp_path / "out" / "out.gguf"), open_source(str(folder))
    kinds = set()
    for piece in pieces(source):
        stored, numbers = found[piece.name]
        expected = converted(piece, source.tensor(piece.source), source.model).float()
        numbers = numbers if piece.expert is None else numbers[piece.expert]
        error = float((numbers - expected).square().sum() / expected.square().sum().clamp(min=1e-12))
        assert error <= LIMITS.get(stored, 0.0), (piece, stored, error)
        kinds.add(stored)
    assert kinds == {kind, "Q6_K", "Q8_0", "F32", "BF16"} and found["token_embd.weight"][0] == "Q6_K"
    assert found["blk.1.ffn_down_exps.weight" if "moe" in name else "blk.1.ffn_down.weight"][0] == "Q8_0"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "out.gguf", "recipe.yaml"]
    assert summary.bytes == inspect(summary.target).bytes == sizes(str(folder), recipe).bytes
    assert all((one.error is None) == (one.method == "rtn") for one in summary.results)


def test_the_same_bytes_after_an_interruption(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = str(checkpoint("qwen3_5", is_wide=True))
    quantize(folder, str(tmp_path / "whole"), small())
    seen = 0

    def watch(progress: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, str(tmp_path / "cut"), small(), watch=watch)
    assert not (tmp_path / "cut").exists()
    assert quantize(folder, str(tmp_path / "cut"), small(), resume=True).resumed
    whole = (tmp_path / "whole" / "whole.gguf").read_bytes()
    assert (tmp_path / "cut" / "cut.gguf").read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"method": "awq"}, Unsupported, "GGUF files take gptq"),
        ({"activation_bits": 8}, Unsupported, "W8A8 is for"),
        ({"format": "gptq", "gguf_type": "Q4_0"}, Unsupported, "add --format gguf"),
        ({"format": "gptq", "lm_head": 6}, Unsupported, "6 bits are for --format gguf"),
        ({"format": "gptq", "embeddings": 8}, Unsupported, "--embeddings is for gguf"),
    ],
)
def test_what_no_file_holds_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, Any], error: type, sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        quantize(str(checkpoint("qwen3_5", is_wide=True)), str(tmp_path / "out"), small(**changes))


def test_narrow_rows_are_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises((Unsupported, BadInput), match=r"blk\.0.*take Q8_0 or Q4_0"):
        quantize(str(checkpoint("qwen3_5")), str(tmp_path / "out"), small())
