"""How fast a model reads a prompt and writes behind it, with its caches filled as far as somebody planned.

A long context takes long to read: 32,768 tokens of a 9B are an hour of two CPU cores. So reading stops at a time limit.
The caches behind what was read then get keys and values of their own (random, for pages of zeros would all be one page
in the processor's cache), and one more chunk is read at the end of the context. A chunk's time is a straight line in
the tokens before it, since every token attends to all of them: the whole prompt's time follows from the first chunks
and the last, and `Measured.is_estimated` says so. Decoding is measured at the full depth either way.

Tokens are random and nothing stops them. With drafts a step is draft and verification, whatever is accepted.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .generate import chunks
from .memory import Buffers
from .model import Model, decode_step, forward, logits, prefill_step
from .sampling import Sampling
from .speculation import Confirmed, draft, verify

PATTERN_ELEMENTS = 1_000_003
"""A prime: so no two rows of a cache are alike."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Per sequence, `depth_tokens` stand before the first step; rates are of all sequences together.

    computed_tokens: read by the model, of `depth_tokens * sequences`; the others were filled in. steps: of decode, and
    accepted_per_step the tokens that each sequence gained in one, 1 without drafts. decode_tokens_per_s counts them.
    """

    depth_tokens: int
    sequences: int
    computed_tokens: int
    prefill_s: float
    is_estimated: bool
    first_chunk_s: float
    last_chunk_s: float
    steps: int
    decode_s: float
    accepted_per_step: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.depth_tokens * self.sequences / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return self.steps * self.sequences * self.accepted_per_step / self.decode_s


@torch.inference_mode()
def measure(
    model: Model, buffers: Buffers, depth_tokens: int, steps: int, limit_s: float = float("inf"), seed: int = 0
) -> Measured:
    """Fill every sequence to `depth_tokens`, computing for `limit_s` seconds at most, and decode `steps` times.

    ValueError where the context has no room for them.
    """
    settings = buffers.settings
    wide = 1 + settings.drafts
    if depth_tokens < 1 or steps < 1 or depth_tokens + steps * wide > settings.ctx_tokens:
        raise ValueError(
            f"{depth_tokens} tokens and {steps} steps of up to {wide} do not go into a context of "
            f"{settings.ctx_tokens}: give fewer, or a larger --ctx"
        )
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, model.configuration.vocab_size, (settings.seqs * depth_tokens,), generator=draw)
    seconds, computed, prefill_s, hidden = _read(model, buffers, prompt.to(model.device), depth_tokens, limit_s)
    began = _now(model)
    gained = _decode(model, buffers, hidden, depth_tokens, steps)
    return Measured(
        depth_tokens=depth_tokens,
        sequences=settings.seqs,
        computed_tokens=computed,
        prefill_s=prefill_s,
        is_estimated=computed < prompt.numel(),
        first_chunk_s=seconds[0],
        last_chunk_s=seconds[-1],
        steps=steps,
        decode_s=_now(model) - began,
        accepted_per_step=gained / (steps * settings.seqs),
    )


def fill_caches(buffers: Buffers) -> None:
    """Keys, values and scales of every position, random: as large as those of normalised heads."""
    pattern = torch.randn(PATTERN_ELEMENTS)
    for cache in buffers.caches:
        for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
            if tensor is None:
                continue
            values = (pattern * 40).clamp(-127, 127) if tensor.dtype == torch.int8 else pattern
            if tensor.dtype == torch.float32 and cache.is_int8:
                values = pattern.abs() / 127
            _repeat(values.to(tensor.device, tensor.dtype), tensor.view(-1))


def _repeat(pattern: Tensor, target: Tensor) -> None:
    for first in range(0, target.numel(), pattern.numel()):
        part = target[first : first + pattern.numel()]
        part.copy_(pattern[: part.numel()])


def _read(
    model: Model, buffers: Buffers, prompt: Tensor, depth_tokens: int, limit_s: float
) -> tuple[list[float], int, float, Tensor]:
    """(seconds of the chunks that were read, tokens in them, seconds of the whole prompt, last hidden states [B, E])"""
    seqs = buffers.settings.seqs
    for sequence in range(seqs):
        buffers.reset(sequence)
    pieces = list(chunks([depth_tokens] * seqs, buffers.settings.prefill_chunk_tokens))
    seconds: list[float] = []
    computed = number = 0
    hidden = torch.zeros(seqs, model.configuration.hidden_size, dtype=model.dtype, device=model.device)
    while number < len(pieces):
        if sum(seconds) > limit_s and len(pieces) - number > 1:
            fill_caches(buffers)
            number = len(pieces) - 1
        began = _now(model)
        last = _read_chunk(model, buffers, prompt, depth_tokens, pieces[number])
        seconds.append(_now(model) - began)
        for sequence, state in last.items():
            hidden[sequence] = state
        computed += sum(length for _, _, length in pieces[number])
        number += 1
    if computed == prompt.numel():
        return seconds, computed, sum(seconds), hidden
    read = [*pieces[: len(seconds) - 1], pieces[-1]]
    return seconds, computed, sum(seconds) + unread_s(read, seconds, depth_tokens, seqs), hidden


def unread_s(
    read: Sequence[Sequence[tuple[int, int, int]]], seconds: Sequence[float], depth_tokens: int, seqs: int
) -> float:
    """Seconds of what was not read: of the chunks in `read`, (sequence, start, length) each, the last is the prompts'
    last, and those before it are their first. The time of a token rises in a straight line with those before it: from
    the end of what was read, and in sequences that were not begun from the first chunk on."""
    per_token = [second / sum(length for _, _, length in chunk) for second, chunk in zip(seconds, read, strict=True)]
    owner, start, length = read[-2][-1]
    last = sum(length for one, _, length in read[-1] if one == owner)
    begun = depth_tokens - (start + length) - last
    fresh = seqs * depth_tokens - sum(length for chunk in read for _, _, length in chunk) - begun
    return begun * (per_token[-2] + per_token[-1]) / 2 + fresh * (per_token[0] + per_token[-1]) / 2


def _read_chunk(
    model: Model, buffers: Buffers, prompt: Tensor, depth_tokens: int, piece: Sequence[tuple[int, int, int]]
) -> dict[int, Tensor]:
    """One chunk; the hidden state of the last token of every sequence in it."""
    sequences, starts, lengths = (list(values) for values in zip(*piece, strict=True))
    tokens = torch.cat([prompt[owner * depth_tokens + start :][:length] for owner, start, length in piece])
    states = forward(model, tokens, prefill_step(model, buffers, sequences, starts, lengths), buffers)
    ends = torch.tensor(lengths).cumsum(0) - 1
    last = states[ends.to(states.device)]
    logits(model, last[-1:])
    return dict(zip(sequences, last, strict=True))


def _decode(model: Model, buffers: Buffers, hidden: Tensor, depth_tokens: int, steps: int) -> int:
    """Tokens that all sequences gained in `steps` steps."""
    seqs, drafts = buffers.settings.seqs, buffers.settings.drafts
    everyone = tuple(range(seqs))
    newest = logits(model, hidden).argmax(-1)
    if not drafts:
        for step in range(steps):
            places = [depth_tokens + step] * seqs
            states = forward(model, newest, decode_step(model, buffers, everyone, places), buffers)
            newest = logits(model, states).argmax(-1)
        return steps * seqs
    confirmed = Confirmed(everyone, hidden[:, None], newest[:, None], (depth_tokens - 1,) * seqs, (1,) * seqs)
    lengths, gained = [depth_tokens] * seqs, 0
    for _ in range(steps):
        proposed = draft(model, buffers, confirmed, drafts)
        tokens = torch.cat((newest[:, None], proposed), dim=1)
        found, confirmed = verify(model, buffers, everyone, lengths, tokens, Sampling())
        lengths = [length + len(new) for length, new in zip(lengths, found, strict=True)]
        newest = torch.tensor([new[-1] for new in found], device=model.device)
        gained += sum(map(len, found))
    return gained


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
