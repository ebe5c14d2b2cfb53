"""The Cholesky factor that GPTQ's error feedback is read from: ordered, damped, blocked, in place.

The solver of `gptq.py` needs H = R R^T with R upper in solving order. Written back to front (the column that is solved
first comes last) that is the ordinary lower factor, so this is one Cholesky of n^3 / 3 multiply-adds. The usual way
(GPTQ's code: Cholesky, inverse, Cholesky of the inverse) spends four times as much and squares the condition number.

Damping adds a multiple of the mean of the diagonal. A multiple that leaves H indefinite in float32 (fewer tokens than
columns, one direction that outweighs all others) is raised tenfold until the factor exists; at 1 it does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian import mirror
from .tasks import Tasks, one_thread_each

BLOCK = 256
TILE_ROWS = 1024
MOST_DAMPING = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """H[order][:, order] + damping * I = (lower * scale) (lower * scale)^T, lower being 1 on its diagonal.

    lower: float32 [I, I]; what stands on and above the diagonal of it is not the factor's and must not be read.
    scale: float32 [I], the diagonal of the Cholesky factor. order: int64 [I], the columns from the last solved to the
    first. damping: what was added to the diagonal, as a multiple of its mean.
    importance: float32 [I], by original column, what a square error in it costs when scales are chosen: sqrt(H_jj) *
    scale_j. An error costs H_jj if nothing makes up for it and scale_j^2 if all later columns do as well as they can;
    on unseen tokens the geometric mean beats or equals either (5 to 10 % less error than scale_j^2 where there are
    fewer tokens than columns, 40 % less than equal costs).
    """

    lower: Tensor
    scale: Tensor
    order: Tensor
    importance: Tensor
    damping: float


def factorize(
    hessian: Tensor, *, damping: float = 0.01, activation_order: bool = True, overwrite: bool = False
) -> Factor:
    """Factor of a Hessian, float32 [I, I] with both triangles.

    overwrite: the factor takes the Hessian's memory, which then holds nothing else; without, it is left alone.
    Columns are solved by descending diagonal (static act-order), or from the first to the last. Columns that are zero
    in every token take the damping alone: they are rounded to nearest. ValueError for NaN, Inf or a negative diagonal.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != torch.float32:
        raise ValueError(f"a Hessian is a square float32 matrix, not {hessian.dtype} {list(hessian.shape)}")
    diagonal = hessian.diagonal().clone()
    if not torch.isfinite(hessian.sum()) or (diagonal < 0).any():
        raise ValueError("the Hessian holds NaN, Inf or a negative diagonal: the calibration tokens do")
    order = diagonal.sort(stable=True).indices if activation_order else torch.arange(len(diagonal)).flip(0)
    order = order.to(hessian.device)
    mean = float(diagonal.double().mean()) or 1.0
    with one_thread_each(hessian.device) as tasks:
        matrix = hessian if overwrite else hessian.clone(memory_format=torch.contiguous_format)
        _permute(matrix, order, tasks)
        while True:
            matrix.diagonal().copy_(diagonal[order] + damping * mean)
            if _cholesky(matrix, tasks):
                break
            damping = max(10 * damping, 1e-4)
            if damping > MOST_DAMPING:
                raise ValueError("the Hessian is not of any tokens: no damping makes it positive definite")
            _restore(matrix)
        scale = matrix.diagonal().clone()
        tasks.run(lambda at: matrix[at : at + TILE_ROWS].div_(scale), range(0, len(matrix), TILE_ROWS))
    importance = (diagonal + damping * mean).sqrt_()
    importance[order] *= scale
    return Factor(matrix, scale, order, importance, damping)


def _permute(matrix: Tensor, order: Tensor, tasks: Tasks) -> None:
    """matrix[order][:, order], in place: strips of rows, then strips of columns."""

    def permute_columns(at: int) -> None:
        rows = matrix[at : at + BLOCK]
        rows.copy_(rows.index_select(1, order))

    def permute_rows(at: int) -> None:
        columns = matrix[:, at : at + BLOCK]
        columns.copy_(columns.index_select(0, order))

    tasks.run(permute_columns, range(0, len(matrix), BLOCK))
    tasks.run(permute_rows, range(0, len(matrix), BLOCK))


def _cholesky(matrix: Tensor, tasks: Tasks) -> bool:
    """The lower factor into the lower triangle, by columns of BLOCK; False where a pivot is not positive.

    The upper triangle is left alone: it holds what a second try starts from.
    """
    size = len(matrix)
    for at in range(0, size, BLOCK):
        end = min(at + BLOCK, size)
        corner = matrix[at:end, at:end]
        done = matrix[at:end, :at]
        factor, failed = torch.linalg.cholesky_ex(torch.addmm(corner.tril(), done, done.t(), alpha=-1).tril())
        if failed or not torch.isfinite(factor.diagonal()).all():
            return False
        corner.copy_(factor.tril() + corner.triu(1))

        def solve(row: int, at: int = at, end: int = end, done: Tensor = done, factor: Tensor = factor) -> None:
            panel = matrix[row : row + TILE_ROWS, at:end]
            if at:
                panel.addmm_(matrix[row : row + TILE_ROWS, :at], done.t(), alpha=-1)
            panel.copy_(torch.linalg.solve_triangular(factor.t(), panel, upper=True, left=False))

        tasks.run(solve, range(end, size, TILE_ROWS))
    return True


def _restore(matrix: Tensor) -> None:
    """The lower triangle from the upper one; the diagonal is whatever it was."""
    mirror(matrix.t())
