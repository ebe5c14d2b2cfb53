"""AWQ checkpoints in the GEMM version (AutoAWQ, llm-awq's successors) to the runtime layout and back, bit for bit.

A matrix of N outputs and K inputs is stored transposed and packed along the outputs, n = 32 / bits codes a word:

    qweight  int32 [K, N / n]        qzeros  int32 [groups, N / n]        scales  float [groups, N]

Outputs are interleaved inside a word: code j of word w is output n w + INTERLEAVE[j]. AutoAWQ has 4 bits; 8 bits as
vLLM's and SGLang's tests pack them (awq_pack). Zero points are stored as they are. There is no act-order.
"""

import torch
from torch import Tensor

from .column_groups import group_size_of
from .packed_words import bits_of, check, pack_words, unpack_words
from .packing import QuantizedWeight, empty, read_codes, read_scales, read_zeros, row_chunks, write_codes, write_groups

INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


def from_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int | None = None, what: str = "an AWQ weight"
) -> QuantizedWeight:
    """The weight [N, K] on the device of its tensors; besides it no more memory than qweight once again.

    Bits and groups follow from the shapes. Zero points that all are the middle code are kept as none. ValueError,
    beginning with `what`, where shapes or dtypes contradict each other.
    """
    check(qweight, torch.int32, 2, f"{what}: qweight")
    check(qzeros, torch.int32, 2, f"{what}: qzeros")
    check(scales, scales.dtype, 2, f"{what}: scales")
    (columns, words_per_row), (groups, rows) = qweight.shape, scales.shape
    bits = bits_of(words_per_row, rows, f"{what}: qweight")
    if qzeros.shape != (groups, words_per_row) or rows * bits % 32:
        raise ValueError(
            f"{what}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} "
            "are not of one matrix; the file is damaged or in another format"
        )
    size = group_size_of(columns, groups, group_size, what)
    zeros = unpack_words(qzeros, bits)[:, _rows_in_order(rows, bits, qzeros.device)]
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    weight = empty(rows, columns, bits, size, scales.dtype, not symmetric, None, scales.device)
    words = qweight.t().contiguous()
    for part in row_chunks(rows, columns):
        few = words[part.start * bits // 32 : part.stop * bits // 32]
        codes = torch.empty(few.shape[0], 32 // bits, columns, dtype=torch.uint8, device=words.device)
        for lane, row in enumerate(INTERLEAVE[bits]):
            codes[:, row] = (few >> lane * bits).bitwise_and_(2**bits - 1)
        write_codes(codes.flatten(0, 1), weight.codes[part], bits)
    write_groups(weight, scales, None if symmetric else zeros)
    return weight


def to_awq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a matrix: what `from_awq` was given.

    ValueError for a stack, for act-order, and for rows that do not fill words of 32 bits.
    """
    bits, per_word = weight.bits, 32 // weight.bits
    if weight.codes.dim() != 2 or weight.rows % per_word or weight.order is not None:
        raise ValueError(
            f"a weight of {weight.rows} x {weight.columns} cannot be stored as AWQ: it takes single matrices "
            f"without act-order whose rows are a multiple of {per_word}"
        )
    words = torch.empty(weight.rows // per_word, weight.columns, dtype=torch.int32, device=weight.codes.device)
    for part in row_chunks(weight.rows, weight.columns):
        codes = read_codes(weight, part).unflatten(0, (-1, per_word))[:, INTERLEAVE[bits]]
        words[part.start // per_word : part.stop // per_word] = pack_words(codes.transpose(1, 2), bits)[..., 0]
    lanes = torch.tensor(INTERLEAVE[bits], device=weight.codes.device)
    zeros = read_zeros(weight).unflatten(1, (-1, per_word))[..., lanes].flatten(1)
    return {"qweight": words.t().contiguous(), "qzeros": pack_words(zeros, bits), "scales": read_scales(weight)}


def _rows_in_order(rows: int, bits: int, device: torch.device) -> Tensor:
    """Where row n stands in the order of the file, [rows]."""
    inside = torch.tensor(INTERLEAVE[bits], device=device).argsort()
    return (torch.arange(0, rows, 32 // bits, device=device)[:, None] + inside).flatten()
