"""Compiles the catalog's YAML files: what a device inherits, the rules for what it does not say, and the JSON text."""

import json
from collections.abc import Mapping
from typing import Any

from .catalog import ROWS, fingerprint
from .device import Device
from .device_file import build, parse_yaml
from .errors import BadInput
from .frozen import fields

_GIB = 1 << 30
_MIB = 1 << 20


def compile_catalog(sources: Mapping[str, bytes]) -> str:
    """The text of devices.json: one line per device, so that the change of a device is the change of a line.

    Every entry is validated as a user's own file is. `BadInput` names file, device and field.
    """
    names = tuple(field.name for field in fields(Device))
    rows: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for file_name, text in sources.items():
        for entry, own_aliases in expand(parse_yaml(text, file_name), file_name):
            device = build(entry, f"{file_name}, {entry.get('name')}")
            if device.name in rows:
                raise BadInput(f"{file_name}: the name {device.name} occurs twice")
            rows[device.name] = json.dumps([getattr(device, field) for field in names])
            for alias in own_aliases:
                if alias in aliases:
                    raise BadInput(f"{file_name}: {device.name} and {aliases[alias]} have the same alias {alias}")
                aliases[alias] = device.name
    for alias in aliases:
        if alias in rows:
            raise BadInput(f"the alias {alias} of {aliases[alias]} is the name of another device")
    head = {"fingerprint": fingerprint(sources), "fields": names, "aliases": aliases}
    lines = [f"{json.dumps(name)}: {row}" for name, row in rows.items()]
    return "".join(
        [
            "{\n",
            *(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()),
            ROWS,
            ",\n".join(lines),
            "\n}}\n",
        ]
    )


def expand(document: Mapping[str, Any], file_name: str) -> list[tuple[dict[str, Any], list[str]]]:
    """The entries of one file with everything that they inherit, and their aliases."""
    unknown = sorted(set(document) - {"defaults", "links", "families", "devices"})
    if unknown:
        raise BadInput(f"{file_name}: unknown part {unknown[0]!r}; there are defaults, links, families and devices")
    links, families = document.get("links", {}), document.get("families", {})
    found = []
    for raw in document["devices"]:
        family = raw.get("family")
        if family is not None and family not in families:
            raise BadInput(f"{file_name}, {raw.get('name')}: there is no family {family!r} in this file")
        entry = {**document.get("defaults", {}), **families.get(family, {}), **raw}
        entry.pop("family", None)
        aliases = entry.pop("aliases", [])
        sizes = entry["memory_gib"] if isinstance(entry.get("memory_gib"), list) else [None]
        for size in sizes:
            sized = dict(entry)
            if size is not None:
                sized |= {
                    "memory_gib": size,
                    "name": f"{entry['name']}-{size}gb",
                    "title": f"{entry['title']} {size} GB",
                }
            found.append((_apply_rules(sized, links), aliases))
    return found


def _apply_rules(entry: dict[str, Any], links: Mapping[str, Any]) -> dict[str, Any]:
    flops = dict(entry.get("flops_per_s", {}))
    for dtype, ratio in entry.pop("flops_per_fp32", {}).items():
        flops.setdefault(dtype, round(flops["fp32"] * ratio))
    sparse = dict(entry.get("sparse_flops_per_s", {}))
    for dtype, ratio in entry.pop("sparse_per_dense", {}).items():
        if dtype in flops:
            sparse.setdefault(dtype, round(flops[dtype] * ratio))
    entry |= {"flops_per_s": flops, "sparse_flops_per_s": sparse}
    link: Mapping[str, Any] = links.get(entry.get("interconnect") or "", {})
    for key, value in link.items():
        entry.setdefault(key, value)
    rule = entry.pop("usable_rule", None)
    if rule is not None and not entry.keys() & {"usable_bytes", "usable_mib", "usable_gib"}:
        memory_bytes = entry["memory_bytes"] if "memory_bytes" in entry else entry["memory_gib"] * _GIB
        entry["usable_bytes"] = usable_by_rule(memory_bytes, rule["steps"])
        entry["usable_source"] = f"rule: {rule['source']}"
    return entry


def usable_by_rule(memory_bytes: int, steps: list[Mapping[str, Any]]) -> int:
    """memory x fraction - reserve_mib, by the first step whose up_to_gib is not below the memory."""
    for step in steps:
        if memory_bytes <= step.get("up_to_gib", float("inf")) * _GIB:
            return int(memory_bytes * step.get("fraction", 1)) - step.get("reserve_mib", 0) * _MIB
    raise ValueError("the last step of a usable_rule has no up_to_gib")
