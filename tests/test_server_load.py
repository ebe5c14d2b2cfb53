"""The simulation beside llama-server under a recorded load. The data is what tests/bench/llama_server.py measured on
22 November 2026 with llama.cpp b11434 on two shared CPU cores; seconds are those that the server worked."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench" / "llama_server.py"
DATA = Path(__file__).parent / "data" / "llama_server_load.json"
SERVER = os.environ.get("QWENFIT_LLAMA_SERVER")


def bench() -> Any:
    spec = importlib.util.spec_from_file_location("llama_server_bench", BENCH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_was_measured_is_within_a_quarter_of_what_is_simulated() -> None:
    """Issue 5's bound, on the recorded answers: median and 95th percentile of first token and whole answer."""
    data, tool = json.loads(DATA.read_text()), bench()
    measured = {name: [one[name] for one in data["requests"]] for name in ("ttft_s", "latency_s")}
    rows = tool.compared(measured, tool.simulated(tool.fitted(data["probes"]), data["requests"]))
    assert len(rows) == 4
    for what, seen, expected in rows:
        assert expected == pytest.approx(seen, rel=0.25), what


def test_the_recorded_load_is_one_that_queues() -> None:
    """A load without waiting would test nothing: many of its requests find all four slots taken."""
    data, tool = json.loads(DATA.read_text()), bench()
    step = tool.fitted(data["probes"])
    queued = tool.simulated(step, data["requests"])["ttft_s"]
    alone = [tool.simulated(step, [{**one, "arrival_s": 0.0}])["ttft_s"][0] for one in data["requests"]]
    assert sum(a > 2 * b for a, b in zip(queued, alone, strict=True)) > len(queued) // 4


@pytest.mark.engines
@pytest.mark.skipif(not SERVER, reason="QWENFIT_LLAMA_SERVER names no llama-server")
def test_a_server_now() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--server", str(SERVER)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
