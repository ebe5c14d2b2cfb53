"""One expert of a mixture: its matrices, the tokens that are routed to it, and what comes out.

A job of its own (`workers.py`): experts know nothing of each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .hessian import Hessian
from .quantized import Scheme
from .smoother import round_for_inputs
from .solve import LEAST_TOKENS, Solved, grid_of, solve_together
from .tasks import one_thread_each

GATE, UP, DOWN = EXPERT = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Method:
    """How matrices are solved: gptq or awq, scales as the format stores them, and GPTQ's damping."""

    name: str
    scale_dtype: torch.dtype
    damping: float


def solve_expert(
    inputs: Sequence[Tensor], weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], method: Method
) -> tuple[dict[str, Solved], list[Tensor]]:
    """(its solved matrices, its output [n, E] for every stream).

    inputs: tokens [n, E] of the quantized stream, then those of the full-precision one, if any. weights: all three
    matrices as they are; those with a scheme are solved, in the quantized stream only.
    """
    solved: dict[str, Solved] = {}
    outputs = []
    for at, x in enumerate(inputs):
        now = {name: weight.to(x.device) for name, weight in weights.items()}
        for names in ((GATE, UP), (DOWN,)):
            here = {name: schemes[name] for name in names if name in schemes} if at == 0 else {}
            read = x if DOWN not in names else _inner(x, now)
            if here:
                found = solve_by(method, {name: now[name] for name in here}, here, _hessian(read))
                solved |= found
                now |= {name: one.weight.dequantize().to(x.device) for name, one in found.items()}
        with one_thread_each(x.device):
            outputs.append(F.linear(_inner(x, now), now[DOWN].float()))
    return solved, outputs


def solve_by(
    method: Method, weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], hessian: Hessian
) -> dict[str, Solved]:
    """Matrices [O, I] that read one input and stand alone (no norm in front of them takes scales)."""
    if method.name == "awq" and hessian.tokens >= LEAST_TOKENS:
        mean = hessian.mean()
        grids = {name: grid_of(scheme, method.scale_dtype) for name, scheme in schemes.items()}
        return {name: round_for_inputs(weights[name], mean, grids[name]) for name in weights}
    return solve_together(weights, schemes, hessian, method.scale_dtype, method.damping)


def _hessian(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[1], x.device)
    if len(x):
        hessian.add(x)
    return hessian


def _inner(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    with one_thread_each(x.device):
        gate, up = (F.linear(x, weights[name].float()) for name in (GATE, UP))
        return F.silu(gate).mul_(up)
