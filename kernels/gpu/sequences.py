"""Sequences laid end to end, as kernels see them: which rows of [T, ...] a program works on, found on the device.

Sequence b has the rows cu_seqlens[b]:cu_seqlens[b+1]. Kernels cut every sequence into blocks of so many rows, the last
of which may be short, and number the blocks of all sequences one after the other. How many there are stands in device
memory, and asking for it would stop the host until the device has caught up. So the host launches as many programs as
there can be (`most_blocks`), and each finds its own block by `locate_block`: one load of cu_seqlens, a cumulative sum
over the sequences. Those left over find that they have no rows.

    cu_seqlens 0 70 70 90, blocks of 64 rows      block 0: rows 0..63 of sequence 0
                                                  block 1: rows 64..69 of sequence 0
    most_blocks(90, 3, 64) = 4                    block 2: rows 70..89 of sequence 2 (sequence 1 is empty and has none)
                                                  block 3: no rows
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SEQUENCES = 4096
MOST_STEP_TOKENS = 8
"""New tokens per sequence in a decode step: one, and up to seven drafts."""
MOST_GRID_BLOCKS = 65535
"""Of the second and third dimension of a CUDA grid."""


@triton.jit
def _blocks_of(lengths, ROWS: tl.constexpr, LEAST: tl.constexpr):
    blocks = (lengths + (ROWS - 1)) // ROWS
    return blocks if LEAST == 1 else tl.where(lengths >= LEAST, blocks, 0)


@triton.jit
def locate_block(cu_seqlens, index, batch, BATCH: tl.constexpr, ROWS: tl.constexpr, LEAST: tl.constexpr = 1):
    """(sequence, first row of it, first row of the block, rows in the block) of block `index`; rows <= 0: no such
    block.

    BATCH: a power of two, not below `batch`. ROWS: rows of a full block. LEAST: sequences of fewer rows have no blocks.
    A sequence's own first block is the one whose first row is the sequence's first row.
    """
    lanes = tl.arange(0, BATCH)
    known = lanes < batch
    starts = tl.load(cu_seqlens + lanes, mask=known, other=0)
    ends = tl.load(cu_seqlens + lanes + 1, mask=known, other=0)
    blocks = _blocks_of(ends - starts, ROWS, LEAST)
    until = tl.cumsum(blocks, 0)  # blocks of the sequences up to and with this one
    sequence = tl.sum((until <= index).to(tl.int32), 0)  # BATCH where there is no such block
    own = lanes == sequence
    start = tl.sum(tl.where(own, starts, 0), 0)
    end = tl.sum(tl.where(own, ends, 0), 0)
    first = start + (index - tl.sum(tl.where(own, until - blocks, 0), 0)) * ROWS
    return sequence, start, first, tl.minimum(end - first, ROWS)


@triton.jit
def count_blocks(cu_seqlens, sequence, BATCH: tl.constexpr, ROWS: tl.constexpr, LEAST: tl.constexpr = 1):
    """(number of the sequence's first block, its first row, one past its last row); LEAST: as in `locate_block`."""
    lanes = tl.arange(0, BATCH)
    before = lanes < sequence
    starts = tl.load(cu_seqlens + lanes, mask=before, other=0)
    ends = tl.load(cu_seqlens + lanes + 1, mask=before, other=0)
    first = tl.sum(_blocks_of(ends - starts, ROWS, LEAST), 0)
    return first, tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)


def most_blocks(tokens: int, sequences: int, rows: int) -> int:
    """The most blocks of `rows` rows that `sequences` sequences of `tokens` tokens together can have."""
    return min(tokens, (tokens + sequences * (rows - 1)) // rows)


def power_of_two(number: int) -> int:
    """The smallest one that is not below `number`."""
    return 1 << (number - 1).bit_length()


def check_sequences(cu_seqlens: Tensor, slots: Tensor, device: torch.device) -> int:
    """The number of sequences. ValueError where the two tensors are not what the kernels read.

    Their values stay on the device and are taken on trust: cu_seqlens starts at 0, never falls and ends at T at most;
    slots are below the state's, and no two sequences have the same one.
    """
    for name, tensor in (("cu_seqlens", cu_seqlens), ("slots", slots)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: give contiguous int32 [B"
                f"{' + 1' if name == 'cu_seqlens' else ''}] on {device}"
            )
    sequences = slots.shape[0]
    if cu_seqlens.shape[0] != sequences + 1:
        raise ValueError(f"cu_seqlens has {cu_seqlens.shape[0]} entries for {sequences} slots: give one more")
    if not 0 < sequences <= MOST_SEQUENCES:
        raise ValueError(f"{sequences} sequences in one call: give 1 to {MOST_SEQUENCES}")
    return sequences


def check_step_slots(source: Tensor, target: Tensor, batch: int, tokens: int, device: torch.device) -> None:
    """ValueError where the slots of a step are not int32 [B] and [B, S] on the device, contiguous."""
    if batch > MOST_GRID_BLOCKS:
        raise ValueError(f"{batch} sequences in one step: give {MOST_GRID_BLOCKS} at most")
    for name, slots, shape in (("source", source, (batch,)), ("target", target, (batch, tokens))):
        if slots.dtype != torch.int32 or slots.shape != shape or not slots.is_contiguous() or slots.device != device:
            raise ValueError(
                f"{name} is {slots.dtype} {list(slots.shape)} on {slots.device}: give contiguous int32 {list(shape)} "
                f"on {device}"
            )


def token_stride(name: str, x: Tensor) -> int:
    """Elements from one token to the next in x [..., channels], all leading dimensions taken as one.

    ValueError where the channels of a token do not lie together or tokens are not equally far apart.
    """
    if x.numel() == 0:
        return x.shape[-1]
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} has a stride of {x.stride(-1)} inside a row: call .contiguous() on it")
    try:
        return x.view(-1, x.shape[-1]).stride(0)
    except RuntimeError:
        shape = list(x.shape)
        raise ValueError(f"the rows of {name} {shape} have no common stride: call .contiguous() on it") from None
