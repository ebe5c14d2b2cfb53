"""One layer from its weights to its codes: the calibration tokens go through it stage by stage (`decoder.py`).

Each stage sums a Hessian over what its matrices read, solves them, and goes on with what they became: so later
matrices make up for the errors of earlier ones. With a full-precision stream beside it (GPTAQ), that one goes on with
the original weights, and the targets are its outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from .activations import Activations
from .decoder import EXPERTS, DecoderLayer, Stream
from .experts import EXPERT, Method, solve_by, solve_expert
from .hessian import CHUNK_TOKENS, Hessian, product_is_less
from .modules import STAGES, Module
from .quantized import Scheme
from .recorder import Recorder
from .smoother import smooth_layer
from .solve import Solved, grid_of, solve_together
from .tasks import one_thread_each
from .weights import Weights
from .workers import Here, RayCluster

SHARED = "mlp.shared_expert."


@dataclass(frozen=True, slots=True, eq=False)
class LayerSolver:
    """What is the same for every layer. modules: those of one layer by leaf are given to `solve_layer`."""

    weights: Weights
    recorder: Recorder
    schemes: Mapping[str, Scheme]
    method: Method
    workers: Here | RayCluster = field(default_factory=Here)

    def solve_layer(self, layers: list[DecoderLayer], streams: list[Stream], modules: Mapping[str, Module]) -> None:
        """Quantize a layer's modules. layers, streams: the quantized one first, then the full-precision one if any.

        The layers hold the original weights; streams end behind the layer.
        """
        smoothed = self._smooth(layers[0], streams[0], modules) if self.method.name == "awq" else set()
        for stage in layers[0].stages:
            if stage == EXPERTS:
                self._experts(layers, streams, modules)
                continue
            inputs = [layer.enter(stage, stream) for layer, stream in zip(layers, streams, strict=True)]
            here = {leaf: modules[leaf] for leaf in STAGES[stage] if leaf in modules and leaf not in smoothed}
            originals = {leaf: layers[0].weights[leaf] for leaf in here}
            hessian = accumulated(inputs, list(originals.values())) if here else None
            # Whatever else there is of streams goes on first: what it read is then free while solving.
            for layer, stream, x in reversed(list(zip(layers, streams, inputs, strict=True))):
                if layer is layers[0] and hessian is not None:
                    for leaf, solved in self._solve(here, originals, hessian).items():
                        layer.weights[leaf] = solved.weight.dequantize()
                layer.leave(stage, stream, x)
                for leaf in STAGES[stage]:
                    if not leaf.startswith(SHARED):  # "experts" still reads those
                        layer.weights.pop(leaf, None)

    def _smooth(self, layer: DecoderLayer, stream: Stream, modules: Mapping[str, Module]) -> set[str]:
        """AWQ of all but a mixture's experts: solved from one pass, written, and put into the layer for the next one.
        The leaves that are done."""
        grids = {
            leaf: grid_of(self.schemes[module.name], self.recorder.result.scale_dtype)
            for leaf, module in modules.items()
        }
        found = smooth_layer(layer, stream, grids)
        for leaf, solved in found.solved.items():
            self.recorder.write(modules[leaf], solved)
            layer.weights[leaf] = solved.weight.dequantize()
        for leaf, tensor in found.plain.items():
            self.recorder.result.write_plain(self.weights.layer_names(layer.number)[leaf], tensor.cpu())
            layer.weights[leaf] = tensor
        return set(found.solved)

    def _solve(
        self, modules: Mapping[str, Module], originals: Mapping[str, Tensor], hessian: Hessian
    ) -> dict[str, Solved]:
        result, method = self.recorder.result, self.method
        names = {leaf: module.name for leaf, module in modules.items()}
        schemes = {leaf: self.schemes[name] for leaf, name in names.items()}
        if method.name == "gptq":
            orders = {leaf: result.orders[name] for leaf, name in names.items() if name in result.orders}
            solved = solve_together(
                originals, schemes, hessian, method.scale_dtype, method.damping, orders, self.workers
            )
        else:
            solved = solve_by(method, originals, schemes, hessian)
        for leaf, module in modules.items():
            self.recorder.write(module, solved[leaf])
        return solved

    def _experts(self, layers: list[DecoderLayer], streams: list[Stream], modules: Mapping[str, Module]) -> None:
        """A mixture of experts, one after another, each with the tokens that are routed to it.

        So one expert's matrices and Hessians are in memory at a time. Experts aim at their own outputs: the streams
        need not agree on who gets which token.
        """
        inputs = [stream.inner for stream in streams if stream.inner is not None]
        tokens = [x[:] for x in inputs]
        outs = [
            self._shared(layer, x, modules if at == 0 else {})
            for at, (layer, x) in enumerate(zip(layers, tokens, strict=True))
        ]
        routes = [layer.route(x) for layer, x in zip(layers, tokens, strict=True)]
        experts = range(layers[0].configuration.num_experts)
        found = self.workers.map(solve_expert, (self._job(layers[0], e, tokens, routes, modules) for e in experts))
        for expert, (solved, results) in zip(experts, found, strict=True):
            for name, one in solved.items():
                self.recorder.write(modules[f"mlp.experts.{expert}.{name}"], one)
            for (chosen, shares), out, result in zip(routes, outs, results, strict=True):
                rows, place = (chosen == expert).nonzero(as_tuple=True)
                out[rows] += result.to(out.device) * shares[rows, place, None]
        for stream, x, out in zip(streams, inputs, outs, strict=True):
            stream.hidden[:] = stream.hidden[:] + out
            stream.inner = None
            x.close()

    def _shared(self, layer: DecoderLayer, x: Tensor, modules: Mapping[str, Module]) -> Tensor:
        """The shared expert's part of the output, [N, E]; its down projection is solved, gate and up are."""
        with one_thread_each(x.device):
            inner, share = layer.gated(x, SHARED), layer.shared_gate(x)
        leaf = f"{SHARED}down_proj"
        if leaf in modules:
            hessian = Hessian(inner.shape[1], x.device)
            hessian.add(inner)
            solved = self._solve({leaf: modules[leaf]}, {leaf: layer.weights[leaf]}, hessian)
            layer.weights[leaf] = solved[leaf].weight.dequantize()
        with one_thread_each(x.device):
            return layer.linear(inner, leaf).mul_(share)

    def _job(
        self,
        layer: DecoderLayer,
        expert: int,
        tokens: list[Tensor],
        routes: list[tuple[Tensor, Tensor]],
        modules: Mapping[str, Module],
    ) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Scheme], Method]:
        """What `solve_expert` takes."""
        leaves = {name: f"mlp.experts.{expert}.{name}" for name in EXPERT}
        inputs = [x[(chosen == expert).any(dim=1)] for x, (chosen, _) in zip(tokens, routes, strict=True)]
        weights = {name: self.weights.expert(layer.number, expert, name) for name in EXPERT}
        schemes = {name: self.schemes[modules[leaf].name] for name, leaf in leaves.items() if leaf in modules}
        return inputs, weights, schemes, self.method


def accumulated(inputs: list[Activations], weights: list[Tensor]) -> Hessian:
    """The Hessian of the first stream's activations, with the cross term to the second's where there is one.

    The second may have only the first tokens of the first. weights: those that read them.
    """
    x, references = inputs[0], inputs[1:]
    common = len(references[0]) if references else 0
    alone = weights[0] if len(weights) == 1 and product_is_less(len(weights[0]), x.columns, common) else None
    hessian = Hessian(x.columns, x.device, cross=bool(references), weight=alone)
    bounds = sorted({*range(0, len(x), CHUNK_TOKENS), common, len(x)})
    for start, stop in pairwise(bounds):
        rows = slice(start, stop)
        hessian.add(x[rows], references[0][rows] if stop <= common else None)
    return hessian
