"""The header of a GGUF file: its metadata and where its tensors lie. No weights are read.

A file is "GGUF", a version, two counts, the metadata as key, type and value, one record per tensor, and the data,
aligned. Of the metadata only what is asked for is kept: a header of this family holds 248,320 tokens and nearly as
many merges, which are stepped over. Measured on such a header of 11 MB, both in the same minute on one busy core: 0.2
s of CPU time, against 31 s for the reader of gguf-py 0.19, which also needs numpy.

Everything in a file is somebody else's word, so counts and lengths are bounded before they are used, and tensors must
lie inside the file, aligned and apart (llama.cpp b11434 `ggml/src/gguf.cpp` checks the same).
"""

import mmap
import os
import stat
from collections.abc import Container, Mapping
from math import prod
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from .errors import BadInput, Unsupported
from .ggml import GGML_TYPE_IDS, GGML_TYPES
from .json_file import short

MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_STRINGS = 1 << 22  # in all arrays together: sixteen times a vocabulary and its merges
MAX_VALUES = 4096  # of an array that is kept

_UINT32, _UINT64 = Struct("<I"), Struct("<Q")
# GGUF's value types, ids as in gguf.h.
_NUMBERS = {
    0: Struct("<B"),
    1: Struct("<b"),
    2: Struct("<H"),
    3: Struct("<h"),
    4: Struct("<I"),
    5: Struct("<i"),
    6: Struct("<f"),
    7: Struct("<?"),
    10: Struct("<Q"),
    11: Struct("<q"),
    12: Struct("<d"),
}
_STRING, _ARRAY = 8, 9

Value = int | float | str | tuple[int | float, ...]


class GgufTensor(NamedTuple):
    """One tensor. `shape` has the row length last, as in a checkpoint (GGML's `ne` reversed)."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # GGML's name in upper case: Q4_K, F16
    begin: int  # bytes from the start of the file
    end: int


class GgufHeader(NamedTuple):
    path: str
    metadata: Mapping[str, Value]  # of the wanted keys those that are there; arrays of strings by their length
    tensors: tuple[GgufTensor, ...]


def read_gguf_header(path: str, wanted: Container[str]) -> GgufHeader:
    """The checked header of one file, with the metadata whose keys are `wanted`.

    `BadInput`, naming file and key or tensor, for a file that is cut short or wrong; `Unsupported` for big-endian
    files and version 1.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path} is not a regular file")
        if status.st_size < 24:
            raise BadInput(f"{path} is cut short: {status.st_size} bytes are no GGUF file")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header(wanted)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except StructError:
        raise BadInput(f"{path} is cut short: its header goes beyond the end of the file") from None


class _Reader:
    """A position in the bytes of a file. `struct.error` where it would go beyond their end."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0
        self.strings = 0

    def header(self, wanted: Container[str]) -> GgufHeader:
        if self.data[:4] != b"GGUF":
            raise BadInput(f"{self.path} is no GGUF file")
        self.position = 4
        version = self.number(_UINT32)
        if version & 0xFFFF == 0:
            raise Unsupported(f"{self.path} is a big-endian GGUF; convert it to little-endian")
        if version not in (2, 3):
            raise Unsupported(f"{self.path} is a GGUF of version {version}; qwenfit reads versions 2 and 3")
        tensor_count, key_count = self.number(_UINT64), self.number(_UINT64)
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise BadInput(f"{self.path} claims {tensor_count} tensors and {key_count} keys, more than any model has")
        metadata: dict[str, Value] = {}
        alignment = 32
        seen: set[str] = set()
        for _ in range(key_count):
            key = self.string("a key")
            if key in seen:
                raise BadInput(f"{self.path} has the key {short(key)} twice")
            seen.add(key)
            value = self.value(key, keep=key in wanted or key == "general.alignment")
            if value is not None and key in wanted:
                metadata[key] = value
            if key == "general.alignment":
                if not isinstance(value, int) or value < 1 or value & (value - 1) or value > 1 << 20:
                    raise BadInput(f"{self.path}: general.alignment is {short(value)}, not a power of two")
                alignment = value
        records = [self.tensor(alignment) for _ in range(tensor_count)]
        start = -(-self.position // alignment) * alignment
        return GgufHeader(self.path, metadata, self.placed(records, start))

    def number(self, kind: Struct) -> int:
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def string(self, what: str, limit_bytes: int = 65535) -> str:
        length = self.number(_UINT64)
        if length > limit_bytes:
            raise BadInput(f"{self.path}: {what} has {length} bytes, more than {limit_bytes}")
        raw = self.data[self.position : self.position + length]
        self.advance(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise BadInput(f"{self.path}: {what} is not UTF-8") from None

    def advance(self, length: int) -> None:
        self.position += length
        if self.position > self.size:
            raise StructError

    def value(self, key: str, keep: bool) -> Value | None:
        """The value of a key where it is to be kept; otherwise steps over it."""
        kind = self.number(_UINT32)
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            if keep:
                return self.string(short(key))
            self.advance(self.number(_UINT64))
            return None
        if kind != _ARRAY:
            raise BadInput(f"{self.path}: {short(key)} has the unknown type {kind}")
        kind, count = self.number(_UINT32), self.number(_UINT64)
        if kind == _STRING:
            self.skip_strings(key, count)
            return count if keep else None
        if kind not in _NUMBERS:
            raise BadInput(f"{self.path}: {short(key)} is an array of the unknown type {kind}")
        number = _NUMBERS[kind]
        if not keep:
            self.advance(count * number.size)
            return None
        if count > MAX_VALUES:
            raise BadInput(f"{self.path}: {short(key)} is an array of {count}, more than {MAX_VALUES}")
        return tuple(self.number(number) for _ in range(count))

    def skip_strings(self, key: str, count: int) -> None:
        """The one hot loop: half a million strings in a usual header."""
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise BadInput(f"{self.path}: {short(key)} has {count} strings, more than any vocabulary")
        position, data, unpack = self.position, self.data, _UINT64.unpack_from
        last = self.size - 8
        for _ in range(count):
            if position > last:
                raise StructError
            position += unpack(data, position)[0] + 8
        self.position = position
        self.advance(0)

    def tensor(self, alignment: int) -> tuple[str, tuple[int, ...], str, int, int]:
        """(name, shape, dtype, offset, bytes) of the next record."""
        name = self.string("a tensor's name")
        dimensions = self.number(_UINT32)
        if not 1 <= dimensions <= 4:
            raise BadInput(f"{self.path}: tensor {short(name)} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self.number(_UINT64) for _ in range(dimensions))[::-1]
        type_id, offset = self.number(_UINT32), self.number(_UINT64)
        dtype = GGML_TYPE_IDS.get(type_id)
        if dtype is None:
            raise BadInput(f"{self.path}: tensor {short(name)} has the unknown type {type_id}")
        block_elements, block_bytes = GGML_TYPES[dtype]
        if shape[-1] % block_elements:
            raise BadInput(
                f"{self.path}: tensor {short(name)} has rows of {shape[-1]}, no whole number of {dtype} blocks "
                f"of {block_elements}"
            )
        if offset % alignment:
            raise BadInput(f"{self.path}: tensor {short(name)} begins at {offset}, not aligned to {alignment}")
        return name, shape, dtype, offset, prod(shape) // block_elements * block_bytes

    def placed(self, records: list[tuple[str, tuple[int, ...], str, int, int]], start: int) -> tuple[GgufTensor, ...]:
        """The tensors in the order of the file's data, which begins at `start`."""
        tensors: list[GgufTensor] = []
        names: set[str] = set()
        position = start
        for name, shape, dtype, offset, length in sorted(records, key=lambda record: record[3:]):
            begin, end = start + offset, start + offset + length
            if name in names:
                raise BadInput(f"{self.path} has the tensor {short(name)} twice")
            if begin < position:
                raise BadInput(f"{self.path}: tensor {short(name)} overlaps the tensor before it")
            if end > self.size:
                raise BadInput(
                    f"{self.path} is cut short: tensor {short(name)} ends at byte {short(end)} of a file of {self.size}"
                )
            names.add(name)
            position = end
            tensors.append(GgufTensor(name, shape, dtype, begin, end))
        return tuple(tensors)
