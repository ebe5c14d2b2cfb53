"""What the page's form offers: names of the catalogs with the words that a person knows them by."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlencode

from ..profiles.device import Device
from ..profiles.device_names import devices
from ..profiles.errors import QwenfitError
from ..profiles.model_catalog import is_name, model, models
from . import completion
from .page_question import MAX_ROWS, DeviceKeys, device_name

NEXT_DEVICE = "rtx3060"
LINES = ("GeForce ", "Radeon ")  # left out of the names in a group that says them: people type what follows
GROUPS = {
    ("nvidia", "discrete"): "NVIDIA workstation and data center",
    ("nvidia", "unified"): "NVIDIA with shared memory",
    ("amd", "discrete"): "AMD Radeon and Instinct",
    ("amd", "unified"): "AMD with shared memory",
    ("intel", "discrete"): "Intel Arc and Max",
    ("apple", "unified"): "Apple silicon",
    ("cpu", "cpu"): "CPU and its memory",
}


class Choice(NamedTuple):
    value: str
    title: str


class Choices(NamedTuple):
    """Lists of the form; of devices by group."""

    models: list[Choice]
    devices: list[tuple[str, list[Choice]]]
    engines: list[Choice]
    weights: list[Choice]
    kv_dtypes: list[Choice]
    interconnects: list[Choice]


@lru_cache
def choices(allow_auto: bool) -> Choices:
    groups: dict[str, list[Choice]] = {}
    if allow_auto:
        groups["The server"] = [Choice("auto", "this machine")]
    for device in devices():
        groups.setdefault(_group(device), []).append(Choice(device.name, _title(device)))
    return Choices(
        models=[Choice(one.name, f"{one.repo.partition('/')[2]} ({one.parameters / 1e9:.1f} B)") for one in models()],
        devices=list(groups.items()),
        engines=[Choice(name, name) for name, _ in completion.engines()],
        weights=[Choice(name, f"{name}: {title}") for name, title in completion.weights()],
        kv_dtypes=[Choice(name, name) for name, _ in completion.kv_dtypes() if name != "auto"],
        interconnects=[Choice(name, f"{name}: {title}") for name, title in completion.interconnects()],
    )


class Row(NamedTuple):
    """A row of devices in the form. Not `listed`: a name that the list does not have, shown as it was given."""

    name: str
    number: int
    listed: bool


def listed_row(row: DeviceKeys, allow_auto: bool) -> Row:
    try:
        return Row(device_name(row.name, allow_auto), row.count, True)
    except QwenfitError:
        return Row(row.name, row.count, False)


def listed_model(name: str) -> str:
    """The name in the list for any spelling of a catalog's model; others stay as they are."""
    if not is_name(name):
        return name
    found = model(name)
    return name if found.stored else found.name


def _group(device: Device) -> str:
    if device.title.startswith("GeForce"):
        return "NVIDIA GeForce laptop" if "Laptop" in device.title else "NVIDIA GeForce"
    return GROUPS[device.vendor, device.kind]


def _title(device: Device) -> str:
    title = device.title
    for line in LINES:
        title = title.removeprefix(line)
    return title


def changed_rows(pairs: Sequence[tuple[str, str]]) -> str | None:
    """Where a button for another device, or for one less, leads: the same question with other rows, as an address.
    None where no such button was pressed."""
    pressed = {name: text for name, text in pairs if name in ("add", "drop")}
    if not pressed:
        return None
    names = [text for name, text in pairs if name == "gpu"]
    counts = [text for name, text in pairs if name == "n"]
    rows = list(zip(names, counts, strict=False))
    drop = pressed.get("drop", "")
    if "add" in pressed and len(rows) < MAX_ROWS:
        rows.append((NEXT_DEVICE, "1"))
    elif drop.isascii() and drop.isdigit() and len(rows) > 1:
        rows = [row for place, row in enumerate(rows) if place != int(drop[:4])]
    others = [(name, text) for name, text in pairs if name not in ("gpu", "n", "add", "drop") and text]
    devices = [pair for name, count in rows for pair in (("gpu", name), ("n", count))]
    return f"/?{urlencode(devices + others)}#gpu-{len(rows) - 1}"
