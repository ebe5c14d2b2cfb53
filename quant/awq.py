"""AWQ (arXiv 2306.00978): columns that see large activations are scaled up before rounding, and what feeds them down.

    W x = (W s) (x / s)

1 / s goes into what produces x, exactly: the weight of a norm, or the rows of the projection before. Every reader of
that norm has to take s, also those that stay unquantized (in_proj_a and in_proj_b, the router): leaving them out ruins
the model. In Qwen3.5:

    producer                    channels            readers, and which column belongs to which channel
    input_layernorm             I                   in_proj_qkv, z, a, b; or q, k, v: its own
    post_attention_layernorm    I                   gate, up; with experts also the router, every expert, the shared one
                                                    and its gate
    linear_attn.norm            128, for all heads  out_proj: column % 128
    v_proj's rows               KV heads x 256      o_proj: `head_channels` (query heads share their KV head's values;
                                                    the output gate is a product per element and commutes)
    up_proj's rows              FFN                 down_proj: its own (silu(gate) * up is linear in up)

Norms multiply by (1 + w), but linear_attn.norm by w: `offset` says which. A file stores the norm in bfloat16, so the
scale that was asked for is not the one that it gets: `fold_into_norm` returns the one that the rounded norm stands for,
and with that one the readers stay exact.

The scale is s = a^p / m^(1 - p) or a^p, a being the root mean square of a channel's activations and m the mean
magnitude of its weights as a part of their group's largest; p is searched. The error is the true one, with H, on rows
spread over all quantized readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid, rtn
from .hessian import output_error
from .quantized import Quantized

POWERS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
SAMPLE_ROWS = 128
MOST_SCALE = 1e3


@dataclass(frozen=True, slots=True, eq=False)
class Smoothing:
    """Scales that readers' columns are multiplied by, and what they gain.

    scales: float32 [C], by channel of the producer; all 1 where nothing was better than rounding as it is.
    error, plain_error: tr(dW H dW^T) / tr(W H W^T) on the sampled rows with them and without.
    """

    scales: Tensor
    error: float
    plain_error: float


def head_channels(query_heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """For each column of o_proj the row of v_proj that feeds it, int64 [query_heads * head_dim]."""
    owner = torch.arange(query_heads) // (query_heads // kv_heads)
    return (owner.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def search_smoothing(
    readers: Sequence[Tensor], hessian: Tensor, grid: Grid, channels: Tensor | None = None
) -> Smoothing:
    """The scales of a producer's channels that make its quantized readers' outputs err least.

    readers: the weights [O, I] that will be quantized on `grid`. hessian: float32 [I, I] of their common input.
    channels: int64 [I], the producer's channel behind each column; its own without.
    """
    columns = hessian.shape[0]
    device = hessian.device
    channels = torch.arange(columns, device=device) if channels is None else channels.to(device)
    sample = _sample(readers).to(device)
    energy = hessian.diagonal()
    count = int(channels.max()) + 1
    activation = _by_channel(energy, channels, count).sqrt()
    size = grid.group_columns(columns)
    grouped = sample.abs().unflatten(1, (-1, size))
    share = (grouped / grouped.amax(2, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0)
    magnitude = _by_channel(share, channels, count)
    plain = best_error = output_error(sample, rtn(sample, grid, energy).dequantize(), hessian)
    best = torch.ones(count, device=device)
    for power in POWERS:
        for denominator in (torch.ones_like(magnitude), magnitude.clamp(min=1e-4).pow(1 - power)):
            scales = _centred(activation.pow(power) / denominator)
            by_column = scales[channels]
            rounded = awq(sample, hessian, grid, by_column).dequantize() / by_column
            error = output_error(sample, rounded, hessian)
            if error < best_error:
                best, best_error = scales, error
    return Smoothing(best, best_error, plain)


def fold_into_norm(norm: Tensor, scales: Tensor, *, offset: float) -> tuple[Tensor, Tensor]:
    """A norm's weight with 1 / scales in it, in its own dtype, and the scales that this weight stands for.

    norm, scales: [C]. offset: 1.0 where the norm multiplies by (1 + w), 0.0 where by w. The readers take the returned
    scales, float32 [C], which differ from those asked for by the rounding of the norm; they are 1 for channels that
    cannot be scaled (a gain of zero, or one that rounding would turn around).
    """
    gain = norm.double() + offset
    folded = (gain / scales.double() - offset).to(norm.dtype)
    new_gain = folded.double() + offset
    exact = gain / new_gain
    usable = torch.isfinite(exact) & (exact > 1 / (2 * MOST_SCALE)) & (exact < 2 * MOST_SCALE)
    return torch.where(usable, folded, norm), torch.where(usable, exact, 1.0).float()


def fold_into_rows(weight: Tensor, scales: Tensor) -> Tensor:
    """A producing projection [C, I] with its rows divided by scales [C], float32: quantize it after this."""
    return weight.float() / scales.unsqueeze(1)


def scale_columns(weight: Tensor, scales: Tensor, channels: Tensor | None = None) -> Tensor:
    """A reader [O, I] with its columns multiplied by the producer's scales [C], float32.

    Quantized readers are rounded from this; unquantized ones are cast back, which costs half a bit of bfloat16.
    """
    return weight.float() * (scales if channels is None else scales[channels])


def awq(weight: Tensor, hessian: Tensor, grid: Grid, scales: Tensor) -> Quantized:
    """Round weight * scales to the grid, with the clip search weighted by what its inputs are then: x / scales.

    weight: [O, I]; scales: float32 [I], by column. The result stands for the scaled weight.
    """
    return rtn(scale_columns(weight, scales), grid, hessian.diagonal() / scales.square())


def _sample(readers: Sequence[Tensor]) -> Tensor:
    """Rows spread evenly over all readers, float32 [R, I]."""
    total = sum(len(reader) for reader in readers)
    step = max(1, total // SAMPLE_ROWS)
    return torch.cat([reader[step // 2 :: step] if len(reader) > step else reader[:1] for reader in readers]).float()


def _by_channel(values: Tensor, channels: Tensor, count: int) -> Tensor:
    """Means of values [I] over the columns of each channel, [C]."""
    sums = torch.zeros(count, device=values.device).index_add_(0, channels, values)
    return sums / torch.bincount(channels, minlength=count).clamp(min=1)


def _centred(scales: Tensor) -> Tensor:
    """Scales whose geometric mean is 1, of a size that the norm's dtype can bear; 1 for channels never active."""
    alive = scales > 0
    middle = scales[alive].log().mean().exp() if alive.any() else scales.new_ones(())
    return torch.where(alive, scales / middle, 1.0).clamp(1 / MOST_SCALE, MOST_SCALE)
