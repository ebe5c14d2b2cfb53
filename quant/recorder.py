"""Where solved modules go: their tensors into the shards, a line into the summary, a word to whoever watches."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .modules import Module
from .quantized import Scheme
from .shards import Shards
from .solve import Solved


@dataclass(frozen=True, slots=True)
class Result:
    """A quantized module. error: relative square error of its outputs on the calibration tokens; None without them."""

    module: str
    bits: int
    group_size: int
    method: str
    error: float | None


@dataclass(frozen=True, slots=True)
class Progress:
    """layer of layers is being worked on (the last one is what lies outside of layers); module: what was solved last.

    seconds_left: from the layers that this run has done; None before the first.
    """

    layer: int
    layers: int
    module: str
    error: float | None
    seconds_left: float | None


class Recorder:
    """file: the module of the format (`module_tensors`). watch: called after every module."""

    def __init__(
        self,
        shards: Shards,
        file: Any,
        schemes: Mapping[str, Scheme],
        layers: int,
        done: Iterable[Mapping[str, Any]] = (),
        watch: Callable[[Progress], None] | None = None,
    ) -> None:
        self.shards, self.file, self.schemes, self.layers, self.watch = shards, file, schemes, layers, watch
        self.results = [Result(**result) for result in done]
        self._begun, self._layers_here, self._layers_done = time.monotonic(), 0, 0

    def write(self, module: Module, solved: Solved) -> None:
        """A solved module."""
        scheme = self.schemes[module.name]
        extra = {"activation_bits": scheme.activation_bits} if scheme.activation_bits else {}
        for ending, tensor in self.file.module_tensors(solved.weight, **extra).items():
            self.shards.write(f"{module.name}.{ending}", tensor)
        self.results.append(Result(module.name, scheme.bits, scheme.group_size, solved.method, solved.error))
        if self.watch:
            layer = self.layers if module.layer is None else module.layer
            self.watch(Progress(layer, self.layers, module.name, solved.error, self._seconds_left()))

    def layer_done(self, number: int) -> None:
        """Layer `number` is written."""
        self._layers_here += 1
        self._layers_done = number + 1

    def as_json(self) -> list[dict[str, Any]]:
        """The results so far, for a journal."""
        return [asdict(result) for result in self.results]

    def _seconds_left(self) -> float | None:
        if not self._layers_here:
            return None
        per_layer = (time.monotonic() - self._begun) / self._layers_here
        return per_layer * (self.layers - self._layers_done)
