"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound's auto_gptq) to the runtime layout and back, bit for bit.

A matrix of N outputs and K inputs is stored transposed and packed, n = 32 / bits codes a word:

    qweight  int32 [K / n, N]        code j of word (i, o) is input i n + j of output o
    qzeros   int32 [groups, N / n]   code j of word (g, w) is output w n + j
    scales   float [groups, N]
    g_idx    int32 [K]               group of every input; absent or k // group_size unless act-order (`desc_act`)

Version 1 stores the zero point minus one, version 2 itself ("gptq_v2"). The one is taken from and added to whole words
(GPTQModel `utils/model.py`, convert_gptq_v1_to_v2_format_module): where a zero point is 0 a borrow runs into the
neighbour, so unpacking first and adding one then would shift a zero point. Symmetric: every zero point is the middle
code, and the runtime keeps none.
"""

import torch
from torch import Tensor

from .column_groups import group_index, group_size_of, order_of
from .packed_words import bits_of, check, pack_words, unpack_words
from .packing import QuantizedWeight, empty, read_codes, read_scales, read_zeros, row_chunks, write_codes, write_groups

_ONES = {4: 0x11111111, 8: 0x01010101}  # a one in every code of a word
_MIDDLE = {4: 0x88888888 - (1 << 32), 8: 0x80808080 - (1 << 32)}  # the middle code in all of them


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    version: int = 1,
    group_size: int | None = None,
    what: str = "a GPTQ weight",
) -> QuantizedWeight:
    """The weight [N, K] on the device of its tensors; besides it no more memory than qweight once again.

    Bits and groups follow from the shapes; group_size is what the configuration says, needed only where the last group
    is shorter and there is no g_idx. ValueError, beginning with `what`, where shapes or dtypes contradict each other.
    """
    check(qweight, torch.int32, 2, f"{what}: qweight")
    check(qzeros, torch.int32, 2, f"{what}: qzeros")
    check(scales, scales.dtype, 2, f"{what}: scales")
    groups, rows = scales.shape
    bits = bits_of(qzeros.shape[1], rows, f"{what}: qzeros")
    columns = qweight.shape[0] * 32 // bits
    if qweight.shape[1] != rows or qzeros.shape[0] != groups or rows * bits % 32:
        raise ValueError(
            f"{what}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} "
            "are not of one matrix; the file is damaged or in another format"
        )
    size = group_size_of(columns, groups, group_size, what) if g_idx is None else -1
    order = None
    if g_idx is not None:
        order, size = order_of(g_idx, columns, groups, size, what)
    if version == 1:
        qzeros = qzeros + _ONES[bits]
    symmetric = bool((qzeros == _MIDDLE[bits]).all())
    weight = empty(rows, columns, bits, size, scales.dtype, not symmetric, order, scales.device)
    words = qweight.t().contiguous()
    for part in row_chunks(rows, columns):
        codes = unpack_words(words[part], bits)
        write_codes(codes if order is None else codes[:, order.long()], weight.codes[part], bits)
    write_groups(weight, scales, None if symmetric else unpack_words(qzeros, bits))
    return weight


def to_gptq(weight: QuantizedWeight, version: int = 1) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx of a matrix: what `from_gptq` was given, with g_idx in any case.

    ValueError for a stack, and for rows or columns that do not fill words of 32 bits.
    """
    per_word = 32 // weight.bits
    if weight.codes.dim() != 2 or weight.rows % per_word or weight.columns % per_word:
        raise ValueError(
            f"a weight of {weight.rows} x {weight.columns} cannot be stored as GPTQ: it takes single matrices "
            f"whose sides are multiples of {per_word}"
        )
    back = None if weight.order is None else weight.order.long().argsort()
    words = torch.empty(weight.rows, weight.columns // per_word, dtype=torch.int32, device=weight.codes.device)
    for part in row_chunks(weight.rows, weight.columns):
        codes = read_codes(weight, part)
        words[part] = pack_words(codes if back is None else codes[:, back], weight.bits)
    qzeros = pack_words(read_zeros(weight), weight.bits)
    return {
        "qweight": words.t().contiguous(),
        "qzeros": qzeros - _ONES[weight.bits] if version == 1 else qzeros,
        "scales": read_scales(weight),
        "g_idx": group_index(weight.columns, weight.group_size, weight.order, weight.codes.device),
    }
