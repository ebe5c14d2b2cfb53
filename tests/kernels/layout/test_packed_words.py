"""Words of 32 bits as checkpoint files hold them, against shifts and masks on Python integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.kernels.layout.packed_words import bits_of, check, pack_words, unpack_words


@given(st.sampled_from([4, 8]), st.integers(1, 20), st.integers(0, 99))
def test_the_first_code_is_lowest(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_words(codes, bits)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << bits * place for place, code in enumerate(row))
        expected = [number >> 32 * place & 0xFFFFFFFF for place in range(-(-count * bits // 32))]
        assert [word & 0xFFFFFFFF for word in packed] == expected
    assert torch.equal(unpack_words(words, bits)[:, :count], codes)
    assert torch.equal(unpack_words(words[::2], bits)[:, :count], codes[::2])


def test_bits_follow_from_counts() -> None:
    assert bits_of(16, 128, "x") == 4
    assert bits_of(32, 128, "x") == 8
    assert bits_of(1, 1, "x") == 4  # one code fills one word in either case; 4 bits are tried first
    with pytest.raises(ValueError, match="x: 17 words of 32 bits do not hold 128 codes"):
        bits_of(17, 128, "x")


def test_dtype_and_dimensions_are_checked() -> None:
    check(torch.zeros(2, 3), torch.float32, 2, "x")
    for wrong in (torch.zeros(2), torch.zeros(2, 3).int(), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match=r"x is .*, not float32 with 2 dimensions"):
            check(wrong, torch.float32, 2, "x")
