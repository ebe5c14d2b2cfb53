"""What the calibration tokens say about a matrix's inputs: H = X^T X / n.

The error of a quantized matrix on those tokens is tr(dW H dW^T) per token, so H is all that GPTQ needs to know of them.
Letters: n tokens, I inputs.

Only the lower triangle is computed, tile by tile and in place: half of the products of the plain matrix product, and no
second matrix of its size. Matrices with the same input (q, k and v; gate and up) share one `Hessian`.
"""

from functools import partial

import torch
from torch import Tensor

from .tasks import one_thread_each

TILE = 256
# Rows of X per product: long enough that reading and writing a tile of H costs little, short enough for the cache.
CHUNK_TOKENS = 2048
ERROR_ROWS = 512


class Hessian:
    """Sums X^T X over batches.

    columns: I. cross: also sum (X_reference - X)^T X, what GPTAQ needs (arXiv 2504.02692, eq. 9): X is what the
    quantized layers before feed into the matrix, X_reference what the full-precision ones would have.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", *, cross: bool = False) -> None:
        self.columns = columns
        self.tokens = 0
        # Not zeroed: the first tokens write, all later ones add.
        self._sum: Tensor | None = torch.empty(columns, columns, device=device)
        self._cross_sum = torch.empty(columns, columns, device=device) if cross else None

    @property
    def has_cross(self) -> bool:
        """Whether a cross term is summed, too."""
        return self._cross_sum is not None

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Add tokens: x [..., I] of any float dtype, reference like x where the sum has a cross term.

        ValueError for another width, for values that are not finite, and where `reference` is missing or not asked for.
        """
        total, cross_total = self._sum, self._cross_sum
        if total is None:
            raise ValueError("this Hessian was finished: start another one for more tokens")
        if x.shape[-1] != self.columns:
            raise ValueError(f"tokens of {x.shape[-1]} values for a Hessian of {self.columns} columns")
        if (reference is None) != (cross_total is None) or (reference is not None and reference.shape != x.shape):
            raise ValueError("a Hessian with a cross term takes x and a reference of its shape, another one x alone")
        rows = x.reshape(-1, self.columns)
        wanted = None if reference is None else reference.reshape(-1, self.columns)
        strip = strip_rows(self.columns)
        with one_thread_each(total.device) as tasks:
            for start in range(0, len(rows), CHUNK_TOKENS):
                part = rows[start : start + CHUNK_TOKENS].to(total)
                if not torch.isfinite(part.sum()) and not torch.isfinite(part).all():
                    raise ValueError("calibration tokens hold NaN or Inf: the layers before them overflow")
                keep = int(self.tokens > 0)
                tasks.run(partial(_add_strip, total, part, keep), range(0, self.columns, strip))
                if wanted is not None and cross_total is not None:
                    shift = wanted[start : start + CHUNK_TOKENS].to(total) - part
                    tasks.run(partial(_add_cross, cross_total, shift, part, keep), range(0, self.columns, strip))
                self.tokens += len(part)

    def mean(self) -> Tensor:
        """H, float32 [I, I] with both triangles, in the memory of the sum (there is no adding afterwards).

        ValueError without tokens.
        """
        total, self._sum = self._sum, None
        if total is None or not self.tokens:
            raise ValueError("no tokens were added: there is no mean")
        return mirror(total, 1 / self.tokens)

    def cross_mean(self) -> Tensor:
        """(X_reference - X)^T X / n, float32 [I, I]. ValueError where it was not asked for, or without tokens."""
        total, self._cross_sum = self._cross_sum, None
        if total is None or not self.tokens:
            raise ValueError("no cross term was summed: create the Hessian with cross=True and add tokens")
        return total.mul_(1 / self.tokens)


def strip_rows(columns: int) -> int:
    """Rows of H per product: a strip computes the square on its diagonal in full, so not too many for a small H."""
    return 512 if columns <= 8192 else 1024


def _add_strip(total: Tensor, x: Tensor, keep: int, at: int) -> None:
    """One strip of the lower triangle; keep: 1 adds to it, 0 writes over it."""
    end = at + strip_rows(len(total))
    total[at:end, :end].addmm_(x[:, at:end].t(), x[:, :end], beta=keep)


def _add_cross(total: Tensor, shift: Tensor, x: Tensor, keep: int, at: int) -> None:
    end = at + strip_rows(len(total))
    total[at:end].addmm_(shift[:, at:end].t(), x, beta=keep)


def mirror(lower: Tensor, scale: float = 1.0) -> Tensor:
    """The lower triangle times `scale`, written into both triangles in place; returns the same tensor [I, I]."""
    for row in range(0, len(lower), TILE):
        for column in range(0, row, TILE):  # by way of small contiguous tiles, which are torch's fast transposition
            tile = lower[row : row + TILE, column : column + TILE].mul_(scale)
            lower[column : column + TILE, row : row + TILE] = tile.contiguous().t().contiguous()
        corner = lower[row : row + TILE, row : row + TILE]
        half = corner.tril().mul_(scale)
        corner.copy_(half + half.tril(-1).t())
    return lower


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor, *, most_rows: int | None = None) -> float:
    """tr(dW H dW^T) / tr(W H W^T): the square error of the outputs on the calibration tokens, relative to their square.

    weight, rounded: [O, I]; hessian: float32 [I, I]. The full sum costs as much as solving; `most_rows` rows spread
    evenly estimate it. 0.0 for outputs that are zero and stay so.
    """
    rows = slice(None, None, 1 if most_rows is None else max(1, -(-len(weight) // most_rows)))
    wanted, got = weight[rows].float(), rounded[rows].float()
    lost = _square(wanted - got, hessian)
    return lost / (_square(wanted, hessian) or 1.0)


def _square(rows: Tensor, hessian: Tensor) -> float:
    """tr(A H A^T), summed in float64."""
    total = 0.0
    with one_thread_each(rows.device):
        for at in range(0, len(rows), ERROR_ROWS):
            part = rows[at : at + ERROR_ROWS]
            total += float((part @ hessian).mul_(part).sum(dtype=torch.float64))
    return total
