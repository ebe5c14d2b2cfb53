"""Devices that would do: the cheapest of those with a published price (profiles/prices.json) on which a question fits.

Prices are of one device, or of the whole machine where it is sold as one. Tried are one device, and as many of one kind
as the question has; the walk is from the cheapest up, and ends with the last offer that is wanted. Where the question
leaves the weights open, only what keeps four-bit quality would do.
"""

from collections.abc import Iterator
from functools import lru_cache
from time import monotonic

from ..profiles.device import Device
from ..profiles.device_names import device
from ..profiles.errors import QwenfitError
from ..profiles.formats import checkpoint_bytes, weight_format
from ..profiles.frozen import dataclass
from ..profiles.model_catalog import model
from ..profiles.speed_data import prices
from .candidates import ENGINE_MODULES, engine_module
from .plan import EnginePlan, Limits
from .request import Options, Request
from .search import FOUR_BIT_DIVERGENCE, assumed_host_bytes, rank, search, variant
from .weights import weight_table


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars for one device, what kind of price that is, and where it stands."""

    device: Device
    usd: int
    what: str
    source: str


@dataclass(frozen=True, slots=True)
class Offer:
    """So many of one device, and the best plan there: it fits, and not only just."""

    price: Price
    count: int
    plan: EnginePlan
    limits: Limits  # of the plan: worked out with it, for they take as long

    @property
    def usd(self) -> int:
        return self.price.usd * self.count


@dataclass(frozen=True, slots=True)
class Offers:
    """The cheapest first. `complete`: there is nothing cheaper, and no more than `found` were wanted or would do."""

    found: tuple[Offer, ...]
    complete: bool


@lru_cache
def price_list() -> tuple[Price, ...]:
    """The cheapest first; of one price, the one with more memory."""
    listed = (
        Price(device(row["device"]), row["usd"], row["what"], row["source"]) for row in prices()["device_usd"]["prices"]
    )
    return tuple(sorted(listed, key=lambda one: (one.usd, -one.device.usable_bytes)))


def offers(request: Request, device_count: int, wanted: int, patience_s: float | None = None) -> Offers:
    """The `wanted` cheapest that would do for the request with its devices replaced; fewer where fewer do.

    Everything else that the request fixes stays fixed; parallel sizes are chosen anew. After `patience_s` it returns
    what it has so far; what was tried is remembered, engine by engine, so that asking again goes on from there.
    """
    asked = variant(request, devices=(), tp=None, pp=None, nodes=1, dp=None, ep=None, interconnect=None)
    at_any = variant(asked, ctx_tokens=1)
    until = None if patience_s is None else monotonic() + patience_s
    found: list[Offer] = []
    for count, price in _by_price(device_count):
        if len(found) == wanted:
            break
        plans: list[EnginePlan] = []
        for engine in _engines(asked):
            if until is not None and monotonic() > until:
                return Offers(tuple(found), False)
            failing = _failing(at_any, engine, price.device.name, count)
            if failing and asked.ctx_tokens >= failing[0]:
                continue
            if not _may_fit(asked, engine, price.device.name, count):
                failing[:] = [asked.ctx_tokens]
                continue
            if until is not None and monotonic() > until:
                return Offers(tuple(found), False)
            best = _plan_on(asked, failing, engine, price.device.name, count)
            if best is not None:
                plans.append(best)
        if plans:
            best = min(plans, key=rank)
            if until is not None and monotonic() > until:
                return Offers(tuple(found), False)
            found.append(Offer(price, count, best, best.limits))
    return Offers(tuple(found), True)


def _by_price(device_count: int) -> Iterator[tuple[int, Price]]:
    """One device, and as many as were asked for: machines that are sold whole only one by one."""
    pairs = [(1, price) for price in price_list()]
    if device_count > 1:
        pairs += [(device_count, price) for price in price_list() if price.device.kind == "discrete"]
    yield from sorted(pairs, key=lambda pair: pair[0] * pair[1].usd)


def _engines(request: Request) -> tuple[str, ...]:
    if request.engine is not None:
        return (request.engine,)
    return tuple(name for name in ENGINE_MODULES if engine_module(name).ENGINE.released)


def _plan_on(request: Request, failing: list[int], engine: str, name: str, count: int) -> EnginePlan | None:
    """The engine's best plan on so many of that device; None where it would not do. What does not do does not do at any
    longer context either: a slider that moves up asks about fewer and fewer devices."""
    found = _search_on(request, engine, name, count)
    if found is None:
        failing[:] = [request.ctx_tokens]
    return found


@lru_cache(maxsize=16384)
def _failing(_request: Request, _engine: str, _name: str, _count: int) -> list[int]:
    """The shortest context that was seen to fail, once there is one; the request's own does not matter."""
    return []


@lru_cache(maxsize=16384)
def _may_fit(request: Request, engine: str, name: str, count: int) -> bool:
    """Before the search through forty formats, which takes a hundred times as long where all fail: the smallest weights
    of four-bit quality. Where these do not fit, none do."""
    if request.weights:
        return True
    try:
        weights = _smallest_weights(request.model, engine.partition("@")[0], name)
        if weights is None or _is_hopeless(request.model, weights, engine, name, count, request.options):
            return False
        return search(variant(request, devices=(name,) * count, engine=engine, weights=weights)).fits
    except QwenfitError:  # the engine does not take this there
        return False


@lru_cache(maxsize=4096)
def _search_on(request: Request, engine: str, name: str, count: int) -> EnginePlan | None:
    try:
        best = search(variant(request, devices=(name,) * count, engine=engine)).best
    except QwenfitError:
        return None
    good = bool(request.weights) or best.divergence <= FOUR_BIT_DIVERGENCE
    return best if best.fits and not best.tight and good else None


def _is_hopeless(model_name: str, weights: str, engine: str, name: str, count: int, options: Options) -> bool:
    """Whether the layers alone are larger than all memory there, so that no layout and no context need be looked at."""
    asked, one = model(model_name), device(name)
    room = count * max(one.memory_bytes, one.usable_bytes)
    if asked.is_moe and engine_module(engine.partition("@")[0]).ENGINE.offloads and one.kind == "discrete":
        room += options.host_memory_bytes or assumed_host_bytes((one,) * count) or 0
    table = weight_table(asked, weight_format(weights))
    return sum(table.layers) + sum(table.experts) > room


@lru_cache(maxsize=4096)
def _smallest_weights(model_name: str, engine: str, name: str) -> str | None:
    asked = model(model_name)
    if asked.stored:
        return asked.stored
    formats = map(weight_format, engine_module(engine).weight_formats(asked, device(name)))
    good = [fmt for fmt in formats if fmt.divergence <= FOUR_BIT_DIVERGENCE]
    return min(good, key=lambda fmt: checkpoint_bytes(asked, fmt)).name if good else None
