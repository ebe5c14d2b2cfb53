"""Which method is better, on a model that has learned something: rtn > awq > gptq > gptq with full-precision targets,
and the last, our default, than the better of two other tools.

KL divergence from bf16 on held-out text, 4 bits, groups of 128, symmetric; docs/quantization.md has the figures
(0.0064, 0.0060, 0.0041, 0.0036). The margins asked for here are half of those measured, but for the other tools, where
it is the whole 10 % that we promise.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="the calibration text is tokenized: pip install tokenizers")

from qwenfit.quant import Recipe, quantize
from qwenfit.quant import fit as fit_module
from qwenfit.quant.calibration import consecutive_sequences, read_text, read_tokenizer
from qwenfit.quant.evaluate import evaluate
from qwenfit.quant.fit import Goal, fit

SMALL_HYBRID = Path(__file__).parents[1] / "data" / "small_hybrid"
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {"full_precision_targets": False},
    "default": {},
}
OTHERS = {32: 0.00296, 128: 0.00458}
"""The smaller of llm-compressor 0.14.0.1's and GPTQModel 7.6.0's GPTQ, 4 bits asymmetric, by group size: means over two
seeds of tests/bench/gptq_models.py, of its 8,192 calibration and 16,384 held-out tokens (docs/quantization.md)."""


@pytest.fixture(scope="module")
def divergence(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder, source = tmp_path_factory.mktemp("quality"), str(SMALL_HYBRID)
    text = read_text(str(SMALL_HYBRID / "heldout.txt"))
    sequences = consecutive_sequences(text, read_tokenizer(source), 256, 4096)
    calibration = str(SMALL_HYBRID / "calibration.txt")
    found = {}
    for name, changes in METHODS.items():
        recipe = Recipe(symmetric=True, calibration=calibration, tokens=8192, sequence_tokens=256, **changes)
        found[name] = evaluate(quantize(source, str(folder / name), recipe).target, source, sequences).mean_kl
    return found


def test_calibration_pays(divergence: dict[str, float]) -> None:
    assert divergence["gptq"] < 0.8 * divergence["rtn"], divergence
    assert divergence["awq"] < 0.98 * divergence["rtn"], divergence


def test_gptq_is_better_than_awq(divergence: dict[str, float]) -> None:
    assert divergence["gptq"] < 0.85 * divergence["awq"], divergence


def test_full_precision_targets_are_better(divergence: dict[str, float]) -> None:
    assert divergence["default"] < 0.95 * divergence["gptq"], divergence


@pytest.mark.parametrize("group_size", OTHERS)
def test_the_default_is_a_tenth_better_than_others(group_size: int, tmp_path: Path) -> None:
    source = str(SMALL_HYBRID)
    text = read_text(str(SMALL_HYBRID / "heldout.txt"))
    sequences = consecutive_sequences(text, read_tokenizer(source), 256, 16384)
    made = quantize(source, str(tmp_path / "made"), Recipe(group_size=group_size, sequence_tokens=256))
    assert made.recipe.symmetric is False
    found = evaluate(made.target, source, sequences).mean_kl
    assert found < 0.9 * OTHERS[group_size], found


def test_eight_bits_where_it_hurts_are_worth_more_than_elsewhere(tmp_path: Path) -> None:
    """A quarter of the weights at 8 bits: 0.0016 by sensitivity, 0.0039 in the opposite order."""
    source, calibration = str(SMALL_HYBRID), str(SMALL_HYBRID / "calibration.txt")
    recipe = Recipe(symmetric=True, calibration=calibration, tokens=8192, sequence_tokens=256)
    groups = fit(source, recipe, Goal("rtx3090", 4096)).sensitivities
    quarter = sum(group.weights for group in groups) // 4
    sequences = consecutive_sequences(read_text(str(SMALL_HYBRID / "heldout.txt")), read_tokenizer(source), 256, 4096)
    found = []
    for order in (groups, groups[::-1]):
        chosen, taken = [], 0
        for group in order:
            if taken + group.weights <= quarter:
                chosen.append(group)
                taken += group.weights
        target = str(tmp_path / f"made-{len(found)}")
        made = quantize(source, target, fit_module.raised(recipe, chosen))
        found.append(evaluate(made.target, source, sequences).mean_kl)
    assert found[0] < 0.6 * found[1], found
