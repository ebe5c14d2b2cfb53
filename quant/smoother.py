"""AWQ of one layer: the calibration tokens go through it once as it is, then scales move from columns to producers.

Which producer feeds which readers is the table of `awq.py`. Everything that reads a folded norm takes its scales, also
what stays unquantized (in_proj_a, in_proj_b): those are written anew. The norm in front of a mixture of experts is left
alone: too many read it, and each sees other tokens; experts, and the shared one, are rounded with the clip search that
their own tokens ask for (`layer_solver.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .activations import Activations
from .awq import awq, fold_into_norm, fold_into_rows, head_channels, scale_columns, search_smoothing
from .decoder import EXPERTS, DecoderLayer, Stream
from .grid import Grid
from .hessian import CHUNK_TOKENS, Hessian, output_error
from .modules import STAGES
from .solve import ERROR_ROWS, Solved

KEPT_READERS = ("linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba")


@dataclass(frozen=True, slots=True, eq=False)
class Smoothed:
    """A layer after AWQ. solved: by leaf. plain: what else changed, by leaf as in `DecoderLayer.weights`."""

    solved: dict[str, Solved] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)


def smooth_layer(layer: DecoderLayer, stream: Stream, grids: Mapping[str, Grid]) -> Smoothed:
    """Quantize the matrices that `grids` names by leaf; `layer` and `stream` stay as they are."""
    found, weights = Smoothed(), layer.weights
    means = _hessians(layer, stream)
    rows: dict[str, Tensor] = {}  # leaf -> what its outputs are divided by, because the next matrix takes it
    columns: dict[str, Tensor] = {}  # stage -> what its readers' columns are multiplied by
    for stage, mean in means.items():
        readers = [leaf for leaf in STAGES[stage] if leaf in grids and leaf in weights]
        columns[stage] = torch.ones(len(mean), device=mean.device)
        producer = _producer(layer, stage)
        if not readers or producer is None:
            continue
        name, channels = producer
        chosen = search_smoothing([weights[leaf] for leaf in readers], mean, grids[readers[0]], channels).scales
        if name.endswith("norm.weight"):
            offset = 0.0 if name == "linear_attn.norm.weight" else 1.0
            found.plain[name], chosen = fold_into_norm(weights[name], chosen, offset=offset)
        elif name not in grids:
            continue  # a producer that stays as it is cannot take the scales
        else:
            rows[name] = chosen
        columns[stage] = chosen if channels is None else chosen[channels]
    for leaf in KEPT_READERS:
        if leaf in weights and "input_layernorm.weight" in found.plain:
            found.plain[leaf] = scale_columns(weights[leaf], columns["input"]).to(weights[leaf].dtype)
    for stage, mean in means.items():
        for leaf in STAGES[stage]:
            if leaf in grids and leaf in weights:
                found.solved[leaf] = _solved(weights[leaf], mean, grids[leaf], columns[stage], rows.get(leaf))
            elif leaf in weights and columns[stage].ne(1).any():
                found.plain[leaf] = scale_columns(weights[leaf], columns[stage]).to(weights[leaf].dtype)
    return found


def round_for_inputs(weight: Tensor, mean: Tensor, grid: Grid) -> Solved:
    """An expert's matrix with the clip search that its inputs ask for, and no scales. mean: float32 [I, I], H."""
    return _solved(weight, mean, grid, torch.ones(len(mean), device=mean.device), None)


def _hessians(layer: DecoderLayer, stream: Stream) -> dict[str, Tensor]:
    """Of every stage but the experts', with the weights as they are."""
    hidden = stream.new(stream.hidden.columns)
    for at in stream.spans:
        hidden[at] = stream.hidden[at]
    alone = Stream(hidden, stream.length, folder=stream.folder)
    means = {}
    for stage in layer.stages:
        if stage == EXPERTS:
            break
        x: Activations = layer.enter(stage, alone)
        if stage != "middle" or not layer.has_experts:
            hessian = Hessian(x.columns, x.device)
            for at in range(0, len(x), CHUNK_TOKENS):
                hessian.add(x[at : at + CHUNK_TOKENS])
            means[stage] = hessian.mean()
        layer.leave(stage, alone, x)
    if alone.inner is not None:
        alone.inner.close()
    hidden.close()
    return means


def _producer(layer: DecoderLayer, stage: str) -> tuple[str, Tensor | None] | None:
    """(norm or leaf that feeds a stage, its channel behind each column); None where nothing can take scales."""
    config = layer.configuration
    if stage == "input":
        return "input_layernorm.weight", None
    if stage == "middle":
        return "post_attention_layernorm.weight", None
    if stage == "inner":
        return "mlp.up_proj", None
    if layer.is_linear:
        return "linear_attn.norm.weight", torch.arange(config.value_dim) % config.linear_value_head_dim
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    return "self_attn.v_proj", head_channels(*heads)


def _solved(weight: Tensor, mean: Tensor, grid: Grid, columns: Tensor, rows: Tensor | None) -> Solved:
    produced = weight.float() if rows is None else fold_into_rows(weight, rows)
    quantized = awq(produced, mean, grid, columns)
    step = slice(None, None, max(1, -(-len(weight) // ERROR_ROWS)))
    stands_for = quantized.dequantize()[step] / columns
    return Solved(quantized, output_error(produced[step], stands_for, mean), "awq")
