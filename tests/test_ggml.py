"""GGML's block sizes, rebuilt from the fields of llama.cpp's structs (`ggml/src/ggml-common.h`, b11434)."""

import pytest

from qwenfit.profiles.ggml import GGML_TYPE_IDS, GGML_TYPES

HALF, WORD = 2, 4

STRUCTS = {
    "Q4_0": (32, [HALF, 32 // 2]),
    "Q4_1": (32, [HALF, HALF, 32 // 2]),
    "Q5_0": (32, [HALF, WORD, 32 // 2]),
    "Q5_1": (32, [HALF, HALF, WORD, 32 // 2]),
    "Q8_0": (32, [HALF, 32]),
    "Q2_K": (256, [256 // 16, 256 // 4, HALF, HALF]),
    "Q3_K": (256, [256 // 8, 256 // 4, 12, HALF]),
    "Q4_K": (256, [HALF, HALF, 12, 256 // 2]),
    "Q5_K": (256, [HALF, HALF, 12, 256 // 8, 256 // 2]),
    "Q6_K": (256, [256 // 2, 256 // 4, 256 // 16, HALF]),
    "IQ2_XXS": (256, [HALF, 2 * 256 // 8]),
    "IQ2_XS": (256, [HALF, 2 * 256 // 8, 256 // 32]),
    "IQ2_S": (256, [HALF, 256 // 4, 256 // 32, 256 // 32]),
    "IQ3_XXS": (256, [HALF, 3 * 256 // 8]),
    "IQ3_S": (256, [HALF, 256 // 4, 256 // 32, 256 // 8, 256 // 64]),
    "IQ1_S": (256, [HALF, 256 // 8, 2 * 256 // 32]),
    "IQ1_M": (256, [256 // 8, 256 // 16, 256 // 32]),
    "IQ4_NL": (32, [HALF, 32 // 2]),
    "IQ4_XS": (256, [HALF, 2, 256 // 64, 256 // 2]),
    "MXFP4": (32, [1, 32 // 2]),
    "NVFP4": (64, [64 // 16, 64 // 2]),
    "TQ1_0": (256, [(256 - 4 * 256 // 64) // 5, 256 // 64, HALF]),
    "TQ2_0": (256, [256 // 4, HALF]),
}


@pytest.mark.parametrize("name", STRUCTS)
def test_block_is_the_sum_of_its_fields(name: str) -> None:
    elements, fields = STRUCTS[name]
    assert GGML_TYPES[name] == (elements, sum(fields))


def test_every_id_names_a_known_type_once() -> None:
    assert sorted(GGML_TYPE_IDS.values()) == sorted(GGML_TYPES)
    assert (GGML_TYPE_IDS[0], GGML_TYPE_IDS[12], GGML_TYPE_IDS[30], GGML_TYPE_IDS[39]) == (
        "F32",
        "Q4_K",
        "BF16",
        "MXFP4",
    )
