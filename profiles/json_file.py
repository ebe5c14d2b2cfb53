"""JSON from files that somebody else wrote: bounded in size and depth, no duplicate keys, no NaN, one sentence on
failure.
"""

import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from .errors import BadInput

CONFIG_LIMIT_BYTES = 4 << 20  # fifty times the largest config.json seen, NVIDIA's with a line per quantized module
MAX_DEPTH = 64


def read_json_object(path: str, limit_bytes: int = CONFIG_LIMIT_BYTES) -> dict[str, Any]:
    """The object in a JSON file. `BadInput`, naming the file, for anything else."""
    try:
        # Opening a FIFO would wait for a writer, and a device never ends: only regular files are opened.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path} is not a regular file")
        if status.st_size > limit_bytes:
            raise BadInput(f"{path} has {status.st_size} bytes, more than the {limit_bytes} that qwenfit reads")
        with open(path, "rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    value = parse_json_object(data, path)
    _check_depth(value, path)
    return value


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """The object in UTF-8 bytes. `BadInput`, beginning with `where`, for anything else."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is not JSON: {error.msg}, line {error.lineno} column {error.colno}") from error
    except _Refused as error:
        raise BadInput(f"{where} {error}") from error
    except RecursionError:
        raise BadInput(f"{where} is nested too deeply to be read") from None
    except ValueError:
        # int() refuses more than 4300 digits (sys.set_int_max_str_digits).
        raise BadInput(f"{where} holds a number of more than 4300 digits") from None
    if not isinstance(value, dict):
        raise BadInput(f"{where} holds a JSON {_kind(value)}, not an object")
    return value


def _check_depth(value: dict[str, Any], where: str) -> None:
    """How deep the parser itself goes differs between versions of Python: past 10,000 from 3.12 on."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise BadInput(f"{where} is nested too deeply to be read")


def short(value: object) -> str:
    """A value from a file as it may stand in a sentence: one line, no control characters, at most 60 characters."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**60 else "a number of more than 60 digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: object) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    return {bool: "boolean", str: "string", list: "list"}.get(type(value), "number")


class _Refused(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"has the key {short(key)} twice in one object")
            seen.add(key)
    return found


def _refuse(constant: str) -> float:
    raise _Refused(f"holds {constant}, which is not JSON")
