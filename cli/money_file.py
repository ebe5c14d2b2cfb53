"""The `money` of a workload's or a matrix's file: what a kWh and the devices cost, and over how many years."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..profiles.box import devices_of
from ..profiles.errors import QwenfitError
from ..profiles.yaml_file import Document

Dollars = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class MoneyKeys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kwh_price_usd: Dollars | None = None
    device_price_usd: dict[str, Dollars] = {}
    years: Annotated[float, Field(gt=0, le=50, allow_inf_nan=False)] | None = None


def device_prices(document: Document, keys: MoneyKeys) -> dict[str, float]:
    """Dollars of one device, by the catalog's names. BadInput, with the line, for a name of no device or of several."""
    found = {}
    for name, price in keys.device_price_usd.items():
        at = ("money", "device_price_usd", name)
        try:
            device, *others = devices_of(name)
        except QwenfitError as error:
            raise document.error(at, str(error)) from None
        if others:
            raise document.error(at, f"{name}: give the price of one device")
        found[device.name] = price
    return found
