"""Devices that would do: against a search of every priced device by itself, and the price list against its sources."""

import pytest

from qwenfit.planner import Request
from qwenfit.planner.candidates import ENGINE_MODULES, engine_module
from qwenfit.planner.offers import _is_hopeless, _smallest_weights, offers, price_list
from qwenfit.planner.request import Options
from qwenfit.planner.search import FOUR_BIT_DIVERGENCE, search
from qwenfit.profiles.errors import QwenfitError
from qwenfit.profiles.speed_data import prices


def would_do(request: Request, count: int) -> list[tuple[int, int, str]]:
    """Every priced device, with nothing left out: dollars, how many, name."""
    found = []
    for price in price_list():
        for number in sorted({1, count if price.device.kind == "discrete" else 1}):
            asked = Request(
                model=request.model,
                devices=(price.device.name,) * number,
                ctx_tokens=request.ctx_tokens,
                seqs=request.seqs,
                weights=request.weights,
                engine=request.engine,
            )
            try:
                best = search(asked).best
            except QwenfitError:
                continue
            good = request.weights or best.divergence <= FOUR_BIT_DIVERGENCE
            if best.fits and not best.tight and good:
                found.append((price.usd * number, number, price.device.name))
    return found


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        (Request(model="9b", ctx_tokens=262144), 1),
        (Request(model="9b", ctx_tokens=262144, engine="vllm"), 1),
        (Request(model="27b", ctx_tokens=65536, weights="q4_k_m"), 2),
        (Request(model="27b", ctx_tokens=131072, seqs=2), 2),
        (Request(model="35b-a3b", ctx_tokens=1_000_000), 1),
        (Request(model="4b", ctx_tokens=196608, weights="q8_0"), 1),  # several fit only just: they would not do
    ],
    ids=lambda value: f"{value.model}-{value.ctx_tokens}" if isinstance(value, Request) else str(value),
)
def test_they_are_the_cheapest_that_do(request_: Request, count: int) -> None:
    """The short cuts (smallest weights first, contexts that failed before) leave nothing out and let nothing in."""
    every = would_do(request_, count)
    got = offers(request_, count, wanted=6)
    assert got.complete
    told = [(one.usd, one.count, one.price.device.name) for one in got.found]
    assert sorted(told) == told == sorted(told, key=lambda one: one[0])
    assert {one[0] for one in told} == {usd for usd, _, _ in sorted(every)[:6]}
    assert set(told) <= set(every) and len(told) == min(6, len(every))


@pytest.mark.parametrize(("asked", "count"), [("397b", 8), ("122b-a10b", 1)])
def test_what_is_not_looked_at_would_not_fit(asked: str, count: int) -> None:
    """Layers larger than all memory: the search says so too, for one token. (All models, devices, engines and 1, 2, 4,
    8 and 32 devices were once tried so: 1,806 of 12,474 are left out, and none of them fits.)"""
    left_out = 0
    for price in price_list()[::3]:
        for engine in (name for name in ENGINE_MODULES if engine_module(name).ENGINE.released):
            name = price.device.name
            weights = _smallest_weights(asked, engine, name)
            if weights is None or not _is_hopeless(asked, weights, engine, name, count, Options()):
                continue
            left_out += 1
            request = Request(model=asked, devices=(name,) * count, ctx_tokens=1, engine=engine, weights=weights)
            try:
                assert not search(request).fits, request
            except QwenfitError:
                continue
    assert left_out > 10


def test_a_slider_up_and_down_says_the_same() -> None:
    """What is remembered of one context decides nothing at another."""
    contexts = (8192, 1_000_000, 131072, 524288, 32768, 262144)
    up = {ctx: names(ctx) for ctx in sorted(contexts)}
    assert {ctx: names(ctx) for ctx in contexts} == up
    assert len(set(up.values())) > 1


def names(ctx_tokens: int) -> tuple[str, ...]:
    asked = Request(model="9b", ctx_tokens=ctx_tokens, seqs=3)
    return tuple(one.price.device.name for one in offers(asked, 1, wanted=5).found)


def test_without_patience_it_goes_on_where_it_stopped() -> None:
    asked = Request(model="4b", ctx_tokens=200_000, seqs=2)
    seen = [offers(asked, 1, wanted=4, patience_s=0.0)]
    while not seen[-1].complete:
        seen.append(offers(asked, 1, wanted=4, patience_s=0.02))
        assert len(seen) < 200
    assert len(seen) > 1
    whole = offers(asked, 1, wanted=4)
    assert [one.price for one in seen[-1].found] == [one.price for one in whole.found]


def test_every_price_has_its_source() -> None:
    rows = prices()["device_usd"]["prices"]
    assert len({row["device"] for row in rows}) == len(rows) == len(price_list())
    for row in rows:
        assert 100 <= row["usd"] <= 100_000 and row["what"] and row["source"].startswith("https://")


def test_nothing_would_do() -> None:
    got = offers(Request(model="397b", ctx_tokens=1_000_000, seqs=4096), 1, wanted=6)
    assert got.found == () and got.complete
