"""The causal depthwise convolution before the delta rule, with SiLU, in Triton: a prompt at once, or step by step.

    y[t, c] = silu(weight[c, W-1] x[t, c] + weight[c, W-2] x[t-1, c] + ... + weight[c, 0] x[t-W+1, c])

and what lies before a sequence comes from state [slots, C, W - 1], oldest column first. Arithmetic in float32, W =
2..4.

Prefill. Grid (C / CHANNELS, blocks of TOKENS tokens of all sequences: `sequences.py`). Tile [TOKENS, CHANNELS],
channels side by side, 8 of 16 bits per load; the W taps are W loads of the same tile, a row apart, of which all but one
hit L1, so DRAM sees x once in and y once out. Only the first block of a sequence needs the state: it reads it, and it
also writes the new one (whose columns are the last of x, wherever the sequence ends), so that no other program can have
overwritten what it reads. A barrier keeps the reads before the writes inside that program.

Update. Grid (C / CHANNELS, sequences). A thread holds the W - 1 columns of its channels in registers over the S tokens
and stores them after each token in target[b, s], so the source slot may be among the targets and may be any of them.
State traffic is 6 bytes in and 6 S out per channel of 16 bits, in 2-byte pieces that lie together: L1 makes lines of
them.

A negative slot: as a source or in prefill, the sequence starts from zeros; as a target, nothing is stored. Twins:
`reference/dense.py` (transformers 5.23 `modeling_qwen3_5.py`, torch_causal_conv1d_update and conv1d in
Qwen3_5GatedDeltaNet).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .sequences import (
    MOST_GRID_BLOCKS,
    MOST_STEP_TOKENS,
    check_sequences,
    check_step_slots,
    locate_block,
    most_blocks,
    power_of_two,
    token_stride,
)
from .target import Target, target_of

DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@triton.jit
def _begin_sequence(x, weight, columns, out, channel, tokens, slot, channels, x_stride, TAPS: tl.constexpr):
    """The first TAPS - 1 tokens, which need the state, and the new state. x, columns, out: the sequence's own."""
    exists = (channel < channels)[None, :]
    held = channel[None, :] < tl.where(slot >= 0, channels, 0)
    few = tl.arange(0, 4)[:, None]  # tokens first, then the columns of the new state
    channel = channel[None, :]
    columns += channel * (TAPS - 1)
    early = exists & (few < TAPS - 1) & (few < tokens)
    total = tl.zeros(early.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        # Token t times this tap is token t - (TAPS - 1 - tap), which the state has as column tap + t.
        factor = tl.load(weight + channel * TAPS + tap, mask=exists, other=0.0).to(tl.float32)
        older = early & (few < TAPS - 1 - tap)
        newer = early & (few >= TAPS - 1 - tap)
        before = tl.load(columns + tap + few, mask=older & held, other=0.0).to(tl.float32)
        values = tl.load(x + (few - (TAPS - 1 - tap)) * x_stride + channel, mask=newer, other=0.0).to(tl.float32)
        total += (before + values) * factor
    result = total * tl.sigmoid(total)
    tl.store(out + few * channels + channel, result.to(out.dtype.element_ty), mask=early)

    # Column j of the new state is token tokens - (TAPS - 1) + j, or the old column tokens + j where that is negative.
    token = tokens - (TAPS - 1) + few
    wanted = held & (few < TAPS - 1)
    old = tl.load(columns + tokens + few, mask=wanted & (token < 0), other=0.0).to(tl.float32)
    new = tl.load(x + token.to(tl.int64) * x_stride + channel, mask=wanted & (token >= 0), other=0.0).to(tl.float32)
    tl.debug_barrier()
    tl.store(columns + few, tl.where(token < 0, old, new).to(columns.dtype.element_ty), mask=wanted)


@triton.jit
def conv1d_prefill_kernel(
    x,
    weight,
    state,
    slots,
    cu_seqlens,
    out,
    channels,
    x_stride,
    batch,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BATCH: tl.constexpr,
):
    sequence, start, first, rows = locate_block(cu_seqlens, tl.program_id(1), batch, BATCH, TOKENS)
    if rows <= 0:
        return
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    row = tl.arange(0, TOKENS)[:, None]
    inside = (row < rows) & exists[None, :] & (first - start + row >= TAPS - 1)
    tile = x + first.to(tl.int64) * x_stride + row * x_stride + channel[None, :]
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight + channel * TAPS + tap, mask=exists, other=0.0).to(tl.float32)
        values = tl.load(tile - (TAPS - 1 - tap) * x_stride, mask=inside, other=0.0)
        total += values.to(tl.float32) * factor[None, :]
    result = total * tl.sigmoid(total)
    at = first.to(tl.int64) * channels + row * channels + channel[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)

    if first == start:
        tokens = tl.load(cu_seqlens + sequence + 1) - start
        slot = tl.load(slots + sequence).to(tl.int64)
        columns = state + slot * channels * (TAPS - 1)
        own, own_out = x + start.to(tl.int64) * x_stride, out + start.to(tl.int64) * channels
        _begin_sequence(own, weight, columns, own_out, channel, tokens, slot, channels, x_stride, TAPS)


@triton.jit
def conv1d_update_kernel(
    x,
    weight,
    state,
    source,
    target,
    out,
    channels,
    x_stride,
    TOKENS: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sequence = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    slot = tl.load(source + sequence).to(tl.int64)
    taps = weight + channel * TAPS
    columns = state + channel * (TAPS - 1)
    held = channel < tl.where(slot >= 0, channels, 0)
    read = columns + slot * channels * (TAPS - 1)

    # before1 is the column before the token, before2 the one before that; unused ones stay what before1 is.
    factor0 = tl.load(taps + (TAPS - 1), mask=exists, other=0.0).to(tl.float32)
    factor1 = tl.load(taps + (TAPS - 2), mask=exists, other=0.0).to(tl.float32)
    before1 = tl.load(read + (TAPS - 2), mask=held, other=0.0)
    factor2, factor3, before2, before3 = factor1, factor1, before1, before1
    if TAPS > 2:
        factor2 = tl.load(taps + (TAPS - 3), mask=exists, other=0.0).to(tl.float32)
        before2 = tl.load(read + (TAPS - 3), mask=held, other=0.0)
    if TAPS > 3:
        factor3 = tl.load(taps + (TAPS - 4), mask=exists, other=0.0).to(tl.float32)
        before3 = tl.load(read + (TAPS - 4), mask=held, other=0.0)
    tl.debug_barrier()

    for token in tl.static_range(TOKENS):
        row = (sequence * TOKENS + token).to(tl.int64)
        now = tl.load(x + row * x_stride + channel, mask=exists, other=0.0)
        total = tl.zeros((CHANNELS,), tl.float32)  # oldest first, as in the prefill kernel: the same sum, to the bit
        if TAPS > 3:
            total += before3.to(tl.float32) * factor3
        if TAPS > 2:
            total += before2.to(tl.float32) * factor2
        total += before1.to(tl.float32) * factor1
        total += now.to(tl.float32) * factor0
        result = total * tl.sigmoid(total)
        tl.store(out + row * channels + channel, result.to(out.dtype.element_ty), mask=exists)
        goal = tl.load(target + sequence * TOKENS + token).to(tl.int64)
        write = columns + goal * channels * (TAPS - 1)
        stored = channel < tl.where(goal >= 0, channels, 0)
        before3 = before2
        before2 = before1
        before1 = now.to(state.dtype.element_ty)
        tl.store(write + (TAPS - 2), before1, mask=stored)
        if TAPS > 2:
            tl.store(write + (TAPS - 3), before2, mask=stored)
        if TAPS > 3:
            tl.store(write + (TAPS - 4), before3, mask=stored)


@dataclass(frozen=True, slots=True)
class ConvConfiguration:
    """tokens x channels: the tile of a program."""

    tokens: int
    channels: int
    num_warps: int


def prefill_configuration(target: Target) -> ConvConfiguration:
    """32 elements per thread, a weight read once for 32 tokens; half as wide on ROCm's 64-thread waves."""
    return ConvConfiguration(tokens=16, channels=256, num_warps=256 // target.warp_threads)


def update_configuration(target: Target) -> ConvConfiguration:
    """One warp of 4 channels per thread: decode has few tokens, so the grid must come from the channels."""
    return ConvConfiguration(tokens=1, channels=4 * target.warp_threads, num_warps=1)


def causal_conv1d_prefill(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    """SiLU of the convolution of x [T, C] bf16 | fp16 | fp32 -> [T, C] in x's dtype; rows may lie apart.

    weight: [C, W], the last tap is the token itself. state: [slots, C, W - 1], read from slots[b] and replaced there by
    the last W - 1 columns of input (of which old ones, where the sequence is shorter); a fresh sequence has zeros, or a
    negative slot, for which nothing is stored. slots: int32 [B], each once. cu_seqlens: int32 [B + 1] (`sequences.py`);
    rows from cu_seqlens[B] on are left as they were allocated. ValueError where shapes, dtypes or strides do not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)}: the convolution of a prompt takes [T, C]")
    taps = _check(x, weight, state)
    sequences = check_sequences(cu_seqlens, slots, x.device)
    tokens, channels = x.shape
    out = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    use = prefill_configuration(target_of(x.device))
    blocks = most_blocks(tokens, sequences, use.tokens)
    if blocks > MOST_GRID_BLOCKS:
        raise ValueError(f"{tokens} tokens in one call: give {MOST_GRID_BLOCKS * use.tokens} at most")
    conv1d_prefill_kernel[(triton.cdiv(channels, use.channels), blocks)](
        x,
        weight,
        state,
        slots,
        cu_seqlens,
        out,
        channels,
        token_stride("x", x),
        sequences,
        TAPS=taps,
        TOKENS=use.tokens,
        CHANNELS=use.channels,
        BATCH=power_of_two(sequences),
        num_warps=use.num_warps,
    )
    return out


def causal_conv1d_update(x: Tensor, weight: Tensor, state: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The same for the next S = 1..8 tokens of each of B sequences: x [B, S, C] -> [B, S, C].

    source: int32 [B], the slot that holds a sequence's columns (negative: zeros). target: int32 [B, S], the slot that
    they go to after token s (negative: none). A sequence's source may be among its targets; another sequence's may not.
    """
    if x.dim() != 3 or not 1 <= x.shape[1] <= MOST_STEP_TOKENS:
        raise ValueError(f"x is {list(x.shape)}: a step takes [B, S, C] with S from 1 to {MOST_STEP_TOKENS}")
    batch, tokens, channels = x.shape
    taps = _check(x, weight, state)
    check_step_slots(source, target, batch, tokens, x.device)
    x_stride = token_stride("x", x)
    out = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    if batch == 0:
        return out
    use = update_configuration(target_of(x.device))
    conv1d_update_kernel[(triton.cdiv(channels, use.channels), batch)](
        x,
        weight,
        state,
        source,
        target,
        out,
        channels,
        x_stride,
        TOKENS=tokens,
        TAPS=taps,
        CHANNELS=use.channels,
        num_warps=use.num_warps,
    )
    return out


def _check(x: Tensor, weight: Tensor, state: Tensor) -> int:
    """The taps; ValueError where the three tensors are not what the kernels read."""
    if x.dtype not in DTYPES or weight.dtype not in DTYPES or state.dtype not in DTYPES:
        raise ValueError(f"x, weight and state are {x.dtype}, {weight.dtype}, {state.dtype}: give 16 or 32 bit floats")
    channels = x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != channels or not 2 <= weight.shape[1] <= 4 or not weight.is_contiguous():
        raise ValueError(f"weight is {list(weight.shape)}: give contiguous [{channels}, 2..4]")
    taps = weight.shape[1]
    if state.dim() != 3 or state.shape[1:] != (channels, taps - 1) or not state.is_contiguous():
        raise ValueError(f"state is {list(state.shape)}: give contiguous [slots, {channels}, {taps - 1}]")
    if len({x.device, weight.device, state.device}) > 1:
        raise ValueError(f"x, weight and state are on {x.device}, {weight.device}, {state.device}: move them together")
    return taps


def compile_cases(target: Target) -> tuple[CompileCase, ...]:
    """4 taps, bf16 (fp16 on Turing); one sequence of prefill, steps of one and four tokens."""
    kind = "*fp16" if target.capability == 75 else "*bf16"
    tensors = {"x": kind, "weight": kind, "state": kind, "out": kind}
    prefill, update = prefill_configuration(target), update_configuration(target)
    cases = [
        CompileCase(
            name="conv1d_prefill",
            kernel=conv1d_prefill_kernel,
            signature=tensors
            | {"slots": "*i32", "cu_seqlens": "*i32", "channels": "i32", "x_stride": "i32", "batch": "i32"},
            constants={"TAPS": 4, "TOKENS": prefill.tokens, "CHANNELS": prefill.channels, "BATCH": 1},
            aligned=("x", "weight", "state", "out", "slots", "cu_seqlens", "channels", "x_stride"),
            num_warps=prefill.num_warps,
        )
    ]
    for tokens in (1, 4):
        cases.append(
            CompileCase(
                name=f"conv1d_update/s{tokens}",
                kernel=conv1d_update_kernel,
                signature=tensors | {"source": "*i32", "target": "*i32", "channels": "i32", "x_stride": "i32"},
                constants={"TOKENS": tokens, "TAPS": 4, "CHANNELS": update.channels},
                aligned=("x", "weight", "state", "out", "source", "target", "channels", "x_stride"),
                num_warps=update.num_warps,
                wide_loads=False,  # the state's 2-byte columns are more than x
            )
        )
    return tuple(cases)
