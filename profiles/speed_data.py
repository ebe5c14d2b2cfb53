"""Published speeds, the factors fitted on them, and published prices: JSON files, each read when first asked for."""

import os
from functools import lru_cache
from json import loads
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))
RUNS = os.path.join(FOLDER, "speed_runs.json")
PRICES = os.path.join(FOLDER, "prices.json")
FACTORS = os.path.join(FOLDER, "speed_factors.json")


@lru_cache
def runs() -> tuple[dict[str, Any], ...]:
    """What was measured, one row each; speed_runs.json says in its note what the keys mean."""
    return tuple(_read(RUNS)["runs"])


@lru_cache
def left_out() -> tuple[dict[str, Any], ...]:
    """Published rows that nothing is fitted or scored on, each with the reason."""
    return tuple(_read(RUNS)["left_out"])


@lru_cache
def fitted() -> dict[str, Any]:
    """What `python tests/bench/fit_speed.py` wrote: `logs` by kind and key, `widths`, the digest of the runs."""
    return _read(FACTORS)


@lru_cache
def prices() -> dict[str, Any]:
    """Published prices and draws of power, each with its source: what is taken where the asker gives none."""
    return _read(PRICES)


def _read(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return loads(file.read())
