"""Devices by name: `device("rtx3060")` looks one up in the catalog (catalog.py) or reads a user's own YAML file
(device_file.py); `devices()` is the whole catalog.
"""

import os
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from .device import Device
from .errors import BadInput, UnknownName
from .names import did_you_mean, fold, join_or, quote

if TYPE_CHECKING:
    from .catalog import Catalog

MAX_NAMED = 6


def device(name_or_path: str) -> Device:
    """The device of that name, or of that YAML file (it ends in .yaml or .yml, or contains a path separator).

    The same name gives the same object; so does the same path until the file changes. `UnknownName` names up to three
    similar devices, `BadInput` says what is wrong with a file.
    """
    if is_name(name_or_path):
        return _named(name_or_path)
    if is_path(name_or_path):
        found = devices_in(name_or_path)
        if len(found) > 1:
            raise BadInput(f"{quote(name_or_path)} holds {len(found)} devices, and one is wanted here")
        return next(iter(found))
    name = _find(name_or_path)
    if name is not None:
        return _named(name)
    known = _catalog().rows
    members = _members(name_or_path)
    if members:
        which = join_or(members) if len(members) <= MAX_NAMED else ", ".join(members[:MAX_NAMED]) + ", ..."
        raise UnknownName(
            f"there are several {quote(name_or_path)}: say which, {which} (`qwen-plan devices` lists all)"
        )
    stem, size = _without_size(name_or_path)
    near = _spelled(stem) if size else None
    if near is not None:
        raise UnknownName(
            f"{near} has {_sizes(near)[0]} GB, not {size}; write {near}, or a file of your own with `like: {near}`"
        )
    hint = did_you_mean(name_or_path, known)
    word = name_or_path.strip().lower()
    kind = not hint and word.isalnum() and any(has_word(one, word) for one in devices())
    where = f"`qwen-plan devices {word}` lists those" if kind else "`qwen-plan devices` lists all"
    raise UnknownName(f"no device is called {quote(name_or_path)}; {hint}{where}")


def devices_in(name_or_path: str) -> tuple[Device, ...]:
    """The devices of that YAML file, which may be several; the one of that name. Errors as of `device`."""
    return _read(name_or_path) if not is_name(name_or_path) and is_path(name_or_path) else (device(name_or_path),)


@lru_cache(maxsize=1)
def devices() -> tuple[Device, ...]:
    """Every device of the catalog, in its order."""
    return tuple(map(_named, _catalog().rows))


def has_word(one: Device, word: str) -> bool:
    """Whether a lower-case word stands in the device's name, title, vendor or architecture: `cpu`, `radeon`."""
    return word in " ".join((one.name, one.title, one.vendor, one.architecture)).lower()


def is_name(text: str) -> bool:
    """Whether the catalog has a device of exactly that name."""
    return text in _catalog().rows


def is_path(text: str) -> bool:
    return text.lower().endswith((".yaml", ".yml")) or "/" in text or "\\" in text


@lru_cache(maxsize=1)
def _catalog() -> "Catalog":
    from . import catalog  # not above: `python -m qwenfit.profiles.catalog` would find itself imported already

    return catalog.load(tuple(Device.__dataclass_fields__))


@lru_cache(maxsize=1)
def _folded() -> dict[str, str]:
    """Folded spelling -> name. A name wins over an alias."""
    rows, aliases = _catalog()
    return {fold(alias): name for alias, name in aliases.items()} | {fold(name): name for name in rows}


def _find(typed: str) -> str | None:
    if typed in _catalog().rows:
        return typed
    name = _spelled(typed)
    if name is None:
        # "RTX 5080 16GB": a right size is no mistake, even where the name does not have one.
        stem, size_gib = _without_size(typed)
        name = _spelled(stem) if size_gib else None
        if name is not None and size_gib not in _sizes(name):
            name = None
    return name


def _sizes(name: str) -> tuple[int, int]:
    """The device's memory as people say it, in GiB and in GB."""
    memory_bytes = _named(name).memory_bytes
    return round(memory_bytes / (1 << 30)), round(memory_bytes / 10**9)


def _spelled(typed: str) -> str | None:
    folded = fold(typed)
    # "4090" and "5070ti" are said without their line; so are "7900xtx" and "1080ti".
    spellings = [folded] + [line + folded for line in ("rtx", "gtx", "rx") if folded[:1].isdigit()]
    return next((_folded()[spelling] for spelling in spellings if spelling in _folded()), None)


def _without_size(typed: str) -> tuple[str, int]:
    """("h100-80gb") -> ("h100", 80); a name without a size -> (name, 0)."""
    words = typed.lower().replace("-", " ").replace("_", " ").replace(" gb", "gb").split()
    stem, _, size = "-".join(words).rpartition("-")
    digits = size.removesuffix("b").removesuffix("g")
    is_size = len(digits) < len(size) and digits.isascii() and digits.isdigit() and len(digits) < 6
    return (stem, int(digits)) if is_size else (typed, 0)


def _members(typed: str) -> list[str]:
    """The devices of which `typed` is the common name: a100 -> a100-40gb, a100-80gb; h100-80gb -> h100-pcie, ..."""
    found = _beginning_with(fold(typed))
    if not found:
        stem, size_gib = _without_size(typed)
        # Where the stem is a device, the size is simply wrong.
        found = _beginning_with(fold(stem)) if size_gib and _spelled(stem) is None else []
    return found


def _beginning_with(folded: str) -> list[str]:
    lines = ("rtx", "gtx", "rx") if folded[:1].isdigit() else ("", "arc")
    stems = {line + folded for line in lines} if folded else set()
    found = [
        (name, name[place + 1 :])
        for name in _catalog().rows
        for place, letter in enumerate(name)
        if letter == "-" and fold(name[:place]) in stems
    ]
    sizes = [name for name, rest in found if rest.endswith("gb") and rest[:-2].isdigit()]
    return sizes or [name for name, _ in found]


@cache
def _named(name: str) -> Device:
    import json

    return Device(*json.loads(_catalog().rows[name]))


def _read(path: str) -> tuple[Device, ...]:
    path = os.path.expanduser(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        status = None  # read_devices says what is wrong
    version = (status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev) if status else ()
    return _read_version(path, version)


@lru_cache(maxsize=64)
def _read_version(path: str, _version: tuple[int, ...]) -> tuple[Device, ...]:
    from .device_file import read_devices

    return read_devices(path, device)
