"""The batches that llama-server reserves compute buffers for, and those buffers on every device.

`llama-context.cpp` reserves for a full ubatch, rounded up to whole tokens per sequence, and a context of multi-token
prediction reserves its own.
"""

from ...profiles.frozen import dataclass, field, replace
from ...profiles.model import Model
from .llamacpp_cache import CELL_PADDING
from .llamacpp_compute import Batch, Place, Reserve, batch_tokens, reserve
from .llamacpp_devices import Share, pipelined


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Compute buffers of one setup. Experts that move to host memory change none."""

    model: Model
    shares: tuple[Share, ...]
    ubatch: int
    rotates: tuple[bool, bool]  # K and V, where their cache is quantized
    mtp: int
    _reserves: dict[tuple[int, int], tuple[Reserve, ...]] = field(default_factory=dict, repr=False)
    _copies: dict[tuple[Batch, Place], tuple[Reserve, Reserve]] = field(default_factory=dict, repr=False)

    def tokens(self, cells: int, seqs: int) -> int:
        """Tokens of the largest batch, before it is rounded up to whole tokens per sequence."""
        return min(cells * seqs, self.ubatch)

    def batch(self, tokens: int, seqs: int, cells: int = 0) -> Batch:
        return Batch(
            tokens=batch_tokens(tokens, tokens, seqs),
            seqs=seqs,
            streams=seqs,
            outputs=min(tokens, seqs * (1 + self.mtp)),
            cells=cells,
            rotate_k=self.rotates[0],
            rotate_v=self.rotates[1],
            drafts=self.mtp,
        )

    def reserves(self, tokens: int, seqs: int) -> tuple[Reserve, ...]:
        """Compute buffers of every device, and of the draft's context behind them."""
        found = self._reserves.get((tokens, seqs))
        if found is None:
            batch = self.batch(tokens, seqs)
            all_of_them: list[Reserve] = []
            for index, share in enumerate(self.shares):
                like = self.shares[index - 1]  # most devices of many hold the same part of the graph
                same = index and share.place is like.place
                all_of_them.append(all_of_them[-1] if same else self._reserve(batch, share, share.place))
            draft = self.shares[-1].draft
            if draft is not None:
                all_of_them.append(reserve(self.model, self._draft_batch(batch), draft))
            found = self._reserves[tokens, seqs] = tuple(all_of_them)
        return found

    def pipeline_bytes(self, share: Share, tokens: int, seqs: int, cells: int) -> int:
        """What a pipeline over several devices takes beyond one batch in flight (`GGML_SCHED_MAX_COPIES`)."""
        batch = self.batch(tokens, seqs)
        found = self._copies_bytes(batch, share, share.place, cells)
        if share.draft is not None:
            found += self._copies_bytes(self._draft_batch(batch), share, share.draft, cells)
        return found

    def _copies_bytes(self, batch: Batch, share: Share, place: Place, cells: int) -> int:
        found = self._copies.get((batch, place))  # with several devices the share does not matter
        if found is None:
            found = self._reserve(batch, share, pipelined(place)), self._reserve(batch, share, place)
            self._copies[batch, place] = found
        kept, once = found
        return max(0, kept.buffer_bytes(cells) - once.buffer_bytes(cells))

    def _reserve(self, batch: Batch, share: Share, place: Place) -> Reserve:
        """The buffer of one device; raised where fewer sequences would need more in all, because their batch is rounded
        up to more tokens (512 tokens for 255 sequences are 765, for 256 they are 512)."""
        fewer, tokens = self._fewer(batch)
        if len(self.shares) > 1:  # a device may hold too few states to make up for it
            return reserve(self.model, replace(batch, tokens=max(batch.tokens, tokens)), place)
        exact = reserve(self.model, batch, place)
        if tokens <= batch.tokens:
            return exact
        growth, more = tokens / batch.tokens, batch.seqs - fewer
        states = int(0.9 * more * share.state_bytes * (1 + self.mtp))  # 0.9: alignment moves the rest about
        mask = int(growth * exact.mask_bytes_per_cell) - more * share.cell_bytes
        without = int(growth * exact.without_mask) - states - more * CELL_PADDING * share.cell_bytes
        return Reserve(
            mask_bytes_per_cell=max(exact.mask_bytes_per_cell, mask),
            with_mask=max(exact.with_mask, int(growth * exact.with_mask) - states),
            without_mask=max(exact.without_mask, without),
            flash=max(exact.flash, int(growth * exact.flash) - states),
            flash_bytes_per_cell=exact.flash_bytes_per_cell,
        )

    def _fewer(self, batch: Batch) -> tuple[int, int]:
        """The most sequences that get a token more each in a full ubatch, and how many tokens that makes."""
        if batch.tokens < self.ubatch:
            return batch.seqs, batch.tokens
        fewer = (self.ubatch - 1) // -(-self.ubatch // batch.seqs)
        if not 1 <= fewer < batch.seqs:
            return batch.seqs, batch.tokens
        return fewer, batch_tokens(self.ubatch, self.ubatch, fewer)

    def _draft_batch(self, batch: Batch) -> Batch:
        """The draft holds no state that would make up for a smaller batch, so the larger one is planned."""
        tokens = max(batch.tokens, self._fewer(batch)[1])
        outputs = min(batch.tokens, batch.seqs)
        return Batch(tokens, batch.seqs, batch.seqs, outputs, 0, True, batch.rotate_k, batch.rotate_v)
