"""What the page shows of an answer: bars that add up, and the command's own words."""

from typing import Any

import pytest

from qwenfit.cli import phrases
from qwenfit.cli.page_answer import BAR_UNITS, OFFER_TITLES, offer_rows, offer_sources, view
from qwenfit.planner import Request, plan
from qwenfit.planner.offers import offers


def test_the_bar_of_what_fits_ends_before_the_room(fitting: Any) -> None:
    share = fitting.best.devices[0]
    shown = view(fitting).shares[0]
    assert shown.edge is None
    ends = [round(one.start + one.width, 1) for one in shown.segments]
    assert ends == sorted(ends) and [round(one.start, 1) for one in shown.segments[1:]] == ends[:-1]
    assert ends[-1] == pytest.approx(BAR_UNITS * share.memory.total.mid / share.usable_bytes, abs=0.2)


def test_the_bar_of_what_does_not_fit_is_the_need_and_has_the_edge_of_the_room(failing: Any) -> None:
    share = failing.best.devices[0]
    shown = view(failing).shares[0]
    assert shown.segments[-1].start + shown.segments[-1].width == pytest.approx(BAR_UNITS, abs=0.1)
    assert shown.edge == pytest.approx(BAR_UNITS * share.usable_bytes / share.memory.total.mid, abs=0.1)


def test_the_words_are_the_commands(failing: Any) -> None:
    shown, best = view(failing), failing.best
    assert (shown.verdict, shown.state) == ("Does not fit", "no")
    assert shown.question == phrases.question(failing) and shown.setup == phrases.setup(best)
    assert shown.reasons == best.reasons and shown.commands == (best.command,) and shown.limits == phrases.limits(best)
    assert dict(shown.lists)["What to change"][0].startswith("KV cache in q4_0 (fits): saves 4.00 GiB")
    assert dict(shown.lists)["Speed"] == list(phrases.speed(best))
    assert [one.title for one in shown.figures] == ["Decodes", "First token", "Longest context", "Most sequences"]


def test_the_line_on_top_tells_the_fullest_of_unlike_devices() -> None:
    shown = view(plan(Request(model="9b", devices=("rtx3090", "rtx3060"), ctx_tokens=32768, weights="q8_0")))
    assert shown.says.startswith("Fits: ~") and " on GeForce RTX 30" in shown.says and "tokens/s" in shown.says
    assert len(shown.shares) == 2


def test_devices_of_which_the_same_is_told_are_told_once() -> None:
    """Two stages of eight A100 differ by some bytes that nobody sees: one bar for sixteen devices."""
    found = plan(Request("397b", ("8xa100-80gb",), 262144, engine="vllm", weights="bf16", nodes=2))
    assert len({share.memory for share in found.best.devices}) == 2
    (shown,) = view(found).shares
    assert shown.title.startswith("16 x A100 SXM4 80 GB (a100-80gb), each: ")


def test_without_a_known_speed(made: Any) -> None:
    found = plan(Request(model="0.8b", devices=("rtx3060",), ctx_tokens=2048)).best
    vars(found)["speed"] = None
    from qwenfit.cli.page_answer import _figures

    assert [one.value for one in _figures(found)][:2] == ["not known", "not known"]


def test_offers_are_rows_with_their_sources() -> None:
    found = offers(Request(model="9b", ctx_tokens=262144), 2, wanted=6)
    rows = offer_rows(found)
    assert len(rows) == 6 and all(len(row) == len(OFFER_TITLES) for row in rows)
    dollars = [int(row[1].removeprefix("$").replace(",", "")) for row in rows]
    assert dollars == sorted(dollars) == [one.usd for one in found.found]
    assert all("https://" in source and "$" in source for source in offer_sources(found))
