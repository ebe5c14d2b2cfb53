"""compressed-tensors checkpoints (llm-compressor, and what qwenfit writes) to the runtime layout and back, bit for bit.

A matrix of N outputs and K inputs, codes plus 2^(bits-1) so that they are unsigned, n = 32 / bits a word; format
pack-quantized:

    weight_packed      int32 [N, K / n rounded up]       code j of word (o, w) is input w n + j
    weight_scale       float [N, groups]                 one group: [N, 1]
    weight_shape       integers [2]                      N, K
    weight_zero_point  int32 [N / n rounded up, groups]  only where asymmetric: packed along the outputs
    weight_g_idx       int32 [K]                         only where actorder is group: group of every input

format int-quantized (W8A8 and 8-bit weights): weight int8 [N, K], weight_scale [N, groups], weight_zero_point int8
[N, groups] only where asymmetric, weight_g_idx as above. (compressed-tensors, end of 2026:
`compressors/pack_quantized/base.py` and `helpers.py`, pack_to_int32; `compressors/naive_quantized/base.py`.)
"""

import torch
from torch import Tensor

from .column_groups import group_index, group_size_of, order_of
from .packed_words import bits_of, check, pack_words, unpack_words
from .packing import QuantizedWeight, empty, read_codes, read_scales, read_zeros, row_chunks, write_codes, write_groups


def from_pack_quantized(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    group_size: int | None = None,
    what: str = "a packed weight",
) -> QuantizedWeight:
    """The weight [N, K] on the device of its tensors; besides it a few MB.

    Zero points that are stored are kept, whatever they are. ValueError, beginning with `what`, where shapes or dtypes
    contradict each other.
    """
    check(weight_packed, torch.int32, 2, f"{what}: weight_packed")
    check(weight_scale, weight_scale.dtype, 2, f"{what}: weight_scale")
    rows, columns = _shape(weight_shape, what)
    bits = bits_of(weight_packed.shape[1], columns, f"{what}: weight_packed")
    groups = weight_scale.shape[1]
    if weight_packed.shape[0] != rows or weight_scale.shape[0] != rows:
        raise ValueError(
            f"{what}: weight_packed {list(weight_packed.shape)} and weight_scale {list(weight_scale.shape)} are not of "
            f"a matrix {rows} x {columns}, as weight_shape says; the file is damaged"
        )
    size, order = group_size_of(columns, groups, group_size, what) if weight_g_idx is None else -1, None
    if weight_g_idx is not None:
        order, size = order_of(weight_g_idx, columns, groups, size, what)
    zeros = None
    if weight_zero_point is not None:
        check(weight_zero_point, torch.int32, 2, f"{what}: weight_zero_point")
        if weight_zero_point.shape != (-(-rows * bits // 32), groups):
            raise ValueError(
                f"{what}: weight_zero_point {list(weight_zero_point.shape)} does not hold {bits} bits for each of "
                f"{groups} groups of {rows} rows; the file is damaged"
            )
        zeros = unpack_words(weight_zero_point.t(), bits)[:, :rows]
    weight = empty(rows, columns, bits, size, weight_scale.dtype, zeros is not None, order, weight_scale.device)
    for part in row_chunks(rows, columns):
        codes = unpack_words(weight_packed[part], bits)[:, :columns]
        write_codes(codes if order is None else codes[:, order.long()], weight.codes[part], bits)
    write_groups(weight, weight_scale.t(), zeros)
    return weight


def to_pack_quantized(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a matrix under their names: what `from_pack_quantized` was given. ValueError for a stack."""
    if weight.codes.dim() != 2:
        raise ValueError("a stack of experts cannot be stored as pack-quantized: store its matrices one by one")
    back = None if weight.order is None else weight.order.long().argsort()
    words = -(-weight.columns * weight.bits // 32)
    packed = torch.empty(weight.rows, words, dtype=torch.int32, device=weight.codes.device)
    for part in row_chunks(weight.rows, weight.columns):
        codes = read_codes(weight, part)
        packed[part] = pack_words(codes if back is None else codes[:, back], weight.bits)
    tensors = {
        "weight_packed": packed,
        "weight_scale": read_scales(weight).t().contiguous(),
        "weight_shape": torch.tensor([weight.rows, weight.columns]),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack_words(read_zeros(weight).t().contiguous().t(), weight.bits).t().contiguous()
    if weight.order is not None:
        tensors["weight_g_idx"] = group_index(weight.columns, weight.group_size, weight.order, weight.codes.device)
    return tensors


def from_int_quantized(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    group_size: int | None = None,
    what: str = "an int8 weight",
) -> QuantizedWeight:
    """The weight [N, K] of signed bytes, which are the runtime's already. ValueError as above."""
    check(weight, torch.int8, 2, f"{what}: weight")
    check(weight_scale, weight_scale.dtype, 2, f"{what}: weight_scale")
    (rows, columns), groups = weight.shape, weight_scale.shape[1]
    if weight_scale.shape[0] != rows:
        raise ValueError(
            f"{what}: weight {list(weight.shape)} and weight_scale {list(weight_scale.shape)} are not of one matrix; "
            "a scale per row or per group of a row is needed"
        )
    if weight_zero_point is not None:
        check(weight_zero_point, torch.int8, 2, f"{what}: weight_zero_point")
        if weight_zero_point.shape != weight_scale.shape:
            raise ValueError(f"{what}: weight_zero_point is not [{rows}, {groups}] as weight_scale is")
    size, order = group_size_of(columns, groups, group_size, what) if weight_g_idx is None else -1, None
    if weight_g_idx is not None:
        order, size = order_of(weight_g_idx, columns, groups, size, what)
    result = empty(rows, columns, 8, size, weight_scale.dtype, weight_zero_point is not None, order, weight.device)
    result.codes[:rows, :columns] = weight if order is None else weight[:, order.long()]
    write_groups(result, weight_scale.t(), None if weight_zero_point is None else weight_zero_point.t().int() + 128)
    return result


def to_int_quantized(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of an 8-bit matrix under their names: what `from_int_quantized` was given.

    ValueError for a stack, and for 4 bits.
    """
    if weight.codes.dim() != 2 or weight.bits != 8:
        raise ValueError("int-quantized takes single matrices of 8 bits: store it as pack-quantized")
    codes = weight.codes[: weight.rows, : weight.columns]
    if weight.order is not None:
        codes = codes[:, weight.order.long().argsort()]
    tensors = {"weight": codes.contiguous(), "weight_scale": read_scales(weight).t().contiguous()}
    if weight.order is not None:
        tensors["weight_g_idx"] = group_index(weight.columns, weight.group_size, weight.order, weight.codes.device)
    if weight.zeros is not None:
        tensors["weight_zero_point"] = (read_zeros(weight).t() ^ 128).contiguous().view(torch.int8)
    return tensors


def _shape(weight_shape: Tensor, what: str) -> tuple[int, int]:
    if weight_shape.is_floating_point() or weight_shape.shape != (2,):
        raise ValueError(
            f"{what}: weight_shape is {list(weight_shape.shape)}, not two whole numbers; the file is damaged"
        )
    rows, columns = (int(size) for size in weight_shape)
    if rows < 1 or columns < 1:
        raise ValueError(f"{what}: weight_shape says {rows} x {columns}; the file is damaged")
    return rows, columns
