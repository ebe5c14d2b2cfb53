"""The header of a safetensors file: which tensors it holds, where, in which dtype and shape. No weights are read.

A file is 8 bytes (little-endian length N), N bytes of JSON, then the data. Everything in it is somebody else's word,
so it is checked as strictly as the library does (safetensors 0.8 `tensor.rs`): a header of at most 100 MB, known
dtypes, sizes that follow from shapes, data that fills the file without overlaps or gaps.
"""

import os
import stat
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple

from .errors import BadInput
from .json_file import parse_json_object, short
from .model import DTYPE_BITS

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16


class HeaderTensor(NamedTuple):
    """One tensor. `begin` and `end` count from the start of the file's data, see `SafetensorsHeader.data_start`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsHeader(NamedTuple):
    path: str
    data_start: int  # bytes from the start of the file
    tensors: tuple[HeaderTensor, ...]  # in the order of the file's data


def read_safetensors_header(path: str) -> SafetensorsHeader:
    """The checked header of one file. `BadInput`, naming file and tensor, where a loader would refuse it too."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path} is not a regular file")
        with open(path, "rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise BadInput(f"{path} is cut short: {len(prefix)} bytes are no safetensors file")
            if header_bytes > MAX_HEADER_BYTES:
                raise BadInput(
                    f"{path} is no safetensors file: its header would have {header_bytes} bytes, "
                    f"more than the {MAX_HEADER_BYTES} that loaders read"
                )
            if 8 + header_bytes > status.st_size:
                raise BadInput(f"{path} is cut short: a header of {header_bytes} bytes in a file of {status.st_size}")
            data = file.read(header_bytes)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    entries = parse_json_object(data, f"the header of {path}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"the header of {path} has a __metadata__ that is no object of strings")
    data_bytes = status.st_size - 8 - header_bytes
    tensors = sorted((_tensor(path, name, entry) for name, entry in entries.items()), key=itemgetter(3, 4))
    _check_layout(path, tensors, data_bytes)
    return SafetensorsHeader(path, 8 + header_bytes, tuple(tensors))


def _tensor(path: str, name: str, entry: Any) -> HeaderTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: tensor {short(name)} is not described by dtype, shape and two data_offsets") from None
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise BadInput(f"{path}: tensor {short(name)} has the unknown dtype {short(dtype)}")
    if not isinstance(shape, list) or not all([type(size) is int and size >= 0 for size in shape]):
        raise BadInput(f"{path}: tensor {short(name)} has a shape that is no list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise BadInput(f"{path}: tensor {short(name)} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise BadInput(f"{path}: tensor {short(name)} has data_offsets that are no range of bytes")
    if prod(shape) * bits != (end - begin) * 8:
        raise BadInput(
            f"{path}: tensor {short(name)} has shape {short(str(shape))} of {dtype}, "
            f"which does not take the {short(end - begin)} bytes of its data_offsets"
        )
    return HeaderTensor(name, dtype, tuple(shape), begin, end)


def _check_layout(path: str, tensors: list[HeaderTensor], data_bytes: int) -> None:
    """Refuses data that overlaps, leaves gaps or does not fill the file. `tensors` are in order of their offsets."""
    position = 0
    for tensor in tensors:
        if tensor.begin < position:
            raise BadInput(f"{path}: tensor {short(tensor.name)} overlaps the tensor before it")
        if tensor.begin > position:
            raise BadInput(f"{path}: there is a gap before tensor {short(tensor.name)}")
        position = tensor.end
    if position > data_bytes:
        raise BadInput(f"{path} is cut short: {data_bytes} bytes of data where its header describes {short(position)}")
    if position < data_bytes:
        raise BadInput(f"{path} has {data_bytes - position} bytes after its last tensor")
