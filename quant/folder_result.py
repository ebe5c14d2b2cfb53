"""What a run makes, as a folder of safetensors: which tensors, and where solved modules go.

`gguf_result.py` is the same for one GGUF file; `pipeline.py` takes either.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..profiles.errors import BadInput, Unsupported
from . import awq_file, compressed_tensors_file, gptq_file
from .modules import Module
from .output import Output
from .quantized import Quantized, Scheme
from .shards import Entry, Shards
from .solve import Solved
from .source import Source

BLOCK_BYTES = 16 << 20
"""Of weights in 16 bits that are rounded at a time: several tasks for each thread, and small enough that the allocator
hands the same pages out again (the system zeroes fresh ones, a third of all CPU time with 64 MB)."""
STRIDED_BLOCK_BYTES = 128 << 20
"""The same where a format stores the rows of a matrix as columns (ROWS_DIMENSION): each block is written in as many
pieces as there are words in a row, so only a head is worth it."""
FILES: dict[str, Any] = {"compressed-tensors": compressed_tensors_file, "gptq": gptq_file, "awq": awq_file}


class FolderResult:
    """format: a name of `FILES`. modules: those that `schemes` quantizes. `BadInput` for a module that the format
    cannot store."""

    orders: Mapping[str, Tensor] = {}

    def __init__(self, source: Source, format: str, modules: Sequence[Module], schemes: Mapping[str, Scheme]) -> None:
        self.source, self.schemes, self.modules = source, schemes, modules
        self.file = FILES[format]
        self.scale_dtype = self.file.SCALE_DTYPE
        self.taken = {module.tensor for module in modules}
        self._parts = {module.name: tuple(self._module_entries(module)) for module in modules}
        self._shards: Shards | None = None

    @property
    def total_bytes(self) -> int:
        """Of all tensors: total_size of the index."""
        return sum(entry.bytes for entry in self.entries())

    @property
    def quantized_bytes(self) -> int:
        """Of the quantized modules alone."""
        return sum(entry.bytes for part in self._parts.values() for entry in part)

    def entries(self) -> Iterator[Entry]:
        """Every tensor, in the order of the source."""
        modules: dict[str, list[Module]] = {}
        for module in self.modules:
            modules.setdefault(module.tensor, []).append(module)
        for name in self.source.names():
            if name not in modules:
                yield Entry(name, self.source.dtype(name), self.source.shape(name))
            for module in modules.get(name, ()):
                yield from self._parts[module.name]

    def kept(self) -> list[str]:
        """Every matrix that stays as it is, without `.weight`."""
        plain = (name for name in self.source.names() if name.endswith(".weight") and name not in self.taken)
        return [name.removesuffix(".weight") for name in plain if len(self.source.shape(name)) == 2]

    def quantization_config(self) -> dict[str, Any]:
        """The block of config.json. `Unsupported` for schemes that the format has no words for."""
        try:
            return self.file.quantization_config(self.schemes, self.kept())
        except ValueError as error:
            raise Unsupported(str(error)) from error

    def open(self, output: Output) -> None:
        """Takes the room on the disk, or goes on in the files of an interrupted run."""
        self._shards = Shards(output.folder, self.entries(), resume=output.resumed)

    def copy(self) -> None:
        """Everything that is not quantized."""
        for name in self.source.names():
            if name not in self.taken:
                self._open.copy(name, self.source)

    def write(self, module: Module, solved: Solved, first_row: int = 0) -> None:
        """A solved module, or rows of it from `first_row` on, a multiple of 8."""
        if not isinstance(solved.weight, Quantized):
            raise ValueError(f"{module.name} is encoded for GGUF")
        scheme = self.schemes[module.name]
        extra = {"activation_bits": scheme.activation_bits} if scheme.activation_bits else {}
        dimension = self.file.ROWS_DIMENSION
        tensors = self.file.module_tensors(solved.weight, **extra)
        for name, _, shape in self._parts[module.name]:
            tensor = tensors[name.removeprefix(f"{module.name}.")]
            if name.endswith("weight_shape"):
                self._open.write(name, tensor.new_tensor([module.rows, module.columns]))
            else:  # zero points of several rows share a word; the order of columns has no rows
                start = first_row * shape[dimension] // module.rows if dimension < len(shape) else 0
                self._open.write(name, tensor, start, dimension)

    def row_blocks(self, module: Module) -> Iterator[slice]:
        """Rows that may be rounded and written on their own."""
        if module.expert is not None:
            yield slice(0, module.rows)
            return
        block_bytes = STRIDED_BLOCK_BYTES if self.file.ROWS_DIMENSION else BLOCK_BYTES
        step = max(8, block_bytes // (2 * module.columns) // 8 * 8)
        for start in range(0, module.rows, step):
            yield slice(start, min(start + step, module.rows))

    def write_plain(self, name: str, tensor: Tensor) -> None:
        """A tensor that is not quantized, under its name in the source."""
        self._open.write(name, tensor)

    def sync(self) -> None:
        """Waits until everything written so far is on the disk."""
        self._open.sync()

    def finish(self) -> None:
        """What makes the files load: headers and index."""
        self._open.finish()

    def close(self) -> None:
        """Leaves the files as they are, for --resume."""
        if self._shards:
            self._shards.close()

    @property
    def _open(self) -> Shards:
        if self._shards is None:
            raise ValueError("the result is not open")
        return self._shards

    def _module_entries(self, module: Module) -> Iterator[Entry]:
        try:
            parts = self.file.module_entries(module.rows, module.columns, self.schemes[module.name])
        except ValueError as error:
            raise BadInput(f"{module.name}: {error}; keep it with a rule, or take another format") from error
        for ending, part in parts.items():
            yield Entry(f"{module.name}.{ending}", *part)
