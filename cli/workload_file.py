"""The file of `qwen-plan report`: what is served, on what, and what is promised. docs/report.md explains every key."""

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..planner.money import Tariff
from ..planner.report import Question, Site
from ..planner.request import Request
from ..planner.tokens import parse_tokens
from ..planner.workload import Images, Lengths, Part, Prefix, Targets, Workload, check, lognormal
from ..profiles.box import devices_of
from ..profiles.errors import BadInput, QwenfitError
from ..profiles.model_catalog import model
from ..profiles.yaml_file import Document, read_yaml
from .matrix_file import Names, Nodes, Parallel, Word, known_link, listed, read_with
from .money_file import Dollars, MoneyKeys, device_prices
from .options import parse_image

Tokens = Annotated[int, read_with(parse_tokens), Field(ge=1, le=1_010_000)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LengthPart(_Strict):
    """One of: `tokens` (fixed), `min_tokens` and `max_tokens` (uniform), `median_tokens`, `p95_tokens` and
    `max_tokens` (lognormal)."""

    share: Share = 1.0
    tokens: Tokens | None = None
    min_tokens: Tokens | None = None
    median_tokens: Tokens | None = None
    p95_tokens: Tokens | None = None
    max_tokens: Tokens | None = None


Parts = Annotated[list[LengthPart], BeforeValidator(listed), Field(min_length=1, max_length=50)]


class PrefixKeys(_Strict):
    tokens: Tokens
    share: Share = 1.0
    image: Annotated[int, read_with(parse_image), Field(ge=1, le=65536)] | None = None


class ImageKeys(_Strict):
    size: Annotated[int, read_with(parse_image), Field(ge=1, le=65536)]
    share: Share = 1.0
    count: Annotated[int, Field(ge=1, le=100)] = 1


class TargetKeys(_Strict):
    p95_ttft_s: Seconds | None = None
    p95_tpot_s: Seconds | None = None


class WorkloadKeys(_Strict):
    rate_requests_per_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    users: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    think_s: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    burstiness: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    prompt_tokens: Parts
    output_tokens: Parts
    shared_prefix: PrefixKeys | None = None
    images: ImageKeys | None = None
    targets: TargetKeys = TargetKeys()


class SiteKeys(_Strict):
    """One kind of replica: `devices` as --gpu takes them."""

    devices: Word
    replicas: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    seats: Annotated[int, Field(ge=1, le=4096)] | None = None


class TariffKeys(MoneyKeys):
    api_price_usd_per_million_tokens: Dollars | None = None


class ReportKeys(_Strict):
    title: Annotated[str, Field(min_length=1, max_length=200)]
    model: Word = "qwen3.5-9b"
    engine: Word | None = None
    weights: Word | None = None
    kv_dtype: Word | None = None
    state_dtype: Literal["float32", "bfloat16"] | None = None
    mtp: Annotated[int, Field(ge=0, le=16)] = 0  # draft tokens
    ctx_tokens: Tokens | None = None
    tp: Parallel | None = None
    pp: Parallel | None = None
    dp: Parallel | None = None
    ep: Parallel | None = None
    nodes: Nodes = 1  # boxes like `devices` that make one replica
    interconnect: Word | None = None
    deployment: Annotated[list[SiteKeys], BeforeValidator(listed), Field(min_length=1, max_length=20)]
    candidates: Names | None = None
    workload: WorkloadKeys
    money: TariffKeys = TariffKeys()


def read_workload(path: str) -> Question:
    """The question in a file. BadInput, with file and line, for anything that is wrong in it."""
    document = read_yaml(path)
    keys = document.checked(ReportKeys)
    load = _workload(document, keys.workload)
    sites = tuple(_site(document, ("deployment", place), one) for place, one in enumerate(keys.deployment))
    _check_sites(document, sites)
    candidates = tuple(keys.candidates or ())
    for place, name in enumerate(candidates):
        _known(document, ("candidates", place), lambda name=name: devices_of(name))
    if len(set(candidates)) != len(candidates):
        raise document.error(("candidates",), "a candidate is named twice: keep one of them")
    _known(document, ("model",), lambda: model(keys.model))
    if keys.interconnect:
        known_link(document, ("interconnect",), keys.interconnect, keys.nodes)
    longest = load.max_request_tokens
    if keys.ctx_tokens is not None and keys.ctx_tokens < longest:
        raise document.error(
            ("ctx_tokens",), f"ctx_tokens is {keys.ctx_tokens:,}, and the longest request has {longest:,} tokens"
        )
    request = Request(
        model=keys.model,
        ctx_tokens=keys.ctx_tokens or longest,
        engine=keys.engine,
        weights=keys.weights,
        kv_dtype=keys.kv_dtype,
        state_dtype=keys.state_dtype,
        mtp=keys.mtp,
        vision=load.sees_images,
        tp=keys.tp,
        pp=keys.pp,
        dp=keys.dp,
        ep=keys.ep,
        nodes=keys.nodes,
        interconnect=keys.interconnect,
    )
    prices = tuple(device_prices(document, keys.money).items())
    return Question(
        title=keys.title,
        source=os.path.basename(document.where),
        request=request,
        sites=sites,
        candidates=candidates,
        workload=load,
        tariff=Tariff(keys.money.kwh_price_usd, prices, keys.money.years, keys.money.api_price_usd_per_million_tokens),
    )


def _workload(document: Document, keys: WorkloadKeys) -> Workload:
    prefix, images = keys.shared_prefix, keys.images
    load = Workload(
        prompt_tokens=_lengths(document, "prompt_tokens", keys.prompt_tokens),
        output_tokens=_lengths(document, "output_tokens", keys.output_tokens),
        rate_per_s=keys.rate_requests_per_s,
        users=keys.users,
        think_s=keys.think_s,
        burstiness=keys.burstiness,
        prefix=Prefix(prefix.tokens, prefix.share, prefix.image or 0) if prefix else None,
        images=Images(images.size * images.count, images.share, images.count) if images else None,
        targets=Targets(keys.targets.p95_ttft_s, keys.targets.p95_tpot_s),
    )
    try:
        check(load)
    except BadInput as error:
        raise document.error(("workload",), str(error)) from None
    return load


def _lengths(document: Document, name: str, parts: list[LengthPart]) -> Lengths:
    at = ("workload", name)
    total = sum(part.share for part in parts)
    if abs(total - 1) > 1e-6:
        raise document.error(at, f"the shares of {name} sum to {total:g}, and must sum to 1")
    return Lengths(tuple(_part(document, (*at, place), part) for place, part in enumerate(parts)))


def _part(document: Document, at: tuple[str | int, ...], keys: LengthPart) -> Part:
    given = {name for name, value in keys.model_dump(exclude={"share"}).items() if value is not None}
    fixed, low, median, p95, high = keys.tokens, keys.min_tokens, keys.median_tokens, keys.p95_tokens, keys.max_tokens
    if given == {"tokens"} and fixed:
        return Part(keys.share, fixed, fixed)
    if given == {"min_tokens", "max_tokens"} and low and high:
        if low <= high:
            return Part(keys.share, low, high)
        raise document.error(at, f"min_tokens is {low:,}, more than max_tokens, {high:,}")
    if given == {"median_tokens", "p95_tokens", "max_tokens"} and median and p95 and high:
        if median < p95 <= high:
            return lognormal(keys.share, median, p95, high)
        raise document.error(at, "median_tokens must be less than p95_tokens, and that at most max_tokens")
    raise document.error(
        at, "a length is tokens; or min_tokens and max_tokens; or median_tokens, p95_tokens and max_tokens"
    )


def _site(document: Document, at: tuple[str | int, ...], keys: SiteKeys) -> Site:
    _known(document, (*at, "devices"), lambda: devices_of(keys.devices))
    return Site(keys.devices, keys.replicas, keys.seats)


def _check_sites(document: Document, sites: tuple[Site, ...]) -> None:
    if len({site.devices for site in sites}) != len(sites):
        raise document.error(("deployment",), "the same devices stand there twice: add their replicas up")
    if len(sites) > 1 and any(site.replicas is None for site in sites):
        raise document.error(("deployment",), "a mix needs replicas for each of its kinds")


def _known(document: Document, at: tuple[str | int, ...], find: Any) -> None:
    try:
        find()
    except QwenfitError as error:
        raise document.error(at, str(error)) from None
