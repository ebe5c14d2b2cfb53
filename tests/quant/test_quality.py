"""Which method is better, on a model that has learned something: rtn > awq > gptq > gptq with full-precision targets.

KL divergence from bf16 on held-out text, 4 bits, groups of 128, symmetric; docs/quantization.md has the figures
(0.0064, 0.0060, 0.0041, 0.0036). The margins asked for here are half of those measured.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="the calibration text is tokenized: pip install tokenizers")

from qwenfit.quant import Recipe, quantize
from qwenfit.quant.calibration import consecutive_sequences, read_text, read_tokenizer
from qwenfit.quant.evaluate import evaluate

SMALL_HYBRID = Path(__file__).parents[1] / "data" / "small_hybrid"
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {},
    "gptaq": {"full_precision_targets": True},
}


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
    assert divergence["gptaq"] < 0.95 * divergence["gptq"], divergence
