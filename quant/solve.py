"""From a matrix and what is known of its inputs to its codes, by the method of the recipe."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .cholesky import Factor, factorize
from .gguf_matrix import GgufMatrix, round_matrix, solve_matrix
from .gptq import gptq
from .grid import Grid, rtn
from .hessian import Cross, Hessian, output_error
from .quantized import Quantized, Scheme
from .workers import Here, RayCluster

ERROR_ROWS = 256
LEAST_TOKENS = 2
"""Fewer tokens say nothing of correlations: such a matrix (an expert that is hardly ever chosen) is rounded by rtn."""
TARGET_DAMPING = 0.3
"""At least, where the full-precision stream gives the targets: they are a regression on the calibration tokens, which
learns these by heart otherwise (docs/quantization.md: 5 to 13 % less divergence than with 0.01)."""
UNMOVED_PER_COLUMN = 2
"""Tokens that are taken to agree in both streams, besides those that were seen: few tokens per column move the targets
little (docs/quantization.md: without it 8 % more divergence than without targets at 2 tokens per column)."""


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """A quantized matrix; error: relative square error of its outputs on the calibration tokens, None without them.

    method: what it came to be by, "rtn" for an expert that no token reached.
    """

    weight: Quantized | GgufMatrix
    error: float | None
    method: str


def round_to_nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, order: Tensor | None = None) -> Solved:
    """Without calibration. order: of a GGUF file's columns, see `GgufMatrix`."""
    if scheme.kind:
        return Solved(round_matrix(weight, scheme.kind, order), None, "rtn")
    return Solved(rtn(weight, grid_of(scheme, scale_dtype)), None, "rtn")


def solve_together(
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    hessian: Hessian,
    scale_dtype: torch.dtype,
    damping: float,
    orders: Mapping[str, Tensor] | None = None,
    workers: Here | RayCluster | None = None,
) -> dict[str, Solved]:
    """GPTQ of all matrices [O, I] that read one input; the Hessian, and its cross term where it has one, is used up.

    orders: for matrices whose columns stand in another order in the file, see `GgufMatrix`. workers: who solves.
    """
    orders, workers = orders or {}, workers or Here()
    if hessian.tokens < LEAST_TOKENS:
        return {
            name: round_to_nearest(weight, schemes[name], scale_dtype, orders.get(name))
            for name, weight in weights.items()
        }
    cross = hessian.cross_mean(UNMOVED_PER_COLUMN * hessian.columns) if hessian.has_cross else None
    mean = hessian.mean()
    factor = factorize(mean, damping=damping if cross is None else max(damping, TARGET_DAMPING))
    shared = [workers.share(one) for one in (factor, mean, cross)]
    jobs = ((weight, schemes[name], scale_dtype, orders.get(name), *shared) for name, weight in weights.items())
    return dict(zip(weights, workers.map(solve_module, jobs), strict=True))


def solve_module(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    order: Tensor | None,
    factor: Factor,
    mean: Tensor,
    cross: Cross | None,
) -> Solved:
    """GPTQ of one matrix [O, I]; mean: H, float32 [I, I], of which `factor` is."""
    if scheme.kind:
        quantized = solve_matrix(weight, scheme.kind, factor, order, cross)
    else:
        quantized = _solve_groups(weight, scheme, factor, scale_dtype, cross)
    return Solved(quantized, sampled_error(weight, quantized, mean), "gptq")


def _solve_groups(
    weight: Tensor, scheme: Scheme, factor: Factor, scale_dtype: torch.dtype, cross: Cross | None
) -> Quantized:
    codes, scales, zeros = gptq(
        weight,
        factor,
        scheme.bits,
        scheme.group_size,
        symmetric=scheme.symmetric,
        scale_dtype=scale_dtype,
        cross=cross,
    )
    return Quantized(codes, scales, zeros, scheme.bits, weight.shape[1] // scales.shape[1], scheme.symmetric)


def sampled_error(weight: Tensor, quantized: Quantized | GgufMatrix, hessian: Tensor) -> float:
    """`output_error` on rows spread over the matrix."""
    rows = slice(None, None, max(1, -(-len(weight) // ERROR_ROWS)))
    return output_error(weight[rows], quantized.rows(rows).dequantize().to(hessian.device), hessian)


def grid_of(scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid of a scheme, with scales as the format stores them."""
    return Grid(scheme.bits, scheme.group_size, scheme.symmetric, scale_dtype)
