"""`planner/quantizing.py`: the line that a plan gives, run by `qwen-quant`, makes what was planned, byte for byte."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenfit.cli.quant import main
from qwenfit.planner.quantizing import quantizing_line
from qwenfit.profiles.formats import checkpoint_bytes, weight_format
from qwenfit.profiles.model_catalog import model

DENSE = ["int4", "int4-sym", "int4-g32", "int4-channel", "int4-mtp4", "int4-gptq", "int4-awq-g64", "int8", "int8-w8a8"]
UNTIED = ["int4-sym-head8", "int8-g64-head8-mtp8"]  # the small dense model has no head of its own
MOE = ["int4-sym", "int4-sym-g32-mtp4", "int4-sym-head8", "int4-gptq", "int4-awq", "int8", "int8-g64-head8-mtp8"]


def made_bytes(line: str, capsys: Any) -> int:
    command, *words = shlex.split(line)
    assert command == "qwen-quant" and main([*words, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["bytes"]


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        *(("qwen3_5", {}, name) for name in DENSE),
        *(("qwen3_5", {"tie_word_embeddings": False}, name) for name in UNTIED),
        *(("qwen3_5_moe", {}, name) for name in MOE),
    ],
)
def test_the_line_makes_what_was_planned(
    checkpoint: Callable[..., Path], capsys: Any, kind: str, changes: dict[str, Any], name: str
) -> None:
    found, fmt = model(str(checkpoint(kind, is_wide=True, **changes))), weight_format(name)
    line = quantizing_line(found, fmt)
    assert line is not None and f"-{fmt.name} " in line
    assert made_bytes(line, capsys) == checkpoint_bytes(found, fmt)


def test_experts_get_no_zero_points(checkpoint: Callable[..., Path], capsys: Any) -> None:
    found = model(str(checkpoint("qwen3_5_moe", is_wide=True)))
    planned, symmetric = (checkpoint_bytes(found, weight_format(name)) for name in ("int4", "int4-sym"))
    line = quantizing_line(found, weight_format("int4"))
    assert line is not None and symmetric == made_bytes(line, capsys) < planned < 1.01 * symmetric


@pytest.mark.parametrize("name", ["bf16", "fp8", "q4_k_m", "mlx-4bit", "int4-g256", "int4-embed8", "int4-vision8"])
def test_what_it_does_not_make_has_no_line(name: str) -> None:
    assert quantizing_line(model("qwen3.5-27b"), weight_format(name)) is None


def test_a_shared_head_has_no_bits_of_its_own() -> None:
    """`qwen-quant` refuses --lm-head where the head is the embedding."""
    assert model("qwen3.5-0.8b").tie_word_embeddings
    assert quantizing_line(model("qwen3.5-0.8b"), weight_format("int4-head8")) is None


def test_it_starts_from_the_repository() -> None:
    assert quantizing_line(model("qwen3.5-35b-a3b"), weight_format("int4")) == (
        "qwen-quant Qwen/Qwen3.5-35B-A3B ./Qwen3.5-35B-A3B-int4 --bits 4 --shared-experts 4"
    )
