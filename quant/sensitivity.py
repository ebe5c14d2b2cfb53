"""Where the bits hurt: how far each group of modules, rounded alone, throws a layer's output off.

A group is what engines fuse, so what gets one precision (`module_rules.fused_with`). For each the layer runs once more
on the calibration tokens with only that group rounded, and the squared change of the hidden state behind the layer is
set against the state's square. That takes in what an error of the module itself does not say: how much of the residual
stream the module writes, what the gate behind it lets through, what softmax and the recurrent state make of it. Layers
are compared by that ratio, as if each passed the noise of those before on unchanged.

Rounding is to nearest: GPTQ errs less, by about the same factor everywhere.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.runtime.configuration import Configuration
from .activations import Activations
from .decoder import EXPERTS, DecoderLayer, Stream
from .module_rules import fused_with
from .modules import Module
from .quantized import Scheme
from .solve import round_to_nearest
from .tasks import one_thread_each
from .weights import Weights

SHARED = "mlp.shared_expert."
Change = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A fused group. error: |change of the hidden state|^2 / |hidden state|^2 behind its layer; weights: how many."""

    modules: tuple[str, ...]
    error: float
    weights: int


@dataclass(frozen=True, slots=True, eq=False)
class Meter:
    """What is the same for every layer. schemes: the coarse ones, to which modules are rounded."""

    weights: Weights
    configuration: Configuration
    schemes: Mapping[str, Scheme]
    scale_dtype: torch.dtype
    orders: Mapping[str, Tensor]

    def measure(
        self, tokens: Tensor, modules: Iterable[Module], watch: Callable[[int, int], None] | None = None
    ) -> list[Sensitivity]:
        """Every group of `modules` (of the decoder's layers), on tokens int64 [n, L]. watch: (layer, layers) done."""
        by_layer: dict[int, list[Module]] = {}
        for module in modules:
            if module.layer is not None:
                by_layer.setdefault(module.layer, []).append(module)
        hidden, found = self.weights.embedded(tokens), []
        for number in range(self.configuration.num_layers):
            originals = self.weights.layer(number)
            expected = self._run(originals, number, hidden, tokens.shape[1], lambda leaf, weight: weight)
            square = float(expected.double().square().sum())
            for group in _fused(by_layer.get(number, ())):
                names = {module.leaf: module for module in group}

                def change(leaf: str, weight: Tensor, names: Mapping[str, Module] = names) -> Tensor:
                    return self._rounded(names[leaf], weight) if leaf in names else weight

                got = self._run(originals, number, hidden, tokens.shape[1], change)
                error = float((got - expected).double().square().sum()) / (square or 1.0)
                size = sum(module.rows * module.columns for module in group)
                found.append(Sensitivity(tuple(module.name for module in group), error, size))
            hidden = expected
            if watch:
                watch(number + 1, self.configuration.num_layers)
        return found

    def _rounded(self, module: Module, weight: Tensor) -> Tensor:
        order = self.orders.get(module.name)
        solved = round_to_nearest(weight, self.schemes[module.name], self.scale_dtype, order)
        return solved.weight.dequantize().to(weight.device)

    def _run(self, originals: Mapping[str, Tensor], number: int, hidden: Tensor, length: int, change: Change) -> Tensor:
        """The hidden state [N, E] behind a layer whose weights went through `change`."""
        changed = {leaf: change(leaf, weight) for leaf, weight in originals.items()}
        layer = DecoderLayer(changed, self.configuration, number)
        state = Activations(len(hidden), hidden.shape[1], hidden.device)
        state[:] = hidden
        stream = Stream(state, length)
        for stage in layer.stages:
            if stage == EXPERTS:
                x = stream.inner
                if x is not None:
                    stream.hidden[:] = stream.hidden[:] + self._mixture(layer, x[:], change)
                    x.close()
                continue
            layer.leave(stage, stream, layer.enter(stage, stream))
        return stream.hidden[:]

    def _mixture(self, layer: DecoderLayer, x: Tensor, change: Change) -> Tensor:
        """The experts' part [N, E] of tokens x, an expert at a time; who gets a token is as for `quantize`."""
        with one_thread_each(x.device):
            out = layer.linear(layer.gated(x, SHARED), f"{SHARED}down_proj").mul_(layer.shared_gate(x))
            chosen, shares = layer.route(x)
        for expert in range(self.configuration.num_experts):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            if not len(rows):
                continue
            gate, up, down = (
                change(f"mlp.experts.{expert}.{name}", self.weights.expert(layer.number, expert, name)).float()
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            with one_thread_each(x.device):
                inner = F.silu(F.linear(x[rows], gate)).mul_(F.linear(x[rows], up))
                out[rows] += F.linear(inner, down) * shares[rows, place, None]
        return out


def _fused(modules: Iterable[Module]) -> list[list[Module]]:
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(fused_with(module.name), []).append(module)
    return list(groups.values())
