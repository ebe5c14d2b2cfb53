"""The bench goes through every shape that the family's checkpoints have, each once."""

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")
import torch

from qwenfit.kernels.proof import bench_shapes
from qwenfit.kernels.proof.bench_work import Setting, Work


def setting(*tokens: int) -> Setting:
    return Setting(torch.device("meta"), torch.bfloat16, lambda size: 1, tokens, (4096,))


def shapes(kind: str, *tokens: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Maker and what it is called with behind the setting, nothing of it made."""
    makers = bench_shapes.works(bench_shapes.family(), setting(*tokens), (kind,))
    return [(make.func.__name__, make.args[1:]) for make in makers]  # type: ignore[attr-defined]


def test_matrices_are_those_of_the_checkpoints() -> None:
    """9B: 32 value and 16 key heads of 128 (qkv 8192 + z 4096 on 4096), 16 / 4 heads of 256 with gates, FFN 12288."""
    found = {(args[2], args[3]) for _, args in shapes("matmul", 1) if "qwen3.5-9b" in args[0]}
    assert found == {(12288, 4096), (4096, 4096), (10240, 4096), (24576, 4096), (4096, 12288)}
    found = {args[2:6] for _, args in shapes("experts", 1)}
    assert found == {(256, 8, 1024, 2048), (256, 8, 2048, 512)}


def test_every_shape_comes_once_with_all_its_models() -> None:
    for kind in bench_shapes.KINDS:
        keys = [(name, args[1:]) for name, args in shapes(kind, 1, 512)]
        assert len(keys) == len(set(map(str, keys))) > 0
    shared = [args[0] for _, args in shapes("delta", 1) if len(args[0]) > 1]
    assert ("qwen3.5-0.8b", "qwen3.5-2b") in shared  # both have 16 heads of 128 x 128


def test_a_tiny_model_takes_every_kernel() -> None:
    for configuration in bench_shapes.family().values():
        tiny = bench_shapes.tiny(configuration)
        assert tiny.is_moe == configuration.is_moe
        assert max(tiny.hidden_size, tiny.head_dim, tiny.conv_dim) <= 256


def test_traffic_is_the_least_there_is() -> None:
    """4 bits and a bf16 scale per 128 of a [128, 256] weight, x and the result in bf16."""
    cpu = Setting(torch.device("cpu"), torch.bfloat16, lambda size: 1)
    from qwenfit.kernels.proof.bench_matmul import matmul_work

    work: Work = matmul_work(cpu, ("any",), 3, 128, 256, 4)
    assert work.bytes == 128 * 256 // 2 + 2 * 128 * 2 + 2 * 3 * (128 + 256)
    assert work.flops == 2 * 3 * 128 * 256 and work.copies == 1
