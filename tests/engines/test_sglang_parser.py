"""The launch lines, given to SGLang's own argument parser.

Set QWENFIT_SGLANG_PYTHON to an interpreter that can import `sglang.srt.server_args`, and run
`pytest -m engines tests/engines/test_sglang_parser.py`; without it these tests are skipped. A whole installation needs
CUDA packages; for the parser it is enough to unpack the wheel of sglang 0.5.23, name that folder in
QWENFIT_SGLANG_PATH, and have torch (the CPU build), transformers, orjson, IPython and what else it imports.
"""

import json
import os
import shlex
import subprocess
from itertools import pairwise
from typing import Any

import pytest

from qwenfit.planner import Request, plan
from qwenfit.planner.engines import sglang
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles import devices_of, model, weight_format

PYTHON = os.environ.get("QWENFIT_SGLANG_PYTHON")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="QWENFIT_SGLANG_PYTHON names no interpreter with SGLang"),
]

CHILD = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs

parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
answers = []
for words in json.load(sys.stdin):
    parsed = vars(parser.parse_args(words))
    answers.append({name: value for name, value in parsed.items() if isinstance(value, (str, int, float, type(None)))})
sys.stdout.write("ANSWERS" + json.dumps(answers))
"""


def line(name: str, weights: str, where: str, ctx_tokens: int, seqs: int, **told: Any) -> str:
    box = devices_of(where)
    settings = {
        "version": "0.5.23",
        "kv_dtype": "bf16",
        "state_dtype": "float32",
        "tp": len(box),
        "pp": 1,
        "mtp": 0,
        "vision": False,
        "options": Options(),
    }
    setup = Setup(model(name), weight_format(weights), box, **{**settings, **told})
    return sglang.estimate(setup).command(ctx_tokens, seqs)


def lines_of_boxes(box: str, nodes: int, **told: Any) -> list[str]:
    found = plan(Request(devices=(box,), nodes=nodes, engine="sglang", ctx_tokens=8192, **told)).best
    told_lines = found.detail.get("node_commands")
    return [str(one) for one in told_lines] if isinstance(told_lines, list) else [found.command]


LINES = [
    line("qwen3.5-9b", "int4", "rtx3060", 65536, 1, kv_dtype="fp8_e4m3"),
    line("qwen3.5-9b", "bf16", "rtx3090", 32768, 2, state_dtype="bfloat16", kv_dtype="fp8_e5m2"),
    line("qwen3.5-27b", "fp8", "2xh100-sxm", 1_010_000, 1, mtp=2, vision=True),
    line(
        "qwen3.5-9b",
        "bf16",
        "2xrtx3060",
        16384,
        4,
        tp=1,
        pp=2,
        options=Options(prefix_caching=False, cuda_graphs=False),
    ),
    line("qwen3-next-80b", "fp8", "2xa100-80gb", 524288, 3),
    line("qwen3.5-122b-a10b", "nvfp4", "b200", 262144, 16),
    *lines_of_boxes("8xa100-80gb", 2, model="397b-a17b", weights="bf16"),
    *lines_of_boxes("8xa100-80gb", 2, model="397b-a17b", weights="bf16", dp=2, seqs=8),
    *lines_of_boxes("dgx-spark", 4, model="397b-a17b", weights="gptq-int4-official", tp=4),
    *lines_of_boxes("4xh100-sxm", 1, model="27b", dp=4, tp=1, seqs=16),
]


def test_every_line_is_accepted_and_means_what_was_planned() -> None:
    assert PYTHON
    calls = []
    for text in LINES:
        words = shlex.split(text)
        calls.append(words[words.index("sglang.launch_server") + 1 :])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if os.environ.get("QWENFIT_SGLANG_PATH"):
        environment["PYTHONPATH"] = os.environ["QWENFIT_SGLANG_PATH"]
    done = subprocess.run(
        [PYTHON, "-c", CHILD], input=json.dumps(calls), capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.split("ANSWERS", 1)[1])
    for words, found in zip(calls, answers, strict=True):
        given = {name: value for name, value in pairwise(words) if name.startswith("--")}
        for name, field in (
            ("--context-length", "context_length"),
            ("--max-running-requests", "max_running_requests"),
            ("--mem-fraction-static", "mem_fraction_static"),
            ("--max-mamba-cache-size", "max_mamba_cache_size"),
            ("--chunked-prefill-size", "chunked_prefill_size"),
            ("--tp-size", "tp_size"),
            ("--pp-size", "pp_size"),
            ("--dp-size", "dp_size"),
            ("--attn-dp-size", "attn_dp_size"),
            ("--ep-size", "ep_size"),
            ("--nnodes", "nnodes"),
            ("--node-rank", "node_rank"),
            ("--speculative-num-steps", "speculative_num_steps"),
            ("--speculative-num-draft-tokens", "speculative_num_draft_tokens"),
        ):
            if name in given:
                assert found[field] == float(given[name]), (name, words)
        assert found["model_path"] == given["--model-path"]
        assert found["kv_cache_dtype"] == given["--kv-cache-dtype"]
        assert found["mamba_ssm_dtype"] == given["--mamba-ssm-dtype"]
        assert found["disable_radix_cache"] is ("--disable-radix-cache" in words)
        assert found["language_model_only"] is ("--language-model-only" in words)
        if "--json-model-override-args" in given:
            assert json.loads(found["json_model_override_args"]) == json.loads(given["--json-model-override-args"])
