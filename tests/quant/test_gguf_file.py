"""A whole model as a GGUF file, read by the gguf package and by our own reader; llama.cpp is in test_loaders.py."""

import hashlib
import random
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.profiles.model_catalog import model
from qwenfit.quant.gguf_blocks import KINDS, decode, encode
from qwenfit.quant.gguf_file import ALIGNMENT, GgufFile
from qwenfit.quant.gguf_names import converted, pieces
from qwenfit.quant.source import open_source

FIELDS = [
    "architecture",
    "hidden_size",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "intermediate_size",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "mtp_num_hidden_layers",
    "max_position_embeddings",
    "tie_word_embeddings",
]
gguf = pytest.importorskip("gguf", reason="GGUF files are written with it: pip install gguf")


def kinds_of(source: Any, kind: str) -> dict[str, str]:
    return {piece.name: kind for piece in pieces(source) if piece.is_matrix and "norm" not in piece.name}


def written(path: Path, source: Any, kinds: dict[str, str], seed: int | None = None) -> GgufFile:
    file = GgufFile(str(path), source, kinds)
    order = list(file.pieces)
    if seed is not None:
        random.Random(seed).shuffle(order)
    for piece in order:
        file.convert(piece)
    file.finish()
    return file


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen3_5", "BF16"), ("qwen3_5", "Q4_K"), ("qwen3_5_moe", "F32"), ("qwen3_5_moe", "Q8_0")]
)
def test_tensors_are_the_converted_ones(name: str, kind: str, checkpoint: Any, tmp_path: Path) -> None:
    source = open_source(str(checkpoint(name, is_wide=kind == "Q4_K")))
    file = written(tmp_path / "a.gguf", source, kinds_of(source, kind))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert list(found) == list(file.tensors) and len(found) == len({piece.name for piece in file.pieces})
    for piece in file.pieces:
        expected = converted(piece, source.tensor(piece.source), source.model)
        tensor = found[piece.name]
        assert [int(size) for size in reversed(tensor.shape)] == list(piece.shape)
        assert tensor.tensor_type.name == (kind if piece.is_matrix else "F32")
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(piece.shape)
        if kind in KINDS and piece.is_matrix:
            flat = expected.reshape(-1, piece.shape[-1])
            expected = decode(encode(flat, kind), kind).view(expected.shape)
        assert torch.equal(numbers if piece.expert is None else numbers[piece.expert], expected.float()), piece


def test_metadata_is_the_models(checkpoint: Any, tmp_path: Path) -> None:
    """The planner's reader finds the same dimensions in the file as in the folder, and llama.cpp's keys are there."""
    for name in ("qwen3_5", "qwen3_5_moe"):
        source = open_source(str(checkpoint(name)))
        path = tmp_path / f"{name}.gguf"
        file = written(path, source, kinds_of(source, "Q8_0"))
        read, expected = model(str(path)), source.model
        for field in FIELDS:
            assert getattr(read, field) == getattr(expected, field), field
        fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
        architecture = {"qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe"}[name]
        assert fields[f"{architecture}.rope.dimension_sections"] == [4, 2, 2, 0]
        assert fields[f"{architecture}.rope.dimension_count"] == 16  # a quarter of 64
        assert fields[f"{architecture}.rope.freq_base"] == 1e7
        assert fields[f"{architecture}.attention.recurrent_layers"] == [True, True, True, False, False]
        assert fields[f"{architecture}.block_count"] == 5 and fields[f"{architecture}.nextn_predict_layers"] == 1
        assert fields[f"{architecture}.ssm.inner_size"] == 128 and fields["general.file_type"] == 7
        assert fields["tokenizer.ggml.pre"] == "qwen35" and fields["tokenizer.ggml.tokens"][260] == "Ġthe"
        assert file.total_bytes == sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)


def test_the_bytes_do_not_depend_on_the_order_or_on_interruptions(checkpoint: Any, tmp_path: Path) -> None:
    source = open_source(str(checkpoint("qwen3_5_moe")))
    kinds = kinds_of(source, "Q8_0")
    digests = set()
    for seed in (None, 1, 2):
        written(tmp_path / f"{seed}.gguf", source, kinds, seed)
        digests.add(hashlib.sha256((tmp_path / f"{seed}.gguf").read_bytes()).hexdigest())
    file = GgufFile(str(tmp_path / "cut.gguf"), source, kinds)
    for piece in file.pieces[:30]:
        file.convert(piece)
    file.close()
    with pytest.raises(BadInput, match="is no GGUF file"):
        model(str(tmp_path / "cut.gguf"))
    file = GgufFile(str(tmp_path / "cut.gguf"), source, kinds, resume=True)
    for piece in file.pieces[28:]:
        file.convert(piece)
    file.finish()
    digests.add(hashlib.sha256((tmp_path / "cut.gguf").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_blocks_go_in_as_they_are(checkpoint: Any, tmp_path: Path) -> None:
    source = open_source(str(checkpoint("qwen3_5_moe")))
    kinds = {"blk.0.ssm_out.weight": "Q4_0", "blk.1.ffn_up_exps.weight": "Q4_1"}
    file = GgufFile(str(tmp_path / "a.gguf"), source, kinds)
    expected = {}
    for piece in file.pieces:
        if piece.name not in kinds:
            file.convert(piece)
            continue
        matrix = converted(piece, source.tensor(piece.source), source.model)
        kind, blocks = kinds[piece.name], []
        for expert, part in enumerate(matrix if matrix.dim() == 3 else [matrix]):
            blocks.append(encode(part + 0.01, kind))
            file.write(piece.name, blocks[-1], expert * part.shape[0])
        expected[piece.name] = torch.cat(blocks)
    file.finish()
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        assert tensor.data_offset % ALIGNMENT == 0
        if tensor.name in kinds:
            assert torch.equal(
                torch.from_numpy(tensor.data.copy()).view(-1, expected[tensor.name].shape[1]), expected[tensor.name]
            )


def test_an_embedding_goes_through_in_pieces(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(checkpoint("qwen3_5", is_wide=True)))
    kinds = {"token_embd.weight": "Q6_K"}
    written(tmp_path / "whole.gguf", source, kinds)
    seen = []
    read = type(source).tensor

    def small(self: Any, name: str, rows: slice | None = None) -> Any:
        seen.append((name, rows))
        return read(self, name, rows)

    monkeypatch.setattr("qwenfit.quant.source.BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(type(source).row_blocks, "__defaults__", (1 << 14,))
    monkeypatch.setattr(type(source), "tensor", small)
    written(tmp_path / "pieces.gguf", source, kinds)
    assert len([name for name, rows in seen if name.endswith("embed_tokens.weight") and rows is not None]) == 16
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_what_does_not_fit_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    source = open_source(str(checkpoint("qwen3_5")))  # 128 wide
    with pytest.raises(
        Unsupported, match=r"attn_qkv.*: rows of 128 are no whole number of Q4_K blocks of 256; take Q8_0"
    ):
        GgufFile(str(tmp_path / "a"), source, {"blk.0.attn_qkv.weight": "Q4_K"})
    with pytest.raises(ValueError, match=r"blk\.9\.ffn_up\.weight is no tensor of this model"):
        GgufFile(str(tmp_path / "a"), source, {"blk.9.ffn_up.weight": "Q8_0"})
    file = GgufFile(str(tmp_path / "a"), source, {"blk.0.ffn_up.weight": "Q8_0"})
    rows = prod(file.tensors["blk.0.ffn_up.weight"].shape[:-1])
    with pytest.raises(ValueError, match="is stored as Q8_0: give it blocks of 136 bytes a row"):
        file.write("blk.0.ffn_up.weight", torch.zeros(rows, 128))
    with pytest.raises(ValueError, match="fewer than 1 and those given"):
        file.write("blk.0.ffn_up.weight", torch.zeros(rows, 136, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="has rows of 128, not of 64"):
        file.write("blk.1.ffn_up.weight", torch.zeros(rows, 64))
