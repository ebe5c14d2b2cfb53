"""What plans and receipts tell of devices and options, so that either can be made anew, and a document's own digest."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import cast

from ..profiles.device import Device
from ..profiles.frozen import fields
from .request import Options


def digest(document: Mapping[str, object]) -> str:
    """SHA-256 of a plan's document without its `sha256`, in one spelling of JSON: sorted keys, no spaces."""
    from hashlib import sha256

    rest = {key: value for key, value in document.items() if key != "sha256"}
    return sha256(_spelled(rest, {}).encode()).hexdigest()


def _spelled(value: object, known: dict[int, str]) -> str:
    """JSON in that spelling. A plan tells the same of many devices, as one object, which is spelled once, `known` by
    its id. What holds no lists of objects is spelled in one go."""
    if isinstance(value, dict):
        found = known.get(id(value))
        if found is None:
            own = cast("dict[str, object]", value)
            if any(isinstance(one, list) and one and isinstance(one[0], dict) for one in own.values()):
                found = "{" + ",".join([f"{_encode()(key)}:{_spelled(own[key], known)}" for key in sorted(own)]) + "}"
            else:
                found = _encode()(own)
            known[id(value)] = found
        return found
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + ",".join([_spelled(one, known) for one in cast("list[object]", value)]) + "]"
    return _encode()(value)


@lru_cache(maxsize=1)
def _encode() -> Callable[[object], str]:
    from json import JSONEncoder

    return JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def device_json(device: Device) -> dict[str, object]:
    """The figures of a profile, under the keys of a device file; where on this machine a file lies stays here."""
    told: dict[str, object] = {}
    for one in fields(device):
        value = getattr(device, one.name)
        if value is not None and one.name != "path":
            told[one.name] = dict(value) if isinstance(value, Mapping) else value
    told["memory_bandwidth_bytes_per_s"] = device.memory_bandwidth_bytes_per_s or None  # null: nobody measured it
    if device.path:
        told["source"] = told["usable_source"] = "a device file"
    return told


def options_json(options: Options) -> dict[str, object]:
    """What is set of the engine's options; of a calibration only that there is one (its factors are a file)."""
    told = {one.name: getattr(options, one.name) for one in fields(options) if one.name != "calibration"}
    return {name: value for name, value in told.items() if value is not None}
