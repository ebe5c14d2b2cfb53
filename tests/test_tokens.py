"""Counts of tokens: the rule is vLLM's own for --max-model-len (k = 1000, K = 1024, no decimals with K)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.planner.tokens import decimal_note, parse_tokens
from qwenfit.profiles.errors import BadInput


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("262144", 262_144),
        ("256K", 262_144),
        ("256k", 256_000),
        ("1M", 1_048_576),
        ("1m", 1_000_000),
        ("1.5k", 1_500),
        ("25.6k", 25_600),
        ("0.5m", 500_000),
        ("007", 7),
        ("0", 0),
        ("1000000000000", 10**12),
    ],
)
def test_counts(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text",
    # the last but one is Arabic-Indic, the last ends in a Cyrillic letter
    (
        *(
            "",
            "-1",
            "+1",
            "12 parsecs",
            "1.5K",
            "1.5M",
            "1.5",
            "K",
            "k",
            ".5k",
            "1.k",
            "1.2345k",
            "1e6",
            "1_000",
            "1,000",
        ),
        *("256 K", " 256", "256G", "²", "0x10", "nan", "inf", "9" * 400, "256KK", "١٢٣", "256К"),
    ),
)
def test_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_tokens(text)
    sentence = str(refused.value)
    assert "\n" not in sentence and len(sentence) < 200


@given(st.text(max_size=30))
def test_any_text_is_a_count_or_a_sentence(text: str) -> None:
    try:
        assert parse_tokens(text) >= 0
    except BadInput as refused:
        assert len(str(refused)) < 300


@given(st.integers(min_value=0, max_value=10**8), st.sampled_from(["K", "k", "M", "m"]))
def test_units_scale(number: int, unit: str) -> None:
    assert parse_tokens(f"{number}{unit}") == number * {"K": 1024, "k": 1000, "M": 1024**2, "m": 1000**2}[unit]


def test_small_letters_are_said_aloud() -> None:
    assert decimal_note("256k") == "256k is 256,000 tokens (k = 1000, m = 1,000,000); 256K would be 262,144"
    assert decimal_note("1.5k") == "1.5k is 1,500 tokens (k = 1000, m = 1,000,000)"
    assert decimal_note("256K") is None and decimal_note("262144") is None
