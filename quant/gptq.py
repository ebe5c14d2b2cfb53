"""GPTQ (arXiv 2210.17323) without an inverse: rounding with the errors of earlier columns made up for by later ones.

With H = L L^T (columns in reverse solving order, `cholesky.py`) the error on the calibration tokens is the sum over
columns j of |(dW L)_j|^2, and (dW L)_j = L_jj (dW_j + sum of dW_i L_ij / L_jj over i > j). So the columns are rounded
from the last to the first, each after adding what the errors dW_i = W_i - rounded W_i of those before ask of it:

    target_j = W_j + sum over i > j of dW_i L_ij / L_jj

which is GPTQ's choice exactly (arXiv 2507.18553: both are Babai's nearest plane), with the Cholesky factor of H itself
in place of that of its inverse.

Blocked: the errors of all solved columns reach a block of 256 by one matrix product, whose long side is the summed
one (the result is written once, not once per block before it); inside the block by products of 64 columns, and inside
those by the loop of `rounding.py`. Weights lie transposed, so that a column is contiguous. Rows do not know of each
other: strips of them are solved by one thread each.

Groups are of original columns and their scales are found before solving ("static act-order"), so no file needs a g_idx.
"""

import torch
from torch import Tensor

from .cholesky import Factor, factorize
from .grid import Grid, search_scales
from .hessian import Cross
from .rounding import LANES, solve_columns
from .tasks import one_thread_each

BLOCK = 256
INNER_BLOCK = 64
MOST_STRIP_ROWS = 1024


def gptq(
    weight: Tensor,
    hessian: Tensor | Factor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    signed_scales: bool = True,
    damping: float = 0.01,
    activation_order: bool = True,
    cross: Cross | None = None,
    cross_strength: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [O, I], scales float32 [O, G] and zeros uint8 [O, G] of a weight [O, I], columns in original order.

    hessian: float32 [I, I], X^T X / n of the matrix's inputs, or what `factorize` made of it, where several matrices
    share one (damping and activation_order are then the factor's). group_size: 32, 64, 128, or -1 for one scale per
    row. signed_scales: as in `Grid`. damping: what is added to the diagonal, as a part of its mean.

    cross: with it the outputs to come near to are those of the full-precision stream, W X_reference, as in GPTAQ (arXiv
    2504.02692), at `cross_strength` 1 wholly, below only in part. The least squares solution W + W C (H + damping)^-1
    becomes the target; by the factor it costs one triangular solve.

    ValueError where shapes do not fit, and for NaN or Inf.
    """
    grid = Grid(bits, group_size, symmetric, scale_dtype, signed_scales)
    columns = weight.shape[1]
    grid.group_columns(columns)
    width = (hessian.lower if isinstance(hessian, Factor) else hessian).shape[0]
    if width != columns:
        raise ValueError(f"a weight of {columns} columns with a Hessian of {width}")
    if not isinstance(hessian, Factor):
        hessian = factorize(hessian, damping=damping, activation_order=activation_order)
    factor = hessian
    scales, zeros = search_scales(weight, grid, factor.importance)
    codes = choose_codes(weight, factor, scales, zeros, bits, cross=cross, cross_strength=cross_strength)
    return codes, scales, zeros


def choose_codes(
    weight: Tensor,
    factor: Factor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    *,
    groups: Tensor | None = None,
    minima: Tensor | None = None,
    cross: Cross | None = None,
    cross_strength: float = 1.0,
) -> Tensor:
    """Codes uint8 [O, I] of a weight [O, I] on levels that are given: (code - zero) * scale + minimum.

    scales float32, zeros uint8, minima float32 (0 without): [O, G], scales not 0. groups: int64 [I], the group of each
    column; without, groups are of neighbours. cross, cross_strength: as in `gptq`.
    """
    rows, columns = weight.shape
    if groups is None:
        groups = torch.arange(columns, device=weight.device) // (columns // scales.shape[1])
    order_groups = groups[factor.order]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    strip = strip_rows(rows) if weight.device.type == "cpu" else rows
    back = torch.empty_like(factor.order).index_copy_(
        0, factor.order, torch.arange(columns, device=factor.order.device)
    )

    def solve(at: int) -> None:
        part = slice(at, min(at + strip, rows))
        weights = _transposed(weight[part])
        shift = None if cross is None else _shift(cross.times(weights, part), cross_strength, factor)
        weights = weights.index_select(0, factor.order)
        if minima is not None:
            # An error is the same whether the minimum is added to the levels or taken from the weight.
            weights -= _transposed(minima[part]).index_select(0, order_groups)
        solved = solve_strip(
            weights,
            factor,
            order_groups,
            _transposed(scales[part], fill=1.0),
            _transposed(zeros[part]),
            bits,
            shift,
        )
        codes[part] = solved.index_select(0, back)[:, : part.stop - at].t()

    with one_thread_each(weight.device) as tasks:
        tasks.run(solve, range(0, rows, strip))
    return codes


def strip_rows(rows: int) -> int:
    """Rows that one thread solves at a time: products of many rows are fast, but a small matrix (an expert's) must not
    leave all threads but one idle."""
    return MOST_STRIP_ROWS if rows >= 4 * MOST_STRIP_ROWS else MOST_STRIP_ROWS // 4


def solve_strip(
    weights: Tensor, factor: Factor, groups: Tensor, scales: Tensor, zeros: Tensor, bits: int, shift: Tensor | None
) -> Tensor:
    """Codes uint8 [I, R] of weights float32 [I, R], both in the factor's order; weights become weights - rounding.

    groups: int64 [I], the group of each column; scales, zeros: float32 [G, R]; shift: float32 [I, R], added to targets.
    """
    columns, rows = weights.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weights.device)
    lower = factor.lower
    for at in reversed(range(0, columns, BLOCK)):
        end = min(at + BLOCK, columns)
        targets = weights[at:end].clone() if shift is None else weights[at:end] + shift[at:end]
        targets.addmm_(lower[end:, at:end].t(), weights[end:])
        for inner in reversed(range(at, end, INNER_BLOCK)):
            stop = min(inner + INNER_BLOCK, end)
            solve_columns(
                targets[inner - at : stop - at],
                weights[inner:stop],
                codes[inner:stop],
                lower[inner:stop, inner:stop],
                groups[inner:stop],
                scales,
                zeros,
                bits,
            )
            targets[: inner - at].addmm_(lower[inner:stop, at:inner].t(), weights[inner:stop])
    return codes


def _transposed(rows: Tensor, fill: float = 0.0) -> Tensor:
    """float32 [I, R] of [R, I], R filled up to a multiple of 16."""
    missing = -len(rows) % LANES
    return torch.nn.functional.pad(rows.float().t(), (0, missing), value=fill).contiguous()


def _shift(asked: Tensor, strength: float, factor: Factor) -> Tensor:
    """What the full-precision stream adds to the targets, float32 [I, R] in the factor's order.

    |(W - Q) X + W (X_reference - X)|^2 is, up to a constant, the sum over j of |(dW L)_j + B_j|^2 with B = W C L^-T, so
    column j aims at B_j / L_jj more. asked: (W C)^T, float32 [I, R] in original order.
    """
    asked = asked.index_select(0, factor.order).mul_(strength)
    columns = len(asked)
    for at in range(0, columns, BLOCK):
        end = min(at + BLOCK, columns)
        asked[at:end].addmm_(factor.lower[at:end, :at], asked[:at], alpha=-1)
        corner = factor.lower[at:end, at:end]
        asked[at:end] = torch.linalg.solve_triangular(corner, asked[at:end], upper=False, unitriangular=True)
    return asked.div_(factor.scale.square().unsqueeze(1))
