"""The levels of a block are what llama.cpp would compute, and other codes go in without touching the scales."""

import pytest
import torch

from qwenfit.quant.gguf_blocks import KINDS, decode, encode
from qwenfit.quant.gguf_codes import code_bits, group_columns, levels, with_codes


def numbers(rows: int = 8, columns: int = 512) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[0, :256] = 0  # a block of zeros
    weight[1, 32:64] = 0  # a group of zeros
    return weight


@pytest.mark.parametrize("kind", KINDS)
def test_codes_times_scale_plus_minimum_is_what_blocks_decode_to(kind: str) -> None:
    weight = numbers()
    blocks = encode(weight, kind)
    found = levels(blocks, kind)
    assert (found.bits, found.group_size) == (code_bits(kind), group_columns(kind))
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**found.bits, weight.shape, generator=generator, dtype=torch.uint8)
    other = with_codes(blocks, codes, kind)
    grouped = codes.view(len(codes), -1, found.group_size).double()
    expected = grouped * found.scales.unsqueeze(2).double() + found.minima.unsqueeze(2).double()
    torch.testing.assert_close(decode(other, kind).double(), expected.flatten(1), rtol=0, atol=2e-6)
    again = levels(other, kind)
    assert torch.equal(again.scales, found.scales) and torch.equal(again.minima, found.minima)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_codes_give_the_rounded_blocks_or_better(kind: str) -> None:
    weight = numbers()
    blocks = encode(weight, kind)
    found = levels(blocks, kind)
    grouped = weight.view(len(weight), -1, found.group_size)
    scales = torch.where(found.scales == 0, 1.0, found.scales).unsqueeze(2)
    codes = ((grouped - found.minima.unsqueeze(2)) / scales).round().clamp(0, 2**found.bits - 1)
    ours = decode(with_codes(blocks, codes.to(torch.uint8).flatten(1), kind), kind)
    theirs = decode(blocks, kind)
    assert float((ours - weight).square().sum()) <= 1.00001 * float((theirs - weight).square().sum())
