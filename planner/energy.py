"""What a plan draws, and what its tokens cost beside an API: watts, joules, money, break-even, a job of so many tokens.

Counted are the devices: their energy while they decode at the rate of `speed.py`, and their price over the years where
it is given. The host, cooling and the room are not. A device draws a share of its board power that grows with the share
of a pass in which it reads or multiplies (profiles/prices.json: the line and the four published draws behind it).
"""

from typing import TYPE_CHECKING

from ..profiles.frozen import dataclass
from ..profiles.speed_data import prices as published
from .request import Prices
from .speed import Interval, Speed, rounded, step_time

if TYPE_CHECKING:
    from .plan import EnginePlan

SECONDS_PER_YEAR = 365.25 * 86400
JOULES_PER_KWH = 3.6e6
WAITING = ("overhead", "link", "host memory")  # constituents of a pass in which a device does little


@dataclass(frozen=True, slots=True)
class Job:
    """So many output tokens on these devices."""

    tokens: int
    hours: Interval
    kwh: Interval
    usd: Interval

    def to_json(self) -> dict[str, object]:
        parts = {name: getattr(self, name).to_json() for name in ("hours", "kwh", "usd")}
        return {"tokens": self.tokens, **parts}


@dataclass(frozen=True, slots=True)
class Energy:
    """Of all devices together, while they decode behind a short prompt."""

    watts: Interval
    joules_per_token: Interval
    usd_per_million_tokens: Interval  # energy, and the devices where their price is known
    energy_usd_per_million_tokens: float
    device_usd_per_million_tokens: float | None
    usd_per_kwh: float
    years: float
    api_usd_per_million_tokens: tuple[float, float]
    break_even_tokens: float | None  # from which the devices are paid for; None: never, or their price is unknown
    break_even_days: float | None  # of decoding without pause
    assumptions: tuple[str, ...]
    job: Job | None

    def to_json(self) -> dict[str, object]:
        low, high = self.api_usd_per_million_tokens
        return {
            "joules_per_token": rounded(self.joules_per_token.mid),
            "usd_per_million_tokens": rounded(self.usd_per_million_tokens.mid),
            "interval": {
                "watts": self.watts.to_json(),
                "joules_per_token": self.joules_per_token.to_json(),
                "usd_per_million_tokens": self.usd_per_million_tokens.to_json(),
            },
            "energy_usd_per_million_tokens": rounded(self.energy_usd_per_million_tokens),
            "device_usd_per_million_tokens": _maybe(self.device_usd_per_million_tokens),
            "usd_per_kwh": self.usd_per_kwh,
            "years": self.years,
            "api_usd_per_million_tokens": {"low": low, "high": high},
            "break_even_tokens": _maybe(self.break_even_tokens),
            "break_even_days": _maybe(self.break_even_days),
            "assumptions": list(self.assumptions),
            "job": self.job.to_json() if self.job else None,
        }


def energy(plan: "EnginePlan", speed: Speed, prices: Prices) -> Energy | None:
    """None where nobody says what the devices draw: Apple's chips, and machines of the asker's own without power_w."""
    watts = _watts(plan, prices)
    if watts is None:
        return None
    found = published()
    usd_per_kwh = found["usd_per_kwh"]["value"] if prices.usd_per_kwh is None else prices.usd_per_kwh
    years = found["years"]["value"] if prices.years is None else prices.years
    rate = speed.start.decode_tokens_per_s
    joules = Interval(watts.low / rate.high, watts.mid / rate.mid, watts.high / rate.low)
    device_usd_per_s = (prices.device_usd or 0.0) / (years * SECONDS_PER_YEAR)
    power_usd = 1e6 * joules.mid / JOULES_PER_KWH * usd_per_kwh
    usd = Interval(
        *(
            1e6 * (one / JOULES_PER_KWH * usd_per_kwh + device_usd_per_s / tokens_per_s)
            for one, tokens_per_s in ((joules.low, rate.high), (joules.mid, rate.mid), (joules.high, rate.low))
        )
    )
    api = _api(prices)
    break_even = _break_even_tokens(prices.device_usd, sum(api) / 2, power_usd)
    return Energy(
        watts=watts,
        joules_per_token=joules,
        usd_per_million_tokens=usd,
        energy_usd_per_million_tokens=power_usd,
        device_usd_per_million_tokens=None if prices.device_usd is None else 1e6 * device_usd_per_s / rate.mid,
        usd_per_kwh=usd_per_kwh,
        years=years,
        api_usd_per_million_tokens=api,
        break_even_tokens=break_even,
        break_even_days=break_even / rate.mid / 86400 if break_even else None,
        assumptions=_assumptions(prices),
        job=_job(prices.job_tokens, rate, joules, usd),
    )


def _maybe(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _watts(plan: "EnginePlan", prices: Prices) -> Interval | None:
    if prices.device_watts is not None:
        return Interval(prices.device_watts, prices.device_watts, prices.device_watts)
    boards = [device.power_w for device in plan.setup.devices]
    if not all(boards):
        return None
    board_w = float(sum(watts or 0 for watts in boards))
    line = published()["power"]
    parts = step_time(plan).constituents(0, 0, plan.seqs, plan.seqs * min(plan.ctx_tokens, 2048))
    busy = 1 - sum(parts[name] for name in WAITING) / sum(parts.values())
    mid = board_w * (line["floor"] + line["span"] * busy) / _turns(plan)
    return Interval(mid * line["low"], mid, min(board_w, mid * line["high"]))


def _turns(plan: "EnginePlan") -> float:
    """Devices for each that works: stages take turns, except where several sequences keep several of them busy."""
    pipelined = step_time(plan).stages
    return plan.pp / min(pipelined, max(1, plan.seqs // plan.dp))


def _api(prices: Prices) -> tuple[float, float]:
    given = prices.api_usd_per_million
    if given is not None:
        return given, given
    known = published()["api_usd_per_million"]
    return known["low"], known["high"]


def _break_even_tokens(device_usd: float | None, api_usd: float, power_usd: float) -> float | None:
    """Output tokens whose price at the API is that of the devices and of the energy that they take for them."""
    if not device_usd or api_usd <= power_usd:
        return None
    return 1e6 * device_usd / (api_usd - power_usd)


def _job(tokens: int | None, rate: Interval, joules: Interval, usd: Interval) -> Job | None:
    if tokens is None:
        return None
    return Job(
        tokens,
        hours=Interval(*(tokens / one / 3600 for one in (rate.high, rate.mid, rate.low))),
        kwh=Interval(*(tokens * one / JOULES_PER_KWH for one in (joules.low, joules.mid, joules.high))),
        usd=Interval(*(tokens / 1e6 * one for one in (usd.low, usd.mid, usd.high))),
    )


def _assumptions(prices: Prices) -> tuple[str, ...]:
    """What was taken because nobody gave it, with its date."""
    found, told = published(), []
    if prices.usd_per_kwh is None:
        told.append(f"{found['usd_per_kwh']['value']} USD/kWh ({found['usd_per_kwh']['what']})")
    if prices.api_usd_per_million is None:
        known = found["api_usd_per_million"]
        told.append(f"API at {known['low']} to {known['high']} USD per million ({known['checked']}: {known['what']})")
    if prices.device_usd is not None and prices.years is None:
        told.append(f"devices paid off over {found['years']['value']} years of decoding without pause")
    if prices.device_usd is None:
        told.append("energy alone: give --device-usd to count the devices")
    return tuple(told)
