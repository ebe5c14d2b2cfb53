"""A checkpoint to quantize: a local folder, one in the hub's cache, or one that is downloaded into that cache.

    source = open_source("Qwen/Qwen3.5-9B")            # headers and config.json only
    source.names(), source.shape(name), source.dtype(name)
    source.tensor(name)                                # the whole tensor, or rows=slice(0, 1024) of its first dimension
    for rows in source.row_blocks(name): ...

Files are opened for reading only, and read by position, a tensor or some rows of it at a time: nothing is mapped and no
shard is held in memory. Headers are checked by `profiles/checkpoint.py` (index, missing and foreign files, truncated
shards), weights here: what is not finite is refused by name. Pickles are neither opened nor downloaded.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout.checkpoint import DTYPES, FLOATS
from ..profiles.checkpoint import StoredTensor, read_folder, stored_tensors
from ..profiles.errors import BadInput, Unsupported
from ..profiles.json_file import read_json_object, short
from ..profiles.model import Model
from .hub import hub_folder
from .uncached import read_once

BLOCK_BYTES = 16 << 20
# Sign and exponent aside, what is not finite has all exponent bits set: (integer of the same width, exponent mask).
_EXPONENTS = {"BF16": (torch.int16, 0x7F80), "F16": (torch.int16, 0x7C00), "F32": (torch.int32, 0x7F800000)}


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """An unquantized checkpoint. `model` has its dimensions, `config` is config.json as it stands."""

    folder: str
    config: Mapping[str, Any]
    model: Model
    tensors: Mapping[str, StoredTensor]

    def names(self) -> tuple[str, ...]:
        """All tensors, as the files name them, in the order of the files."""
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """As safetensors names it: BF16, F16 or F32."""
        return self.tensors[name].dtype

    def bytes(self, name: str) -> int:
        return self.tensors[name].bytes

    def tensor(self, name: str, rows: slice | None = None, *, is_checked: bool = True) -> Tensor:
        """The tensor as it is stored, or those rows (without a step) of its first dimension.

        `BadInput` where the file ends before it, and where it holds NaN or infinity, naming the tensor. is_checked
        False: the reader looks for these himself.
        """
        place = self.tensors[name]
        if rows is not None:
            start, stop, _ = rows.indices(place.shape[0])
            row_bytes = place.bytes // max(place.shape[0], 1)
            place = place._replace(
                offset_bytes=place.offset_bytes + start * row_bytes,
                bytes=max(stop - start, 0) * row_bytes,
                shape=(max(stop - start, 0), *place.shape[1:]),
            )
        try:
            tensor = read_once(place)
        except ValueError as error:
            raise BadInput(f"{error} ({short(name)}); the source changed while it was read") from error
        if is_checked:
            self._refuse_infinite(name, tensor)
        return tensor

    def row_blocks(self, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
        """The first dimension in slices that take `block_bytes` or less, or one row where that takes more."""
        shape = self.shape(name)
        rows = shape[0] if shape else 1
        step = max(1, block_bytes * rows // max(self.bytes(name), 1))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def fingerprint(self) -> str:
        """Hex digest of what the result depends on: names, sizes, times and headers of shards, config, tokenizer.

        Weights are not read, so it takes milliseconds. A resumed run compares it: another one means another source.
        """
        digest = hashlib.sha256()
        beside = [os.path.join(self.folder, name) for name in ("config.json", "tokenizer.json")]
        paths = [path for path in beside if os.path.exists(path)]
        for path in (*paths, *sorted({place.path for place in self.tensors.values()})):
            try:
                with open(path, "rb") as file:
                    status = os.fstat(file.fileno())
                    whole_bytes = status.st_size
                    if path.endswith(".safetensors"):
                        whole_bytes = int.from_bytes(file.read(8), "little")
                    head = file.read(whole_bytes)
            except OSError as error:
                raise BadInput(f"{path} cannot be read: {error.strerror}") from error
            digest.update(f"{os.path.basename(path)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            digest.update(hashlib.sha256(head).digest())
        return digest.hexdigest()

    def _refuse_infinite(self, name: str, tensor: Tensor) -> None:
        # A sum is finite only where all its terms are (and may overflow where they are): one pass, the fastest one.
        if tensor.sum().isfinite():
            return
        integer, mask = _EXPONENTS[self.tensors[name].dtype]
        for part in tensor.view(-1).view(integer).split(1 << 18):
            if bool(((part & mask) == mask).any()):
                raise BadInput(
                    f"{self.tensors[name].path}: tensor {short(name)} holds NaN or infinity; "
                    "the checkpoint is damaged, download it anew"
                )


def open_source(text: str, revision: str | None = None) -> Source:
    """The checkpoint that `text` names: a folder, or a repository on the hub (`Qwen/Qwen3.5-9B`, or `9b`).

    A repository is taken from the hub's cache where it is complete there, else downloaded (huggingface_hub, which
    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE direct). `BadInput` for damaged files; `Unsupported` for what is quantized
    already, GGUF, pickles and other architectures; `UnknownName` for what is neither a folder nor on the hub.
    """
    folder = os.path.abspath(text) if os.path.isdir(text) else hub_folder(text, revision)
    model = read_folder(folder)
    tensors = stored_tensors(folder)
    if not tensors:
        raise BadInput(f"{folder} has no weights; finish the download")
    config = read_json_object(os.path.join(folder, "config.json"))
    if model.quantization is not None:
        raise Unsupported(
            f"{folder} is quantized already ({short(model.quantization.get('method'))}); "
            "give the checkpoint that it was made from"
        )
    for name, place in tensors.items():
        if place.dtype not in FLOATS or place.dtype not in DTYPES:
            raise Unsupported(
                f"{place.path}: tensor {short(name)} is stored as {place.dtype}; qwen-quant takes {', '.join(FLOATS)}"
            )
        if not prod(place.shape):
            raise BadInput(f"{place.path}: tensor {short(name)} is empty")
    return Source(folder, config, model, tensors)
