"""Amounts of memory that say how sure they are, and the six parts that every engine's allocation is told in."""

from ..profiles.frozen import dataclass


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes. `exact` where they follow from the engine's own arithmetic; otherwise an interval around an estimate."""

    low: int
    mid: int
    high: int
    exact: bool = False

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.low + other.low, self.mid + other.mid, self.high + other.high, self.exact and other.exact)


def exactly(amount_bytes: int) -> Amount:
    return Amount(amount_bytes, amount_bytes, amount_bytes, True)


def estimated(low: float, mid: float, high: float) -> Amount:
    return Amount(int(low), int(mid), int(high), False)


NOTHING = exactly(0)


@dataclass(frozen=True, slots=True)
class Memory:
    """What one device (or the host) holds. The parts sum to `total`."""

    weights: Amount = NOTHING
    kv_cache: Amount = NOTHING
    recurrent_state: Amount = NOTHING
    activation: Amount = NOTHING  # prefill and decode scratch, sampler, vision encoder, compute buffers
    graph: Amount = NOTHING  # captured CUDA or HIP graphs
    runtime: Amount = NOTHING  # driver context, communication buffers, the process itself

    @property
    def parts(self) -> dict[str, Amount]:
        return {
            "weights": self.weights,
            "kv_cache": self.kv_cache,
            "recurrent_state": self.recurrent_state,
            "activation": self.activation,
            "graph": self.graph,
            "runtime": self.runtime,
        }

    @property
    def total(self) -> Amount:
        low = mid = high = 0
        exact = True
        for part in (
            self.weights,
            self.kv_cache,
            self.recurrent_state,
            self.activation,
            self.graph,
            self.runtime,
        ):
            low += part.low
            mid += part.mid
            high += part.high
            exact = exact and part.exact
        return Amount(low, mid, high, exact)
