"""GGML's block formats for weights: Q4_0, Q4_1, Q8_0, Q4_K and Q6_K, encoded and decoded with torch, many rows at once.

A row is cut into blocks (sizes: `profiles/ggml.py`); layouts follow the structs of llama.cpp's `ggml-common.h`, b11434.

    Q8_0  32 weights: d, 32 int8                       w = d q
    Q4_0  32 weights: d, 16 bytes                      w = d (q - 8)      byte i: weight i low, weight i + 16 high
    Q4_1  32 weights: d, m, 16 bytes                   w = d q + m        the same
    Q4_K  256 weights, 8 groups of 32: d, dmin, 6-bit scales and minima, 128 bytes       w = d s q - dmin m
    Q6_K  256 weights, 16 groups of 16: 128 + 64 bytes, int8 scales, d                   w = d s (q - 32)

`encode` minimises sum_i importance_i (w_i - w'_i)^2 over a grid of scales, with the scale (and minimum) of every
candidate from least squares; the importance of a column is the diagonal of its Hessian. All scales are rounded to fp16
before the codes are chosen. A code never costs more than 4 or 6 bits: groups of zeros get scale 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..profiles.ggml import GGML_TYPES
from .tasks import one_thread_each

KINDS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
_CHUNK_WEIGHTS = 1 << 16  # encoded at a time: its dozen temporaries stay in the cache
_STRETCH = tuple(step / 10 for step in range(-9, 10, 2))


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row. ValueError where its columns are no whole number of blocks."""
    block, size = GGML_TYPES[kind]
    if columns % block:
        raise ValueError(f"rows of {columns} are no whole number of {kind} blocks of {block}")
    return columns // block * size


def encode(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Weights of any float dtype [O, I] -> uint8 [O, row_bytes].

    importance: float [I], not negative, e.g. the diagonal of the Hessian; None: all columns count alike.
    """
    rows, columns = weight.shape
    block = GGML_TYPES[kind][0]
    out = torch.empty(rows, row_bytes(kind, columns), dtype=torch.uint8)
    shares = _shares(importance, columns)
    step = max(1, _CHUNK_WEIGHTS // columns)

    def encode_rows(start: int) -> None:
        part = weight[start : start + step].float()
        weights = shares.expand_as(part).reshape(-1, block)
        out[start : start + step] = _ENCODERS[kind](part.reshape(-1, block), weights).view(len(part), -1)

    with one_thread_each() as tasks:
        tasks.run(encode_rows, range(0, rows, step))
    return out


def decode(blocks: Tensor, kind: str) -> Tensor:
    """uint8 [O, row_bytes] -> the weights that llama.cpp computes with, float32 [O, I]."""
    rows = blocks.shape[0]
    return _DECODERS[kind](blocks.reshape(-1, GGML_TYPES[kind][1])).view(rows, -1)


def _shares(importance: Tensor | None, columns: int) -> Tensor:
    """Importance around 1, so that squares neither vanish nor overflow; all 1 where there is none, or it is all 0."""
    total = 0.0 if importance is None else float(importance.double().clamp(min=0).sum())
    if importance is None or total == 0:
        return torch.ones(columns)
    # Columns that no token ever excited still get a say: a thousandth of the mean.
    return (importance.double().clamp(min=0) * (columns / total)).float() + 1e-3


def _encode_q8_0(x: Tensor, weights: Tensor) -> Tensor:
    scale = (x.abs().amax(1, keepdim=True) / 127).half()
    codes = _ratio(x, scale.float()).round_().clamp_(-127, 127)
    return _joined(scale, codes.to(torch.int8))


def _encode_q4_0(x: Tensor, weights: Tensor) -> Tensor:
    scale = _symmetric_scale(x, weights, 8).half()
    codes = _ratio(x, scale.float()).round_().clamp_(-8, 7).add_(8)
    return _joined(scale, nibbles(codes.to(torch.uint8)))


def _encode_q4_1(x: Tensor, weights: Tensor) -> Tensor:
    scale, low = (part.half() for part in _affine(x, weights, 15, bounded=False))
    codes = _ratio(x - low.float(), scale.float()).round_().clamp_(0, 15)
    return _joined(scale, low, nibbles(codes.to(torch.uint8)))


def _encode_q4_k(x: Tensor, weights: Tensor) -> Tensor:
    groups, shares = x.view(-1, 8, 32), weights.view(-1, 8, 32)
    scales, lows = _affine(groups, shares, 15, bounded=True)
    d, s = _six_bits(scales.squeeze(2))
    dmin, m = _six_bits(-lows.squeeze(2))
    best = (torch.full_like(d, torch.inf), d, dmin, s, m, torch.zeros_like(groups))
    for _ in range(3):
        step, shift = (d * s).unsqueeze(2), (dmin * m).unsqueeze(2)
        codes = _ratio(groups + shift, step).round_().clamp_(0, 15)
        error = ((codes * step - shift - groups).square_() * shares).sum((1, 2)).unsqueeze(1)
        better = error < best[0]
        found = (error, d, dmin, s, m)
        kept = (torch.where(better, new, old) for new, old in zip(found, best[:5], strict=True))
        best = (*kept, torch.where(better.unsqueeze(2), codes, best[5]))
        # What suits these codes best, by least squares: scale and minimum of a group, then d and dmin of the block.
        scales, lows = _least_squares(codes, torch.ones_like(codes), groups, shares)
        s = _ratio(scales.squeeze(2), d).round_().clamp_(0, 63)
        m = _ratio(-lows.squeeze(2), dmin).round_().clamp_(0, 63)
        a, b = (codes * s.unsqueeze(2)).flatten(1), m.unsqueeze(2).expand_as(codes).flatten(1)
        d, dmin = (part.half().float() for part in _least_squares(a, -b, groups.flatten(1), shares.flatten(1)))
    _, d, dmin, s, m, codes = best
    packed = codes.to(torch.uint8).view(-1, 4, 2, 32)
    return _joined(d.half(), dmin.half(), _packed_scales(s, m), (packed[:, :, 0] | packed[:, :, 1] << 4).flatten(1))


def _encode_q6_k(x: Tensor, weights: Tensor) -> Tensor:
    groups, shares = x.view(-1, 16, 16), weights.view(-1, 16, 16)
    scales = _symmetric_scale(groups, shares, 32).squeeze(2)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = (largest / -128).half().float()
    s = _ratio(scales, d).round_().clamp_(-128, 127)
    best = (torch.full_like(d, torch.inf), d, torch.zeros_like(groups))
    for _ in range(2):
        step = (d * s).unsqueeze(2)
        codes = _ratio(groups, step).round_().clamp_(-32, 31)
        error = ((codes * step - groups).square_() * shares).sum((1, 2)).unsqueeze(1)
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better, d, best[1]),
            torch.where(better.unsqueeze(2), codes, best[2]),
        )
        a = codes * s.unsqueeze(2)
        weighted = a * shares
        d = _ratio((weighted * groups).sum((1, 2)), (weighted * a).sum((1, 2))).unsqueeze(1).half().float()
    _, d, codes = best
    packed = six_bit_codes((codes + 32).to(torch.uint8).flatten(1))
    return torch.cat((packed, _joined(s.to(torch.int8)), _joined(d.half())), 1)


def six_bit_codes(codes: Tensor) -> Tensor:
    """Codes 0 ... 63 of Q6_K blocks, uint8 [N, 256] -> their bytes, uint8 [N, 192]: low halves, then upper two bits."""
    # Weights 0 ... 31 and 64 ... 95 of each half share bytes, and so do 32 ... 63 and 96 ... 127.
    quarters = codes.view(-1, 2, 4, 32)
    low, high = quarters & 15, quarters >> 4
    ql = torch.stack((low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), 2)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat((ql.flatten(1), qh.flatten(1)), 1)


_ENCODERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q8_0": _encode_q8_0,
    "Q4_K": _encode_q4_k,
    "Q6_K": _encode_q6_k,
}


def _symmetric_scale(x: Tensor, weights: Tensor, top: int) -> Tensor:
    """The scale d, keepdim, with the least sum of weights (x - d q)^2, q in -top ... top - 1; its sign is free."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    weighted = x * weights
    best, scale = torch.full_like(largest, -1), torch.zeros_like(largest)
    codes = torch.empty_like(x)
    for stretch in _STRETCH:
        reach = _ratio(torch.full_like(largest, -(top + stretch)), largest)
        torch.mul(x, reach, out=codes).round_().clamp_(-top, top - 1)
        xq = torch.mul(weighted, codes).sum(-1, keepdim=True)
        qq = codes.square_().mul_(weights).sum(-1, keepdim=True)
        gain = _ratio(xq.square(), qq)  # by how much the error falls below that of all zeros
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, _ratio(xq, qq), scale)
    return scale


def _affine(x: Tensor, weights: Tensor, top: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """(scale, low), keepdim, with the least sum of weights (x - scale q - low)^2, q in 0 ... top; scale >= 0.

    bounded: low is not positive, as Q4_K needs it. Codes are tried from the smallest weight on, then from the best low
    of that round on.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if bounded:
        low = low.clamp(max=0)
    weighted = x * weights
    ones, total = weights.sum(-1, keepdim=True), weighted.sum(-1, keepdim=True)
    best, scale, least = torch.full_like(low, -torch.inf), (high - low) / top, low
    codes, shares = torch.empty_like(x), torch.empty_like(x)
    for _ in range(2):
        span, shifted = high - least, x - least
        for stretch in _STRETCH:
            torch.mul(shifted, _ratio(torch.full_like(span, top + stretch), span), out=codes).round_().clamp_(0, top)
            torch.mul(codes, weights, out=shares)
            q, qx = shares.sum(-1, True), torch.mul(codes, weighted).sum(-1, True)
            qq = shares.mul_(codes).sum(-1, True)
            slope = _ratio(ones * qx - total * q, ones * qq - q.square())
            start = _ratio(total - slope * q, ones)
            if bounded:
                slope, start = torch.where(start > 0, _ratio(qx, qq), slope), start.clamp(max=0)
            # By how much the error falls below that of all zeros.
            gain = slope * (2 * qx - slope * qq - 2 * start * q) + start * (2 * total - start * ones)
            better = (gain > best) & (slope >= 0)
            best = torch.where(better, gain, best)
            scale, least = torch.where(better, slope, scale), torch.where(better, start, least)
    return scale, least


def _least_squares(a: Tensor, b: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(u, v), keepdim, with the least sum of weights (u a + v b - x)^2; v = 0 where a and b are parallel."""
    wa, wb = a * weights, b * weights
    aa, ab, bb = (wa * a).sum(-1, True), (wa * b).sum(-1, True), (wb * b).sum(-1, True)
    ax, bx = (wa * x).sum(-1, True), (wb * x).sum(-1, True)
    determinant = aa * bb - ab.square()
    regular = determinant > 1e-6 * aa * bb
    u = torch.where(regular, _ratio(bb * ax - ab * bx, determinant), _ratio(ax, aa))
    v = torch.where(regular, _ratio(aa * bx - ab * ax, determinant), torch.zeros_like(u))
    return u, v


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N, 8], not negative -> (d [N, 1] in fp16 values, codes 0 ... 63 [N, 8] as floats)."""
    d = (values.amax(1, keepdim=True) / 63).half().float()
    return d, _ratio(values, d).round_().clamp_(0, 63)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return x * torch.where(y == 0, torch.zeros_like(y), 1 / y)


def nibbles(codes: Tensor) -> Tensor:
    """Codes of blocks of 32: uint8 [N, 32] -> uint8 [N, 16]: weight i low, weight i + 16 high."""
    return codes[:, :16] | codes[:, 16:] << 4


def _joined(*parts: Tensor) -> Tensor:
    """Parts [N, n] of any dtype side by side as bytes [N, bytes]."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)


def _packed_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight 6-bit scales and minima [N, 8] -> the 12 bytes of Q4_K (`ggml-quants.c`, get_scale_min_k4)."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    return torch.cat((first, second, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4), 1)


def _decode_q8_0(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _decode_q4_0(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * (_fromnibbles(blocks[:, 2:]) - 8)


def _decode_q4_1(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * _fromnibbles(blocks[:, 4:]) + half_at(blocks, 2)


def _decode_q4_k(blocks: Tensor) -> Tensor:
    pairs = blocks[:, 16:].reshape(-1, 4, 32)
    codes = torch.stack((pairs & 15, pairs >> 4), 2).view(-1, 8, 32).float()
    scales, minima = scales_and_minima(blocks)
    return (scales.unsqueeze(2) * codes + minima.unsqueeze(2)).flatten(1)


def scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of the groups of Q4_K blocks uint8 [N, 144], float32 [N, 8] each: weight = code * scale + minimum."""
    packed = blocks[:, 4:16]
    low, high = packed[:, :8] & 63, packed[:, :8] >> 6
    s = torch.cat((low[:, :4], (packed[:, 8:] & 15) | high[:, :4] << 4), 1).float()
    m = torch.cat((low[:, 4:], (packed[:, 8:] >> 4) | high[:, 4:] << 4), 1).float()
    return half_at(blocks, 0) * s, -(half_at(blocks, 2) * m)


def _decode_q6_k(blocks: Tensor) -> Tensor:
    ql, qh = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    low = torch.cat((ql & 15, ql >> 4), 2)
    high = torch.stack([qh >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    codes = (low | high << 4).view(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].view(torch.int8).float()
    return ((half_at(blocks, 208) * scales).unsqueeze(2) * codes).flatten(1)


def half_at(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at that byte of every block, float32 [N, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fromnibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), 1).float()


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q8_0": _decode_q8_0,
    "Q4_K": _decode_q4_k,
    "Q6_K": _decode_q6_k,
}
