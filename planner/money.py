"""What a deployment draws and costs: watts from load, dollars from the asker's own prices, beside an API's price.

A device draws a share of its board power when idle and at most nearly all of it under load. Both shares are assumed,
not measured: they are told with every figure.
"""

from ..profiles.device import Device
from ..profiles.frozen import dataclass

IDLE_SHARE, BUSY_SHARE = 0.15, 0.75  # of the board power: waiting with a model loaded, and decoding
BUSY_LOW, BUSY_HIGH = 0.5, 1.0
HOURS_PER_YEAR = 8766.0
HOURS_PER_MONTH = HOURS_PER_YEAR / 12


@dataclass(frozen=True, slots=True)
class Bill:
    """Of a whole deployment. None where a price or the devices' power is not known."""

    power_w: tuple[float, float, float] | None  # low, mid, high, on average
    joules_per_token: float | None  # per token given out
    energy_usd_per_month: float | None
    devices_usd: float | None
    usd_per_month: float | None  # energy, and the devices over their years
    usd_per_million_tokens: float | None  # given out
    api_usd_per_month: float | None  # the same tokens from an API
    break_even_months: float | None  # until the devices have cost less than the API; None: never, or not known


def power_w(device: Device, utilization: float) -> tuple[float, float, float] | None:
    """Watts on average: low, mid, high."""
    if device.power_w is None:
        return None
    idle = device.power_w * IDLE_SHARE * (1 - utilization)
    low, mid, high = (idle + device.power_w * share * utilization for share in (BUSY_LOW, BUSY_SHARE, BUSY_HIGH))
    return low, mid, high


def bill(
    devices: list[tuple[Device, int, float]],
    tokens_per_s: float,
    kwh_price_usd: float | None,
    prices_usd: dict[str, float],
    years: float,
    api_price_usd: float | None,
) -> Bill:
    """`devices`: each kind, how many, and the share of the time that they work. `api_price_usd` per million tokens."""
    watts = [power_w(device, utilization) for device, _, utilization in devices]
    drawn: tuple[float, float, float] | None = None
    if all(one is not None for one in watts):
        sums = [
            sum(one[part] * count for one, (_, count, _) in zip(watts, devices, strict=True) if one)
            for part in range(3)
        ]
        drawn = (sums[0], sums[1], sums[2])
    energy = drawn[1] / 1000 * HOURS_PER_MONTH * kwh_price_usd if drawn and kwh_price_usd is not None else None
    known = all(device.name in prices_usd for device, _, _ in devices)
    bought = sum(prices_usd[device.name] * count for device, count, _ in devices) if known else None
    monthly = energy + bought / (years * 12) if energy is not None and bought is not None else None
    millions = tokens_per_s * HOURS_PER_MONTH * 3600 / 1e6
    api = api_price_usd * millions if api_price_usd is not None else None
    saved = api - energy if api is not None and energy is not None else None
    return Bill(
        power_w=drawn,
        joules_per_token=drawn[1] / tokens_per_s if drawn and tokens_per_s else None,
        energy_usd_per_month=energy,
        devices_usd=bought,
        usd_per_month=monthly,
        usd_per_million_tokens=monthly / millions if monthly is not None and millions else None,
        api_usd_per_month=api,
        break_even_months=bought / saved if bought is not None and saved is not None and saved > 0 else None,
    )
