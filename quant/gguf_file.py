"""A whole Qwen3.5 text model as one GGUF file, written in any order.

    file = GgufFile(path, source, kinds)                 # kinds: GGUF name -> Q4_K, ...; others stay BF16 or F32
    for piece in file.pieces: file.convert(piece)        # rounded to nearest; or, where a solver chose the codes:
    file.write("blk.0.ffn_up.weight", matrix.blocks)     # `gguf_matrix.py`
    file.finish()

The `gguf` package (an extra) writes the container's header; data is placed by its rules, 32 bytes aligned. Metadata
follow llama.cpp b11434 `conversion/base.py` (TextModel.set_gguf_parameters) and `conversion/qwen.py`
(Qwen3NextModel and _Qwen35MRopeMixin, set_gguf_parameters).
"""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..profiles.errors import Unsupported
from ..profiles.ggml import GGML_TYPE_IDS, GGML_TYPES
from ..profiles.model import Model
from .gguf_blocks import KINDS, encode, row_bytes
from .gguf_names import Piece, converted, pieces
from .gguf_vocabulary import add_vocabulary
from .placed_file import PlacedFile
from .source import Source

if TYPE_CHECKING:
    from gguf import GGUFWriter

ALIGNMENT = 32
_ARCHITECTURES = {"qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# llama.cpp's names for a file by what most of it is (`llama.h`, llama_ftype); mixtures with Q6_K are called Q4_K_M.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14, "Q4_K_M": 15, "Q6_K": 18, "BF16": 32}


class Stored(NamedTuple):
    """A tensor of the file: its type, its shape with the row length last, and where it begins after the header."""

    kind: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def row_bytes(self) -> int:
        block, size = GGML_TYPES[self.kind]
        return self.shape[-1] // block * size

    @property
    def bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


class GgufFile:
    """The file at `path`. ValueError for a tensor that is not in it, or not as announced."""

    def __init__(self, path: str, source: Source, kinds: Mapping[str, str], resume: bool = False) -> None:
        """kinds: GGUF name -> one of `KINDS`, F16, BF16 or F32, for matrices; without an entry a matrix keeps the dtype
        of the source. `Unsupported` where rows are no whole number of blocks, and without the gguf package.
        """
        self.source, self.pieces = source, pieces(source)
        self.tensors = place_tensors(self.pieces, source, kinds)
        self._header = _header(source, self.tensors)
        last = list(self.tensors.values())[-1]
        size_bytes = len(self._header) + last.offset_bytes + _aligned(last.bytes)
        self._file = PlacedFile(path, size_bytes, len(self._header), resume)

    @property
    def total_bytes(self) -> int:
        """Of all tensors, without padding and header."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Rows of a tensor from row `start` on (rows of a stack count through): blocks uint8 [n, row_bytes] where it is
        quantized, else numbers of any float dtype [..., row length]. Threads may write at once.
        """
        stored = self.tensors[name]
        if stored.kind in KINDS:
            if data.dtype != torch.uint8 or data.shape[-1] != stored.row_bytes:
                raise ValueError(f"{name} is stored as {stored.kind}: give it blocks of {stored.row_bytes} bytes a row")
        else:
            if data.shape[-1] != stored.shape[-1]:
                raise ValueError(f"{name} has rows of {stored.shape[-1]}, not of {data.shape[-1]}")
            data = data.to(_DTYPES[stored.kind])
        raw = data.detach().cpu().contiguous().view(-1).view(torch.uint8)
        if start * stored.row_bytes + raw.numel() > stored.bytes:
            raise ValueError(f"{name} has {prod(stored.shape[:-1])} rows, fewer than {start} and those given")
        offset = len(self._header) + stored.offset_bytes + start * stored.row_bytes
        self._file.write(offset, raw.numpy().data)

    def convert(self, piece: Piece, importance: Tensor | None = None) -> None:
        """Reads a piece from the source, converts it and writes it, rounded to nearest where it is quantized.

        A few ten MB at a time where rows stay in order (the embedding), a matrix at a time otherwise.
        importance: as for `gguf_blocks.encode`, in the order of the GGUF file.
        """
        rows = prod(piece.shape[-2:-1])
        if piece.source.endswith(("embed_tokens.weight", "lm_head.weight")):
            for block in self.source.row_blocks(piece.source):
                self._write_part(piece, self.source.tensor(piece.source, block), block.start, importance)
        elif len(piece.shape) == 3 and piece.expert is None:
            for expert in range(piece.shape[0]):
                matrix = self.source.tensor(piece.source, slice(expert, expert + 1))[0]
                self._write_part(piece, matrix, expert * rows, importance)
        else:
            start = 0 if piece.expert is None else piece.expert * rows
            self._write_part(piece, self.source.tensor(piece.source), start, importance)

    def _write_part(self, piece: Piece, tensor: Tensor, start: int, importance: Tensor | None) -> None:
        numbers = converted(piece, tensor, self.source.model)
        kind = self.tensors[piece.name].kind
        self.write(piece.name, encode(numbers, kind, importance) if kind in KINDS else numbers, start)

    def sync(self) -> None:
        """Waits until everything written so far is on the disk."""
        self._file.sync()

    def finish(self) -> None:
        """Writes the header; the file is closed."""
        self._file.finish(self._header)

    def close(self) -> None:
        """Leaves everything as it is, for a later run with `resume`."""
        self._file.close()


def place_tensors(found: tuple[Piece, ...], source: Source, kinds: Mapping[str, str]) -> dict[str, Stored]:
    """Name -> type, shape and place of every tensor, in the order of the file; errors as of `GgufFile`."""
    unknown = set(kinds) - {piece.name for piece in found}
    if unknown:
        raise ValueError(f"{min(unknown)} is no tensor of this model's GGUF file")
    placed: dict[str, Stored] = {}
    position = 0
    for piece in found:
        if piece.name in placed:
            continue
        kind = kinds.get(piece.name, source.dtype(piece.source)) if piece.is_matrix else "F32"
        if kind in KINDS:
            try:
                row_bytes(kind, piece.shape[-1])
            except ValueError as error:
                raise Unsupported(f"{piece.name}: {error}; take Q8_0 or Q4_0 for it") from error
        placed[piece.name] = Stored(kind, piece.shape, position)
        position += _aligned(placed[piece.name].bytes)
    return placed


def draft_gguf(path: str, source: Source, tensors: Mapping[str, Stored]) -> None:
    """A file with a header, but for the vocabulary, and a hole in place of data: for those who read headers only."""
    header = _header(source, tensors, with_vocabulary=False)
    last = list(tensors.values())[-1]
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + last.offset_bytes + _aligned(last.bytes))


def _header(source: Source, tensors: Mapping[str, Stored], with_vocabulary: bool = True) -> bytes:
    """Everything before the data, padded to the alignment."""
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise Unsupported("GGUF files are written with the gguf package, which is missing: pip install gguf") from error
    import numpy

    ids = {name: number for number, name in GGML_TYPE_IDS.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "header")
        writer = GGUFWriter(path, _ARCHITECTURES[source.model.architecture])
        _add_model(writer, source, tensors)
        if with_vocabulary:
            add_vocabulary(writer, source.folder, source.model.vocab_size)
        for name, stored in tensors.items():
            kind = GGMLQuantizationType(ids[stored.kind])
            # The dtype is looked at only where no raw one is given, and bytes would be taken for blocks.
            writer.add_tensor_info(name, stored.shape, numpy.dtype("float32"), stored.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(path, "rb") as file:
            header = file.read()
    return header + bytes(-len(header) % ALIGNMENT)


def _add_model(writer: "GGUFWriter", source: Source, tensors: Mapping[str, Stored]) -> None:
    model = source.model
    prediction_layers = model.mtp_num_hidden_layers
    writer.add_type("model")
    writer.add_name(os.path.basename(model.name))
    writer.add_quantized_by("qwenfit")
    writer.add_block_count(model.num_layers + prediction_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    if model.intermediate_size:
        writer.add_feed_forward_length(model.intermediate_size)
    if model.num_experts:
        writer.add_expert_count(model.num_experts)
        writer.add_expert_used_count(model.num_experts_per_tok)
        writer.add_expert_feed_forward_length(model.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(model.shared_expert_intermediate_size)
    text: Mapping[str, Any] = source.config.get("text_config", source.config)
    writer.add_layer_norm_rms_eps(float(text.get("rms_norm_eps", 1e-6)))
    _add_rope(writer, model, text)
    writer.add_ssm_conv_kernel(model.linear_conv_kernel_dim)
    writer.add_ssm_state_size(model.linear_key_head_dim)
    writer.add_ssm_group_count(model.linear_num_key_heads)
    writer.add_ssm_time_step_rank(model.linear_num_value_heads)
    writer.add_ssm_inner_size(model.linear_num_value_heads * model.linear_value_head_dim)
    recurrent = [kind == "linear_attention" for kind in model.layer_types] + [False] * prediction_layers
    writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)
    writer.add_full_attention_interval(recurrent.index(False) + 1 if False in recurrent else model.num_layers)
    if prediction_layers:
        writer.add_nextn_predict_layers(prediction_layers)
    writer.add_file_type(_file_type(tensors))
    writer.add_quantization_version(2)


def _add_rope(writer: "GGUFWriter", model: Model, text: Mapping[str, Any]) -> None:
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    writer.add_rope_freq_base(float(rope.get("rope_theta", text.get("rope_theta", 1e7))))
    partial = float(rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25)))
    writer.add_rope_dimension_count(int(model.head_dim * partial))
    sections = [*rope.get("mrope_section", (11, 11, 10)), 0, 0, 0, 0][:4]
    writer.add_rope_dimension_sections(sections)
    if rope.get("rope_type") == "yarn":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def _file_type(tensors: Mapping[str, Stored]) -> int:
    weights: Counter[str] = Counter()
    for stored in tensors.values():
        weights[stored.kind] += prod(stored.shape)
    main = weights.most_common(1)[0][0]
    return _FILE_TYPES["Q4_K_M" if main == "Q4_K" and weights["Q6_K"] else main]


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
