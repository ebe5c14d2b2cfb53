"""Watts, joules and money: arithmetic from given prices, and what is taken where none are given."""

import json

import pytest

from qwenfit.planner import Request, plan
from qwenfit.planner.request import Prices


def energy(gpu="rtx3060", **prices):
    return plan(Request(devices=(gpu,), ctx_tokens=8192, prices=Prices(**prices))).best


def test_money_is_energy_and_depreciation():
    """100 W at 0.30 USD/kWh, 1,000 USD over 2 years of 31,557,600 s: per token over the plan's own rate."""
    best = energy(usd_per_kwh=0.30, device_usd=1000, years=2, device_watts=100, api_usd_per_million=2)
    rate, found = best.speed.start.decode_tokens_per_s.mid, best.energy
    assert found.joules_per_token.mid == pytest.approx(100 / rate)
    assert found.energy_usd_per_million_tokens == pytest.approx(1e6 * 100 / rate / 3.6e6 * 0.30)
    assert found.device_usd_per_million_tokens == pytest.approx(1e6 * 1000 / (2 * 31_557_600) / rate)
    both = found.energy_usd_per_million_tokens + found.device_usd_per_million_tokens
    assert found.usd_per_million_tokens.mid == pytest.approx(both)
    assert found.assumptions == ()


def test_break_even_is_where_the_api_would_have_cost_as_much():
    found = energy(usd_per_kwh=0.30, device_usd=1000, device_watts=100, api_usd_per_million=2).energy
    spent = 1000 + found.break_even_tokens / 1e6 * found.energy_usd_per_million_tokens
    assert spent == pytest.approx(found.break_even_tokens / 1e6 * 2)


def test_dear_energy_never_breaks_even():
    assert energy(usd_per_kwh=50, device_usd=1000, api_usd_per_million=0.1).energy.break_even_tokens is None


def test_a_job_takes_hours_kwh_and_money():
    """78 million output tokens, an evaluation run."""
    best = energy(usd_per_kwh=0.30, device_watts=100, job_tokens=78_000_000)
    rate, job = best.speed.start.decode_tokens_per_s.mid, best.energy.job
    assert job.hours.mid == pytest.approx(78e6 / rate / 3600)
    assert job.kwh.mid == pytest.approx(job.hours.mid * 0.1)
    assert job.usd.mid == pytest.approx(job.kwh.mid * 0.30)
    assert job.hours.low < job.hours.mid < job.hours.high


def test_what_nobody_gave_is_said():
    found = energy().energy
    told = " ".join(found.assumptions)
    assert "0.18 USD/kWh" in told and "2026-11-22" in told and "--device-usd" in told
    low, high = found.api_usd_per_million_tokens
    assert 0 < low < high


def test_watts_lie_within_the_board_power():
    for gpu, board_w in (("rtx3060", 170), ("l4", 72), ("2xrtx3090", 700)):
        watts = energy(gpu).energy.watts
        assert 0 < watts.low < watts.mid <= watts.high <= board_w


def test_apple_says_nothing_about_power():
    assert energy("m4-pro-24gb").energy is None
    assert energy("m4-pro-24gb", device_watts=40).energy.watts.mid == 40


def test_its_json_has_the_contracts_keys():
    document = energy(job_tokens=1000).energy.to_json()
    assert {"joules_per_token", "usd_per_million_tokens"} <= set(document)
    assert isinstance(document["joules_per_token"], float)
    json.dumps(document, allow_nan=False)
