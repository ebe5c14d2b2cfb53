"""A quantized matrix between the method that chose its codes and the file that takes them.

Dimension letters in this room: O outputs (rows), I inputs (columns), G groups of columns with one scale each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is stored: everything about it that config.json has to say.

    group_size: columns per scale, or -1 for one scale per row. activation_bits: 8 where the engine is to round the
    activations too (W8A8: int8, symmetric, one scale per token, found while it runs); None: they stay as they are.
    kind: the type of GGML's blocks where the file is GGUF; it says everything else.
    """

    bits: int
    group_size: int
    symmetric: bool
    activation_bits: int | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) and self.kind is None:
            raise ValueError(f"files hold codes of 4 and 8 bits, not of {self.bits}")

    def groups(self, columns: int) -> int:
        """Scales per row. ValueError where the columns do not fall into equal groups."""
        size = columns if self.group_size == -1 else self.group_size
        if size < 1 or columns % size:
            raise ValueError(f"{columns} columns do not fall into groups of {self.group_size}")
        return columns // size


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """W[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g] with g = i // group_size.

    codes: uint8 [O, I], 0 ... 2^bits - 1, columns in the order of the original.
    scales: float32 [O, G], already rounded to the dtype that the file stores them in.
    zeros: uint8 [O, G]; where symmetric, 2^(bits - 1) everywhere.
    group_size: columns per scale; I where there is one scale per row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = (rows, columns // self.group_size)
        if columns % self.group_size or self.scales.shape != groups or self.zeros.shape != groups:
            raise ValueError(
                f"codes {list(self.codes.shape)}, scales {list(self.scales.shape)} and zeros {list(self.zeros.shape)} "
                f"are not of one matrix in groups of {self.group_size}"
            )
        if self.codes.dtype != torch.uint8 or self.zeros.dtype != torch.uint8 or self.scales.dtype != torch.float32:
            raise ValueError("codes and zeros are uint8, scales float32")

    @property
    def scheme(self) -> Scheme:
        """How it is stored, as weights alone tell: without `activation_bits`."""
        per_row = self.group_size == self.codes.shape[1]
        return Scheme(self.bits, -1 if per_row else self.group_size, self.symmetric)

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, part: slice) -> "Quantized":
        """Some of the rows."""
        codes, scales, zeros = self.codes[part], self.scales[part], self.zeros[part]
        return Quantized(codes, scales, zeros, self.bits, self.group_size, self.symmetric)

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, float32 [O, I]; (code - zero) is exact, so one rounding per element."""
        codes = self.codes.unflatten(1, (-1, self.group_size)).float()
        return codes.sub_(self.zeros.unsqueeze(2)).mul_(self.scales.unsqueeze(2)).flatten(1)


def exact_scales(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """The scales in the dtype of a file, [O, G]. ValueError where that would change them (round before solving), and
    for codes that no file holds.
    """
    scales = weight.scales.to(dtype)
    bits = weight.scheme.bits
    if not torch.equal(scales.float(), weight.scales):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"scales of {bits}-bit codes are not exact in {name}: round them before solving")
    return scales
