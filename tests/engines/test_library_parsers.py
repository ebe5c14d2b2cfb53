"""The launch lines of MLX-LM, KTransformers and transformers, read by those programs' own declarations.

None of the three can be imported on a machine without its accelerator or without torch, so the declarations are taken
out of the source as they stand and run by the library that the program itself uses: argparse, or Typer. Where the
source is not at hand the test says so and is skipped; give the unpacked wheels by

    QWENFIT_MLX_LM=.../mlx_lm  QWENFIT_SGLANG_KT=.../sglang  QWENFIT_TRANSFORMERS=.../transformers
"""

import argparse
import ast
import json
import os
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qwenfit.planner.engines import ktransformers, mlx, transformers
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles.device import Device
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.model_catalog import model

pytestmark = pytest.mark.engines

GIB = 1 << 30
KEPT_KEYWORDS = ("dest", "action", "nargs", "choices", "required", "type")
KNOWN_TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def source(variable: str, file: str) -> str:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: give the folder of the engine's source")
    return (Path(folder) / file).read_text()


def made_device(vendor: str, **changes: Any) -> Device:
    kind = "unified" if vendor == "apple" else "discrete"
    facts = {"compute_capability": None if vendor == "apple" else "8.9", "kind": kind, **changes}
    return Device(
        name="made",
        title="made",
        vendor=vendor,
        architecture="made",
        memory_bytes=80 * GIB,
        usable_bytes=80 * GIB,
        memory_bandwidth_bytes_per_s=1,
        flops_per_s={"bf16": 1},
        source="invented",
        checked="2026-11-22",
        **facts,
    )


def line(engine: Any, name: str, weights: str, vendor: str, ctx_tokens: int, seqs: int, **told: Any) -> str:
    fields: dict[str, Any] = {"kv_dtype": "bf16", "state_dtype": "float32", "tp": 1, **told}
    options = Options(**fields.pop("options", {}))
    devices = (made_device(vendor),) * fields["tp"]
    setup = Setup(
        model(name), weight_format(weights), devices, "", pp=1, mtp=0, vision=False, options=options, **fields
    )
    return engine.estimate(setup).command(ctx_tokens, seqs)


@lru_cache
def argparse_parser(text: str) -> argparse.ArgumentParser:
    """A parser with every `add_argument` of that source; defaults and help are left behind, types and choices kept."""
    tree = ast.parse(text)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return value(constants[node.id]) if node.id in constants else KNOWN_TYPES.get(node.id)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "json.loads":
            return json.loads
        try:
            return ast.literal_eval(node)
        except ValueError:
            return None  # a function or a constant of another file: any text passes

    class Strict(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise ValueError(message)

    parser = Strict(allow_abbrev=False)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        flags = [value(argument) for argument in node.args]
        if (
            node.func.attr == "add_argument"
            and all(isinstance(flag, str) and flag[0] == "-" for flag in flags)
            and flags
        ):
            told = {word.arg: value(word.value) for word in node.keywords if word.arg in KEPT_KEYWORDS}
            parser.add_argument(*flags, **{name: kept for name, kept in told.items() if name and kept is not None})
    return parser


@pytest.mark.parametrize(("kv_dtype", "seqs"), [("bf16", 8), ("8bit", 1), ("4bit", 1)])
def test_mlx_server(kv_dtype: str, seqs: int) -> None:
    parser = argparse_parser(source("QWENFIT_MLX_LM", "server.py"))
    words = shlex.split(line(mlx, "qwen3.5-9b", "mlx-4bit", "apple", 32768, seqs, kv_dtype=kv_dtype))
    assert words[0] == "mlx_lm.server"
    told = parser.parse_args(words[1:])
    assert told.model == "mlx-community/Qwen3.5-9B-4bit"
    assert (told.prefill_step_size, told.decode_concurrency, told.prompt_concurrency) == (2048, seqs, 1)
    assert told.kv_bits == {"bf16": None, "8bit": 8, "4bit": 4}[kv_dtype]


@pytest.mark.parametrize("weights", ["bf16", "fp8", "int8", "int4", "gptq-int4-official", "q4_k_m"])
@pytest.mark.parametrize(
    "told",
    [
        {},
        {"tp": 2, "state_dtype": "bfloat16", "kv_dtype": "fp8_e4m3"},
        {"options": {"prefix_caching": False, "cuda_graphs": False}},
    ],
)
def test_ktransformers_server(weights: str, told: dict[str, Any]) -> None:
    parser = argparse_parser(source("QWENFIT_SGLANG_KT", "srt/server_args.py"))
    for ctx_tokens in (32768, 1_010_000):
        words = shlex.split(line(ktransformers, "qwen3.5-35b-a3b", weights, "nvidia", ctx_tokens, 3, **told))
        words = words[1:] if words[0].startswith("SGLANG_ALLOW") else words
        assert words[:3] == ["python", "-m", "sglang.launch_server"]
        heard = parser.parse_args(words[3:])
        assert heard.context_length == ctx_tokens and heard.max_total_tokens == 3 * ctx_tokens
        assert 0.9 < heard.mem_fraction_static < 1
        assert heard.kt_num_gpu_experts == 0 and heard.kt_cpuinfer > 0
        assert heard.max_mamba_cache_size == (9 if told.get("options") is None else 3)
        assert bool(heard.json_model_override_args) == (ctx_tokens > 262144)


def test_the_extracted_parser_still_refuses() -> None:
    """What is taken out of the source must not have become a parser that takes anything."""
    parser = argparse_parser(source("QWENFIT_SGLANG_KT", "srt/server_args.py"))
    for words in (["--kt-nothing", "1"], ["--context-length", "many"], ["--kv-cache-dtype", "int8"]):
        with pytest.raises(ValueError):
            parser.parse_args(words)


@pytest.mark.parametrize(("weights", "name"), [("bf16", "Qwen/Qwen3.5-9B"), ("q4_k_m", "unsloth/Qwen3.5-9B-GGUF")])
def test_transformers_serve(weights: str, name: str) -> None:
    """`Serve.__init__` in `cli/serve.py` is the Typer command: its signature runs here, with another body."""
    tree = ast.parse(source("QWENFIT_TRANSFORMERS", "cli/serve.py"))
    serve = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Serve")
    reasoning = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ReasoningMode")
    signature = next(node for node in serve.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    signature.args.args.pop(0)  # self
    signature.name, signature.body = "command", ast.parse("heard.update(locals())").body
    heard: dict[str, Any] = {}
    names: dict[str, Any] = {"typer": typer, "heard": heard}
    exec("import enum\nfrom typing import Annotated\n", names)
    exec(compile(ast.fix_missing_locations(ast.Module([reasoning, signature], [])), "serve.py", "exec"), names)
    app = typer.Typer()
    app.command()(names["command"])

    words = shlex.split(line(transformers, "qwen3.5-9b", weights, "nvidia", 8192, 1))
    assert words[:2] == ["transformers", "serve"]
    result = CliRunner().invoke(app, words[2:])
    assert result.exit_code == 0, result.output
    assert heard["force_model"].startswith(name)
    assert (heard["device"], heard["dtype"]) == ("cuda", "bfloat16")
    assert CliRunner().invoke(app, [*words[2:], "--context-length", "8192"]).exit_code == 2
