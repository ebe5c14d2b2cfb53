"""What the calibration tokens say about a matrix's inputs: H = X^T X / n.

The error of a quantized matrix on those tokens is tr(dW H dW^T) per token, so H is all that GPTQ needs to know of them.
Letters: n tokens, I inputs.

Only the lower triangle is computed, tile by tile and in place: half of the products of the plain matrix product, and no
second matrix of its size. Matrices with the same input (q, k and v; gate and up) share one `Hessian`.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .tasks import one_thread_each

TILE = 256
# Rows of X per product: long enough that reading and writing a tile of H costs little, short enough for the cache.
CHUNK_TOKENS = 2048
ERROR_ROWS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Cross:
    """C = (X_reference - X)^T X / n, what GPTAQ needs (arXiv 2504.02692, eq. 9): X is what the quantized layers before
    feed into a matrix, X_reference what the full-precision ones would have.

    matrix: float32, C itself [I, I], or W C [O, I] of the one weight W that reads this input (`of_weight`).
    """

    matrix: Tensor
    of_weight: bool = False

    def times(self, weights: Tensor, rows: slice) -> Tensor:
        """(W C)^T, float32 [I, R], of some rows of W; weights: those rows as float32 [I, R']; R' may be more than R,
        filled up with zeros, and so is what comes out."""
        if not self.of_weight:
            return self.matrix.t() @ weights
        part = self.matrix[rows]
        return torch.nn.functional.pad(part.t(), (0, weights.shape[1] - len(part))).contiguous()


class Hessian:
    """Sums X^T X over batches.

    columns: I. cross: also sum (X_reference - X)^T X (`Cross`). weight: [O, I], sum W (X_reference - X)^T X instead,
    where that is less work and memory (`product_is_less`).
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        *,
        cross: bool = False,
        weight: Tensor | None = None,
    ) -> None:
        self.columns = columns
        self.tokens = self.cross_tokens = 0
        # Not zeroed: the first tokens write, all later ones add.
        self._sum: Tensor | None = torch.empty(columns, columns, device=device)
        self._weight = weight if cross else None
        rows = columns if self._weight is None else len(self._weight)
        self._cross_sum = torch.empty(rows, columns, device=device) if cross else None

    @property
    def has_cross(self) -> bool:
        """Whether a cross term is summed, too."""
        return self._cross_sum is not None

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Add tokens: x [..., I] of any float dtype; reference: like x, for the cross term. Tokens without it add to
        H alone: the full-precision stream need not have them all.

        ValueError for another width, for values that are not finite, and where `reference` is not asked for.
        """
        total, cross_total = self._sum, self._cross_sum
        if total is None:
            raise ValueError("this Hessian was finished: start another one for more tokens")
        if x.shape[-1] != self.columns:
            raise ValueError(f"tokens of {x.shape[-1]} values for a Hessian of {self.columns} columns")
        if reference is not None and (cross_total is None or reference.shape != x.shape):
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
                    keep = int(self.cross_tokens > 0)
                    add = partial(_add_cross, cross_total, shift, part, keep, strip, self._weight)
                    tasks.run(add, range(0, len(cross_total), strip))
                    self.cross_tokens += len(part)
                self.tokens += len(part)

    def mean(self) -> Tensor:
        """H, float32 [I, I] with both triangles, in the memory of the sum (there is no adding afterwards).

        ValueError without tokens.
        """
        total, self._sum = self._sum, None
        if total is None or not self.tokens:
            raise ValueError("no tokens were added: there is no mean")
        return mirror(total, 1 / self.tokens)

    def cross_mean(self, unmoved: int = 0) -> Cross:
        """The mean over the tokens that came with a reference, and over `unmoved` more, as if both streams had agreed
        on those. ValueError where it was not asked for, or without tokens."""
        total, self._cross_sum = self._cross_sum, None
        if total is None or not self.cross_tokens:
            raise ValueError("no cross term was summed: create the Hessian with cross=True and add tokens")
        return Cross(total.mul_(1 / (self.cross_tokens + unmoved)), self._weight is not None)


def product_is_less(rows: int, columns: int, tokens: int) -> bool:
    """Whether W C of a weight [rows, columns] is less work to sum over the tokens (2 n O I) than C with its product
    afterwards ((n + O) I^2). It then also takes less memory: that is down_proj, which has fewer rows than columns."""
    return rows < columns and 2 * tokens * rows < (tokens + rows) * columns


def strip_rows(columns: int) -> int:
    """Rows of H per product: a strip computes the square on its diagonal in full, so not too many for a small H."""
    return 512 if columns <= 8192 else 1024


def _add_strip(total: Tensor, x: Tensor, keep: int, at: int) -> None:
    """One strip of the lower triangle; keep: 1 adds to it, 0 writes over it."""
    end = at + strip_rows(len(total))
    total[at:end, :end].addmm_(x[:, at:end].t(), x[:, :end], beta=keep)


def _add_cross(total: Tensor, shift: Tensor, x: Tensor, keep: int, strip: int, weight: Tensor | None, at: int) -> None:
    """One strip of rows of shift^T X, or of W shift^T X."""
    rows = slice(at, at + strip)
    moved = shift[:, rows] if weight is None else shift @ weight[rows].to(shift).t()
    total[rows].addmm_(moved.t(), x, beta=keep)


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
