"""What a deployment draws and costs under its load: watts from how busy it is, dollars beside an API's price.

`energy.py` answers for a plan that decodes without pause; here devices also wait. At work they draw what its line says
of a pass that reads or multiplies all the time (profiles/prices.json); waiting, a share that is assumed. Prices that
nobody gave are the published ones there, with their date.
"""

from ..profiles.device import Device
from ..profiles.frozen import dataclass
from ..profiles.speed_data import prices as published

IDLE_SHARE = 0.15  # of the board power with a model loaded and nothing to do: assumed
HOURS_PER_MONTH = 8766.0 / 12


@dataclass(frozen=True, slots=True)
class Tariff:
    """Prices in dollars. None: the published ones."""

    usd_per_kwh: float | None
    device_usd: tuple[tuple[str, float], ...]  # by the device's name
    years: float | None
    api_usd_per_million: float | None  # tokens given out

    @property
    def kwh(self) -> float:
        return published()["usd_per_kwh"]["value"] if self.usd_per_kwh is None else self.usd_per_kwh

    @property
    def term_years(self) -> float:
        return published()["years"]["value"] if self.years is None else self.years

    @property
    def api(self) -> tuple[float, float]:
        if self.api_usd_per_million is not None:
            return self.api_usd_per_million, self.api_usd_per_million
        known = published()["api_usd_per_million"]
        return known["low"], known["high"]


@dataclass(frozen=True, slots=True)
class Bill:
    """Of a whole deployment. None where the price of a device, or its power, is not known."""

    power_w: tuple[float, float, float] | None  # low, mid, high, on average
    joules_per_token: float | None  # per token given out
    energy_usd_per_month: float | None
    devices_usd: float | None
    usd_per_month: float | None  # energy, and the devices over their years
    usd_per_million_tokens: float | None  # given out
    api_usd_per_month: tuple[float, float]  # the same tokens from an API: low, high
    break_even_months: float | None  # until the devices have cost less than the API's middle; None: never, or not known


def power_w(device: Device, utilization: float) -> tuple[float, float, float] | None:
    """Watts on average: low, mid, high."""
    if device.power_w is None:
        return None
    line = published()["power"]
    idle = device.power_w * IDLE_SHARE * (1 - utilization)
    work = device.power_w * (line["floor"] + line["span"]) * utilization
    most = float(device.power_w)
    return min(most, idle + work * line["low"]), min(most, idle + work), min(most, idle + work * line["high"])


def bill(devices: list[tuple[Device, int, float]], tokens_per_s: float, tariff: Tariff) -> Bill:
    """`devices`: each kind, how many, and the share of the time that they work."""
    drawn = _drawn(devices)
    energy = drawn[1] / 1000 * HOURS_PER_MONTH * tariff.kwh if drawn else None
    prices = dict(tariff.device_usd)
    known = all(device.name in prices for device, _, _ in devices)
    bought = sum(prices[device.name] * count for device, count, _ in devices) if known else None
    monthly = energy + bought / (tariff.term_years * 12) if energy is not None and bought is not None else None
    millions = tokens_per_s * HOURS_PER_MONTH * 3600 / 1e6
    low, high = (price * millions for price in tariff.api)
    saved = (low + high) / 2 - energy if energy is not None else 0.0
    return Bill(
        power_w=drawn,
        joules_per_token=drawn[1] / tokens_per_s if drawn and tokens_per_s else None,
        energy_usd_per_month=energy,
        devices_usd=bought,
        usd_per_month=monthly,
        usd_per_million_tokens=monthly / millions if monthly is not None and millions else None,
        api_usd_per_month=(low, high),
        break_even_months=bought / saved if bought is not None and saved > 0 else None,
    )


def _drawn(devices: list[tuple[Device, int, float]]) -> tuple[float, float, float] | None:
    low = mid = high = 0.0
    for device, count, utilization in devices:
        watts = power_w(device, utilization)
        if watts is None:
            return None
        low, mid, high = low + watts[0] * count, mid + watts[1] * count, high + watts[2] * count
    return low, mid, high


def assumptions(tariff: Tariff) -> list[tuple[str, str, str]]:
    """(what, value, source or why)."""
    found = published()
    line, kwh, api = found["power"], found["usd_per_kwh"], found["api_usd_per_million"]
    busy = line["floor"] + line["span"]
    told = [
        ("power at work", f"{busy:.0%} of the board power (x {line['low']:g} to x {line['high']:g})", line["what"]),
        ("power at rest", f"{IDLE_SHARE:.0%} of the board power", "assumed, not measured"),
    ]
    if tariff.usd_per_kwh is None:
        told.append(
            ("price of energy", f"${kwh['value']:g} per kWh", f"{kwh['what']}: {kwh['source']} ({kwh['checked']})")
        )
    if tariff.api_usd_per_million is None:
        value = f"${api['low']:g} to ${api['high']:g} per million tokens"
        told.append(("price of an API", value, f"{api['what']}: {api['source']} ({api['checked']})"))
    return told
