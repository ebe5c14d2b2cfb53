"""Setups on their way to plans: one is priced when nothing cheaper says that it cannot win."""

from collections.abc import Iterable, Iterator
from functools import cached_property

from ..profiles.frozen import dataclass
from .candidates import Candidates
from .engines.engine import Setup
from .plan import EnginePlan
from .request import Request


@dataclass(frozen=True, eq=False)
class Prospect:
    """One of an engine's setups for one question. `place`: how many are better in quality."""

    offered: Candidates
    place: int
    request: Request
    notes: tuple[str, ...]
    assumed_host_bytes: int | None
    least_missing_bytes: int  # above 0: it does not fit, and at least so much is missing

    @property
    def setup(self) -> Setup:
        return self.offered.setups[self.place]

    @cached_property
    def plan(self) -> EnginePlan | None:
        """None where the engine refuses the setup."""
        estimate = self.offered.estimate(self.place)
        if estimate is None:
            return None
        request = self.request
        return EnginePlan(
            self.offered.engine.name,
            self.setup,
            estimate,
            request.ctx_tokens,
            request.seqs,
            self.notes,
            self.assumed_host_bytes,
            request.prices,
            self.offered.floor(self.place),
        )


def prospects(
    offered: Candidates, request: Request, notes: tuple[str, ...], assumed_host_bytes: int | None
) -> Iterator[Prospect]:
    ctx_tokens, seqs = request.ctx_tokens, request.seqs
    for place in range(len(offered.setups)):
        floor = offered.floor(place)
        least = floor.missing_bytes(ctx_tokens, seqs) if floor else 0
        yield Prospect(offered, place, request, notes, assumed_host_bytes, least)


def nearest_miss(misses: Iterable[Prospect]) -> EnginePlan | None:
    """Of what does not fit, the plan that lacks least, of equals the one of better quality. Those that lack more in any
    case are left out."""
    nearest: tuple[int, int] | None = None
    best: EnginePlan | None = None
    for one in sorted(misses, key=lambda miss: (miss.least_missing_bytes, miss.place)):
        if nearest and (one.least_missing_bytes, one.place) > nearest:
            break
        found = one.plan
        if found is not None and (nearest is None or (found.shortfall_bytes, one.place) < nearest):
            nearest, best = (found.shortfall_bytes, one.place), found
    return best
