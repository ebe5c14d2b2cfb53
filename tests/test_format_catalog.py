"""Expected divergence orders the formats the way the sources in `format_catalog.py` do."""

from qwenfit.profiles.format_catalog import ALIASES, FIXED, INTEGER_DIVERGENCE
from qwenfit.profiles.gguf_mixture import FILE_TYPES
from qwenfit.profiles.model_catalog import models

BEST_FIRST = [
    *("bf16", "q8_0", "fp8", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "iq4_xs", "gptq-int4-official"),
    *("q4_0", "q3_k_l", "q3_k_m", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "q3_k_s", "iq2_m", "q2_k", "q2_k_s", "iq2_s"),
    *("iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"),
]


def test_order() -> None:
    divergences = [FIXED[name].divergence for name in BEST_FIRST]
    assert divergences == sorted(divergences)
    assert len(set(divergences)) == len(divergences)


def test_figures_of_the_sweep() -> None:
    """reddit r/LocalLLaMA 1rr72lr, Qwen3.5-9B against bf16."""
    assert [FIXED[name].divergence for name in ("q8_0", "q4_k_m", "q4_k_s", "iq4_xs")] == [
        0.00081,
        0.0087,
        0.0108,
        0.0127,
    ]


def test_integers_lie_beside_the_gguf_types_of_their_bits() -> None:
    for bits, groups in INTEGER_DIVERGENCE.items():
        by_size = [groups[size] for size in sorted(groups, key=lambda size: size if size > 0 else 1 << 30)]
        assert by_size == sorted(by_size), bits
    assert FIXED["q8_0"].divergence < INTEGER_DIVERGENCE[8][128] < FIXED["fp8"].divergence
    assert FIXED["q4_k_s"].divergence < INTEGER_DIVERGENCE[4][128] < FIXED["q3_k_l"].divergence


def test_every_gguf_row_has_a_mixture_and_every_release_a_model() -> None:
    gguf = {name.removeprefix("gguf-").upper() for name, row in FIXED.items() if row.family == "gguf"}
    assert gguf == set(FILE_TYPES) - {"F32"}
    known = {found.name for found in models()}
    assert {name for row in FIXED.values() for name in row.releases} <= known
    assert not set(ALIASES) & set(FIXED)
