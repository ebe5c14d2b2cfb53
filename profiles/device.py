"""A device as the planner sees it: how much memory an allocator gets, and how fast it moves and multiplies.

`device("rtx3060")` looks one up in the catalog (see catalog.py), or reads a user's own YAML file (see device_file.py);
`devices()` is the whole catalog, and `devices_of("2xrtx3090,rtx4090")` the devices of one box.
"""

import os
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from .errors import BadInput, UnknownName
from .frozen import dataclass, field
from .names import did_you_mean, fold, join_or, quote

if TYPE_CHECKING:
    from .catalog import Catalog

MAX_DEVICES = 1024
MAX_SPEC_CHARACTERS = 16384
MAX_NAMED = 6


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """One accelerator or CPU box. Compared by identity: look-ups return one object per name.

    Vendor figures only; what somebody measured lies in `measured`. FLOPS are dense; sparse ones are apart.
    """

    name: str  # lower case, no spaces: rtx3060, a100-80gb, m1-16gb
    title: str  # as the vendor writes it
    vendor: str  # nvidia, amd, intel, apple, cpu
    architecture: str  # turing, ampere, ada, hopper, blackwell, rdna3, cdna3, alchemist, m1, zen4, ...
    kind: str  # "discrete" (own memory), "unified" (memory shared with the host), "cpu"
    memory_bytes: int  # what is sold
    usable_bytes: int  # what an allocator can reach: CUDA's total, Metal's working set, RAM less the system
    memory_bandwidth_bytes_per_s: int
    flops_per_s: Mapping[str, int]  # dense: fp32, fp16, bf16, fp8, int8, fp4, int4
    source: str
    checked: str  # ISO date on which the source was read
    sparse_flops_per_s: Mapping[str, int] = field(default_factory=dict)
    compute_capability: str | None = None  # "8.6" or "gfx1100"
    shared_memory_per_sm_bytes: int | None = None
    interconnect: str | None = None  # nvlink4, infinity-fabric-4, pcie4-x16
    interconnect_bytes_per_s: int | None = None  # per device, both directions
    host_link_bytes_per_s: int | None = None  # to host memory, one direction
    power_w: int | None = None
    measured: Mapping[str, object] = field(default_factory=dict)  # {what: {value, by, on, source}}
    usable_source: str | None = None  # where usable_bytes comes from; "rule: ..." where it is not an observation
    flops_source: str | None = None  # of flops_per_s, where `source` does not give them all
    safe_fraction: float | None = (
        None  # of usable_bytes that was filled without trouble, where more is known to make some
    )
    note: str | None = None  # what a reader of a plan should know about this device
    path: str | None = None  # the user's file that it was read from


def device(name_or_path: str) -> Device:
    """The device of that name, or of that YAML file (it ends in .yaml or .yml, or contains a path separator).

    The same name gives the same object; so does the same path until the file changes. `UnknownName` names up to three
    similar devices, `BadInput` says what is wrong with a file.
    """
    if _is_path(name_or_path):
        return _read(name_or_path)
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
    raise UnknownName(f"no device is called {quote(name_or_path)}; {hint}`qwen-plan devices` lists all")


@lru_cache(maxsize=1)
def devices() -> tuple[Device, ...]:
    """Every device of the catalog, in its order."""
    return tuple(map(_named, _catalog().rows))


def devices_of(spec: str) -> tuple[Device, ...]:
    """The devices of one box, as `--gpu` takes them: `rtx3090`, `2xrtx3090`, `rtx4090,rtx3060`, `2xrtx3090,my.yaml`.

    `auto` stands for this machine.

    `BadInput` for an empty part or a count outside 1 to 1024, and whatever `device` says of a name or a file.
    """
    if spec in _catalog().rows:  # the common case, at once
        return (_named(spec),)
    if spec.strip().lower() == "auto":
        from .this_machine import this_machine  # it describes devices, so it stands above this file

        return this_machine()
    if len(spec) > MAX_SPEC_CHARACTERS:
        raise BadInput(
            f"a list of devices of {len(spec)} characters is too long; at most {MAX_DEVICES} devices fit a box"
        )
    found: list[Device] = []
    for part in [spec] if _is_path(spec) and _exists(spec) else spec.split(","):
        count, name = _count_and_name(part.strip(), spec)
        if len(found) + count > MAX_DEVICES:
            raise BadInput(f"{quote(spec)} asks for more than {MAX_DEVICES} devices")
        found += [device(name)] * count
    return tuple(found)


def _count_and_name(part: str, spec: str) -> tuple[int, str]:
    """("2xrtx3090") -> (2, "rtx3090"). A name may begin or end with an x: only a number before the first x counts."""
    if not part:
        where = "is empty" if not spec.strip() else f"has an empty part: {quote(spec)}"
        raise BadInput(f"the list of devices {where}; write a name such as rtx3090, or 2xrtx3090,rtx4090")
    if _is_path(part) and _exists(part):
        return 1, part
    before, x, name = part.replace("×", "x").replace("X", "x", 1).partition("x")
    number = before.strip().removeprefix("-").removeprefix("+")
    if not x or not number.isascii() or not number.isdigit():
        return 1, part
    name = part[len(before) + 1 :].strip()
    if not name:
        raise BadInput(f"{quote(part)}: a device's name must follow the x, as in 2xrtx3090")
    if "-" in before or len(number) > 9 or not 1 <= int(number) <= MAX_DEVICES:
        raise BadInput(f"{quote(part)}: the number of devices must lie between 1 and {MAX_DEVICES}")
    return int(number), name


def _is_path(text: str) -> bool:
    return text.lower().endswith((".yaml", ".yml")) or "/" in text or "\\" in text


def _exists(path: str) -> bool:
    return "\0" not in path and os.path.exists(os.path.expanduser(path))


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


def _read(path: str) -> Device:
    path = os.path.expanduser(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        status = None  # read_device says what is wrong
    version = (status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev) if status else ()
    return _read_version(path, version)


@lru_cache(maxsize=64)
def _read_version(path: str, _version: tuple[int, ...]) -> Device:
    from .device_file import read_device

    return read_device(path)
