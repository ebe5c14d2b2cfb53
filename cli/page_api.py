"""The planner as JSON over HTTP. The answers are the command's `--json`; docs/serve.md shows how to ask."""

from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import BaseModel

from ..planner.offers import Offer, Offers
from ..profiles.device_names import devices
from ..profiles.model_catalog import models
from . import completion
from .catalogs import device_record, model_record
from .page_desk import Desk
from .page_question import Question


class Problem(BaseModel):
    """Why there is no answer, in one sentence."""

    error: str


class Name(BaseModel):
    """A name that a question may use, and a word about it."""

    name: str
    title: str


class Names(BaseModel):
    """What a question may fix beside the model and the devices."""

    engines: list[Name]
    weights: list[Name]
    kv_dtypes: list[Name]
    state_dtypes: list[Name]
    interconnects: list[Name]


PATIENCE_S = 5.0
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in (
        (400, "unreadable, or a Host header with another name than this server's"),
        (413, "too large"),
        (422, "no answer: out of bounds, unknown, or a combination that does not exist"),
        (429, "too many requests: Retry-After says when to ask again"),
        (503, "busy"),
    )
}


def api(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/api", responses=PROBLEMS)

    @router.post("/plan")
    async def plan(question: Annotated[Question, Body()]) -> dict[str, Any]:
        """What `qwen-plan --json` prints for this question."""
        return await desk.turns.run(lambda: desk.plan(question).to_json())

    @router.post("/offers")
    async def offers(question: Annotated[Question, Body()]) -> dict[str, Any]:
        """Devices with a published price that would do, the cheapest first. Not `complete`: there was no time to look
        at all of them; asking again goes on from there."""
        return await desk.turns.run(lambda: _offers_json(desk.offers(question, PATIENCE_S)))

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """The catalog of models, as `qwen-plan models --json`."""
        return {"schema": 1, "models": [model_record(one) for one in models()]}

    @router.get("/devices")
    async def list_devices() -> dict[str, Any]:
        """The catalog of devices, as `qwen-plan devices --json`."""
        return {"schema": 1, "devices": [device_record(one) for one in devices()]}

    @router.get("/names")
    async def list_names() -> Names:
        """Engines, weight formats, types of the cache and of the recurrent state, links between boxes."""
        return Names(**{kind: _named(kind) for kind in Names.model_fields})

    return router


def _named(kind: str) -> list[Name]:
    return [Name(name=name, title=title) for name, title in completion.LISTS[kind]()]


def _offers_json(offers: Offers) -> dict[str, Any]:
    return {"schema": 1, "complete": offers.complete, "offers": [_offer_json(one) for one in offers.found]}


def _offer_json(one: Offer) -> dict[str, object]:
    price = one.price
    return {
        "device": price.device.name,
        "count": one.count,
        "usd": one.usd,
        "price": {"usd_each": price.usd, "what": price.what, "source": price.source},
        "plan": one.plan.to_json(),
    }
