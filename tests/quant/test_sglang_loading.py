"""Checkpoints of `qwen-quant` in SGLang's own classes: every parameter filled, every tensor known, the draft's too.

    QWENFIT_SGLANG_PYTHON, QWENFIT_SGLANG_PATH    bash tests/engines/run quantized-sglang

SGLang leaves what it does not find as it was allocated, with a line in its log: files that it reads wrongly answer
nonsense and no error.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenfit.quant import Recipe, quantize

PYTHON, PACKAGE = os.environ.get("QWENFIT_SGLANG_PYTHON"), os.environ.get("QWENFIT_SGLANG_PATH")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not (PYTHON and PACKAGE), reason="QWENFIT_SGLANG_PYTHON and _PATH name no SGLang"),
]
MODELS = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
DRAFT = "Qwen3_5ForCausalLMMTP"
BOTH = {"mtp": 4, "group_size": 64}
RECIPES: dict[str, dict[str, Any]] = {
    "int4": {"group_size": 64},
    "int4, prediction": BOTH,
    "int4, head": {"lm_head": 4, **BOTH},
    "int4, head of 8": {"lm_head": 8, **BOTH},
    "int8, head, prediction": {"bits": 8, "lm_head": 8, "mtp": 8},
    "int8 by row": {"bits": 8, "group_size": -1},
    "gptq": {"format": "gptq", **BOTH},
    "gptq, head": {"format": "gptq", "lm_head": 4, **BOTH},
    "gptq of 8, head": {"format": "gptq", "bits": 8, "lm_head": 8, "mtp": 8, "group_size": 64},
    "awq": {"format": "awq", "group_size": 64},
}
DENSE = {"w8a8": {"activation_bits": 8}}
MOE = {
    "int4, shared": {"shared_experts": 4, **BOTH},
    "int4, shared of 8": {"shared_experts": 8, **BOTH},
    "gptq, shared": {"format": "gptq", "shared_experts": 4, **BOTH},
    "awq, shared": {"format": "awq", "shared_experts": 4, "group_size": 64},
}


def loaded(folder: Path) -> dict[str, Any]:
    script = Path(__file__).parent / "load_in_sglang.py"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), str(script), str(folder), "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("FOUND")).removeprefix("FOUND"))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *(("qwen3_5", case) for case in ({**RECIPES, **DENSE}).items()),
        *(("qwen3_5_moe", case) for case in ({**RECIPES, **MOE}).items()),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].replace(", ", "-").replace(" ", "-"),
)
def test_every_parameter_is_filled(
    name: str, recipe: tuple[str, dict[str, Any]], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(name, sees=True, for_kernels=True, tie_word_embeddings=False)
    quantize(str(folder), str(tmp_path / "made"), Recipe(**{"method": "rtn", **recipe[1]}))
    found = loaded(tmp_path / "made")
    model = found[MODELS[name == "qwen3_5_moe"]]
    assert not model["unknown"]
    # Orders of act-order are made up while experts are loaded.
    assert not [parameter for parameter in model["without"] if "g_idx" not in parameter]
    draft = found[DRAFT]
    assert not draft["unknown"]
    # Its head and embedding are those of the model (`init_lm_head`).
    assert not [parameter for parameter in draft["without"] if "g_idx" not in parameter and "head" not in parameter]


def test_what_the_planner_refuses_of_drafts(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """`planner/engines/sglang.py`: SGLang takes GPTQ experts in the draft, too, where the files keep them."""
    folder = checkpoint("qwen3_5_moe", sees=True, for_kernels=True, tie_word_embeddings=False)
    quantize(str(folder), str(tmp_path / "made"), Recipe(method="rtn", format="gptq", group_size=64))
    found = loaded(tmp_path / "made")
    draft = found[DRAFT] if DRAFT in found else found["draft"]
    assert "error" in draft or "model.layers.0.mlp.experts.w13_qweight" in draft["without"]
