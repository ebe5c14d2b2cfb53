"""Writes a `Program` (operations.py): norms, roundings and matmuls of a few rows, with the buffers between them.

Rows are float32; what a quantized matrix reads is, beside them, their int16 planes, once for every kind of matrix
(parts of a block that share a scale, factor of its zero points). Both have names, and layers share them, so that they
stay in the caches while the weights pass: each is written before it is read. What belongs to the model or to its
caches is pointed to and not kept alive, see `decode.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..layout.packing import QuantizedWeight
from ..layout.rows import Stacked, Weight
from ..layout.rows import rows_of as matrix_rows
from .library import CpuLibrary
from .matmul import add_matmul, dense_matrix, parts_of, quantized_matrix, zero_factor_of
from .operations import (
    DTYPES,
    Matrix,
    Program,
    Round,
    Rounded,
    Rows,
    address,
    operation,
    pointer,
    rounded_rows,
    rows_of,
)

Kind = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Rows that matrices read: as floats, and rounded for each kind of matrix.

    roundings: those that are still to be made, with the matmul that reads them (`add_matmul`).
    """

    floats: Tensor
    rounded: dict[Kind, Rounded]
    roundings: dict[Kind, Round] = field(default_factory=dict)


class Writer:
    """A program under way, for `rows` rows of activations in `planes` int16 planes each."""

    def __init__(self, library: CpuLibrary, rows: int, planes: int) -> None:
        self.program = Program(library)
        self.rows, self.planes = rows, planes
        self._buffers: dict[tuple[str, int, int], Tensor] = {}
        self._rounded: dict[tuple[str, int, int, Kind], Rounded] = {}

    def buffer(self, name: str, columns: int, rows: int = 0) -> Tensor:
        """Float rows [rows, columns] by name; rows 0: the program's."""
        key = (name, rows or self.rows, columns)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(key[1], columns)
            self.program.held.append(self._buffers[key])
        return self._buffers[key]

    def rounded(self, name: str, columns: int, kind: Kind, rows: int = 0) -> Rounded:
        """Rounded rows by name; rows 0: the program's."""
        key = (name, rows or self.rows, columns, kind)
        if key not in self._rounded:
            self._rounded[key], held = rounded_rows(key[1], columns, self.planes, *kind)
            self.program.held += [self._rounded[key], *held]
        return self._rounded[key]

    def rounds(self, name: str, columns: int, readers: Sequence[Weight], rows: int = 0) -> dict[Kind, Rounded]:
        """Rounded rows by name, for every kind of matrix that reads the columns in their own order."""
        kinds = {kind_of(weight) for weight in readers if isinstance(weight, QuantizedWeight) and weight.order is None}
        return {kind: self.rounded(name, columns, kind, rows) for kind in sorted(kinds)}

    def norm(
        self,
        x: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        readers: Sequence[Weight],
        y: Tensor | None = None,
    ) -> Source:
        """residual += x, then (1 + weight) * rmsnorm(residual): as floats in `y`, and rounded for its readers."""
        columns = residual.shape[1]
        floats = self.buffer("normed", columns) if y is None else y
        rounded = self.rounds("normed", columns, readers)
        first, *others = [*rounded.values(), None]
        norm = operation(
            "NORM",
            x=rows_of(residual if x is None else x),
            residual=rows_of(None if x is None else residual),
            weight=vector_of(weight),
            y=rows_of(floats),
            rows=self.rows,
            columns=columns,
            eps=eps,
            offset=1.0,
            rounded=address(first),
        )
        self.program.add(norm)
        for other in others:
            if other is not None:
                self.program.add(self.rounding(rows_of(floats), columns, other))
        return Source(floats, rounded)

    def rounding(
        self,
        source: Rows,
        columns: int,
        out: Rounded | None,
        gate: Rows | None = None,
        y: Tensor | None = None,
        gather: Tensor | None = None,
        order: Tensor | None = None,
        rows: int = 0,
    ) -> Round:
        """Rows of a source (times silu(gate)) into `out`, and as floats into `y`: an operation, not appended yet."""
        self.program.held += [gather, order]
        return operation(
            "ROUND",
            source=source,
            gate=gate or Rows(),
            gather=pointer(gather),
            order=pointer(order),
            rows=rows or self.rows,
            columns=columns,
            y=rows_of(y),
            out=address(out),
        )

    def unrounded(self, floats: Tensor, rounded: dict[Kind, Rounded]) -> Source:
        """Rows that lie in floats, to be rounded where they are read."""
        rows, columns = rows_of(floats), floats.shape[1]
        return Source(floats, rounded, {kind: self.rounding(rows, columns, out) for kind, out in rounded.items()})

    def gated(self, name: str, both: Tensor, readers: Sequence[Weight]) -> Source:
        """silu(gate) * up of [rows, 2 I], as its readers want it."""
        rows, inner = both.shape[0], both.shape[1] // 2
        gate, up = rows_of(both[:, :inner]), rows_of(both[:, inner:])
        floats, rounded = self.buffer(name, inner, rows), self.rounds(name, inner, readers, rows)
        needs_floats = any(isinstance(weight, Tensor) or weight.order is not None for weight in readers)
        if needs_floats:
            self.program.add(self.rounding(up, inner, None, gate, floats, rows=rows))
        roundings = {kind: self.rounding(up, inner, out, gate, rows=rows) for kind, out in rounded.items()}
        return Source(floats, rounded, roundings)

    def linear(
        self, source: Source, pairs: Sequence[tuple[Weight, Tensor]], routing: Mapping[str, Tensor] | None = None
    ) -> None:
        """Every weight times the source, into its rows; those that read the same form of it are one operation.

        routing: offsets, experts and active of `add_matmul`, for stacks.
        """
        rows, more = source.floats.shape[0], cast(dict[str, Any], routing or {})
        packed = [(weight, y) for weight, y in pairs if isinstance(weight, QuantizedWeight)]
        for kind, rounded in source.rounded.items():
            alike = [matrix_of(weight, y) for weight, y in packed if weight.order is None and kind_of(weight) == kind]
            if alike:
                add_matmul(self.program, alike, rows, rounded, rounding=source.roundings.get(kind), **more)
        for weight, y in packed:
            if weight.order is not None:
                order, rounded = (
                    weight.order.to(torch.int32).contiguous(),
                    self.rounded("ordered", weight.columns, kind_of(weight), rows),
                )
                rounding = self.rounding(rows_of(source.floats), weight.columns, rounded, order=order, rows=rows)
                add_matmul(self.program, [matrix_of(weight, y)], rows, rounded, rounding=rounding, **more)
        plain = [matrix_of(weight, y) for weight, y in pairs if isinstance(weight, Tensor)]
        if plain:
            add_matmul(self.program, plain, rows, floats=rows_of(source.floats), **more)


def kind_of(weight: QuantizedWeight) -> Kind:
    """What rounded rows must be for this weight."""
    return parts_of(weight), zero_factor_of(weight)


def side_by_side(weights: Stacked, y: Tensor) -> list[tuple[Weight, Tensor]]:
    """Each weight with its columns of y."""
    pairs, first = [], 0
    for weight in weights:
        pairs.append((weight, y[:, first : first + matrix_rows(weight)]))
        first += matrix_rows(weight)
    return pairs


def matrix_of(weight: Weight, y: Tensor) -> tuple[Matrix, list[Any]]:
    """The structure of a weight and what to keep alive: what was converted, but not the model's own tensors."""
    if isinstance(weight, Tensor):
        return dense_matrix(weight, y)[0], []
    matrix, held = quantized_matrix(weight, y)
    own = (weight.codes, weight.scales, weight.zeros, y)
    return matrix, [x for x in held if not any(x is tensor for tensor in own)]


def vector_of(weight: Tensor) -> Rows:
    """A contiguous vector as one row."""
    return Rows(weight.data_ptr(), DTYPES[weight.dtype], weight.numel())
