"""`qwen-plan verify` with the engines themselves: started with the planned line, measured, scored, stopped. Slow.

    QWENFIT_LLAMA_SERVER   a built llama-server                    bash tests/engines/run verify-llama.cpp
    QWENFIT_VLLM_PYTHON    an interpreter with vLLM's CPU build    bash tests/engines/run verify-vllm

Models are tests/data/small_hybrid, as it is and quantized by us to GGUF. SGLang has no build for a CPU: its logs are
read (tests/test_engine_log.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenfit.planner.receipt_file import read_receipt

pytestmark = pytest.mark.engines
SERVER, VLLM = (os.environ.get(f"QWENFIT_{name}") for name in ("LLAMA_SERVER", "VLLM_PYTHON"))
SMALL = Path(__file__).parent.parent / "data" / "small_hybrid"
BUFFER_GOAL = 0.02  # of issue 6
BOX = """
name: my-box
vendor: cpu
kind: cpu
architecture: x86_64
memory_gib: 16
memory_bandwidth_bytes_per_s: 18000000000
flops_per_s: {fp32: 100000000000}
"""


def qwen_plan(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "qwenfit.cli.plan", *words], capture_output=True, text=True)
    if words[0] == "verify":
        print(f"\n{done.stderr}{done.stdout}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def verified(folder: Path, engine: str, binary: str, model: str, *more: str) -> dict[str, Any]:
    """The verification of a plan for a small box. Speeds are told: the build is what it is."""
    (folder / "box.yaml").write_text(BOX)
    plan, out, receipt = (str(folder / name) for name in ("plan.json", "out.json", "receipt.json"))
    words = ("--model", model, "--gpu", str(folder / "box.yaml"), "--engine", engine, *more, "--json")
    Path(plan).write_text(qwen_plan(*words))
    words = ("verify", plan, "--engine", engine, "--binary", binary, "--memory-only", "--prompt-tokens", "128")
    qwen_plan(*words, "--output", out, "--receipt", receipt)
    assert read_receipt(receipt).log.engine == engine
    told = json.loads(Path(out).read_text())
    assert told["holds"] and told["engine"] == engine
    rates = {one["name"]: one["measured"] for one in told["rates"]}
    assert rates["decode_tokens_per_s"] > 1 and rates["prefill_tokens_per_s"] > 1
    assert str(folder) not in Path(out).read_text() + Path(receipt).read_text()
    return told


@pytest.mark.skipif(not SERVER, reason="QWENFIT_LLAMA_SERVER names no built llama-server")
@pytest.mark.parametrize(("ctx", "seqs", "kv"), [("4096", "1", "f16"), ("2048", "4", "q8_0"), ("32768", "2", "f16")])
def test_llama_cpp(ctx: str, seqs: str, kv: str, gguf: str, tmp_path: Path) -> None:
    """Every buffer within 2 % of what the plan says, or within the hundredth of a MiB that the log rounds to."""
    told = verified(tmp_path, "llama.cpp", str(SERVER), gguf, "--ctx", ctx, "--seqs", seqs, "--kv-dtype", kv)
    parts = {one["part"]: one for one in told["scores"]}
    assert {"weights", "kv_cache", "recurrent_state", "activation"} <= parts.keys()
    for one in parts.values():
        off = abs(one["planned_bytes"]["mid"] - one["measured_bytes"])
        assert off <= BUFFER_GOAL * one["measured_bytes"] + one["resolution_bytes"], one
    assert told["peak_bytes"] > parts["total"]["measured_bytes"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GGUF of small_hybrid by our quantizer: Q4_K and Q6_K."""
    pytest.importorskip("torch", reason="the quantizer needs torch")
    from qwenfit.quant import Recipe, quantize

    folder = tmp_path_factory.mktemp("gguf") / "small"
    quantize(str(SMALL), str(folder), Recipe(format="gguf", bits=4, method="rtn"))
    return str(next(folder.glob("*.gguf")))


@pytest.mark.skipif(not VLLM, reason="QWENFIT_VLLM_PYTHON names no interpreter with vLLM")
def test_vllm(tmp_path: Path) -> None:
    """Its CPU build: the pool is what VLLM_CPU_KVCACHE_SPACE in the planned line says."""
    told = verified(tmp_path, "vllm", str(VLLM), str(SMALL), "--ctx", "1024", "--seqs", "2")
    (pool,) = (one for one in told["scores"] if one["part"] == "kv_cache+recurrent_state")
    assert pool["measured_bytes"] == 1 << 30 and told["settings"]["seqs"] == 2
    assert told["command"].startswith("VLLM_CPU_KVCACHE_SPACE=1 python")
