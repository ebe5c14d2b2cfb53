"""The operations of the C kernels as ctypes structures, and programs of them.

Each class mirrors a structure of `csrc/operations.h`, which says what the fields mean; every field has 8 bytes. A
`Program` keeps its structures and tensors alive and hands an array of pointers to the library.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import CpuLibrary

KINDS = [
    "ROUND",
    "MATMUL",
    "NORM",
    "CONV_UPDATE",
    "CONV_PREFILL",
    "DELTA_STEP",
    "DELTA_PREFILL",
    "ROPE_STORE",
    "ATTENTION",
    "ATTENTION_JOIN",
    "EMBED",
    "ROUTE",
    "COMBINE",
    "READ",
    "FIND_SCALES",
    "SOLVE_COLUMNS",
    "ROUND_GROUPS",
]
KIND = {name: number for number, name in enumerate(KINDS)}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
BLOCK = 128

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


def _fields(text: str, nested: dict[str, Any] | None = None) -> list[tuple[str, Any]]:
    """ "kind *data eps:double x:Rows" -> fields: * is a pointer, a bare name an int64."""
    types: dict[str, Any] = {"double": ctypes.c_double, **(nested or {})}
    fields: list[tuple[str, Any]] = []
    for word in text.split():
        name, _, type_name = word.partition(":")
        kind = types[type_name] if type_name else _Pointer if name.startswith("*") else _Int
        fields.append((name.removeprefix("*"), kind))
    return fields


class Rows(ctypes.Structure):
    _fields_ = _fields("*data dtype stride")


_ROWS = {"Rows": Rows}


class Rounded(ctypes.Structure):
    _fields_ = _fields("*words *scales *sums blocks rows planes parts zero_factor")


class Round(ctypes.Structure):
    _fields_ = _fields("kind source:Rows gate:Rows gate_is_sigmoid *gather *order rows columns y:Rows *out", _ROWS)


class Matrix(ctypes.Structure):
    _fields_ = _fields(
        "*codes *scales *zeros *bias bits code_dtype scale_dtype group_size rows padded_rows columns "
        "expert_code_bytes expert_scales y:Rows",
        _ROWS,
    )


class Matmul(ctypes.Structure):
    _fields_ = _fields(
        "kind *matrices count *x floats:Rows rows *offsets *experts *active slots task_rows *rounding", _ROWS
    )


class Norm(ctypes.Structure):
    _fields_ = _fields(
        "kind x:Rows residual:Rows weight:Rows gate:Rows y:Rows rows columns eps:double offset:double *rounded", _ROWS
    )


class Conv(ctypes.Structure):
    _fields_ = _fields(
        "kind x:Rows weight:Rows y:Rows state:Rows *source *target *cu_seqlens sequences steps channels taps", _ROWS
    )


class Delta(ctypes.Structure):
    _fields_ = _fields(
        "kind qkv:Rows a:Rows b:Rows state:Rows y:Rows *a_log *dt_bias *source *target *cu_seqlens sequences steps "
        "key_heads value_heads key_dim value_dim norm_weight:Rows gate:Rows eps:double *rounded",
        _ROWS,
    )


class RopeStore(ctypes.Structure):
    _fields_ = _fields(
        "kind q:Rows k:Rows v:Rows q_out:Rows q_head_stride q_norm:Rows k_norm:Rows *cosines *sines *slots *positions "
        "tokens heads kv_heads head_dim half eps:double *keys *values *key_scales *value_scales "
        "cache_dtype cache_tokens",
        _ROWS,
    )


class Attention(ctypes.Structure):
    _fields_ = _fields(
        "kind q:Rows gate:Rows y:Rows gate_head_stride *slots *lengths sequences steps heads kv_heads head_dim splits "
        "*keys *values *key_scales *value_scales cache_dtype cache_tokens *partial",
        _ROWS,
    )


class Embed(ctypes.Structure):
    _fields_ = _fields("kind *tokens count *matrix y:Rows", _ROWS)


class Route(ctypes.Structure):
    _fields_ = _fields("kind *logits tokens experts_count top *gather *offsets *experts *active *weights")


class Combine(ctypes.Structure):
    _fields_ = _fields("kind x:Rows shared:Rows shared_gate:Rows y:Rows *gather *weights rows tokens columns", _ROWS)


class Read(ctypes.Structure):
    _fields_ = _fields("kind *data bytes streams ahead_bytes sum")


class FindScales(ctypes.Structure):
    _fields_ = _fields(
        "kind *weight *importance *ratios ratio_count refinements rows columns group_size bits symmetric signed_scales "
        "scale_dtype *scales *zeros"
    )


class SolveColumns(ctypes.Structure):
    _fields_ = _fields("kind *targets *weights *factor *scales *zeros *groups *codes rows columns factor_stride bits")


class RoundGroups(ctypes.Structure):
    _fields_ = _fields(
        "kind *weight dtype *ratios ratio_count refinements rows columns group_size bits symmetric signed_scales "
        "scale_dtype *codes *scales *zeros is_bad"
    )


STRUCTURES = dict(
    zip(
        KINDS,
        (
            *(Round, Matmul, Norm, Conv, Conv, Delta, Delta, RopeStore, Attention, Attention, Embed, Route, Combine),
            *(Read, FindScales, SolveColumns, RoundGroups),
        ),
        strict=True,
    )
)


def operation(name: str, **fields: Any) -> Any:
    """The structure of that name ("NORM", "MATMUL", ...) with these fields; the others are 0."""
    return STRUCTURES[name](kind=KIND[name], **fields)


def check_layout(handle: Any) -> None:
    """RuntimeError if a structure here and in the library differ in size: both sides must be edited together."""
    sizes = (ctypes.c_int64 * len(KINDS)).in_dll(handle, "qwenfit_bytes")
    for (name, structure), size in zip(STRUCTURES.items(), sizes, strict=True):
        if ctypes.sizeof(structure) != size:
            raise RuntimeError(f"{name}: {ctypes.sizeof(structure)} bytes in operations.py, {size} in operations.h")


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element lies; None for none."""
    return None if tensor is None else tensor.data_ptr()


def address(structure: Any) -> int | None:
    """Where a structure lies; None for none."""
    return None if structure is None else ctypes.addressof(structure)


def rows_of(tensor: Tensor | None) -> Rows:
    """A tensor [rows, columns] (or [columns]) whose last dimension is contiguous."""
    if tensor is None:
        return Rows(None, 0, 0)
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError("the CPU kernels read rows whose elements lie side by side: call .contiguous() first")
    return Rows(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(-2) if tensor.dim() > 1 else tensor.shape[-1])


def slots_of(state: Tensor) -> Rows:
    """A state [slots, ...], each slot contiguous."""
    return Rows(state.data_ptr(), DTYPES[state.dtype], state.stride(0))


def rounded_rows(rows: int, columns: int, planes: int, parts: int, zero_factor: int) -> tuple[Rounded, list[Tensor]]:
    """Room for `rows` rows of activations as int16 planes (csrc/activations.h), and the tensors that hold it."""
    blocks = -(-columns // BLOCK)
    streams = rows * planes
    words = torch.empty(blocks * streams * BLOCK, dtype=torch.int16)
    scales = torch.empty(blocks * streams, dtype=torch.float32)
    sums = torch.empty(blocks * parts * streams, dtype=torch.int32)
    held = [words, scales, sums]
    return Rounded(*(tensor.data_ptr() for tensor in held), blocks, rows, planes, parts, zero_factor), held


class Program:
    """Operations to run in order, with all that they point to.

    `add` takes a structure of this module and whatever must stay alive with it; `run` may be called again and again:
    what the pointers show may change between runs, the pointers may not.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self.library = library
        self.operations: list[Any] = []
        self.held: list[Any] = []
        self._array: Any = None

    def add(self, operation: Any, *held: Any) -> None:
        self.operations.append(operation)
        self.held.extend(held)
        self._array = None

    def extend(self, operations: Sequence[Any], *held: Any) -> None:
        for operation in operations:
            self.add(operation)
        self.held.extend(held)

    def run(self, threads: int | None = None) -> None:
        if self._array is None:
            pointers = [ctypes.addressof(operation) for operation in self.operations]
            self._array = (_Pointer * len(pointers))(*pointers)
        self.library.run(self._array, len(self.operations), threads or torch.get_num_threads())
