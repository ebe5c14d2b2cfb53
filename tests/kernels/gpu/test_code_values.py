"""Codes become numbers exactly, and inline assembly gives the bits of its twin in pure Triton.

The assembly itself runs on no machine here: what is compared are the numpy functions below, which say what its text
does instruction by instruction, through the interpreter's hook. That ptxas takes the text, the compile matrix shows.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
import triton.language as tl  # noqa: E402

from qwenfit.kernels.gpu import matmul  # noqa: E402
from qwenfit.kernels.gpu.code_values import (  # noqa: E402
    expert_of_row,
    expert_of_tile,
    int4_values,
    int8_values,
    magic_number,
)
from qwenfit.kernels.gpu.target import INTERPRETED  # noqa: E402
from qwenfit.kernels.layout.packing import quantize_rtn  # noqa: E402

FLOATS = {torch.bfloat16: (ml_dtypes.bfloat16, 0x4300), torch.float16: (np.float16, 0x6400)}


def lop3_and_or(a: Any, mask: int, bits: int) -> Any:
    """lop3.b32 with the table 0xea: (a & mask) | bits."""
    return (a & np.uint32(mask)) | np.uint32(bits)


def nibble_twin(shift: int, magic: int, kind: Any) -> Callable[[Any], Any]:
    def run(words: Any) -> Any:
        pairs = np.ascontiguousarray(words).view(np.uint32)  # pack = 2: two words in a register
        return lop3_and_or(pairs >> np.uint32(shift), 0x000F000F, magic << 16 | magic).view(kind)

    return run


def bytes_to_bfloat16(codes: Any) -> Any:
    registers = np.ascontiguousarray(codes).view(np.uint32)  # pack = 4
    out = np.empty((*registers.shape, 2), np.uint32)
    for half in range(2):
        # prmt 0x4140 and 0x4342: two bytes, each below a zero byte
        a = (registers >> np.uint32(16 * half)) & np.uint32(0xFF) | ((registers >> np.uint32(16 * half + 8)) << 16) & (
            np.uint32(0x00FF0000)
        )
        c = lop3_and_or(a, 0x00800080, 0xC300C300).view(ml_dtypes.bfloat16)
        low = lop3_and_or(a, 0x007F007F, 0x43004300).view(ml_dtypes.bfloat16)
        total = low.astype(np.float32) + c.astype(np.float32)  # fma by one, rounded to bfloat16: exact
        out[..., half] = total.astype(ml_dtypes.bfloat16).view(np.uint32)
    return out.view(ml_dtypes.bfloat16).reshape(codes.shape)


def bytes_to_float16(codes: Any) -> Any:
    registers = np.ascontiguousarray(codes).view(np.uint32) ^ np.uint32(0x80808080)
    magic = np.array([0x64806480], np.uint32).view(np.float16)[0]
    out = np.empty((*registers.shape, 2), np.uint32)
    for half in range(2):
        pair = (registers >> np.uint32(16 * half)) & np.uint32(0xFF) | (
            (registers >> np.uint32(16 * half + 8)) << 16
        ) & np.uint32(0x00FF0000)
        out[..., half] = ((pair | np.uint32(0x64006400)).view(np.float16) - magic).view(np.uint32)
    return out.view(np.float16).reshape(codes.shape)


@pytest.fixture
def twins(assembly: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Every assembly text of `gpu/code_values.py` with what it does."""
    for shift in (0, 4, 8, 12):
        for kind, magic in FLOATS.values():
            text = "{ .reg .b32 a; shr.u32 a, $1, %d; lop3.b32 $0, a, 0x000f000f, 0x%04x%04x, 0xea; }"
            assembly[text % (shift, magic, magic)] = nibble_twin(shift, magic, kind)
    assembly[
        "{ .reg .b32 a, b, m; mov.b32 m, 0x64806480; xor.b32 a, $2, 0x80808080;"
        " prmt.b32 b, a, 0x64646464, 0x4342; prmt.b32 a, a, 0x64646464, 0x4140;"
        " sub.f16x2 $0, a, m; sub.f16x2 $1, b, m; }"
    ] = bytes_to_float16
    assembly[
        "{ .reg .b32 a, b, c, d, one; mov.b32 one, 0x3f803f80;"
        " prmt.b32 a, $2, 0, 0x4140; prmt.b32 b, $2, 0, 0x4342;"
        " lop3.b32 c, a, 0x00800080, 0xc300c300, 0xea; lop3.b32 d, b, 0x00800080, 0xc300c300, 0xea;"
        " lop3.b32 a, a, 0x007f007f, 0x43004300, 0xea; lop3.b32 b, b, 0x007f007f, 0x43004300, 0xea;"
        " fma.rn.bf16x2 $0, a, one, c; fma.rn.bf16x2 $1, b, one, d; }"
    ] = bytes_to_bfloat16
    return assembly


@triton.jit
def values_kernel(
    codes,
    out,
    zero,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    EMULATED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    at = tl.arange(0, SIZE)
    dtype: tl.constexpr = out.dtype.element_ty
    taken = tl.zeros([1], tl.float32) + (zero + magic_number(BITS, dtype))
    if BITS == 4:
        words = tl.load(codes + at)[None, :]
        for j in tl.static_range(4):
            values = int4_values(words, taken.to(dtype), j, dtype, EMULATED, ASSEMBLY)
            tl.store(out + (j * SIZE + at)[None, :], values)
    else:
        taken = taken if EMULATED else taken.to(dtype)
        values = int8_values(tl.load(codes + at)[None, :], taken, True, dtype, EMULATED, ASSEMBLY)
        tl.store(out + at[None, :], values)


@pytest.mark.parametrize("assembled", (False, True))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_int4_code_less_every_zero_point(
    dtype: torch.dtype, assembled: bool, twins: dict[str, Callable[..., Any]]
) -> None:
    words = torch.arange(0, 1 << 16, 37, dtype=torch.int32)[:1024].to(torch.uint16)
    nibbles = torch.stack([(words.to(torch.int32) >> 4 * j) & 15 for j in range(4)])
    for zero in (0, 7, 8, 15, 16):
        out = torch.empty(4, 1024, dtype=dtype)
        values_kernel[(1,)](words, out, float(zero), 4, 1024, False, assembled)
        assert torch.equal(out, (nibbles - zero).to(dtype))


@pytest.mark.parametrize("assembled", (False, True))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_int8_code_less_zero_points(
    dtype: torch.dtype, assembled: bool, twins: dict[str, Callable[..., Any]]
) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)
    for zero in (-128, -3, 0, 127):
        out = torch.empty(256, dtype=dtype)
        values_kernel[(1,)](codes, out, float(zero), 8, 256, False, assembled)
        assert torch.equal(out, (codes.int() - zero).to(dtype))


def test_int8_without_bfloat16_arithmetic() -> None:
    codes, out = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8), torch.empty(256, dtype=torch.bfloat16)
    for zero in (-128, 0, 127):
        values_kernel[(1,)](codes, out, float(zero), 8, 256, True, False)
        assert torch.equal(out, (codes.int() - zero).bfloat16())


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_matmul_has_the_same_bits_with_assembly(
    dtype: torch.dtype, bits: int, twins: dict[str, Callable[..., Any]]
) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = quantize_rtn(torch.randn(40, 256, generator=generator), bits, 64, symmetric=False)
    x = torch.randn(3, 256, generator=generator).to(dtype)
    results = [torch.empty(3, 40) for _ in range(2)]
    for assembled, out in enumerate(results):
        matmul.multiply_by_tiles(x, weight, None, out, INTERPRETED, 2, assembly=bool(assembled))
    assert torch.equal(*results)


@triton.jit
def experts_kernel(offsets, rows, tiles, COUNT: tl.constexpr, HEIGHT: tl.constexpr, EXPERTS: tl.constexpr):
    for at in range(COUNT):
        tl.store(rows + at, expert_of_row(offsets, at, EXPERTS, 8))
        expert, begin, end = expert_of_tile(offsets, at, HEIGHT, EXPERTS, 8)
        tl.store(tiles + 3 * at, expert)
        tl.store(tiles + 3 * at + 1, begin)
        tl.store(tiles + 3 * at + 2, end)


@pytest.mark.parametrize("counts", ([0, 5, 0, 9, 4, 0], [18, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 18], [1, 2, 3, 4, 5, 3]))
def test_rows_and_tiles_find_their_expert(counts: list[int]) -> None:
    """Against the loop that a host would run over the counts; tiles that are not there have expert 6 or more."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    offsets = torch.tensor([0, *ends], dtype=torch.int32)
    rows, tiles = torch.zeros(18, dtype=torch.int32), torch.zeros(18, 3, dtype=torch.int32)
    experts_kernel[(1,)](offsets, rows, tiles, 18, 4, 6)
    assert rows.tolist() == [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected = [
        (expert, begin, end)
        for expert, (count, end) in enumerate(zip(counts, ends, strict=True))
        for begin in range(end - count, end, 4)
    ]
    found = [tuple(tile) for tile in tiles.tolist()]
    assert found[: len(expected)] == expected
    assert all(tile[0] >= 6 for tile in found[len(expected) :])
