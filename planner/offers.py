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
from .plan import EnginePlan
from .request import Request
from .search import FOUR_BIT_DIVERGENCE, search, variant


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
    what it has so far; what was tried is remembered, so that asking again goes on from there.
    """
    asked = variant(request, devices=(), tp=None, pp=None, nodes=1, dp=None, ep=None, interconnect=None)
    until = None if patience_s is None else monotonic() + patience_s
    found: list[Offer] = []
    for count, price in _by_price(device_count):
        if len(found) == wanted:
            break
        if until is not None and monotonic() > until:
            return Offers(tuple(found), False)
        best = _plan_on(asked, price.device.name, count)
        if best is not None:
            found.append(Offer(price, count, best))
    return Offers(tuple(found), True)


def _by_price(device_count: int) -> Iterator[tuple[int, Price]]:
    """One device, and as many as were asked for: machines that are sold whole only one by one."""
    pairs = [(1, price) for price in price_list()]
    if device_count > 1:
        pairs += [(device_count, price) for price in price_list() if price.device.kind == "discrete"]
    yield from sorted(pairs, key=lambda pair: pair[0] * pair[1].usd)


def _plan_on(request: Request, name: str, count: int) -> EnginePlan | None:
    """The best plan on so many of that device; None where none would do. What does not do does not do at any longer
    context either: a slider that moves up asks about fewer and fewer devices."""
    failing = _failing(variant(request, ctx_tokens=1), name, count)
    if failing and request.ctx_tokens >= failing[0]:
        return None
    found = _search_on(request, name, count)
    if found is None:
        failing[:] = [request.ctx_tokens]
    return found


@lru_cache(maxsize=4096)
def _failing(_request: Request, _name: str, _count: int) -> list[int]:
    """The shortest context that was seen to fail, once there is one; the request's own does not matter."""
    return []


@lru_cache(maxsize=1024)
def _search_on(request: Request, name: str, count: int) -> EnginePlan | None:
    asked = variant(request, devices=(name,) * count)
    if not request.weights and not any(_fits(one) for one in _smallest(asked, name)):
        return None
    try:
        best = search(asked).best
    except QwenfitError:  # no engine takes this there
        return None
    good = bool(request.weights) or best.divergence <= FOUR_BIT_DIVERGENCE
    return best if best.fits and not best.tight and good else None


def _fits(request: Request) -> bool:
    try:
        return search(request).fits
    except QwenfitError:
        return False


def _smallest(request: Request, name: str) -> Iterator[Request]:
    """The question to each engine, with the smallest weights of four-bit quality: where these do not fit, none do.

    A search through forty formats that all fail takes a hundred times as long."""
    engines = ENGINE_MODULES if request.engine is None else (request.engine,)
    for engine in engines:
        weights = _smallest_weights(request.model, engine.partition("@")[0], name)
        if weights:
            yield variant(request, engine=engine, weights=weights)


@lru_cache(maxsize=4096)
def _smallest_weights(model_name: str, engine: str, name: str) -> str | None:
    asked = model(model_name)
    if asked.stored:
        return asked.stored
    formats = map(weight_format, engine_module(engine).weight_formats(asked, device(name)))
    good = [fmt for fmt in formats if fmt.divergence <= FOUR_BIT_DIVERGENCE]
    return min(good, key=lambda fmt: checkpoint_bytes(asked, fmt)).name if good else None
