"""The device catalog: nvidia.yaml, amd.yaml, intel.yaml, apple.yaml and cpu.yaml, compiled into devices.json.

The YAML files are the truth. Reading them takes half a second, so their result lies beside them as JSON with a
fingerprint of the bytes it came from; where the fingerprint differs (somebody edits a YAML file) the JSON is ignored
and the YAML is read. `python -m qwenfit.profiles.catalog` writes the JSON anew, and a test holds it fresh.

A catalog file has four parts:

    defaults    keys that every device of the file starts with
    links       what a name under `interconnect` means: interconnect_bytes_per_s, host_link_bytes_per_s
    families    keys that the devices of a family share
    devices     the devices; `family` names one of the above, and a key of the device wins over the family's

Beyond the keys of `device_file.Entry` a device may have: `memory_gib: [8, 16]` (one device per size, NAME-8gb and
NAME-16gb), `aliases`, and three rules that families use: `flops_per_fp32` (other dtypes as multiples of fp32),
`sparse_per_dense`, and `usable_rule` (steps tried in order: up to up_to_gib, usable = memory x fraction - reserve_mib;
and a source).
"""

import json
import os
import zlib
from collections.abc import Mapping
from typing import NamedTuple

FILES = ("nvidia.yaml", "amd.yaml", "intel.yaml", "apple.yaml", "cpu.yaml")
FOLDER = os.path.dirname(os.path.abspath(__file__))
COMPILED = os.path.join(FOLDER, "devices.json")
SCHEMA = 1
ROWS = '"devices": {\n'


class Catalog(NamedTuple):
    """The catalog, its devices still JSON text: a look-up needs one of them."""

    rows: dict[str, str]  # name -> JSON array of the values of Device's fields, in their order
    aliases: dict[str, str]  # alias -> name


def load(fields: tuple[str, ...]) -> Catalog:
    """From devices.json where it was made from these YAML files and for these `fields`, else from the YAML files."""
    sources = read_sources()
    try:
        with open(COMPILED, encoding="utf-8") as file:
            return _split(file.read(), fingerprint(sources), fields)
    except (OSError, ValueError, KeyError):
        pass  # missing, stale, cut short or reformatted: the YAML files say the same
    from .catalog_build import compile_catalog

    return _split(compile_catalog(sources), fingerprint(sources), fields)


def _split(text: str, fingerprint_now: str, fields: tuple[str, ...]) -> Catalog:
    """The text of devices.json, read no further than needed. `ValueError` or `KeyError` where it is not ours."""
    head, rows, body = text.partition(ROWS)
    values = json.loads(head.rstrip().rstrip(",") + "}")
    if not rows or not body.endswith("]\n}}\n"):
        raise ValueError("cut short")
    if values["fingerprint"] != fingerprint_now or tuple(values["fields"]) != fields:
        raise ValueError("stale")
    lines = (line.partition('": ') for line in body[:-4].split("\n"))
    return Catalog({name[1:]: row.rstrip(",") for name, _, row in lines}, values["aliases"])


def read_sources() -> dict[str, bytes]:
    """The bytes of the YAML files, by name."""
    sources: dict[str, bytes] = {}
    for name in FILES:
        with open(os.path.join(FOLDER, name), "rb") as file:
            # A checkout on Windows may have turned the line ends around; the text is the same.
            sources[name] = file.read().replace(b"\r\n", b"\n")
    return sources


def fingerprint(sources: Mapping[str, bytes]) -> str:
    """CRC-32 and length of all files together: enough to notice an edit, and cheap to import (hashlib is not)."""
    checksum = 0
    for name in FILES:
        checksum = zlib.crc32(sources[name], checksum)
    return f"{SCHEMA}-{checksum:08x}-{sum(map(len, sources.values()))}"


def main() -> None:
    from .catalog_build import compile_catalog

    text = compile_catalog(read_sources())
    with open(COMPILED, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


if __name__ == "__main__":
    main()
