"""A plan as a file: what `qwen-plan --json` wrote, read back with suspicion and made anew.

Nothing in the file is believed but the question: model, devices with their figures, context, sequences, engine, format.
The plan behind them is worked out again, and what it allocates and how it is launched must be what the file says. So a
file that somebody changed is refused, and so is one whose rules have been corrected since.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..profiles.device import Device
from ..profiles.device_file import Entry
from ..profiles.device_names import device, is_name
from ..profiles.errors import BadInput, QwenfitError
from ..profiles.frozen import dataclass, fields, replace
from ..profiles.json_file import read_json_object, short
from ..profiles.names import join_or, quote
from .boxes import MAX_NODES
from .calibration import Calibration
from .candidates import engine_module
from .documents import digest
from .plan import EnginePlan
from .receipt_file import CheckedOptions, device_of
from .request import Options, Request
from .search import search

LIMIT_BYTES = 8 << 20
AGAIN = "make it anew with `qwen-plan ... --json`"
MAX_PLANS = 64
_MEMORY_KEYS = 16

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Size = Annotated[int, Field(ge=-(1 << 50), le=1 << 50)]


class _Open(BaseModel):
    """Keys that are not named here may stand there: a plan says more than is needed to make it anew."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _AskedOptions(_Open):
    calibration: Name | None = None


class _Request(_Open):
    model: Name
    model_path: Name | None = None
    devices: Annotated[list[Name], Field(min_length=1, max_length=1024)]
    ctx_tokens: Annotated[int, Field(ge=1, le=10_000_000)]
    seqs: Annotated[int, Field(ge=1, le=1_000_000)]
    nodes: Annotated[int, Field(ge=1, le=MAX_NODES)] = 1  # boxes that `devices` are dealt out to
    interconnect: Name | None = None
    options: _AskedOptions


class _Share(_Open):
    name: Name
    memory: Annotated[dict[str, Size], Field(max_length=_MEMORY_KEYS)]


class _Entry(_Open):
    engine: Name
    engine_version: Name
    weights: Name
    kv_dtype: Name
    state_dtype: Name
    mtp: Annotated[int, Field(ge=0, le=16)]
    vision: bool
    fits: bool
    options: CheckedOptions
    devices: Annotated[list[_Share], Field(min_length=1, max_length=1024)]
    command: Annotated[str, Field(max_length=16_000)]


class _Document(_Open):
    schema_: Annotated[int, Field(alias="schema", ge=1, le=1)]
    request: _Request
    plans: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_PLANS)]
    profiles: Annotated[list[Entry], Field(min_length=1, max_length=1024)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, eq=False)
class PlanFile:
    """A plan that was read back. `plan` is worked out anew; `sha256` names the file's content."""

    path: str
    sha256: str
    request: Request  # with everything of the chosen plan resolved
    devices: tuple[Device, ...]
    plan: EnginePlan


def read_plan(path: str, engine: str | None = None, calibration: Calibration | None = None) -> PlanFile:
    """One plan of the file: the best, or that of `engine`. BadInput in a sentence where there is none, or the file was
    edited, or its figures are not today's."""
    raw = read_json_object(path, LIMIT_BYTES)
    where = path[:300] if path.isprintable() else ascii(path[:300])
    document = _checked(_Document, raw, where)
    if digest(raw) != document.sha256:
        raise BadInput(f"{where} was changed after it was made: its sha256 is of something else; {AGAIN}")
    entry = _chosen([_checked(_Entry, one, where) for one in document.plans], engine, where)
    place = [one["engine"] for one in document.plans].index(entry.engine)
    calibrated = document.request.options.calibration
    if calibrated and calibration is None:
        raise BadInput(f"{where} was planned with the calibration {quote(calibrated)}: give --calibration again")
    devices = _devices(document)
    box, rest = divmod(len(devices), document.request.nodes)
    if rest:
        raise BadInput(
            f"{where} has {len(devices)} devices in {document.request.nodes} boxes, which is not even; {AGAIN}"
        )
    request = _request(document.request, entry, document.plans[place], calibration)
    try:
        plan = search(request, devices=devices[:box]).best
    except QwenfitError as error:
        raise BadInput(f"{where} cannot be planned anew: {error}") from None
    _compare(plan, entry, where)
    return PlanFile(path, document.sha256, request, devices, plan)


def _checked(model: Any, raw: Any, where: str) -> Any:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        missing = first["type"] == "missing"
        what = "missing" if missing else f"{short(first.get('input'))}: {first['msg'].lower()}"
        raise BadInput(f"{where} is no plan that `qwen-plan --json` wrote: {field} is {what}; {AGAIN}") from None


def _chosen(entries: list[_Entry], engine: str | None, where: str) -> _Entry:
    if engine is None:
        return entries[0]
    name = engine.partition("@")[0].strip().lower()
    found = [entry for entry in entries if entry.engine == name]
    if not found:
        engine_module(name)  # which says so where there is no such engine
        has = join_or([entry.engine for entry in entries])
        raise BadInput(
            f"{where} has no plan for {quote(engine)}, but for {has}: give --engine {entries[0].engine}, or plan with "
            f"--engine {name}"
        )
    return found[0]


def _devices(document: _Document) -> tuple[Device, ...]:
    """Of the catalog where the file has the catalog's figures, for look-ups compare devices by identity."""
    made: dict[str, Device] = {}
    for one in document.profiles:
        told = device_of(one)
        own = device(told.name) if is_name(told.name) else None
        same = own is not None and all(
            getattr(own, field.name) == getattr(told, field.name) for field in fields(own) if field.name != "path"
        )
        made[told.name] = own if own is not None and same else told
    missing = next((name for name in document.request.devices if name not in made), None)
    if missing is not None:
        raise BadInput(f"the plan names the device {quote(missing)} and does not say what it is; {AGAIN}")
    return tuple(made[name] for name in document.request.devices)


def _request(asked: _Request, entry: _Entry, raw: dict[str, Any], calibration: Calibration | None) -> Request:
    """The question with what the plan chose. Ranks (tp, pp and their like) are in both under one name."""
    ranks = {
        field.name: raw[field.name]
        for field in fields(Request())
        if field.name in raw and type(raw[field.name]) is int and field.name not in ("mtp", "seqs", "ctx_tokens")
    }
    return Request(
        model=asked.model_path or asked.model,
        devices=tuple(asked.devices[: len(asked.devices) // asked.nodes]),
        ctx_tokens=asked.ctx_tokens,
        seqs=asked.seqs,
        engine=f"{entry.engine}@{entry.engine_version}",
        weights=entry.weights,
        kv_dtype=entry.kv_dtype,
        state_dtype=entry.state_dtype,
        mtp=entry.mtp,
        vision=entry.vision,
        interconnect=asked.interconnect,
        options=replace(Options(**entry.options.model_dump()), calibration=calibration),
        **ranks,
    )


def _compare(plan: EnginePlan, entry: _Entry, where: str) -> None:
    told: dict[str, Any] = plan.to_json()
    for now, then in zip(told["devices"], entry.devices, strict=False):
        for part, planned_bytes in then.memory.items():
            found = now["memory"].get(part)
            if found != planned_bytes:
                raise BadInput(
                    f"{where} is out of date: it plans {planned_bytes:,} {part.replace('_', ' ')} on {then.name}, and "
                    f"today it would be {found:,}; {AGAIN}"
                )
    if len(told["devices"]) != len(entry.devices) or told["command"] != entry.command:
        raise BadInput(f"{where} is out of date: today's launch line is another; {AGAIN}")
