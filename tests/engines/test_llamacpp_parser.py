"""Launch lines against llama.cpp's own argument parser.

QWENFIT_LLAMA_SERVER: a built llama-server. It parses words in order and leaves at `--version`, so every line that ends
in it is parsed to the end, and nothing is loaded.
QWENFIT_LLAMACPP_SOURCE: a source tree. The flags are read from `common/arg.cpp`.
"""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from qwenfit.planner.engines import llamacpp, ollama
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.engines.llamacpp_cache import CACHE_TYPES
from qwenfit.planner.request import Options
from qwenfit.profiles import devices_of
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.model_catalog import model

pytestmark = pytest.mark.engines

SERVER = os.environ.get("QWENFIT_LLAMA_SERVER")
SOURCE = os.environ.get("QWENFIT_LLAMACPP_SOURCE")
LINES = {
    "plain": ("qwen3.5-9b", "q4_k_m", "rtx3060", "q8_0", 0, False, Options(), 262144, 1),
    "rope scaling": ("qwen3.5-9b", "q8_0", "a100-80gb", "f16", 0, False, Options(), 1_010_000, 1),
    "vision": ("qwen3.5-9b", "q4_k_m", "rtx4090", "f16", 0, True, Options(image_tokens=1024), 32768, 4),
    "draft": ("qwen3.6-27b", "q4_k_m-mtp", "rtx4090", "q8_0/q5_1", 3, False, Options(), 65536, 1),
    "two devices": ("qwen3.6-27b", "q8_0", "rtx3090,rtx3060", "f16", 3, False, Options(), 65536, 2),
    "experts on the host": ("qwen3.5-35b-a3b", "q4_k_m", "rtx3060", "q4_0", 0, False, Options(), 65536, 1),
    "all experts": ("qwen3.5-35b-a3b", "q4_k_m", "rtx4090", "bf16", 0, False, Options(offload_experts=True), 4096, 1),
    "little host memory": (
        "qwen3.5-9b", "q4_k_m", "rtx3060", "f16", 0, False, Options(host_memory_bytes=8 << 30), 4096, 1,
    ),
    "metal": ("qwen3.5-9b", "q4_k_m", "m1-16gb", "f16", 0, False, Options(ubatch_tokens=1024), 4096, 1),
    "cpu": ("qwen3.5-9b", "q4_0", "desktop-ddr5-2ch-16gb", "iq4_nl", 0, False, Options(), 4096, 2),
}  # fmt: skip


def line(name: str) -> str:
    asked, fmt, spec, kv_dtype, mtp, vision, options, ctx_tokens, seqs = LINES[name]
    devices = devices_of(spec)
    parts = (model(asked), weight_format(fmt), devices, "b11434", kv_dtype, "float32", 1, len(devices), mtp, vision)
    return llamacpp.estimate(Setup(*parts, options)).command(ctx_tokens, seqs)


@pytest.mark.skipif(not SERVER, reason="QWENFIT_LLAMA_SERVER names no built llama-server")
@pytest.mark.parametrize("name", LINES)
def test_the_server_parses_the_line(name: str) -> None:
    program, *words = shlex.split(line(name))
    assert program == "llama-server"
    done = subprocess.run([str(SERVER), *words, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "version" in done.stdout + done.stderr


@pytest.mark.skipif(not SERVER, reason="QWENFIT_LLAMA_SERVER names no built llama-server")
@pytest.mark.parametrize("wrong", [["--n-cpu-moo", "3"], ["-ctk", "fp8"], ["-fa", "maybe"], ["--spec-type", "mtp2"]])
def test_the_server_refuses_what_is_wrong(wrong: list[str]) -> None:
    """Otherwise the test above would prove nothing."""
    done = subprocess.run([str(SERVER), *wrong, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0


@pytest.mark.skipif(not SERVER, reason="QWENFIT_LLAMA_SERVER names no built llama-server")
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_the_server_knows_every_cache_type(cache_type: str) -> None:
    words = ["-ctk", cache_type, "-ctv", cache_type, "--version"]
    assert subprocess.run([str(SERVER), *words], capture_output=True, timeout=60).returncode == 0


@pytest.mark.skipif(not SOURCE, reason="QWENFIT_LLAMACPP_SOURCE names no source tree of llama.cpp")
@pytest.mark.parametrize("name", LINES)
def test_every_flag_is_in_the_source(name: str) -> None:
    import re

    text = (Path(str(SOURCE)) / "common" / "arg.cpp").read_text(encoding="utf-8")
    known = {
        flag
        for group in re.findall(r"\{((?:\s*\"-[^\"]*\",?)+)\s*\}", text)
        for flag in re.findall(r"-[^\",\s]+", group)
    }
    assert len(known) > 200
    flags = [word for word in shlex.split(line(name)) if word.startswith("-")]
    assert flags and set(flags) <= known, set(flags) - known


def test_ollamas_line_is_one_that_a_shell_parses() -> None:
    devices = devices_of("rtx3060")
    parts = (model("qwen3.5-9b"), weight_format("q4_k_m"), devices, "0.33.0", "q8_0", "float32", 1, 1, 0, False)
    command = ollama.estimate(Setup(*parts, Options())).command(32768, 1)
    assert subprocess.run(["sh", "-n", "-c", command], capture_output=True, timeout=20).returncode == 0
    assert command.endswith("ollama run qwen3.5:9b")
