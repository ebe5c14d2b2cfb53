"""How far a checkpoint is from its reference: perplexity, divergence of the next-token distributions, error per layer.

    result = evaluate("Qwen3.5-9B-int4", "Qwen3.5-9B", sequences)          # sequences int64 [n, L], one vocabulary
    result.mean_kl, result.perplexity / result.reference_perplexity, result.layer_errors

Both models run side by side, a layer at a time: what is in memory is one layer of one of them, the hidden states of
both for up to `PASS_TOKENS` tokens, and at the end both output matrices as they are stored with the logits of a few
hundred tokens. So a 9B needs about 5 GB, and nothing is written to disk; a longer text takes more passes.

Layers are the native runtime's (`kernels/runtime/layers.py`) on plain torch (`kernels/operations.py`, REFERENCE), which
reads plain, compressed-tensors, GPTQ and AWQ checkpoints. Both compute in the same dtype, float32 unless told
otherwise, with weights as the files say: so what differs is the weights. Activations are not quantized, whatever a
W8A8 checkpoint asks of an engine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil, exp, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.layout.checkpoint import Checkpoint, open_checkpoint
from ..kernels.layout.packing import QuantizedWeight, dequantize
from ..kernels.layout.rows import Weight
from ..kernels.operations import REFERENCE, reference_linear
from ..kernels.runtime.assembly import assemble
from ..kernels.runtime.configuration import Configuration, read_configuration
from ..kernels.runtime.generate import chunks
from ..kernels.runtime.layers import LinearAttention, PrefillStep, attend, attend_linearly, feed_forward
from ..kernels.runtime.memory import Buffers, Settings, allocate
from ..kernels.runtime.model import Model, prefill_step
from ..profiles.errors import BadInput

PASS_TOKENS = 16384
CHUNK_TOKENS = 1024
BLOCK_ROWS = 8192
"""Of an embedding or an output matrix that are widened at a time."""
SCORE_BYTES = 128 << 20
"""Of float32 logits at a time, per model."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of it, over `tokens` positions: all of every sequence but its last, whose next token is unknown.

    perplexity, reference_perplexity: e to the mean negative log-likelihood of the next token. kl: of the checkpoint's
    distribution from the reference's, in nats per token (mean, its standard error over tokens, the values that 99 % and
    99.9 % of tokens do not exceed, the largest). top1_agreement: share of tokens with the same likeliest next one.
    layer_errors: after each layer, the root mean square of the difference of hidden states (the residual stream) over
    that of the reference's. embedding_error: the same before the first layer.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    mean_kl: float
    mean_kl_error: float
    kl_99: float
    kl_99_9: float
    max_kl: float
    top1_agreement: float
    embedding_error: float
    layer_errors: tuple[float, ...]


@torch.inference_mode()
def evaluate(
    folder: str,
    reference: str,
    sequences: Tensor,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare the checkpoint in `folder` with the one in `reference` on sequences, int64 [n, L] of L >= 2 tokens.

    on_layer: told after every layer how many of how many are done, all passes together. `BadInput` where the folders
    hold different models or a token is beyond their vocabulary; ValueError (from the runtime) where one is damaged.
    """
    if sequences.dim() != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise ValueError(f"sequences are [n, L] with L >= 2, not {list(sequences.shape)}")
    pair = (_open(reference), _open(folder))
    _check_alike(pair, sequences)
    settings = _Place(torch.device(device), dtype)
    layers = pair[0].configuration.num_layers
    per_pass = sequences.split(max(1, PASS_TOKENS // sequences.shape[1]))
    squares = torch.zeros(layers + 1, 2, dtype=torch.float64)
    scores: list[_Scores] = []
    for number, tokens in enumerate(per_pass):
        streams = [_embedded(opened.embedding, tokens, settings) for opened in pair]
        squares[0] += _squares(streams)
        for layer in range(layers):
            for opened, stream in zip(pair, streams, strict=True):
                _run_layer(opened, layer, stream, settings)
            squares[layer + 1] += _squares(streams)
            if on_layer is not None:
                on_layer(number * layers + layer + 1, len(per_pass) * layers)
        scores += _score(pair, streams, tokens, settings)
    embedding_error, *layer_errors = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
    return _summary(scores, embedding_error, tuple(layer_errors))


@dataclass(frozen=True, slots=True)
class _Place:
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    folder: str
    configuration: Configuration
    checkpoint: Checkpoint

    @property
    def embedding(self) -> Weight:
        return self._matrix("embed_tokens")

    @property
    def lm_head(self) -> Weight:
        return self._matrix("embed_tokens" if self.configuration.tie_word_embeddings else "lm_head")

    def _matrix(self, module: str) -> Weight:
        return self.checkpoint.matrix(module, self.configuration.vocab_size, self.configuration.hidden_size)


@dataclass(frozen=True, slots=True, eq=False)
class _OneLayer:
    """A `Source` of `assembly.py` that shows one layer of a checkpoint as layer 0, and an embedding without rows."""

    checkpoint: Checkpoint
    layer: int

    def has(self, module: str) -> bool:
        return self.checkpoint.has(self._stored(module))

    def matrix(self, module: str, rows: int, columns: int) -> Weight:
        if module == "embed_tokens":
            return torch.empty(0, columns)
        return self.checkpoint.matrix(self._stored(module), rows, columns)

    def stack(self, module: str, count: int, rows: int, columns: int) -> Weight:
        return self.checkpoint.stack(self._stored(module), count, rows, columns)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.checkpoint.tensor(self._stored(name), shape)

    def _stored(self, name: str) -> str:
        return f"layers.{self.layer}." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """Of T tokens, float64: negative log-likelihoods by the reference and the checkpoint, and divergences; bool."""

    reference_losses: Tensor
    losses: Tensor
    divergences: Tensor
    is_top1_same: Tensor


def _open(folder: str) -> _Opened:
    return _Opened(folder, read_configuration(folder), open_checkpoint(folder))


def _check_alike(pair: tuple[_Opened, _Opened], sequences: Tensor) -> None:
    first, second = (opened.configuration for opened in pair)
    names = ("architecture", "hidden_size", "layer_types", "vocab_size")
    unlike = [name for name in names if getattr(first, name) != getattr(second, name)]
    if unlike:
        raise BadInput(
            f"{pair[1].folder} and {pair[0].folder} are different models ({', '.join(unlike)}); "
            "give the checkpoint that it was made from as the reference"
        )
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= first.vocab_size:
        raise BadInput(
            f"token {high if low >= 0 else low} is not in the vocabulary of {pair[0].folder} ({first.vocab_size} "
            "tokens); tokenize the text with the tokenizer.json of this checkpoint"
        )


def _embedded(table: Weight, tokens: Tensor, settings: _Place) -> Tensor:
    """Tokens [n, L] -> hidden states [n, L, E] before the first layer."""
    rows = tokens.flatten()
    if isinstance(table, Tensor):
        hidden = F.embedding(rows, table).to(settings.dtype)
    else:
        hidden = torch.empty(len(rows), table.columns, dtype=settings.dtype)
        for start, block in _row_blocks(table, settings.dtype):
            here = (rows >= start) & (rows < start + len(block))
            hidden[here] = block[rows[here] - start]
    return hidden.view(*tokens.shape, -1).to(settings.device)


def _run_layer(opened: _Opened, layer: int, hidden: Tensor, settings: _Place) -> None:
    """Hidden states [n, L, E] before a layer become those after it, in place."""
    config = opened.configuration
    alone = replace(config, layer_types=(config.layer_types[layer],), tie_word_embeddings=True)
    source = _OneLayer(opened.checkpoint, layer)
    model = assemble(source, alone, settings.dtype, settings.device, REFERENCE, with_prediction=False)
    count, length, _ = hidden.shape
    buffers = allocate(alone, Settings(ctx_tokens=length, seqs=count), settings.dtype, settings.device)
    rows, begin = hidden.view(count * length, -1), 0
    for pieces in chunks([length] * count, CHUNK_TOKENS):
        numbers, starts, lengths = (list(values) for values in zip(*pieces, strict=True))
        part = slice(begin, begin + sum(lengths))
        step = prefill_step(model, buffers, numbers, starts, lengths)
        rows[part], begin = _after_layer(model, rows[part], step, buffers), part.stop


def _after_layer(model: Model, residual: Tensor, step: PrefillStep, buffers: Buffers) -> Tensor:
    """The only layer of `model`, as `runtime/model.py` forward() has it: residual [T, E] -> [T, E]."""
    (layer,), config, eps = model.layers, model.configuration, model.configuration.rms_norm_eps
    x = REFERENCE.rms_norm(residual, layer.input_norm, eps)
    if isinstance(layer.attention, LinearAttention):
        state, conv_state = buffers.states[0], buffers.conv_states[0]
        x = attend_linearly(layer.attention, x, step, state, conv_state, config, REFERENCE)
    else:
        x = attend(layer.attention, x, step, buffers.caches[0], config, REFERENCE)
    x, residual = REFERENCE.add_rms_norm(x, residual, layer.post_norm, eps)
    return residual + feed_forward(layer.mlp, x, REFERENCE)


def _score(pair: tuple[_Opened, _Opened], streams: list[Tensor], tokens: Tensor, settings: _Place) -> Iterator[_Scores]:
    """The final norm, both output matrices and the comparison, a few hundred tokens at a time."""
    heads = [opened.lm_head for opened in pair]
    if _are_equal(heads[0], heads[1]):
        heads[1] = heads[0]  # gigabytes, where lm_head was not quantized
    config = pair[0].configuration
    norms = [opened.checkpoint.tensor("norm.weight", (config.hidden_size,)).to(settings.device) for opened in pair]
    finals = [
        REFERENCE.rms_norm(stream[:, :-1].flatten(0, 1), norm, opened.configuration.rms_norm_eps)
        for stream, norm, opened in zip(streams, norms, pair, strict=True)
    ]
    targets = tokens[:, 1:].flatten().to(settings.device)
    rows = max(1, SCORE_BYTES // (4 * config.vocab_size))
    for begin in range(0, len(targets), rows):
        part = slice(begin, begin + rows)
        first, second = (_logits(final[part], head) for final, head in zip(finals, heads, strict=True))
        yield from _compare(first, second, targets[part])


def _are_equal(one: Weight, other: Weight) -> bool:
    if isinstance(one, QuantizedWeight) or isinstance(other, QuantizedWeight):
        return False
    return one.dtype == other.dtype and torch.equal(one, other)


def _logits(hidden: Tensor, head: Weight) -> Tensor:
    """Hidden states [T, E] -> float32 logits [T, vocab], the matrix widened block by block."""
    rows = head.rows if isinstance(head, QuantizedWeight) else len(head)
    logits = torch.empty(len(hidden), rows, device=hidden.device)
    for start, block in _row_blocks(head, hidden.dtype):
        logits[:, start : start + len(block)] = reference_linear(hidden, block.to(hidden.device))
    return logits


def _row_blocks(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, block [rows, columns] in dtype) after block of a matrix, packed or not."""
    total = weight.rows if isinstance(weight, QuantizedWeight) else len(weight)
    for start in range(0, total, BLOCK_ROWS):
        part = slice(start, min(start + BLOCK_ROWS, total))
        if isinstance(weight, Tensor):
            yield start, weight[part].to(dtype)
        else:
            zeros = None if weight.zeros is None else weight.zeros[:, part]
            block = replace(weight, codes=weight.codes[part], scales=weight.scales[:, part], zeros=zeros)
            yield start, dequantize(replace(block, rows=part.stop - start), dtype)


def _compare(reference: Tensor, logits: Tensor, targets: Tensor) -> Iterator[_Scores]:
    """Logits [T, vocab] of both models, targets [T]; in float64, for the divergence is a sum of small differences."""
    rows = max(1, SCORE_BYTES // (32 * logits.shape[1]))
    for begin in range(0, len(targets), rows):
        part = slice(begin, begin + rows)
        theirs, ours = (values[part].double().log_softmax(-1) for values in (reference, logits))
        place = targets[part, None]
        yield _Scores(
            reference_losses=-theirs.gather(1, place)[:, 0].cpu(),
            losses=-ours.gather(1, place)[:, 0].cpu(),
            divergences=F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).clamp_min(0).cpu(),
            is_top1_same=(theirs.argmax(-1) == ours.argmax(-1)).cpu(),
        )


def _squares(streams: list[Tensor]) -> Tensor:
    """float64 [2]: sums of squares of the difference of the streams, and of the first."""
    sums = torch.zeros(2, dtype=torch.float64)
    for theirs, ours in zip(*streams, strict=True):
        wide = theirs.double()
        sums += torch.stack(((ours.double() - wide).square().sum(), wide.square().sum())).cpu()
    return sums


def _summary(scores: list[_Scores], embedding_error: float, layer_errors: tuple[float, ...]) -> Evaluation:
    divergences = torch.cat([score.divergences for score in scores]).sort().values
    count = len(divergences)
    return Evaluation(
        tokens=count,
        perplexity=exp(torch.cat([score.losses for score in scores]).mean().item()),
        reference_perplexity=exp(torch.cat([score.reference_losses for score in scores]).mean().item()),
        mean_kl=divergences.mean().item(),
        mean_kl_error=divergences.std(correction=0).item() / sqrt(count),
        kl_99=divergences[ceil(0.99 * count) - 1].item(),
        kl_99_9=divergences[ceil(0.999 * count) - 1].item(),
        max_kl=divergences[-1].item(),
        top1_agreement=torch.cat([score.is_top1_same for score in scores]).double().mean().item(),
        embedding_error=embedding_error,
        layer_errors=layer_errors,
    )
