"""Receipts as files: JSON that somebody else may have written, checked before anything is made of it."""

import json
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..profiles.device import Device
from ..profiles.device_file import Entry
from ..profiles.errors import BadInput
from ..profiles.json_file import read_json_object, short
from .logs.dialect import LoggedPart
from .logs.engine_log import EngineLog
from .memory import Amount
from .receipt import SCHEMA, Receipt
from .request import Options, Request
from .scores import PartScore

LIMIT_BYTES = 1 << 20
MAX_RECEIPTS = 10_000
MAX_BYTES = 1 << 50

Text = Annotated[str, Field(max_length=500)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Bytes = Annotated[int, Field(ge=-MAX_BYTES, le=MAX_BYTES)]
Size = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Place = Annotated[str, Field(pattern=r"^(host|device\d{1,4})$")]
Part = Literal["weights", "kv_cache", "recurrent_state", "activation", "graph", "runtime"]
Value = bool | int | float | Annotated[str, Field(max_length=2000)] | None
Values = Annotated[dict[Name, Value], Field(max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CheckedOptions(_Strict):
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    ubatch_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    prefix_caching: bool = True
    cuda_graphs: bool = True
    image_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    offload_experts: bool | None = None
    host_memory_bytes: Size | None = None


class _Request(_Strict):
    model: Name
    devices: Annotated[list[Name], Field(min_length=1, max_length=1024)]
    ctx_tokens: Annotated[int, Field(ge=1, le=10_000_000)]
    seqs: Annotated[int, Field(ge=1, le=1_000_000)]
    engine: Name
    weights: Name | None
    kv_dtype: Name | None
    state_dtype: Name | None
    mtp: Annotated[int, Field(ge=0, le=16)]
    vision: bool | None
    tp: Annotated[int, Field(ge=1, le=1024)] | None
    pp: Annotated[int, Field(ge=1, le=1024)] | None
    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    dp: Annotated[int, Field(ge=1, le=1024)] | None = None
    ep: Annotated[int, Field(ge=1, le=1024)] | None = None
    interconnect: Name | None = None
    options: CheckedOptions


class _Part(_Strict):
    part: Part
    place: Place
    bytes: Size
    resolution_bytes: Size
    line: Text
    covers: Annotated[list[Part], Field(max_length=6)]


class _Log(_Strict):
    engine: Name
    version: Text | None
    model: Text | None
    settings: Values
    facts: Values
    parts: Annotated[list[_Part], Field(max_length=20_000)]
    died: Text | None
    notes: Annotated[list[Text], Field(max_length=100)]


class _Interval(_Strict):
    low: Bytes
    mid: Bytes
    high: Bytes


class _Score(_Strict):
    part: Name
    place: Place
    planned_bytes: _Interval
    basis: Literal["exact", "estimated"]
    measured_bytes: Size
    resolution_bytes: Size
    error: Annotated[float, Field(allow_inf_nan=False)]
    within: bool


class _Receipt(_Strict):
    schema_: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    kind: Literal["receipt"]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    qwenfit: Text
    source: Text | None
    request: _Request
    devices: Annotated[list[Entry], Field(min_length=1, max_length=1024)]
    command: Annotated[str, Field(max_length=4000)]
    log: _Log
    scores: Annotated[list[_Score], Field(max_length=20_000)]


def read_receipt(path: str) -> Receipt:
    """The receipt in a file. BadInput, naming file and field, for anything else."""
    return from_json(read_json_object(path, LIMIT_BYTES), path)


def read_receipts(paths: list[str]) -> list[Receipt]:
    """The receipts in files and folders (every *.json there), in order of their names."""
    found = [read_receipt(path) for path in _files(paths)]
    if not found:
        raise BadInput(f"no receipt in {', '.join(paths)[:300]}: `qwen-plan receipt LOG --output FILE` makes one")
    return found


def from_json(told: dict[str, Any], where: str) -> Receipt:
    """The receipt that `Receipt.to_json` told. BadInput begins with `where`."""
    try:
        checked = _Receipt.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BadInput(
            f"{where} is no receipt: {field} is {short(first.get('input'))}: {first['msg'].lower()}"
        ) from None
    for place, one in enumerate(checked.scores):
        amount = one.planned_bytes
        if not amount.low <= amount.mid <= amount.high:
            raise BadInput(f"{where} is no receipt: scores.{place}.planned_bytes is no interval")
    request, log = checked.request, checked.log
    fields = request.model_dump()
    return Receipt(
        date=checked.date,
        qwenfit=checked.qwenfit,
        source=checked.source,
        request=Request(**{**fields, "devices": tuple(request.devices), "options": Options(**fields["options"])}),
        devices=tuple(map(device_of, checked.devices)),
        command=checked.command,
        log=EngineLog(
            engine=log.engine,
            version=log.version,
            model=log.model,
            settings=log.settings,
            parts=tuple(LoggedPart(**{**part.model_dump(), "covers": tuple(part.covers)}) for part in log.parts),
            facts=log.facts,
            died=log.died,
            notes=tuple(log.notes),
        ),
        scores=tuple(_score(one) for one in checked.scores),
    )


def device_of(entry: Entry) -> Device:
    """A profile that was checked. What nobody measured is null in a file and 0 in a value."""
    return Device(**{**entry.model_dump(), "memory_bandwidth_bytes_per_s": entry.memory_bandwidth_bytes_per_s or 0})


def text(made: Receipt) -> str:
    """The file."""
    return json.dumps(made.to_json(), indent=1, allow_nan=False) + "\n"


def _score(one: _Score) -> PartScore:
    amount = one.planned_bytes
    return PartScore(
        one.part,
        one.place,
        Amount(amount.low, amount.mid, amount.high, one.basis == "exact"),
        one.measured_bytes,
        one.resolution_bytes,
        one.error,
        one.within,
    )


def _files(paths: list[str]) -> Iterator[str]:
    count = 0
    for path in paths:
        try:
            inside = sorted(os.listdir(path)) if os.path.isdir(path) else None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not a valid path"
            raise BadInput(f"{path} cannot be read: {reason}") from None
        for name in [path] if inside is None else [os.path.join(path, one) for one in inside if one.endswith(".json")]:
            count += 1
            if count > MAX_RECEIPTS:
                raise BadInput(f"more than {MAX_RECEIPTS:,} receipts: give fewer at once")
            yield name
