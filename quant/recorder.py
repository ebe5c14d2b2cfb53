"""Where solved modules go: their tensors into the result, a line into the summary, a word to whoever watches."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .folder_result import FolderResult
from .gguf_result import GgufResult
from .modules import Module
from .quantized import Scheme
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
    """watch: called after every module."""

    def __init__(
        self,
        result: FolderResult | GgufResult,
        schemes: Mapping[str, Scheme],
        layers: int,
        done: Iterable[Mapping[str, Any]] = (),
        watch: Callable[[Progress], None] | None = None,
    ) -> None:
        self.result, self.schemes, self.layers, self.watch = result, schemes, layers, watch
        self.results = [Result(**result) for result in done]
        self._begun, self._layers_here, self._layers_done = time.monotonic(), 0, 0

    def write(self, module: Module, solved: Solved, first_row: int = 0) -> None:
        """A solved module, or the rows of it from `first_row` on; it is done with the last of them."""
        self.result.write(module, solved, first_row)
        if first_row + len(solved.weight) < module.rows:
            return
        scheme = self.schemes[module.name]
        self.results.append(Result(module.name, scheme.bits, scheme.group_size, solved.method, solved.error))
        if self.watch:
            layer = self.layers if module.layer is None else module.layer
            self.watch(Progress(layer, self.layers, module.name, solved.error, self._seconds_left()))

    def layer_done(self, number: int) -> None:
        """Layer `number` is written."""
        self._layers_here += 1
        self._layers_done = number + 1

    def check_complete(self, modules: Iterable[Module]) -> None:
        """RuntimeError where a module was never written: its tensors would be zeros, and the file would load."""
        written = {result.module for result in self.results}
        missing = [module.name for module in modules if module.name not in written]
        if missing:
            raise RuntimeError(
                f"{len(missing)} modules were never written, the first {missing[0]}: a bug in qwenfit, please report it"
            )

    def as_json(self) -> list[dict[str, Any]]:
        """The results so far, for a journal."""
        return [asdict(result) for result in self.results]

    def _seconds_left(self) -> float | None:
        if not self._layers_here:
            return None
        per_layer = (time.monotonic() - self._begun) / self._layers_here
        return per_layer * (self.layers - self._layers_done)
