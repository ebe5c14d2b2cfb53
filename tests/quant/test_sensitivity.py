"""Sensitivities against `evaluate`, which has another forward pass: a checkpoint with one group rounded, and the error
of the hidden state behind that group's layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwenfit.kernels.runtime.configuration import read_configuration
from qwenfit.quant import Recipe, Rule, quantize
from qwenfit.quant.evaluate import evaluate
from qwenfit.quant.layout import Layout, lay_out
from qwenfit.quant.sensitivity import Meter, Sensitivity
from qwenfit.quant.source import open_source
from qwenfit.quant.weights import Weights

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def measured(layout: Layout) -> list[Sensitivity]:
    weights = Weights(layout.source, layout.found, torch.device("cpu"))
    configuration = read_configuration(layout.source.folder)
    result = layout.result
    meter = Meter(weights, configuration, layout.schemes, result.scale_dtype, result.orders)
    return meter.measure(TOKENS, layout.modules)


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("qwen3_5", "0.mlp.down_proj"),
        ("qwen3_5", "1.linear_attn.in_proj_qkv"),
        ("qwen3_5", "3.self_attn.q_proj"),
        ("qwen3_5", "2.linear_attn.out_proj"),
        ("qwen3_5_moe", "1.linear_attn.out_proj"),
        ("qwen3_5_moe", "0.mlp.experts.0.up_proj"),
    ],
)
def test_errors_are_those_of_a_checkpoint_with_that_group_rounded(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, leaf: str
) -> None:
    folder = str(checkpoint(name))
    base = Recipe(group_size=32, method="rtn", symmetric=True)
    groups = measured(lay_out(open_source(folder), base))
    group = next(group for group in groups if any(module.endswith(f"layers.{leaf}") for module in group.modules))
    rules = (*(Rule(f"{module}$".replace(".", r"\."), 4) for module in group.modules), Rule("", 16))
    quantize(folder, str(tmp_path / "one"), Recipe(group_size=32, method="rtn", symmetric=True, modules=rules))
    errors = evaluate(str(tmp_path / "one"), folder, TOKENS).layer_errors
    layer = int(leaf.split(".")[0])
    assert all(error < 1e-6 for error in errors[:layer])
    assert group.error == pytest.approx(errors[layer] ** 2, rel=0.02) and group.error > 1e-6
    modules = {module.name: module for module in lay_out(open_source(folder), base).modules}
    assert group.weights == sum(modules[module].rows * modules[module].columns for module in group.modules)


def test_every_module_of_the_layers_is_in_one_group(checkpoint: Callable[..., Path]) -> None:
    layout = lay_out(open_source(str(checkpoint("qwen3_5_moe"))), Recipe(group_size=32, method="rtn"))
    names = [name for group in measured(layout) for name in group.modules]
    assert len(names) == len(set(names)) == sum(module.layer is not None for module in layout.modules)


def test_eight_bits_err_a_two_hundredth_of_four(checkpoint: Callable[..., Path]) -> None:
    """Steps are 16 times finer: 1 / 256, by the scale search a little off."""
    source = open_source(str(checkpoint("qwen3_5")))
    low, high = (measured(lay_out(source, Recipe(bits=bits, group_size=32, method="rtn"))) for bits in (4, 8))
    for coarse, fine in zip(low, high, strict=True):
        assert 100 < coarse.error / fine.error < 600, coarse.modules
