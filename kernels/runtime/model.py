"""Qwen3.5 as one value: its weights, and the forward pass of a prompt's chunk or of a decode step.

A model holds no state: caches and recurrent state are `memory.Buffers`, and which tokens of which sequences a call is
about is a step (`layers.PrefillStep`, `layers.DecodeStep`), made here by `prefill_step` and `decode_step`.

    tokens [T] -> embedding -> layers (residual and norm fused) -> final norm -> hidden [T, E] -> lm_head -> logits

The prediction layer sees hidden states after the final norm, and hands on its own after its norm: so the heads were
trained (vLLM `qwen3_next.py` Qwen3NextModel.forward with `qwen3_5_mtp.py`; llama.cpp pull request 24025 measured the
acceptance of both and changed to it). It pairs the hidden state of a position with the token after it, and keeps keys
at that position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout.packing import QuantizedWeight, dequantize
from ..layout.rows import Weight
from ..layout.tiles import gather_rows
from ..operations import Operations
from ..reference.attention import rope_tables
from .configuration import Configuration
from .layers import (
    DecodeStep,
    FullAttention,
    Layer,
    LinearAttention,
    Prediction,
    PrefillStep,
    Step,
    attend,
    attend_linearly,
    feed_forward,
)
from .memory import Buffers


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """embedding [vocab, E]; layers in order; norm [E]; lm_head [vocab, E], the embedding itself where they are tied.

    prediction: None unless the model was loaded to draft tokens. dtype: what it computes in.
    """

    configuration: Configuration
    embedding: Weight
    layers: tuple[Layer, ...]
    norm: Tensor
    lm_head: Weight
    prediction: Prediction | None
    dtype: torch.dtype
    device: torch.device
    operations: Operations


def prefill_step(
    model: Model, buffers: Buffers, sequences: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> PrefillStep:
    """The step of `lengths[b]` prompt tokens of `sequences[b]`, of which `starts[b]` tokens were seen before."""
    pairs = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    positions = [position for first, last in pairs for position in range(first, last)]
    owners = [sequence for sequence, length in zip(sequences, lengths, strict=True) for _ in range(length)]
    offsets = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    cos, sin = _rope(model, positions)
    return PrefillStep(
        sequences=_int32(model, sequences),
        slots=_int32(model, [buffers.source_slot(sequence) for sequence in sequences]),
        cu_seqlens=_int32(model, offsets),
        starts=_int32(model, starts),
        token_sequences=_int32(model, owners),
        positions=_int32(model, positions),
        cos=cos,
        sin=sin,
    )


def decode_step(
    model: Model, buffers: Buffers, sequences: Sequence[int], lengths: Sequence[int], tokens: int = 1
) -> DecodeStep:
    """The step of `tokens` new tokens of each of `sequences`, of which `lengths[b]` tokens were seen before."""
    positions = [length + token for length in lengths for token in range(tokens)]
    owners = [sequence for sequence in sequences for _ in range(tokens)]
    cos, sin = _rope(model, positions)
    return DecodeStep(
        sequences=_int32(model, sequences),
        lengths=_int32(model, lengths),
        source=_int32(model, [buffers.source_slot(sequence) for sequence in sequences]),
        target=_int32(model, [buffers.target_slots(sequence, tokens) for sequence in sequences]),
        token_sequences=_int32(model, owners),
        positions=_int32(model, positions),
        cos=cos,
        sin=sin,
    )


def forward(model: Model, tokens: Tensor, step: Step, buffers: Buffers) -> Tensor:
    """Tokens int64 [T] -> hidden states after the final norm [T, E]; cache and state are brought up to date."""
    if model.operations.decode is not None and isinstance(step, DecodeStep):
        return model.operations.decode(model, tokens, step, buffers)
    eps, add_rms_norm = model.configuration.rms_norm_eps, model.operations.add_rms_norm
    residual = embed(model, tokens)
    x = model.operations.rms_norm(residual, model.layers[0].input_norm, eps)
    caches, states = iter(buffers.caches), iter(zip(buffers.states, buffers.conv_states, strict=True))
    for layer, after in zip(model.layers, [*(layer.input_norm for layer in model.layers[1:]), model.norm], strict=True):
        if isinstance(layer.attention, LinearAttention):
            state, conv_state = next(states)
            settings = (model.configuration, model.operations)
            x = attend_linearly(layer.attention, x, step, state, conv_state, *settings)
        else:
            x = attend(layer.attention, x, step, next(caches), model.configuration, model.operations)
        x, residual = add_rms_norm(x, residual, layer.post_norm, eps)
        x = feed_forward(layer.mlp, x, model.operations)
        x, residual = add_rms_norm(x, residual, after, eps)
    return x


def predict(model: Model, hidden: Tensor, tokens: Tensor, step: Step, buffers: Buffers) -> Tensor:
    """The prediction layer: hidden [T, E] and the token after each, int64 [T] -> its hidden states [T, E].

    Their logits are of the token after that one. Keys and values go to the last of the buffers' caches.
    """
    prediction, eps = model.prediction, model.configuration.rms_norm_eps
    if prediction is None:
        raise ValueError("the model was loaded without its prediction layer: load it with drafts")
    layer, operations = prediction.layer, model.operations
    assert isinstance(layer.attention, FullAttention)
    both = (
        operations.rms_norm(embed(model, tokens), prediction.embedding_norm, eps),
        operations.rms_norm(hidden, prediction.hidden_norm, eps),
    )
    residual = operations.linear(torch.cat(both, dim=-1), prediction.fc)
    x = operations.rms_norm(residual, layer.input_norm, eps)
    x = attend(layer.attention, x, step, buffers.caches[-1], model.configuration, operations)
    x, residual = operations.add_rms_norm(x, residual, layer.post_norm, eps)
    x = feed_forward(layer.mlp, x, operations)
    return operations.add_rms_norm(x, residual, prediction.norm, eps)[0]


def logits(model: Model, hidden: Tensor) -> Tensor:
    """Hidden states [..., E] -> float32 logits [..., vocab]."""
    return model.operations.linear(hidden, model.lm_head).float()


def embed(model: Model, tokens: Tensor) -> Tensor:
    """Tokens int64 [T] -> [T, E] in the model's dtype. Of a quantized embedding only these rows are unpacked."""
    table = model.embedding
    if isinstance(table, QuantizedWeight):
        return dequantize(gather_rows(table, tokens), torch.float32).to(model.dtype)
    return F.embedding(tokens, table).to(model.dtype)


def weight_bytes(model: Model) -> int:
    """Bytes of all weights on the device; a tied lm_head counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in _tensors(model)}.values())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, Operations | Configuration):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))


def _rope(model: Model, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(_int32(model, positions), model.configuration.rope, model.configuration.head_dim)
    return cos.contiguous(), sin.contiguous()


def _int32(model: Model, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=model.device)
