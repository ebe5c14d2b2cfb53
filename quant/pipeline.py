"""`quantize`: a checkpoint in, a smaller one out, layer by layer in bounded memory.

Read a layer, run the calibration tokens up to the first matrices, solve these, go on with what they became, write,
free, next layer (`layer_solver.py`). What is not quantized is copied beforehand. The result has its name only when it
is complete; until then a run may be killed at any moment and gone on with (`journal.py`), and gives the same bytes as
one that was not.
"""

import hashlib
import importlib.metadata
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.runtime.configuration import read_configuration
from ..kernels.runtime.process_memory import peak_bytes
from ..profiles.errors import BadInput
from .activations import Activations
from .calibration import Text, choose_sequences, read_text, read_tokenizer
from .card import Card, model_card
from .decoder import DecoderLayer, Stream
from .experts import Method
from .folder_result import FolderResult
from .gguf_result import GgufResult
from .grid import NotFinite
from .journal import Journal
from .layer_solver import LayerSolver
from .layout import lay_out
from .modules import Module
from .output import SCRATCH, Output, open_output
from .placed_file import refuse
from .recipe import Recipe
from .recorder import Progress, Recorder, Result
from .solve import Solved, round_to_nearest
from .source import Source, open_source
from .tasks import Aside, one_ahead, one_thread_each
from .weights import Weights
from .workers import Here, RayCluster, workers_at

TARGET_SHARE = 0.75
"""Of the calibration sequences, those that the full-precision stream takes: with all of them a layer costs 10 % more,
with half of them the targets lose what they gain (docs/quantization.md)."""
PROCESS_BYTES = 500_000_000
"""Python, torch and what its allocator keeps."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What `quantize` made. bits_per_weight: of quantized modules, scales and zero points included.

    fallbacks: experts that no calibration token reached. seconds, peak_memory_bytes: of
    this run alone, where it was resumed, and of its whole process.
    """

    target: str
    bytes: int
    source_bytes: int
    bits_per_weight: float
    results: tuple[Result, ...]
    fallbacks: tuple[str, ...]
    recipe: Recipe
    calibration: str
    seconds: float
    peak_memory_bytes: int
    resumed: bool


def quantize(
    source: str,
    target: str,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "cpu",
    max_ram_bytes: int | None = None,
    workers: str | None = None,
    command: str = "",
    watch: Callable[[Progress], None] | None = None,
) -> Summary:
    """Quantize the checkpoint that `source` names into the folder `target`.

    max_ram_bytes: activations go to files beside the result where everything together would take more. workers: a Ray
    cluster that solves, `auto` or `ray://HOST:PORT`. command: for the model card. watch: called after every module.
    `QwenfitError` in one sentence for whatever is wrong; the source is never written to, and what was done so far stays
    for `resume`.
    """
    started = time.monotonic()
    job = _Job(open_source(source), recipe, torch.device(device))
    identity, spills = job.identity(), job.spills(max_ram_bytes)
    quantization = job.result.quantization_config()  # what it cannot say is refused before hours of work
    if job.tokens is not None:
        job.weights.check_tokens(job.tokens)
    with workers_at(workers) as solvers, _opened(job.result, target, job.source.folder, overwrite, resume) as output:
        journal = Journal(output, identity)
        state = journal.read()
        done = state["results"] if state else ()
        recorder = Recorder(job.result, job.schemes, job.configuration.num_layers, done, watch)
        job.result.open(output)
        with _scratch(output.folder) as scratch:
            job.work(recorder, journal, state, scratch if spills else None, solvers)
        recorder.check_complete(job.modules)
        if job.source.fingerprint() != identity["source"]:
            raise BadInput(f"{job.source.folder} changed while it was read: --overwrite begins anew")
        job.result.finish()
        seconds = time.monotonic() - started
        summary = job.summary(output.target, recorder.results, seconds, state is not None)
        texts = {"README.md": model_card(job.card(summary, command)), "recipe.yaml": job.recipe.text()}
        output.finish(job.source, quantization, texts)
    return summary


@contextmanager
def _opened(
    result: FolderResult | GgufResult, target: str, source_folder: str, overwrite: bool, resume: bool
) -> Iterator[Output]:
    """Where to write, claimed until the end, whatever that is."""
    output = open_output(target, source_folder, overwrite=overwrite, resume=resume)
    try:
        yield output
    finally:
        result.close()
        output.release()


@contextmanager
def _scratch(folder: str) -> Iterator[str]:
    """A folder for activations, gone afterwards. `BadInput` where there can be none."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder)
    except OSError as error:
        refuse(folder, error)
    with scratch as path:
        yield path


@dataclass(frozen=True, slots=True)
class Sizes:
    """What `quantize` would make, in bytes, without making it. modules: how many are quantized."""

    bytes: int
    source_bytes: int
    bits_per_weight: float
    modules: int
    recipe: Recipe


def sizes(source: str, recipe: Recipe) -> Sizes:
    """Exact, from the headers of the source: nothing is read or written. `QwenfitError` as of `quantize`."""
    found = lay_out(open_source(source), recipe)
    found.result.quantization_config()  # refuses what `quantize` would
    size_bytes = found.result.total_bytes
    return Sizes(size_bytes, found.source_bytes, found.bits_per_weight, len(found.modules), found.recipe)


class _Job:
    """A source with its recipe resolved."""

    def __init__(self, source: Source, recipe: Recipe, device: torch.device) -> None:
        self.source, self.device = source, device
        self.configuration = read_configuration(source.folder)
        self.layout = lay_out(source, recipe)
        self.recipe, self.result = self.layout.recipe, self.layout.result
        self.schemes, self.modules = self.layout.schemes, self.layout.modules
        self.weights = Weights(source, self.layout.found, device)
        self.threads = torch.get_num_threads()

    @cached_property
    def text(self) -> Text | None:
        """What it is calibrated on; None without calibration."""
        return read_text(self.recipe.calibration) if self.recipe.needs_calibration else None

    @cached_property
    def tokens(self) -> Tensor | None:
        """int64 [n, L]; None without calibration."""
        if self.text is None:
            return None
        length = min(self.recipe.sequence_tokens, self.configuration.max_position_embeddings)
        tokenizer = read_tokenizer(self.source.folder)
        return choose_sequences(self.text, tokenizer, self.recipe.tokens, length, self.recipe.seed)

    def identity(self) -> dict[str, str]:
        """What a resumed run has to have in common with the first."""
        recipe = self.recipe.text() + (self.text.sha256 if self.text else "")
        return {"source": self.source.fingerprint(), "recipe": hashlib.sha256(recipe.encode()).hexdigest()}

    def work(
        self,
        recorder: Recorder,
        journal: Journal,
        state: Mapping[str, Any] | None,
        folder: str | None,
        workers: Here | RayCluster,
    ) -> None:
        """Everything that `state` does not call done. folder: where activations go; None keeps them in memory."""
        first = int(state["layer"]) if state else 0
        streams = self._streams(journal, first, folder)
        method = Method(str(self.recipe.method), self.result.scale_dtype, self.recipe.damping)
        outside = [module for module in self.modules if module.layer is None]
        inside = [] if streams else [m for n in range(first, self.configuration.num_layers) for m in self._layer(n)]
        rounded = self._rounded([*inside, *outside])
        solver = LayerSolver(self.weights, recorder, self.schemes, method, workers)
        # Without calibration this thread packs and writes; a team of its own would spin beside those that round.
        with nullcontext() if streams else one_thread_each(self.device), Aside() as saver:
            if state is None:
                self.result.copy()
                self._save(recorder, journal, 0, streams, saver)
            for number in range(first, self.configuration.num_layers):
                if streams:
                    modules = {module.leaf: module for module in self._layer(number)}
                    originals = self.weights.layer(number)
                    layers = [DecoderLayer(originals, self.configuration, number) for _ in streams]
                    solver.solve_layer(layers, streams, modules)
                else:
                    self._write(self._layer(number), recorder, rounded)
                recorder.layer_done(number)
                self._save(recorder, journal, number + 1, streams, saver)
            self._write(outside, recorder, rounded)
            saver.wait()
        self.result.sync()

    def _layer(self, number: int) -> list[Module]:
        return [module for module in self.modules if module.layer == number]

    def spills(self, max_ram_bytes: int | None) -> bool:
        """Whether activations have to go to files; `BadInput` where even that is not enough."""
        if max_ram_bytes is None:
            return False
        config = self.configuration
        largest = max(self._weights_at_once(module) for module in self.modules)
        fixed = PROCESS_BYTES + 4 * 4 * largest
        activations = 0
        if self.tokens is not None:
            widest = max(module.columns for module in self.modules)
            fixed += self.weights.layer_bytes(0) + 2 * 4 * widest**2
            if self.recipe.full_precision_targets:
                fixed += 4 * widest * min(widest, config.hidden_size)  # the cross term (`hessian.py`)
            inner = max(config.intermediate_size, config.value_dim, config.num_attention_heads * config.head_dim)
            activations = 4 * sum(self._stream_tokens()) * (2 * config.hidden_size + inner)
        if fixed > max_ram_bytes:
            beside = "; give that" if self.tokens is None else " beside activations; give that, or take --method rtn"
            raise BadInput(f"--max-ram {max_ram_bytes:,} bytes: about {fixed:,} are needed{beside}")
        return fixed + activations > max_ram_bytes

    def _weights_at_once(self, module: Module) -> int:
        """How many of a module's weights are worked on at a time."""
        if self.tokens is not None and module.layer is not None:
            return module.rows * module.columns
        return module.columns * max(rows.stop - rows.start for rows in self.result.row_blocks(module))

    def _write(self, modules: Iterable[Module], recorder: Recorder, rounded: Iterator[Solved]) -> None:
        """rounded: from `_rounded`, the next of which are these modules'."""
        for module in modules:
            for rows in self.result.row_blocks(module):
                recorder.write(module, next(rounded), rows.start)

    def _rounded(self, modules: Iterable[Module]) -> Iterator[Solved]:
        """Every block of rows of these modules to nearest: a head has more rows than fit into memory twice. While one
        is written, the next is rounded (which looks for NaN and Inf), and the one behind it is read."""
        blocks = [(module, rows) for module in modules for rows in self.result.row_blocks(module)]
        weights = one_ahead(
            lambda block: self.weights.module(*block, is_checked=self.schemes[block[0].name].kind is not None), blocks
        )
        work = zip(blocks, weights, strict=True)
        return one_ahead(lambda found: self._round(*found[0], found[1]), work, self.threads)

    def _round(self, module: Module, rows: slice, weight: Tensor) -> Solved:
        order = self.result.orders.get(module.name)
        try:
            return round_to_nearest(weight, self.schemes[module.name], self.result.scale_dtype, order)
        except NotFinite:
            self.weights.module(module, rows)  # names the tensor
            raise

    def _streams(self, journal: Journal, layer: int, folder: str | None) -> list[Stream]:
        """The quantized stream, and the full-precision one where it is asked for, as they enter a layer."""
        if self.tokens is None:
            return []
        columns, counts = self.configuration.hidden_size, self._stream_tokens()
        entering = journal.hidden(layer, sum(counts), columns) if layer else self.weights.embedded(self.tokens)
        streams = []
        for at, count in enumerate(counts):
            path = None if folder is None else os.path.join(folder, f"hidden-{at}")
            hidden = Activations(count, columns, self.device, path)
            first = sum(counts[:at]) if layer else 0
            hidden[:] = entering[first : first + count]
            streams.append(Stream(hidden, self.tokens.shape[1], folder=folder))
        return streams

    def _stream_tokens(self) -> list[int]:
        """Tokens of the quantized stream, and of the full-precision one where it is asked for: whole sequences."""
        if self.tokens is None:
            return []
        sequences, length = self.tokens.shape
        shared = [math.ceil(TARGET_SHARE * sequences)] if self.recipe.full_precision_targets else []
        return [count * length for count in (sequences, *shared)]

    def _save(self, recorder: Recorder, journal: Journal, layer: int, streams: list[Stream], saver: Aside) -> None:
        """Rounding goes on while the disk takes what there is, so the state is saved as often as the disk keeps up.
        With hidden states it waits: they would be in memory twice."""
        if not (streams and layer):
            if saver.is_free():
                saver.start(self._save_now, journal, layer, recorder.as_json(), None)
            return
        saver.wait()
        hidden = torch.cat([stream.hidden[:].cpu() for stream in streams])
        self._save_now(journal, layer, recorder.as_json(), hidden)

    def _save_now(self, journal: Journal, layer: int, results: list[dict[str, Any]], hidden: Tensor | None) -> None:
        self.result.sync()
        journal.write(layer, results, hidden)

    def summary(self, target: str, results: Iterable[Result], seconds: float, resumed: bool) -> Summary:
        results, method = tuple(results), self.recipe.method
        return Summary(
            target=target,
            bytes=self.result.total_bytes,
            source_bytes=self.layout.source_bytes,
            bits_per_weight=self.layout.bits_per_weight,
            results=results,
            fallbacks=tuple(one.module for one in results if ".experts." in one.module and one.method != method),
            recipe=self.recipe,
            calibration=self._calibration(),
            seconds=seconds,
            peak_memory_bytes=peak_bytes(torch.device("cpu")),
            resumed=resumed,
        )

    def card(self, summary: Summary, command: str) -> Card:
        return Card(
            name=os.path.basename(summary.target),
            format=self.recipe.format,
            method=str(self.recipe.method),
            command=command or "qwenfit.quant.quantize(...)",
            versions={name: importlib.metadata.version(name) for name in ("qwenfit", "torch")},
            seed=self.recipe.seed,
            recipe=self.recipe.text(),
            calibration=summary.calibration,
            source_fingerprint=self.source.fingerprint(),
            bytes=summary.bytes,
            source_bytes=summary.source_bytes,
            bits_per_weight=summary.bits_per_weight,
            has_vision=any("visual." in name for name in self.source.names()),
            errors={one.module: one.error for one in summary.results if one.error is not None},
            fallbacks=summary.fallbacks,
        )

    def _calibration(self) -> str:
        if self.text is None or self.tokens is None:
            return "none"
        count, length = self.tokens.shape
        return f"{count * length} tokens of {self.text.name} in sequences of {length}"
