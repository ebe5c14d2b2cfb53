"""The question as a browser or a program asks it: checked and bounded, and turned into the planner's request.

Over HTTP a name is a name of the catalogs and nothing else: no folder, no file, no `auto` unless whoever started the
server allowed it. The query string of the page and the body of `POST /api/plan` are two spellings of one `Question`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field

from ..planner.boxes import MAX_NODES
from ..planner.request import Options, Prices, Request
from ..planner.search import MAX_ASKED_CTX_TOKENS, MAX_ASKED_SEQS, MAX_PARALLEL
from ..planner.tokens import parse_tokens
from ..profiles.device_names import device, is_path
from ..profiles.errors import BadInput, UnknownName
from ..profiles.model_catalog import is_name
from ..profiles.names import quote
from .options import parse_count

AUTO = "auto"
MAX_ROWS = 8
MAX_DEVICES = 32
STEPS_PER_OCTAVE = 8
CONTEXTS = tuple(  # tokens at each place of the slider: eighths of an octave, from 1K to 1M
    (1 << place // STEPS_PER_OCTAVE) // STEPS_PER_OCTAVE * (STEPS_PER_OCTAVE + place % STEPS_PER_OCTAVE)
    for place in range(10 * STEPS_PER_OCTAVE, 20 * STEPS_PER_OCTAVE + 1)
)

Word = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[ -~]+$")]
Flag = bool | None
Dollars = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1, le=MAX_ASKED_CTX_TOKENS)]
Ranks = Annotated[int, Field(ge=1, le=MAX_PARALLEL)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DeviceKeys(_Strict):
    """So many of one device of the catalog."""

    name: Word
    count: Annotated[int, Field(ge=1, le=MAX_DEVICES)] = 1


class OptionsKeys(_Strict):
    """Settings of the engines. null: the engine's default, or the planner's choice."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    max_num_batched_tokens: Tokens | None = None
    ubatch_tokens: Tokens | None = None
    prefix_caching: bool = True
    cuda_graphs: bool = True
    image_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    offload_experts: Flag = None
    host_memory_bytes: Annotated[int, Field(ge=0, le=1 << 50)] | None = None


class PricesKeys(_Strict):
    """What things cost the asker. null: the published price, or not counted."""

    usd_per_kwh: Dollars | None = None
    device_usd: Dollars | None = None
    years: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    api_usd_per_million: Dollars | None = None
    job_tokens: Annotated[int, Field(ge=1, le=10**15)] | None = None
    device_watts: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None


class Question(_Strict):
    """The planner's request with names of the catalogs only, and a limit on every field."""

    model: Word = "qwen3.5-9b"
    devices: Annotated[tuple[DeviceKeys, ...], Field(min_length=1, max_length=MAX_ROWS, strict=False)] = (
        DeviceKeys(name="rtx3060"),
    )
    ctx_tokens: Tokens = 32768
    seqs: Annotated[int, Field(ge=1, le=MAX_ASKED_SEQS)] = 1
    engine: Word | None = None
    weights: Word | None = None
    kv_dtype: Word | None = None
    state_dtype: Literal["float32", "bfloat16"] | None = None
    mtp: Annotated[int, Field(ge=0, le=16)] = 0
    vision: Flag = None
    tp: Ranks | None = None
    pp: Ranks | None = None
    nodes: Annotated[int, Field(ge=1, le=MAX_NODES)] = 1
    dp: Ranks | None = None
    ep: Ranks | None = None
    interconnect: Word | None = None
    options: OptionsKeys = OptionsKeys()
    prices: PricesKeys = PricesKeys()

    @property
    def device_count(self) -> int:
        return sum(row.count for row in self.devices)

    def request(self, allow_auto: bool = False) -> Request:
        """Raises UnknownName or BadInput, without a word about what lies on this machine."""
        if not is_name(self.model):
            raise UnknownName(f"no model of the catalog is called {quote(self.model)}; /api/models lists them")
        if self.device_count > MAX_DEVICES:
            raise BadInput(f"{self.device_count} devices: give at most {MAX_DEVICES}")
        return Request(
            devices=tuple(name for row in self.devices for name in (device_name(row.name, allow_auto),) * row.count),
            options=Options(**dict(self.options)),
            prices=Prices(**dict(self.prices)),
            **{name: value for name, value in self if name not in ("devices", "options", "prices")},
        )


def device_name(name: str, allow_auto: bool) -> str:
    """The catalog's spelling of it. Raises UnknownName, for a path too: no file is looked at."""
    if name.strip().lower() == AUTO:
        if allow_auto:
            return AUTO
        raise UnknownName("this server does not tell what it runs on: choose a device, /api/devices lists them")
    if is_path(name):
        raise UnknownName(f"no device of the catalog is called {quote(name)}; /api/devices lists them")
    return device(name).name


def from_query(pairs: Sequence[tuple[str, str]]) -> Question:
    """The question of a query string as the page writes it; a key that it does not know is left alone.

    Raises BadInput for a number that is none, and pydantic's ValidationError for one that is out of bounds."""
    given = {name: text.strip() for name, text in pairs if text.strip()}
    names = [text.strip() for name, text in pairs if name == "gpu"]
    counts = [text.strip() for name, text in pairs if name == "n"]
    rows = [
        {"name": name, "count": _number("the number of devices", counts[place]) if place < len(counts) else 1}
        for place, name in enumerate(names)
        if name
    ]
    keys: dict[str, object] = {name: given[key] for key, name in WORDS.items() if key in given}
    if rows:
        keys["devices"] = rows
    if "ctx" in given:
        keys["ctx_tokens"] = _tokens(given["ctx"])
    for key, what in NUMBERS.items():
        if key in given:
            keys[key] = _number(what, given[key])
    if keys.get("nodes", 1) == 1:
        keys.pop("interconnect", None)  # left in the form by somebody who went back to one box
    if "vision" in given:
        keys["vision"] = True
    return Question.model_validate(keys)


WORDS = {"model": "model", "engine": "engine", "weights": "weights", "kv": "kv_dtype", "interconnect": "interconnect"}
NUMBERS = {
    "seqs": "sequences",
    "mtp": "draft tokens",
    "nodes": "boxes",
    "tp": "tensor-parallel ranks",
    "pp": "pipeline stages",
    "dp": "replicas",
    "ep": "ranks that experts are dealt out to",
}


def query(question: Question) -> str:
    """The query string that `from_query` reads as this question. Options and prices are not the page's."""
    return urlencode(list(_pairs(question)))


def _pairs(question: Question) -> Iterator[tuple[str, str]]:
    yield "model", question.model
    for row in question.devices:
        yield "gpu", row.name
        yield "n", str(row.count)
    yield "ctx", tokens_text(question.ctx_tokens)
    yield "seqs", str(question.seqs)
    values: Mapping[str, object] = dict(question)
    for key, name in WORDS.items():
        if key != "model" and values[name]:
            yield key, str(values[name])
    for key in NUMBERS:
        if key != "seqs" and values[key] != Question.model_fields[key].default:
            yield key, str(values[key])
    if question.vision:
        yield "vision", "on"


def tokens_text(tokens: int) -> str:
    """As a person would type it: 256K, 1M, 1152."""
    for unit, scale in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens % scale == 0:
            return f"{tokens // scale}{unit}"
    return str(tokens)


def slider_step(tokens: int) -> int:
    """The place on the slider that is nearest from below."""
    return max((place for place, at in enumerate(CONTEXTS) if at <= tokens), default=0)


def _tokens(text: str) -> int:
    try:
        return parse_tokens(text)
    except BadInput as error:
        raise BadInput(f"context: {error}") from None


def _number(what: str, text: str) -> int:
    try:
        return parse_count(text)
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from None
