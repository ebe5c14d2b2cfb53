"""The file of `qwen-plan matrix`: rows of device x model x context x sequences, and what each must satisfy.

    defaults:                  # optional: what rows do not say themselves
      model: 9b
    rows:
      - device: [rtx3060, 2xrtx3090]     # one, several, or all of the catalog
        ctx_tokens: [32K, 256K]
        seqs: 1
        must_fit: true                   # the default
        min_decode_tokens_per_s: 20
        max_memory_bytes: 11GiB          # of the fullest device; or a number of bytes
        job_tokens: 78m                  # hours, kWh and USD of so many output tokens
    money: {kwh_price_usd: 0.25, device_price_usd: {rtx3060: 300}, years: 3}   # of a job; optional

Also engine, weights, kv_dtype, state_dtype, mtp, vision, tp, pp, dp, ep, nodes and interconnect, in the words of the
command's options of those names: `nodes: 2` are two boxes of `device`.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ..planner.boxes import MAX_NODES
from ..planner.matrix import FIXED, Cell, Requirements, cells_of, refuse_duplicates
from ..planner.request import Prices, Request
from ..planner.search import MAX_PARALLEL
from ..planner.tokens import parse_tokens
from ..profiles.box import devices_of
from ..profiles.device_names import devices
from ..profiles.errors import BadInput, QwenfitError
from ..profiles.frozen import replace
from ..profiles.interconnect import interconnect
from ..profiles.model_catalog import model, models
from ..profiles.yaml_file import Document, read_yaml
from .money_file import MoneyKeys, device_prices
from .options import parse_bytes

ALL = "all"


def listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


def read_with(parse: Callable[[str], int]) -> BeforeValidator:
    """Text in the option's own spelling; numbers as they are."""

    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return parse(value)
        except BadInput as error:
            raise PydanticCustomError("sentence", "{says}", {"says": str(error)}) from None

    return BeforeValidator(read)


Names = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4096)]], BeforeValidator(listed), Field(min_length=1)
]
Tokens = Annotated[int, read_with(parse_tokens), Field(ge=1, le=10_000_000)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Parallel = Annotated[int, Field(ge=1, le=MAX_PARALLEL)]
Nodes = Annotated[int, Field(ge=1, le=MAX_NODES)]
Word = Annotated[str, Field(min_length=1, max_length=200)]


class Row(BaseModel):
    """The keys of a row. None stands for what it does not say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: Names | None = None
    model: Names | None = None
    ctx_tokens: Annotated[list[Tokens], BeforeValidator(listed), Field(min_length=1)] | None = None
    seqs: Annotated[list[Count], BeforeValidator(listed), Field(min_length=1)] | None = None
    must_fit: bool | None = None
    min_decode_tokens_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_memory_bytes: Annotated[int, read_with(parse_bytes), Field(gt=0)] | None = None
    job_tokens: Annotated[int, read_with(parse_tokens), Field(ge=1, le=10**15)] | None = None
    engine: Word | None = None
    weights: Word | None = None
    kv_dtype: Word | None = None
    state_dtype: Word | None = None
    mtp: Annotated[int, Field(ge=0, le=16)] | None = None
    vision: bool | None = None
    tp: Parallel | None = None
    pp: Parallel | None = None
    dp: Parallel | None = None
    ep: Parallel | None = None
    nodes: Nodes | None = None
    interconnect: Word | None = None


class Matrix(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    defaults: Row = Row()
    rows: Annotated[list[Row], Field(min_length=1, max_length=5000)]
    money: MoneyKeys = MoneyKeys()


def read_matrix(path: str) -> tuple[str, list[Cell]]:
    """(the file's name, its cells in order). BadInput, with file and line, for anything that is wrong in it."""
    document = read_yaml(path)
    matrix = document.checked(Matrix)
    prices = device_prices(document, matrix.money)
    cells = [
        _priced(cell, matrix.money, prices)
        for place, row in enumerate(matrix.rows)
        for cell in _cells(document, matrix.defaults, row, place)
    ]
    refuse_duplicates(cells, document.where)
    return document.where, cells


def _cells(document: Document, defaults: Row, row: Row, place: int) -> Iterator[Cell]:
    said: dict[str, Any] = {**defaults.model_dump(exclude_none=True), **row.model_dump(exclude_none=True)}
    at = ("rows", place)
    if "device" not in said:
        raise document.error(at, "device is missing: name one, several in brackets, or all")
    if "interconnect" in said:
        key = (*at, "interconnect") if row.interconnect else ("defaults", "interconnect")
        known_link(document, key, said["interconnect"], said.get("nodes", 1))
    base = Request(
        **{name: said[name] for name in FIXED if name in said}, prices=Prices(job_tokens=said.get("job_tokens"))
    )
    asked = Requirements(said.get("must_fit", True), said.get("min_decode_tokens_per_s"), said.get("max_memory_bytes"))
    yield from cells_of(
        document.line(at),
        _named(document, (*at, "device"), said["device"], _device_name, lambda: [one.name for one in devices()]),
        _named(
            document,
            (*at, "model"),
            said.get("model", ["qwen3.5-9b"]),
            _model_name,
            lambda: [one.name for one in models()],
        ),
        base,
        said.get("ctx_tokens", [32768]),
        said.get("seqs", [1]),
        asked,
    )


def _priced(cell: Cell, money: MoneyKeys, prices: dict[str, float]) -> Cell:
    """The cell with what its devices cost together; energy alone counts where the price of one is not given."""
    request = cell.request
    if request.prices.job_tokens is None:
        return cell
    names = [device.name for spec in request.devices for device in devices_of(spec)]
    cost = request.nodes * sum(prices[name] for name in names) if all(name in prices for name in names) else None
    priced = replace(request.prices, usd_per_kwh=money.kwh_price_usd, device_usd=cost, years=money.years)
    return replace(cell, request=replace(request, prices=priced))


def known_link(document: Document, at: tuple[str | int, ...], name: str, nodes: int) -> None:
    """Refuses an interconnect that does not exist, and one beside a single box."""
    try:
        interconnect(name)
    except QwenfitError as error:
        raise document.error(at, str(error)) from None
    if nodes == 1:
        raise document.error(at, "an interconnect lies between boxes: give nodes too")


def _named(
    document: Document,
    at: tuple[str | int, ...],
    names: list[str],
    spelled: Callable[[str], str],
    every: Callable[[], list[str]],
) -> list[str]:
    """The names as the catalog spells them, so that one thing under two names is seen to be one."""
    if names == [ALL]:
        return every()
    found = []
    for place, name in enumerate(names):
        try:
            found.append(spelled(name))
        except QwenfitError as error:
            raise document.error((*at, place), str(error)) from None
    return found


def _device_name(spec: str) -> str:
    devices = devices_of(spec)
    if any(one.path for one in devices) or spec.strip().lower() == "auto":  # a file may hold several
        return spec.strip()
    found = [one.name for one in devices]
    counts = [(found.count(name), name) for name in dict.fromkeys(found)]
    return ",".join(f"{count}x{name}" if count > 1 else name for count, name in counts)


def _model_name(name: str) -> str:
    found = model(name)
    return name if found.path or found.stored else found.name
