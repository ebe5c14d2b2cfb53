"""Layers on calibration tokens against the runtime, which is held to transformers (tests/kernels/runtime)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenfit.kernels.operations import REFERENCE
from qwenfit.kernels.runtime.configuration import read_configuration
from qwenfit.kernels.runtime.loading import load
from qwenfit.kernels.runtime.memory import Settings, allocate
from qwenfit.kernels.runtime.model import forward, prefill_step
from qwenfit.quant.activations import Activations
from qwenfit.quant.decoder import EXPERTS, DecoderLayer, Stream
from qwenfit.quant.experts import Method
from qwenfit.quant.layer_solver import LayerSolver
from qwenfit.quant.modules import list_modules
from qwenfit.quant.source import open_source
from qwenfit.quant.weights import Weights

LENGTH, COUNT = 19, 3


def truth(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states behind the final norm, [N, E], by the runtime in float32, sequence after sequence."""
    model = load(str(folder), dtype=torch.float32, operations=REFERENCE)
    buffers = allocate(model.configuration, Settings(LENGTH, seqs=COUNT), torch.float32, "cpu")
    every = list(range(COUNT))
    step = prefill_step(model, buffers, every, [0] * COUNT, [LENGTH] * COUNT)
    return forward(model, tokens.flatten(), step, buffers)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("in_files", [False, True])
def test_hidden_states_are_those_of_the_runtime(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, in_files: bool
) -> None:
    folder = checkpoint(name)
    source, configuration = open_source(str(folder)), read_configuration(str(folder))
    weights = Weights(source, list_modules(source), torch.device("cpu"))
    tokens = torch.randint(0, 256, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden = Activations(COUNT * LENGTH, configuration.hidden_size)
    hidden[:] = weights.embedded(tokens)
    stream = Stream(hidden, LENGTH, folder=str(tmp_path) if in_files else None)
    recorder: Any = None  # there is nothing to record
    nothing = LayerSolver(weights, recorder, {}, Method("gptq", torch.bfloat16, 0.01))
    for number in range(configuration.num_layers):
        layer = DecoderLayer(weights.layer(number), configuration, number)
        assert (EXPERTS in layer.stages) == (name == "qwen3_5_moe")
        nothing.solve_layer([layer], [stream], {})
    norm = source.tensor(next(one for one in source.names() if one.endswith(".norm.weight") and "layers" not in one))
    x = stream.hidden[:]
    got = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + configuration.rms_norm_eps) * (1 + norm.float())
    expected = truth(folder, tokens)
    assert (got - expected).norm() / expected.norm() < 2e-5
    assert not list(tmp_path.iterdir())  # activations leave no files behind


def test_stages_come_in_order(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_5")
    source = open_source(str(folder))
    weights = Weights(source, list_modules(source), torch.device("cpu"))
    layer = DecoderLayer(weights.layer(0), read_configuration(str(folder)), 0)
    with pytest.raises(ValueError, match="comes after the stage before it"):
        layer.enter("core", Stream(Activations(4, 128), 2))
