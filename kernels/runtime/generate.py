"""Prompts in, tokens out: prefill in chunks, then one step after another, several sequences at a time.

Prefill fills every chunk with up to `prefill_chunk_tokens` tokens of one prompt or several, in order; caches and states
carry a prompt over from one chunk to the next. Decode takes all unfinished sequences together, one token each, or with
drafts what `speculation.py` proposes and the model confirms. A sequence ends at a stop token, after `max_tokens`
tokens, or where its context is full.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Buffers
from .model import Model, forward, logits, predict, prefill_step
from .sampling import Sampling, choose
from .speculation import Confirmed, draft, verify

GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Generation:
    """What came of it. tokens: the new ones of each prompt, a stop token included; times end when the device is done.

    steps: passes through the model after prefill. drafted, accepted: tokens that were proposed to it, and that it kept.
    """

    tokens: tuple[tuple[int, ...], ...]
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    steps: int
    drafted: int
    accepted: int


@torch.inference_mode()
def generate(
    model: Model,
    buffers: Buffers,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
) -> Generation:
    """Continue every prompt by up to `max_tokens` tokens; stop_tokens None: those of the model's configuration.

    ValueError where there are more prompts than sequences, or a prompt is empty, too long or not of this vocabulary.
    """
    _check(model, buffers, prompts, max_tokens)
    stops = frozenset(model.configuration.stop_tokens if stop_tokens is None else stop_tokens)
    context_tokens = buffers.settings.ctx_tokens
    began = _now(model)
    hidden = prefill(model, buffers, prompts)
    places = [(sequence, len(prompt)) for sequence, prompt in enumerate(prompts)]
    newest = choose(logits(model, hidden), sampling, places)
    texts = [[token] for token in newest.tolist()]
    prefilled = _now(model)

    def is_unfinished(sequence: int) -> bool:
        text, room = texts[sequence], context_tokens - len(prompts[sequence])
        return len(text) < min(max_tokens, room) and text[-1] not in stops

    steps = drafted = accepted = 0
    starts = tuple(len(prompt) - 1 for prompt in prompts)
    everyone = tuple(range(len(prompts)))
    confirmed = Confirmed(everyone, hidden[:, None], newest[:, None], starts, (1,) * len(prompts))
    while active := [sequence for sequence in everyone if is_unfinished(sequence)]:
        lengths = [len(prompts[sequence]) + len(texts[sequence]) - 1 for sequence in active]
        tokens = torch.tensor([texts[sequence][-1:] for sequence in active], device=model.device)
        if buffers.settings.drafts:
            count = min(buffers.settings.drafts, context_tokens - 1 - max(lengths))
            tokens = torch.cat((tokens, draft(model, buffers, confirmed.only(active), count)), dim=1)
        found, confirmed = verify(model, buffers, active, lengths, tokens, sampling)
        steps += 1
        drafted += tokens[:, 1:].numel()
        accepted += sum(len(new) - 1 for new in found)
        for sequence, new in zip(active, found, strict=True):
            for token in new:
                if is_unfinished(sequence):
                    texts[sequence].append(token)
    return Generation(
        tokens=tuple(map(tuple, texts)),
        prefill_tokens=sum(map(len, prompts)),
        prefill_s=prefilled - began,
        decode_tokens=sum(len(text) - 1 for text in texts),
        decode_s=_now(model) - prefilled,
        steps=steps,
        drafted=drafted,
        accepted=accepted,
    )


@torch.inference_mode()
def prefill(model: Model, buffers: Buffers, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Read every prompt into the row and slot of its number -> the hidden state of its last token [B, E].

    With drafts the prediction layer reads the prompts, too: every position whose next token is known.
    """
    for sequence in range(len(prompts)):
        buffers.reset(sequence)
    last = torch.empty(len(prompts), model.configuration.hidden_size, dtype=model.dtype, device=model.device)
    for pieces in chunks([len(prompt) for prompt in prompts], buffers.settings.prefill_chunk_tokens):
        sequences, starts, lengths = (list(values) for values in zip(*pieces, strict=True))
        step = prefill_step(model, buffers, sequences, starts, lengths)
        hidden = forward(model, _tokens(model, prompts, pieces), step, buffers)
        begin = 0
        for sequence, start, length in pieces:
            begin += length
            if start + length == len(prompts[sequence]):
                last[sequence] = hidden[begin - 1]
        if buffers.settings.drafts:
            _read_ahead(model, buffers, prompts, pieces, hidden)
    return last


def chunks(lengths: Sequence[int], chunk_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
    """Prompts of these lengths in chunks of up to `chunk_tokens` tokens: lists of (prompt, start, tokens)."""
    pieces: list[tuple[int, int, int]] = []
    room = chunk_tokens
    for prompt, length in enumerate(lengths):
        start = 0
        while start < length:
            tokens = min(room, length - start)
            pieces.append((prompt, start, tokens))
            start, room = start + tokens, room - tokens
            if not room:
                yield pieces
                pieces, room = [], chunk_tokens
    if pieces:
        yield pieces


def _read_ahead(
    model: Model,
    buffers: Buffers,
    prompts: Sequence[Sequence[int]],
    pieces: Sequence[tuple[int, int, int]],
    hidden: Tensor,
) -> None:
    """The prediction layer over a chunk: hidden [T, E] of the pieces, each with the prompt's token after it."""
    rows: list[int] = []
    known: list[tuple[int, int, int]] = []
    begin = 0
    for sequence, start, length in pieces:
        tokens = min(length, len(prompts[sequence]) - 1 - start)
        if tokens:
            known.append((sequence, start, tokens))
            rows += range(begin, begin + tokens)
        begin += length
    if known:
        sequences, starts, lengths = (list(values) for values in zip(*known, strict=True))
        step = prefill_step(model, buffers, sequences, starts, lengths)
        after = _tokens(model, prompts, [(sequence, start + 1, length) for sequence, start, length in known])
        predict(model, hidden[torch.tensor(rows, device=model.device)], after, step, buffers)


def _tokens(model: Model, prompts: Sequence[Sequence[int]], pieces: Sequence[tuple[int, int, int]]) -> Tensor:
    tokens = [token for sequence, start, length in pieces for token in prompts[sequence][start : start + length]]
    return torch.tensor(tokens, dtype=torch.long, device=model.device)


def _check(model: Model, buffers: Buffers, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    settings, vocabulary = buffers.settings, model.configuration.vocab_size
    if not 0 < len(prompts) <= settings.seqs:
        raise ValueError(f"{len(prompts)} prompts for {settings.seqs} sequences: give --seqs {max(1, len(prompts))}")
    if max_tokens < 1:
        raise ValueError(f"{max_tokens} tokens to generate: give 1 or more")
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < settings.ctx_tokens:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, and a context of {settings.ctx_tokens} takes 1 to "
                f"{settings.ctx_tokens - 1} and what comes after: give a larger --ctx"
            )
        if not all(0 <= token < vocabulary for token in prompt):
            raise ValueError(f"prompt {number} has a token outside 0 ... {vocabulary - 1}: it is of another tokenizer")


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
