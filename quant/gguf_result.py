"""What a run makes, as one GGUF file in a folder of its own: `folder_result.py` for llama.cpp.

Whatever is not quantized keeps the dtype of the source, or is F32 where llama.cpp wants that. Vision is in no such
file (llama.cpp keeps it in another one), tokenizer and configuration are in its header.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..profiles.errors import BadInput, Unsupported
from .gguf_file import GgufFile, Stored, place_tensors
from .gguf_matrix import GgufMatrix
from .gguf_names import Piece, column_order, converted, pieces, row_order
from .modules import Module
from .output import Output
from .quantized import Scheme
from .shards import Entry
from .solve import Solved
from .source import Source


class GgufResult:
    """modules: those that `schemes` quantizes. `Unsupported` where a matrix does not fall into blocks."""

    scale_dtype = torch.float16

    def __init__(self, source: Source, modules: Sequence[Module], schemes: Mapping[str, Scheme]) -> None:
        self.source, self.schemes, self.modules = source, schemes, modules
        self.taken = {module.tensor for module in modules}
        self._pieces = pieces(source)
        by_source: dict[str, list[Piece]] = {}
        for piece in self._pieces:
            by_source.setdefault(piece.source, []).append(piece)
        self._places = {module.name: _place(module, by_source) for module in modules}
        self._kinds = {self._places[name].name: str(scheme.kind) for name, scheme in schemes.items()}
        self.tensors: dict[str, Stored] = place_tensors(self._pieces, source, self._kinds)
        found = ((module.name, column_order(module.tensor, source.model)) for module in modules)
        self.orders = {name: order for name, order in found if order is not None}
        self._file: GgufFile | None = None

    @property
    def total_bytes(self) -> int:
        """Of all tensors, without header and padding."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def quantized_bytes(self) -> int:
        """Of the quantized matrices alone."""
        return sum(self.tensors[name].bytes for name in self._kinds)

    def entries(self) -> Iterator[Entry]:
        """Every tensor: name, type, shape."""
        for name, stored in self.tensors.items():
            yield Entry(name, stored.kind, stored.shape)

    def quantization_config(self) -> None:
        """There is no config.json: everything is in the file."""

    def open(self, output: Output) -> None:
        """Takes the room on the disk, or goes on in the file of an interrupted run."""
        path = os.path.join(output.folder, f"{os.path.basename(output.target)}.gguf")
        self._file = GgufFile(path, self.source, self._kinds, resume=output.resumed)

    def copy(self) -> None:
        """Everything that is not quantized."""
        for piece in self._pieces:
            if piece.name not in self._kinds:
                self._open.convert(piece)

    def write(self, module: Module, solved: Solved, first_row: int = 0) -> None:
        """A solved module, or rows of it from `first_row` on where rows keep their order."""
        if not isinstance(solved.weight, GgufMatrix):
            raise ValueError(f"{module.name} is not encoded for GGUF")
        blocks, order = solved.weight.blocks, row_order(module.tensor, self.source.model)
        if order is not None:
            blocks = blocks[order]
        before = (module.expert or 0) * module.rows
        self._open.write(self._places[module.name].name, blocks, before + first_row)

    def row_blocks(self, module: Module) -> Iterator[slice]:
        """Rows that may be rounded and written on their own."""
        if module.expert is not None or row_order(module.tensor, self.source.model) is not None:
            yield slice(0, module.rows)
        else:
            yield from self.source.row_blocks(module.tensor)

    def write_plain(self, name: str, tensor: Tensor) -> None:
        """A tensor that is not quantized, under its name in the source."""
        for piece in self._pieces:
            if piece.source == name:
                self._open.write(piece.name, converted(piece, tensor, self.source.model))

    def sync(self) -> None:
        """Waits until everything written so far is on the disk."""
        self._open.sync()

    def finish(self) -> None:
        """What makes the file load: its header."""
        self._open.finish()

    def close(self) -> None:
        """Leaves the file as it is, for --resume."""
        if self._file:
            self._file.close()

    @property
    def _open(self) -> GgufFile:
        if self._file is None:
            raise ValueError("the result is not open")
        return self._file


def _place(module: Module, by_source: Mapping[str, Sequence[Piece]]) -> Piece:
    for piece in by_source.get(module.tensor, ()):
        if piece.rows is None or piece.rows.start == module.first_row:
            if not piece.is_matrix:
                raise Unsupported(f"{module.name} is kept as F32 in GGUF files: keep it with a rule")
            return piece
    raise BadInput(f"{module.name} has no place in a GGUF file; take another format")
