"""The runtime layout of quantized weights: one for int4, one for int8, the same on every device.

int4 ("P16"): the codes of a row are cut into blocks of 128 columns, and a block is 32 words of 16 bits.
Word w of a block holds columns w, w + 32, w + 64 and w + 96 of that block, the first in its lowest four bits:

    block b of row n      word 0            word 1                   word 31
    bits 0..3             128 b             128 b + 1        ...     128 b + 31
    bits 4..7             128 b + 32        128 b + 33       ...     128 b + 63
    bits 8..11            128 b + 64        128 b + 65       ...     128 b + 95
    bits 12..15           128 b + 96        128 b + 97       ...     128 b + 127

so one shift and one mask turn 32 words into 32 neighbouring columns, which belong to one group of 32, 64, 128 or more;
a block is 64 bytes, one cache line and one AVX-512 register. int8: codes as signed bytes, row by row.

Scales and zero points are [groups, rows] in the dtype of the checkpoint, and a zero point is the integer it stands for.
W[n, k] = scales[g, n] * (code[n, k] - zeros[g, n]), g = k // group_size. Neighbouring rows are neighbours in memory, as
a GPU's threads want them. A model on the CPU has the same words and bytes in tiles of 16 rows (`tiles.py`).

Files hold unsigned codes 0..2^bits-1, and so do the functions here that fill a weight and read it back; the runtime
keeps int8 codes and their zero points minus 128. Conversions, all lossless both ways: `gptq_layout.py`,
`awq_layout.py`, `compressed_tensors_layout.py`. Stacks of experts and rows side by side: `weight_stack.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .tiles import untile

BLOCK_COLUMNS = 128
BLOCK_WORDS = 32
ROW_PAD = 16
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK_CODES = 1 << 21  # unpacked at a time: conversions need a few MB beside the matrix itself, and stay in the cache
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A matrix [rows, columns], or a stack of them [experts, rows, columns], as the kernels read it.

    codes: int4 uint16 [..., rows', columns' / 4]; int8 int8 [..., rows', columns']; rows' is rows rounded up to 16,
        columns' is columns rounded up to 128.
    scales: bfloat16, float16 or float32 [..., groups, rows'], groups = columns' / group_size rounded up.
    zeros: None where symmetric (int4 codes stand around 8, int8 codes around 0), else as scales, whole numbers.
    group_size: columns per scale, a multiple of 32; `columns'` where there is one scale per row ("channel").
    order: None, or int32 [columns]: column k of the codes belongs to input feature order[k] (GPTQ act-order).
    tiled: codes, scales and zeros lie as `tiles.py` says, in the shapes that it says.

    Padding rows, and groups of nothing but padding, have scale 0. Padding columns of a group that also has real ones
    hold the code 8 (int4) or 0 (int8): x has no elements there, and whoever reads them takes x as 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    rows: int
    columns: int
    order: Tensor | None = None
    tiled: bool = False

    @property
    def stack(self) -> tuple[int, ...]:
        """(experts,) of a stack, () of one matrix."""
        return tuple(self.scales.shape[: -3 if self.tiled else -2])

    @property
    def padded_rows(self) -> int:
        """Rows that are stored: rounded up to 16."""
        return _up(self.rows, ROW_PAD)

    @property
    def padded_columns(self) -> int:
        """Columns that are stored: rounded up to 128."""
        return _up(self.columns, BLOCK_COLUMNS)

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.codes, self.scales, self.zeros, self.order)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    @property
    def zero_point(self) -> int:
        """The code that stands for 0 where there are no zero points: 8 for int4, 0 for int8."""
        return 8 if self.bits == 4 else 0

    @property
    def groups(self) -> int:
        """Groups that have columns: what a file stores, without those of nothing but padding."""
        return -(-self.columns // self.group_size)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0..15 uint8 [..., rows, columns], columns a multiple of 128 -> uint16 [..., rows, columns / 4] (P16)."""
    *stack, rows, columns = codes.shape
    if columns % BLOCK_COLUMNS:
        raise ValueError(f"{columns} columns do not fill blocks of {BLOCK_COLUMNS}: pad the codes before packing")
    # Eight codes at a time as one int64; nibbles 0 and 1 of a word are its low byte, 2 and 3 its high one.
    nibbles = codes.to(torch.uint8).contiguous().view(torch.int64).view(-1, 2, 2, BLOCK_WORDS // 8)
    halves = (nibbles[:, :, 1] << 4).bitwise_or_(nibbles[:, :, 0]).view(torch.uint8)
    words = (halves[:, 1].to(torch.int16) << 8).bitwise_or_(halves[:, 0])
    return words.view(torch.uint16).view(*stack, rows, columns // 4)


def unpack_int4(words: Tensor) -> Tensor:
    """uint16 [..., rows, columns / 4] -> codes 0..15 uint8 [..., rows, columns]: the inverse of `pack_int4`."""
    *stack, rows, quarter = words.shape
    signed = words.contiguous().view(torch.int16).view(-1, BLOCK_WORDS)
    halves = torch.empty(signed.shape[0], 2, BLOCK_WORDS, dtype=torch.uint8, device=words.device)
    halves[:, 0], halves[:, 1] = signed, signed >> 8
    nibbles = torch.empty(signed.shape[0], 2, 2, BLOCK_WORDS // 8, dtype=torch.int64, device=words.device)
    torch.bitwise_and(halves.view(torch.int64), _LOW_NIBBLES, out=nibbles[:, :, 0])
    torch.bitwise_and(halves.view(torch.int64) >> 4, _LOW_NIBBLES, out=nibbles[:, :, 1])
    return nibbles.view(torch.uint8).view(*stack, rows, 4 * quarter)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrix [..., rows, columns] that the codes stand for, input features in their own order, in `dtype`."""
    weight = untile(weight)
    codes = unpack_int4(weight.codes) if weight.bits == 4 else weight.codes
    group = torch.arange(codes.shape[-1], device=codes.device) // weight.group_size
    scales = weight.scales.to(dtype).transpose(-1, -2)[..., group]
    zeros = weight.zero_point if weight.zeros is None else weight.zeros.to(dtype).transpose(-1, -2)[..., group]
    matrix = ((codes.to(dtype) - zeros) * scales)[..., : weight.rows, : weight.columns]
    if weight.order is None:
        return matrix
    in_order = torch.empty_like(matrix)
    in_order[..., weight.order.long()] = matrix
    return in_order


def quantize_rtn(
    matrix: Tensor, bits: int, group_size: int, symmetric: bool = True, scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    """Round to nearest: the matrix [..., N, K] of any float dtype in the runtime layout, without calibration.

    group_size: a multiple of 32, or -1 for one scale per row. The grid is the usual one of AutoGPTQ and llm-compressor:
    symmetric scale = 2 max|w| / (2^bits - 1) around the middle code; asymmetric from min(w, 0) to max(w, 0). A group
    of zeros gets the smallest scale there is and comes back as zeros.
    """
    *stack, rows, columns = matrix.shape
    group_size = runtime_group_size(group_size, columns)
    groups, top, tiny = -(-columns // group_size), 2**bits - 1, torch.finfo(scale_dtype).tiny
    padding = (0, groups * group_size - columns)
    values = torch.nn.functional.pad(matrix.float(), padding).unflatten(-1, (groups, group_size))
    if symmetric:
        scales = (2 * values.abs().amax(-1) / top).to(scale_dtype).clamp(min=tiny)
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.float32)
    else:
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        scales = ((high - low) / top).to(scale_dtype).clamp(min=tiny)
        zeros = (-low / scales.float()).round_().clamp_(0, top)
    codes = (values / scales.float()[..., None]).round_().add_(zeros[..., None]).clamp_(0, top).to(torch.uint8)
    weight = empty(rows, columns, bits, group_size, scale_dtype, not symmetric, None, matrix.device, tuple(stack))
    codes = codes.flatten(-2)[..., :columns].reshape(-1, rows, columns)
    for one, target in zip(codes, weight.codes.view(-1, *weight.codes.shape[-2:]), strict=True):
        write_codes(one, target, bits)
    write_groups(weight, scales.mT, None if symmetric else zeros.mT)
    return weight


def empty(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    asymmetric: bool,
    order: Tensor | None = None,
    device: torch.device | str = "cpu",
    stack: tuple[int, ...] = (),
) -> QuantizedWeight:
    """A weight of that shape whose every entry is 0: scales 0, codes and zeros at the zero point."""
    if bits not in (4, 8):
        raise ValueError(f"there is no runtime layout for {bits}-bit codes: quantize to 4 or 8 bits")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scales of {scale_dtype} have no runtime layout: store bfloat16, float16 or float32")
    padded_rows, padded_columns = _up(rows, ROW_PAD), _up(columns, BLOCK_COLUMNS)
    group_size = runtime_group_size(group_size, columns)
    if bits == 4:
        # int16 of the same bits as 0x8888: torch fills that, and has few operations for uint16
        words = (*stack, padded_rows, padded_columns // 4)
        codes = torch.full(words, 0x8888 - (1 << 16), dtype=torch.int16, device=device).view(torch.uint16)
    else:
        codes = torch.zeros(*stack, padded_rows, padded_columns, dtype=torch.int8, device=device)
    groups = -(-padded_columns // group_size)
    scales = torch.zeros(*stack, groups, padded_rows, dtype=scale_dtype, device=device)
    zeros = torch.full_like(scales, 8 if bits == 4 else 0) if asymmetric else None
    return QuantizedWeight(codes, scales, zeros, bits, group_size, rows, columns, order)


def runtime_group_size(group_size: int, columns: int) -> int:
    """Columns per scale as `QuantizedWeight` has them: -1, 0 and whatever covers all columns become columns'."""
    if group_size in (-1, 0) or group_size >= columns:
        return _up(columns, BLOCK_COLUMNS)
    if group_size < 0 or group_size % 32:
        raise ValueError(
            f"groups of {group_size} columns have no runtime layout: take a multiple of 32, or -1 for a row"
        )
    return group_size


def write_codes(codes: Tensor, target: Tensor, bits: int) -> None:
    """Unsigned codes uint8 [n, K] into the first n rows of `target`, a matrix of codes; other rows and columns stay."""
    rows, columns = codes.shape
    if bits == 8:
        torch.bitwise_xor(codes, 128, out=target.view(torch.uint8)[:rows, :columns])
    else:
        padding = 4 * target.shape[-1] - columns
        target[:rows] = pack_int4(torch.nn.functional.pad(codes, (0, padding), value=8) if padding else codes)


def read_codes(weight: QuantizedWeight, rows: slice) -> Tensor:
    """Unsigned codes uint8 [n, K] of those rows of one matrix, columns as they lie."""
    codes = weight.codes[rows]
    codes = unpack_int4(codes) if weight.bits == 4 else codes.view(torch.uint8) ^ 128
    return codes[:, : weight.columns]


def write_groups(weight: QuantizedWeight, scales: Tensor, zeros: Tensor | None) -> None:
    """Scales and unsigned zero points [..., groups, N] into a weight that has zeros if there are any."""
    weight.scales[..., : weight.groups, : weight.rows] = scales
    if zeros is not None and weight.zeros is not None:
        weight.zeros[..., : weight.groups, : weight.rows] = zeros.to(weight.scales.dtype) - _signed_offset(weight)


def read_scales(weight: QuantizedWeight) -> Tensor:
    """Scales [groups, N] without padding."""
    return weight.scales[: weight.groups, : weight.rows].contiguous()


def read_zeros(weight: QuantizedWeight) -> Tensor:
    """Unsigned zero points uint8 [groups, N]; where there are none, the middle code that stands for 0."""
    if weight.zeros is None:
        middle, shape = 2 ** (weight.bits - 1), (weight.groups, weight.rows)
        return torch.full(shape, middle, dtype=torch.uint8, device=weight.codes.device)
    zeros = weight.zeros[: weight.groups, : weight.rows].float() + _signed_offset(weight)
    return zeros.to(torch.uint8)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix in slices of some two million codes: multiples of 64 rows, but for the last."""
    step = max(_CHUNK_CODES // columns // 64, 1) * 64
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _signed_offset(weight: QuantizedWeight) -> int:
    return 0 if weight.bits == 4 else 128


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
