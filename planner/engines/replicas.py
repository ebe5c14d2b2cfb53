"""Data parallelism: equal replicas, each with its part of the sequences."""

from ...profiles.frozen import dataclass
from .engine import Allocation, Estimate


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """`dp` replicas of what `one` is the arithmetic of, on all their devices: requests are dealt out evenly, so that
    the fullest has its share of them, rounded up. Contexts are not divided."""

    one: Estimate
    dp: int

    def _share(self, seqs: int) -> int:
        return -(-seqs // self.dp)

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        return self.one.shortfall_bytes(ctx_tokens, self._share(seqs))

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self.one.is_sure(ctx_tokens, self._share(seqs))

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        return self.one.allocate(ctx_tokens, self._share(seqs))

    def command(self, ctx_tokens: int, seqs: int) -> str:
        return self.one.command(ctx_tokens, self._share(seqs))


def over_replicas(one: Estimate, dp: int) -> Estimate:
    return one if dp == 1 else Replicas(one, dp)
