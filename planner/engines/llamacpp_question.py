"""What is missing for one context and number of sequences, for any number of layers whose experts have moved.

Every figure that does not depend on the experts is worked out once: a plan asks for the same question several times.
"""

from .llamacpp_batch import Batches
from .llamacpp_cache import padded
from .llamacpp_devices import Layout
from .llamacpp_host import Host

COMPUTE_HIGH = 1.06  # backends ask for more than a tensor's bytes here and there


class Question:
    """`ctx_tokens` for each of `seqs` sequences, in cells and batches.

    compute_bytes: per device, what the graph needs, the draft's context included on the last.
    """

    __slots__ = (
        "_host",
        "_host_bytes",
        "_missing",
        "cells",
        "compute_bytes",
        "ctx_tokens",
        "margin_bytes",
        "seqs",
        "tokens",
    )

    def __init__(self, batches: Batches, host: Host, margin_bytes: int, ctx_tokens: int, seqs: int) -> None:
        self.ctx_tokens, self.seqs, self.margin_bytes = ctx_tokens, seqs, margin_bytes
        cells = self.cells = padded(ctx_tokens)
        tokens = self.tokens = batches.tokens(cells, seqs)
        reserves = batches.reserves(tokens, seqs)
        devices = len(batches.shares)
        compute = [reserve.buffer_bytes(cells) for reserve in reserves]
        if len(compute) > devices:
            compute[devices - 1] += compute.pop() + host.seed_bytes(tokens)
        self.compute_bytes = compute
        self._host = host
        self._host_bytes: tuple[int, int] | None = None
        self._missing: dict[tuple[int, bool], tuple[int, int]] = {}

    def missing_bytes(self, layout: Layout, doubted: bool = False) -> tuple[int, int]:
        """Bytes missing on the tightest device, and bytes taken on all; at the upper end of every estimate where
        `doubted`."""
        found = self._missing.get((layout.moved, doubted))
        if found is not None:
            return found
        worst, total, cells, seqs = -(1 << 62), 0, self.cells, self.seqs
        for index, share in enumerate(layout.shares):
            compute = self.compute_bytes[index]
            need = layout.fixed_bytes[index] + seqs * (cells * share.cell_bytes + layout.seq_bytes[index]) + compute
            if doubted:
                need += layout.doubt_bytes[index] + int((COMPUTE_HIGH - 1) * (compute + share.expert_copy_bytes)) + 1
            total += need
            short = need + self.margin_bytes - share.device.usable_bytes
            if short > worst:
                worst = short
        self._missing[layout.moved, doubted] = worst, total
        return worst, total

    def host_bytes(self, batches: Batches, moved: int) -> int:
        """The expected figure of host memory."""
        if self._host_bytes is None:
            batch = batches.batch(self.tokens, self.seqs, self.cells)
            self._host_bytes = self._host.resident_bytes(batch, self.ctx_tokens), batch.tokens
        resident, tokens = self._host_bytes
        return resident + self._host.moved_needs_bytes(moved, tokens)
