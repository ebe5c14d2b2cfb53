"""Multi-token prediction: the prediction layer proposes a few tokens, one step of the model checks them all.

Position L holds the newest token t, which the model has not seen yet. A round:

    draft    the layer gets the pairs (hidden state, token after it) of the positions that the last step confirmed, and
             its last output gives draft 1; draft k + 1 comes from the pair of the layer's own output and draft k
    verify   one step over t, draft 1 ... draft n at positions L ... L + n; from the logits after each of them comes the
             token that the model itself would have had there. As far as these are the drafts, they stand, and one more
             token is won behind them

so every token is the model's own choice, and drafts decide only how many of them one step yields. Recurrent state is
written to another slot after every token: the slot of the last token that stands is the state (`memory.py`). Keys of
rejected tokens stay in the caches behind the length that counts and are overwritten.

The layer is run over all n + 1 positions of a step, for that is a rectangle; pairs behind the first rejected draft are
wrong, seen by nobody (attention is causal), and overwritten in the next round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Buffers
from .model import Model, decode_step, forward, logits, predict
from .sampling import Sampling, choose


@dataclass(frozen=True, slots=True, eq=False)
class Confirmed:
    """What the last step left for the prediction layer, per sequence.

    hidden [B, S, E]: the model's hidden states at positions starts[b] ... starts[b] + S - 1; tokens int64 [B, S]: the
    token after each; kept[b]: how many of them stand, at least 1.
    """

    sequences: tuple[int, ...]
    hidden: Tensor
    tokens: Tensor
    starts: tuple[int, ...]
    kept: tuple[int, ...]

    def only(self, sequences: Sequence[int]) -> "Confirmed":
        """The same for some of the sequences."""
        if tuple(sequences) == self.sequences:
            return self
        rows = [self.sequences.index(sequence) for sequence in sequences]
        index = torch.tensor(rows, dtype=torch.long, device=self.hidden.device)
        starts, kept = (tuple(values[row] for row in rows) for values in (self.starts, self.kept))
        return Confirmed(tuple(sequences), self.hidden[index], self.tokens[index], starts, kept)


def draft(model: Model, buffers: Buffers, confirmed: Confirmed, count: int) -> Tensor:
    """Drafts int64 [B, count] of the tokens behind the confirmed ones: the most likely ones, one after another."""
    batch, tokens = confirmed.tokens.shape
    step = decode_step(model, buffers, confirmed.sequences, confirmed.starts, tokens)
    hidden = predict(model, confirmed.hidden.flatten(0, 1), confirmed.tokens.flatten(), step, buffers)
    last = torch.tensor(confirmed.kept, device=hidden.device) - 1
    hidden = hidden.unflatten(0, (batch, tokens))[torch.arange(batch, device=hidden.device), last]
    lengths = [start + kept for start, kept in zip(confirmed.starts, confirmed.kept, strict=True)]
    drafts = []
    for number in range(count):
        if number:
            step = decode_step(model, buffers, confirmed.sequences, lengths)
            hidden = predict(model, hidden, drafts[-1], step, buffers)
            lengths = [length + 1 for length in lengths]
        drafts.append(logits(model, hidden).argmax(-1))
    return torch.stack(drafts, dim=1) if drafts else confirmed.tokens.new_empty(batch, 0)


def verify(
    model: Model,
    buffers: Buffers,
    sequences: Sequence[int],
    lengths: Sequence[int],
    tokens: Tensor,
    sampling: Sampling,
) -> tuple[list[list[int]], Confirmed]:
    """One step over tokens int64 [B, 1 + drafts] at positions lengths[b] ...: the newest token, then its drafts.

    Returns the tokens that stand behind it, drafts and one more (without drafts just that one), and brings the choice
    of slots up to date.
    """
    batch, width = tokens.shape
    step = decode_step(model, buffers, sequences, lengths, width)
    hidden = forward(model, tokens.flatten(), step, buffers)
    places = [
        (sequence, length + 1 + token)
        for sequence, length in zip(sequences, lengths, strict=True)
        for token in range(width)
    ]
    chosen = choose(logits(model, hidden), sampling, places).view(batch, width)
    stands = (chosen[:, :-1] == tokens[:, 1:]).cumprod(-1).sum(-1) + 1
    kept = stands.tolist()
    found = [row[:count] for row, count in zip(chosen.tolist(), kept, strict=True)]
    for sequence, count in zip(sequences, kept, strict=True):
        buffers.advance(sequence, count)
    starts = tuple(lengths)
    return found, Confirmed(tuple(sequences), hidden.unflatten(0, (batch, width)), chosen, starts, tuple(kept))
