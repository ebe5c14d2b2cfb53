"""A device in a YAML file of the user's own, with the keys that the catalog uses. Also validates the catalog.

    name: my-3080-20gb                    # lower case, digits, hyphens
    like: rtx3080                         # optional: start from a device of the catalog and change what follows
    memory_gib: 20                        # or memory_bytes: 21474836480
    usable_mib: 19970                     # or usable_gib, usable_bytes: what CUDA calls the total

Without `like` a file also needs `vendor` (nvidia, amd, intel, apple, cpu), `kind` (discrete, unified, cpu),
`architecture` and `memory_bandwidth_bytes_per_s: 760300000000`. Optional are

    title, flops_per_s: {fp32: 29770000000000, fp16: 59540000000000}, sparse_flops_per_s, compute_capability: "8.6",
    shared_memory_per_sm_bytes, interconnect, interconnect_bytes_per_s, host_link_bytes_per_s, power_w, safe_fraction,
    measured: {memory_bandwidth_bytes_per_s: {value: 700000000000, by: bandwidthTest, on: "2026-11-22", source: mine}},
    source, usable_source, flops_source, checked, note

A box of several devices is a list of them, an entry each, with how many there are where that is more than one:

    devices:
      - {like: rtx3090, usable_mib: 24000, count: 2}
      - like: rtx4090

Everything is in base units (bytes, bytes per second, operations per second, watts) and written out: 760300000000, not
7.6e11 or "760 GB/s"; only memory_gib, usable_gib and usable_mib have a prefix. `memory_bandwidth_bytes_per_s: null`
says that it is not known; then no speed is. FLOPS are dense, fp16 and bf16 with fp32 accumulation. Without usable_*:
97 % of the memory of a discrete device, 75 % of a unified one, 90 % of a CPU's; with `like`, the share of that device.
"""

import datetime
import os
import stat
from collections.abc import Callable
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .device import Device
from .errors import BadInput, UnknownName
from .json_file import short
from .names import nearest
from .yaml_file import PlainLoader

LIMIT_BYTES = 64 << 10
LIMIT_DEVICES = 1024
LIMIT_BRACKETS = 100
_GIB = 1 << 30
_MIB = 1 << 20


def _printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("printable", "must be one line without control characters")
    return text


Text = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_printable)]
Dtype = Literal["fp32", "fp16", "bf16", "fp8", "int8", "fp4", "int4"]
Memory = Annotated[int, Field(ge=64 * _MIB, le=64 << 40)]
Rate = Annotated[int, Field(ge=10**9, le=10**15)]
Flops = Annotated[int, Field(ge=10**9, le=10**18)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Measurement(_Strict):
    """What somebody measured: the value in base units, with what, when, and where it was said."""

    value: Annotated[int, Field(gt=0, le=10**18)]
    by: Text
    on: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    source: Text


class Entry(_Strict):
    """The keys of a device file, complete: what `like`, families and rules give is already there."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=64)]
    title: Text
    vendor: Literal["nvidia", "amd", "intel", "apple", "cpu"]
    architecture: Text
    kind: Literal["discrete", "unified", "cpu"]
    memory_bytes: Memory
    usable_bytes: Memory
    memory_bandwidth_bytes_per_s: Rate | None
    flops_per_s: dict[Dtype, Flops] = {}
    source: Text
    checked: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    sparse_flops_per_s: dict[Dtype, Flops] = {}
    compute_capability: Annotated[str, Field(pattern=r"^(\d{1,2}\.\d|gfx[0-9a-f]{3,5})$")] | None = None
    shared_memory_per_sm_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 24)] | None = None
    interconnect: Text | None = None
    interconnect_bytes_per_s: Rate | None = None
    host_link_bytes_per_s: Rate | None = None
    power_w: Annotated[int, Field(ge=1, le=100_000)] | None = None
    measured: dict[Text, Measurement] = {}
    usable_source: Text | None = None
    flops_source: Text | None = None
    safe_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    note: Text | None = None

    @model_validator(mode="after")
    def _usable_within_memory(self) -> "Entry":
        if self.usable_bytes > self.memory_bytes:
            raise PydanticCustomError("usable", "usable memory is more than the memory: check GB against GiB")
        return self


# Sizes that may be written with a prefix, and what one unit is.
_PREFIXED = {
    "memory_gib": ("memory_bytes", _GIB),
    "usable_gib": ("usable_bytes", _GIB),
    "usable_mib": ("usable_bytes", _MIB),
}
_KEYS = (*Entry.model_fields, *_PREFIXED, "like")
_USABLE_FRACTION = {"discrete": 0.97, "unified": 0.75, "cpu": 0.9}


def read_device(path: str, find: Callable[[str], Device]) -> Device:
    """The device in a YAML file; `find` looks up the one that it is `like`.

    `BadInput`, naming the file and the field, for anything else.
    """
    found = read_devices(path, find)
    if len(found) > 1:
        raise BadInput(f"{_shown(path)} holds {len(found)} devices: give it to --gpu as it is, where a box may stand")
    return next(iter(found))


def read_devices(path: str, find: Callable[[str], Device]) -> tuple[Device, ...]:
    """The devices of a YAML file, one or those in its list `devices`; a `count` repeats one object.

    `BadInput`, naming the file and the field, for anything else.
    """
    where = _shown(path)
    raw = parse_yaml(_read_bytes(path, where), where)
    if "devices" not in raw:
        return (_one({"name": _name_of_file(path), **raw}, path, where, find),)
    entries = raw["devices"]
    if len(raw) > 1 or not isinstance(entries, list) or not entries:
        raise BadInput(f"{where}: devices must be a list of devices, at least one, and the only key of the file")
    found: list[Device] = []
    for place, entry in enumerate(entries, 1):
        at = f"{where}, device {place}"
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            raise BadInput(f"{at}: holds {short(entry)}, not `key: value` lines")
        count = entry.pop("count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= LIMIT_DEVICES - len(found):
            raise BadInput(f"{at}: count must be a whole number, and all together at most {LIMIT_DEVICES}")
        if "like" not in entry:  # which gives its name, too
            entry.setdefault("name", f"{_name_of_file(path)[:58]}-{place}")
        found += [_one(entry, path, at, find)] * count
    return tuple(found)


def _shown(path: str) -> str:
    return path[:300] if path.isprintable() else ascii(path[:300])


def _one(raw: dict[str, Any], path: str, where: str, find: Callable[[str], Device]) -> Device:
    _refuse_unknown_keys(raw, where)
    entry = _in_bytes(raw, where)
    entry.setdefault("checked", _date_of_file(path))
    if "name" in entry:
        entry.setdefault("title", entry["name"])
    if "usable_bytes" in entry:
        entry.setdefault("usable_source", where)
    like = entry.pop("like", None)
    entry = _completed(entry, where) if like is None else _changed(_base(like, where, find), entry, where)
    return build(entry, where, path)


def build(entry: dict[str, Any], where: str, path: str | None = None) -> Device:
    """A `Device` from the keys of a file. `BadInput` begins with `where`."""
    _refuse_unknown_keys(entry, where)
    try:
        checked = Entry.model_validate(_in_bytes(entry, where))
    except ValidationError as error:
        raise BadInput(f"{where}: {_sentence(error)}") from None
    values = checked.model_dump()
    values["memory_bandwidth_bytes_per_s"] = checked.memory_bandwidth_bytes_per_s or 0  # not known
    return Device(**values, path=path)


def parse_yaml(data: bytes, where: str) -> dict[str, Any]:
    """The mapping in the YAML text. No aliases, no duplicate keys, no tags; `BadInput` begins with `where`."""
    try:
        value = yaml.load(data.decode("utf-8-sig"), Loader=PlainLoader)
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not a text file (byte {error.start} is not UTF-8)") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise BadInput(
            f"{where}: not YAML that qwenfit reads{line}: {' '.join(str(error.problem).split())[:200]}"
        ) from None
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: not a text file: {' '.join(str(error).split())[:100]}") from None
    except RecursionError:
        raise BadInput(f"{where}: nested too deeply; a device is a list of `key: value` lines") from None
    except (ValueError, OverflowError):
        raise BadInput(f"{where}: holds a number or a date that cannot be read") from None
    if value is None:
        raise BadInput(f"{where}: the file is empty; a device needs at least a name, a vendor and its memory")
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadInput(
            f"{where}: holds {short(value)}, not `key: value` lines; see `qwen-plan devices` for a device to start from"
        )
    return value


def _read_bytes(path: str, where: str) -> bytes:
    try:
        status = os.stat(path)
        # Opening a FIFO would wait for a writer, and /dev/zero never ends: only regular files are opened.
        data = None
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                data = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(f"there is no file {where}; `qwen-plan devices` lists the devices that need none") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a valid path"
        raise BadInput(f"{where} cannot be read: {reason}") from None
    if data is None:
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise BadInput(f"{where} is {what}; --gpu takes the YAML file of a device")
    # PyYAML takes seconds for thousands of open brackets.
    if len(data) > LIMIT_BYTES or data.count(b"[") + data.count(b"{") > LIMIT_BRACKETS:
        raise BadInput(
            f"{where} is too large for the file of a device ({LIMIT_BYTES} bytes, {LIMIT_BRACKETS} brackets)"
        )
    return data


def _refuse_unknown_keys(raw: dict[str, Any], where: str) -> None:
    for key in raw:
        if key not in _KEYS:
            near = nearest(key, _KEYS, 1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else "the keys are those of the catalog, such as memory_gib and power_w"
            )
            raise BadInput(f"{where}: unknown key {short(key)}; {hint}")


def _in_bytes(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The entry with memory_gib, usable_gib and usable_mib turned into bytes."""
    entry = dict(entry)
    for key, (target, unit) in _PREFIXED.items():
        if key not in entry:
            continue
        amount = entry.pop(key)
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < 1 << 40:
            raise BadInput(f"{where}: {key} must be a number greater than 0 without a unit, not {short(amount)}")
        if target in entry:
            raise BadInput(f"{where}: {key} says again what another key says; keep one of them")
        entry[target] = int(amount * unit)
    return entry


def _completed(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of a file that stands alone, with the defaults of those that may be left out."""
    entry = {"source": where, **entry}
    memory_bytes, fraction = entry.get("memory_bytes"), _USABLE_FRACTION.get(str(entry.get("kind")))
    if "usable_bytes" not in entry and fraction and isinstance(memory_bytes, int):
        entry["usable_bytes"] = int(memory_bytes * fraction)
        entry["usable_source"] = f"rule: {fraction:.0%} of the memory, because the file does not say"
    return entry


def _base(like: object, where: str, find: Callable[[str], Device]) -> Device:
    if not isinstance(like, str) or like.lower().endswith((".yaml", ".yml")) or "/" in like or "\\" in like:
        raise BadInput(f"{where}: like must be the name of a device of the catalog, not {short(like)}")
    try:
        return find(like)
    except UnknownName as error:
        raise BadInput(f"{where}: like: {error}") from None


def _changed(base: Device, entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of `base`, with those of the file in their place."""
    inherited: dict[str, Any] = {key: getattr(base, key) for key in Entry.model_fields}
    inherited["source"] = f"{where}; what it does not say as {base.name}"
    memory_bytes = entry.get("memory_bytes")
    if isinstance(memory_bytes, int) and "usable_bytes" not in entry:
        inherited["usable_bytes"] = int(memory_bytes * (base.usable_bytes / base.memory_bytes))
        inherited["usable_source"] = f"rule: the share of {base.name}"
    return inherited | entry


def _date_of_file(path: str) -> str:
    return datetime.date.fromtimestamp(os.stat(path).st_mtime).isoformat()


def _name_of_file(path: str) -> str:
    stem = os.path.splitext(os.path.basename(path))[0].lower()
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in stem).strip("-")
    return kept[:64] or "device"


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in our words."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part != "[key]")
    kind, value = first["type"], first.get("input")
    context = first.get("ctx", {})
    if kind == "missing":
        if field in ("memory_bytes", "usable_bytes"):
            return f"{field} is missing; write memory_gib: 24 or memory_bytes: 25769803776"
        return f"{field} is missing"
    if kind == "extra_forbidden":
        return f"{field} is not a key here"
    if kind == "usable":
        return first["msg"]
    if kind == "printable":
        return f"{field} {first['msg']}"
    if kind in ("int_type", "int_from_float", "int_parsing"):
        unit = f" of {_unit(field)}" if _unit(field) else ""
        return f"{field} must be a whole number{unit}, written out and without a unit, not {short(value)}"
    if kind in ("greater_than", "greater_than_equal", "less_than_equal", "finite_number"):
        low, high = context.get("ge", context.get("gt")), context.get("le")
        bound = f"at least {low}" if low is not None and kind.startswith("greater") else f"at most {high}"
        return f"{field} is {short(value)}, and must be {bound} {_unit(field)}".rstrip()
    if kind == "literal_error":
        return f"{field} must be {context['expected'].replace(chr(39), '')}, not {short(value)}"
    if kind == "string_type":
        quoted = f'; write it in quotes: "{value}"' if isinstance(value, int | float) else ""
        return f"{field} must be text, not {short(value)}{quoted}"
    if kind == "string_pattern_mismatch":
        meant = {
            "name": "lower-case letters, digits, dots and hyphens",
            "compute_capability": 'like "8.6" or gfx1100',
        }.get(field, "a date like 2026-11-22")
        return f"{field} must be {meant}, not {short(value)}"
    if kind in ("dict_type", "model_type"):
        return f"{field} must be `key: value` pairs, not {short(value)}"
    if kind in ("string_too_short", "string_too_long"):
        return f"{field} is empty" if kind == "string_too_short" else f"{field} is too long"
    return f"{field} cannot be {short(value)}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _unit(field: str) -> str:
    if "bytes_per_s" in field:
        return "bytes per second (936 GB/s is 936000000000)"
    if "flops" in field:
        return "operations per second (35.6 TFLOPS is 35600000000000)"
    if field.endswith("_bytes"):
        return "bytes"
    return "watts" if field == "power_w" else ""
