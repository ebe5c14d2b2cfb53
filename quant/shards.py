"""safetensors shards of a checkpoint whose tensors are known beforehand, written in any order.

    shards = Shards(folder, entries)          # lays everything out and takes the room on the disk
    shards.write("lm_head.weight", tensor)    # or rows of it: start=1024
    shards.finish()                           # headers, and model.safetensors.index.json with total_size

The layout follows from `entries` alone, so the bytes do not depend on the order of writing, on threads or on
interruptions. Tensors go into shards in their order, up to 4.5 GB each; within a shard the wider dtypes stand first,
as the library has them, so that every tensor is aligned (safetensors 0.8 `tensor.rs`, prepare).
"""

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.layout.checkpoint import DTYPES
from .placed_file import PlacedFile, refuse
from .source import Source
from .tasks import one_ahead

SHARD_BYTES = 4_500_000_000
INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor of the result. dtype in safetensors' words: BF16, I32, ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Shards:
    """The files of a checkpoint in `folder`. ValueError for a tensor that is not announced, or not as announced."""

    def __init__(
        self, folder: str, entries: Iterable[Entry], shard_bytes: int = SHARD_BYTES, resume: bool = False
    ) -> None:
        self.folder = folder
        parts = _divided(entries, shard_bytes)
        self.files: dict[str, PlacedFile] = {}
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[Entry, str, int]] = {}
        for number, part in enumerate(parts, 1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            header, places = _laid_out(part)
            size_bytes = len(header) + sum(entry.bytes for entry in part)
            self.files[file] = PlacedFile(os.path.join(folder, file), size_bytes, len(header), resume)
            self._headers[file] = header
            self._places.update({entry.name: (entry, file, offset) for entry, offset in places})

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The tensors by name."""
        return {name: place[0] for name, place in self._places.items()}

    @property
    def total_bytes(self) -> int:
        """Of all tensors: total_size of the index."""
        return sum(place[0].bytes for place in self._places.values())

    def write(self, name: str, tensor: Tensor, start: int = 0, dimension: int = 0) -> None:
        """A whole tensor, or rows of it from `start` on (dimension 0), or columns (dimension 1). Threads may write
        different tensors at once."""
        if name not in self._places:
            raise ValueError(f"{name} is not among the tensors that were announced")
        entry, file, offset = self._places[name]
        if not _fits(entry, tensor, start, dimension):
            raise ValueError(
                f"{name} was announced as {entry.dtype} {list(entry.shape)}, and is {tensor.dtype} "
                f"{list(tensor.shape)} from {'column' if dimension else 'row'} {start} on"
            )
        item_bytes = DTYPES[entry.dtype].itemsize
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        if dimension == 0 or tuple(tensor.shape) == entry.shape:
            row_bytes = entry.bytes // entry.shape[0] if entry.shape else 0
            self.files[file].write(offset + start * row_bytes, data)
            return
        rows, columns = tensor.shape
        for row in range(rows):
            piece = data[row * columns * item_bytes : (row + 1) * columns * item_bytes]
            self.files[file].write(offset + (row * entry.shape[1] + start) * item_bytes, piece)

    def copy(self, name: str, source: Source) -> None:
        """A tensor of the source as it is, checked, in pieces of 16 MB: an embedding may be larger than the memory."""
        blocks = list(source.row_blocks(name))
        pieces = one_ahead(lambda rows: source.tensor(name, rows if source.shape(name) else None), blocks)
        for rows, piece in zip(blocks, pieces, strict=True):
            self.write(name, piece, rows.start)

    def sync(self) -> None:
        """Waits until everything written so far is on the disk."""
        for file in self.files.values():
            file.sync()

    def finish(self) -> None:
        """Headers and index; the files are closed."""
        for name, file in self.files.items():
            file.finish(self._headers[name])
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {name: self._places[name][1] for name in sorted(self._places)},
        }
        write_text(os.path.join(self.folder, INDEX), json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        """Leaves everything as it is, for a later run with `resume`."""
        for file in self.files.values():
            file.close()


def _fits(entry: Entry, tensor: Tensor, start: int, dimension: int) -> bool:
    """Whether a tensor is the announced one, or a part of it from `start` on in that dimension."""
    shape = tuple(tensor.shape)
    if tensor.dtype != DTYPES[entry.dtype] or len(shape) != len(entry.shape):
        return False
    ends = [size + start * (number == dimension) for number, size in enumerate(shape)]
    return all(
        end <= most if number == dimension else end == most
        for number, (end, most) in enumerate(zip(ends, entry.shape, strict=True))
    )


def draft_shards(folder: str, entries: Iterable[Entry], shard_bytes: int = SHARD_BYTES) -> None:
    """Files with the headers that `Shards` would give them and holes in place of data."""
    parts = _divided(entries, shard_bytes)
    for number, part in enumerate(parts, 1):
        header, _ = _laid_out(part)
        path = os.path.join(folder, f"model-{number:05d}-of-{len(parts):05d}.safetensors")
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(entry.bytes for entry in part))


def write_text(path: str, text: str) -> None:
    """A small file, on the disk when it returns. `BadInput` where it cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        refuse(path, error)


def _divided(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    parts: list[list[Entry]] = [[]]
    filled = 0
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"{entry.name} is announced twice")
        seen.add(entry.name)
        if parts[-1] and filled + entry.bytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(entry)
        filled += entry.bytes
    return parts


def _laid_out(part: list[Entry]) -> tuple[bytes, list[tuple[Entry, int]]]:
    """(header with its length, padded to 8 bytes; tensors with their offsets in the file)."""
    ordered = sorted(part, key=lambda entry: -DTYPES[entry.dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, begins = 0, []
    for entry in ordered:
        begins.append(position)
        end = position + entry.bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = [(entry, start + begin) for entry, begin in zip(ordered, begins, strict=True)]
    return len(text).to_bytes(8, "little") + text, places
