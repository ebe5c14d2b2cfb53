"""Codes of 4 or 8 bits in 32-bit words, as checkpoint files hold them: along the last dimension, the first code lowest.

A word is little-endian wherever torch runs, so its bytes are its codes (8 bits), or pairs of them (4 bits): everything
here is work on bytes.
"""

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> codes uint8 [..., n * 32 / bits]."""
    pairs = words.contiguous().view(torch.uint8)
    if bits == 8:
        return pairs
    wide = pairs.to(torch.int16)  # a byte, then the same with its halves in a byte each
    return (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., n] -> int32 [..., n * bits / 32 rounded up], the last word filled up with zero bits."""
    padding = -codes.shape[-1] % (32 // bits)
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    codes = codes.contiguous()
    if bits == 4:
        pairs = codes.view(torch.int16)
        codes = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    return codes.view(torch.int32)


def bits_of(words: int, codes: int, what: str) -> int:
    """4 or 8: how wide `codes` codes are that fill `words` words; ValueError, naming `what`, for any other number."""
    for bits in (4, 8):
        if codes > 0 and words == -(-codes * bits // 32):
            return bits
    raise ValueError(f"{what}: {words} words of 32 bits do not hold {codes} codes of 4 or 8 bits; the shapes disagree")


def check(tensor: Tensor, dtype: torch.dtype, dimensions: int, what: str) -> None:
    """ValueError, naming `what`, unless the tensor has that dtype and number of dimensions and no empty one."""
    if tensor.dtype != dtype or tensor.dim() != dimensions or 0 in tensor.shape:
        expected = f"{str(dtype).removeprefix('torch.')} with {dimensions} dimensions"
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ValueError(f"{what} is {found}, not {expected}: the file is damaged or in another format")
