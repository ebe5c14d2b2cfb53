"""What engines that run here print at boot, read and set beside their plans.

QWENFIT_LLAMA_SERVER   a built llama-server                  bash tests/engines/run llama.cpp
QWENFIT_VLLM_PYTHON    an interpreter with vLLM's CPU build  bash tests/engines/run vllm
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenfit.planner import EnginePlan, Request, plan
from qwenfit.planner.logs.engine_log import read_log
from qwenfit.planner.scores import score

sys.path.append(str(Path(__file__).parent.parent / "bench"))
SERVER, VLLM = os.environ.get("QWENFIT_LLAMA_SERVER"), os.environ.get("QWENFIT_VLLM_PYTHON")
pytestmark = pytest.mark.engines
READY_S = 120
VLLM_CHILD = """
import sys
from vllm import LLM
if __name__ == "__main__":
    LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, max_model_len=int(sys.argv[2]), max_num_seqs=2,
        enforce_eager=True, dtype="bfloat16", max_num_batched_tokens=2048)
"""


def booted(command: list[str], ready: str, path: Path) -> str:
    """What a server prints until it is ready; it is ended then."""
    with open(path, "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        ends = time.monotonic() + READY_S
        while ready not in path.read_text(errors="replace"):
            assert server.poll() is None and time.monotonic() < ends, path.read_text(errors="replace")[-2000:]
            time.sleep(0.1)
    finally:
        server.terminate()
        server.wait(20)
    return path.read_text(errors="replace")


@pytest.mark.skipif(not SERVER, reason="QWENFIT_LLAMA_SERVER names no built llama-server")
@pytest.mark.parametrize(("ctx_tokens", "seqs", "kv_dtype"), [(2048, 2, "f16"), (8192, 1, "q8_0"), (512, 4, "f16")])
def test_llama_server_by_its_buffers(ctx_tokens: int, seqs: int, kv_dtype: str, tmp_path: Path) -> None:
    """Every buffer within 2 %, and the exact ones to the last printed digit."""
    pytest.importorskip("gguf")
    from llama_server import write_model

    model = str(tmp_path / "small.gguf")
    write_model(model)
    asked = Request(
        model=model, devices=("auto",), ctx_tokens=ctx_tokens, seqs=seqs, engine="llama.cpp", kv_dtype=kv_dtype
    )
    found: EnginePlan = plan(asked).best
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = found.command.split()
    command = [str(SERVER), *words[1:], "-lv", "4", "--host", "127.0.0.1", "--port", str(port), "-t", "1"]
    log = read_log(booted(command, "listening on", tmp_path / "boot.log"))
    assert (log.engine, log.settings["ctx_tokens"], log.settings["seqs"]) == ("llama.cpp", ctx_tokens, seqs)
    scores = score(found, log)
    assert {one.part for one in scores} == {"weights", "kv_cache", "recurrent_state", "activation", "total"}
    for one in scores:
        assert one.within and abs(one.error) < 0.02, one


@pytest.mark.skipif(not VLLM, reason="QWENFIT_VLLM_PYTHON names no interpreter with vLLM")
def test_vllm_on_a_cpu_by_its_tokens(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parent.parent / "data" / "tiny_qwen3_5.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "child.py").write_text(VLLM_CHILD)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(VLLM), str(tmp_path / "child.py"), str(tmp_path), "1024"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    log = read_log(done.stdout + done.stderr)
    found = plan(
        Request(
            model=str(tmp_path / "config.json"),
            devices=("auto",),
            ctx_tokens=1024,
            seqs=2,
            engine=f"vllm@{log.version}",
            weights="bf16",
            kv_dtype="bf16",
        )
    ).best
    assert all(one.within for one in score(found, log))
    for key in ("kv_cache_tokens", "max_concurrency"):
        assert found.detail[key] == log.facts[key]
