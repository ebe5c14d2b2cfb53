"""Which token comes next: the most likely one, or one drawn from what temperature, top-k and top-p leave.

The random number of a token depends on the seed, its sequence and its position, and on nothing else: not on the batch,
the chunks of the prompt, or the drafts. So a seed gives the same text with speculation and without, and a draft is
accepted exactly where it is what would have been drawn: with one draft per position no rule accepts more often, and
what is generated has the distribution of the model itself.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_CANDIDATES = 512


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0: the most likely token. top_k 0 and top_p 1: no limit; top_k is applied before top_p."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give 0 (no limit) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a share above 0 and up to 1")


def choose(logits: Tensor, sampling: Sampling, places: Sequence[tuple[int, int]]) -> Tensor:
    """Float32 logits [N, vocab] -> tokens int64 [N]; places[n] is the (sequence, position) that token n will have."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    shares, tokens = _candidates(logits, sampling)
    before = shares.cumsum(-1) - shares
    shares = shares.where(before < sampling.top_p, 0)  # as many as it takes to reach top_p, so at least one
    reached = shares.cumsum(-1)
    drawn = [random.Random(f"{sampling.seed} {sequence} {position}").random() for sequence, position in places]
    goal = torch.tensor(drawn, dtype=torch.float64, device=logits.device)[:, None] * reached[:, -1:]
    index = torch.searchsorted(reached, goal, right=True).clamp(max=shares.shape[-1] - 1)
    return index[:, 0] if tokens is None else tokens.gather(-1, index)[:, 0]


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Shares float64 [N, C] of the tokens that may be drawn, and which they are [N, C], the most likely first; None for
    all of them as they are. Sorting 248,320 takes 20 ms, so no more are than reach top_p."""
    vocabulary = logits.shape[-1]
    if sampling.top_k:
        likely, tokens = logits.topk(min(sampling.top_k, vocabulary), dim=-1)
        return (likely.double() / sampling.temperature).softmax(-1), tokens
    shares = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_p == 1:
        return shares, None
    count = min(FIRST_CANDIDATES, vocabulary)
    largest, tokens = shares.topk(count, dim=-1)
    while count < vocabulary and bool((largest.sum(-1) < sampling.top_p).any()):
        count = min(8 * count, vocabulary)
        largest, tokens = shares.topk(count, dim=-1)
    return largest, tokens
