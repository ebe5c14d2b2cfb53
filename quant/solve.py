"""From a matrix and what is known of its inputs to its codes, by the method of the recipe."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .cholesky import factorize
from .gptq import gptq
from .grid import Grid, rtn
from .hessian import Hessian, output_error
from .quantized import Quantized, Scheme

ERROR_ROWS = 256
LEAST_TOKENS = 2
"""Fewer tokens say nothing of correlations: such a matrix (an expert that is hardly ever chosen) is rounded by rtn."""
TARGET_DAMPING = 0.3
"""At least, where the full-precision stream gives the targets: they are a regression on the calibration tokens, which
learns these by heart otherwise (docs/quantization.md: 5 to 13 % less divergence than with 0.01)."""


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """A quantized matrix; error: relative square error of its outputs on the calibration tokens, None without them.

    method: what it came to be by, "rtn" for an expert that no token reached.
    """

    weight: Quantized
    error: float | None
    method: str


def round_to_nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Solved:
    """Without calibration."""
    return Solved(rtn(weight, grid_of(scheme, scale_dtype)), None, "rtn")


def solve_together(
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    hessian: Hessian,
    scale_dtype: torch.dtype,
    damping: float,
) -> dict[str, Solved]:
    """GPTQ of all matrices [O, I] that read one input; the Hessian, and its cross term where it has one, is used up."""
    if hessian.tokens < LEAST_TOKENS:
        return {name: round_to_nearest(weight, schemes[name], scale_dtype) for name, weight in weights.items()}
    cross = hessian.cross_mean() if hessian.has_cross else None
    mean = hessian.mean()
    factor = factorize(mean, damping=damping if cross is None else max(damping, TARGET_DAMPING))
    solved = {}
    for name, weight in weights.items():
        scheme = schemes[name]
        codes, scales, zeros = gptq(
            weight,
            factor,
            scheme.bits,
            scheme.group_size,
            symmetric=scheme.symmetric,
            scale_dtype=scale_dtype,
            cross=cross,
        )
        size = weight.shape[1] // scales.shape[1]
        quantized = Quantized(codes, scales, zeros, scheme.bits, size, scheme.symmetric)
        solved[name] = Solved(quantized, sampled_error(weight, quantized, mean), "gptq")
    return solved


def sampled_error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> float:
    """`output_error` on rows spread over the matrix."""
    step = max(1, -(-len(weight) // ERROR_ROWS))
    rows = slice(None, None, step)
    part = Quantized(
        quantized.codes[rows],
        quantized.scales[rows],
        quantized.zeros[rows],
        quantized.bits,
        quantized.group_size,
        quantized.symmetric,
    )
    return output_error(weight[rows], part.dequantize(), hessian)


def grid_of(scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid of a scheme, with scales as the format stores them."""
    return Grid(scheme.bits, scheme.group_size, scheme.symmetric, scale_dtype)
