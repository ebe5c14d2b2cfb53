"""The page: its HTML, the pieces that htmx asks for, and the files to download. All its state is the query string."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from json import dumps
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, FunctionLoader, StrictUndefined
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..planner.boxes import MAX_NODES
from ..planner.search import MAX_ASKED_SEQS, MAX_PARALLEL
from ..profiles.errors import BadInput, QwenfitError
from . import page_report, phrases
from .markdown import markdown
from .page_answer import OFFER_TITLES, offer_rows, offer_sources, view
from .page_choices import changed_rows, choices, listed_model, listed_row
from .page_desk import Desk
from .page_guard import invalid
from .page_question import AUTO, CONTEXTS, MAX_DEVICES, MAX_ROWS, Question, from_query, query, slider_step, tokens_text

PATIENCE_S = 0.025  # of one look through the devices that would do; the page asks again until it is complete
FIRST_PATIENCE_S = 0.4  # where the whole page is asked for
STATIC = {"page.css": "text/css", "page.js": "text/javascript", "page_htmx.min.js": "text/javascript"}
MEDIA = {"html": "text/html", "md": "text/markdown", "json": "application/json", "yaml": "application/yaml"}
Pairs = Sequence[tuple[str, str]]


def web(desk: Desk) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for file in _folder().iterdir():
        if file.name.startswith("page") and file.name.endswith(".j2"):  # compiled before anybody asks
            _templates().get_template(file.name)

    @router.get("/")
    async def page(http: Request) -> Response:
        pairs = http.query_params.multi_items()
        elsewhere = changed_rows(pairs)
        if elsewhere:
            return RedirectResponse(elsewhere, 303)
        return await desk.turns.run(lambda: _page(desk, pairs))

    @router.get("/answer")
    async def answer(http: Request) -> Response:
        question = from_query(http.query_params.multi_items())
        told = await desk.turns.run(lambda: _answer(desk, question))
        return HTMLResponse(_render("page_moved.html.j2", told), headers={"HX-Trigger": dumps(_moved(question))})

    @router.get("/offers")
    async def offers(http: Request) -> Response:
        question = from_query(http.query_params.multi_items())
        told = await desk.turns.run(lambda: _offers(desk, question, PATIENCE_S))
        return HTMLResponse(_render("page_offers.html.j2", told))

    @router.get("/plan.{kind}")
    async def plan_file(http: Request, kind: Literal["json", "md"]) -> Response:
        question = from_query(http.query_params.multi_items())
        found = await desk.turns.run(lambda: desk.plan(question))
        text = markdown(found) if kind == "md" else dumps(found.to_json(), indent=2, allow_nan=False) + "\n"
        return _download(text, "plan", kind)

    @router.get("/report.{kind}")
    async def report_file(http: Request, kind: Literal["html", "md", "json", "yaml"]) -> Response:
        if kind == "html" and not page_report.has_html():
            raise BadInput("the server has no matplotlib for the charts of the HTML report: take .md or .json")
        request = from_query(http.query_params.multi_items()).request()
        if kind == "yaml":
            return _download(page_report.workload(request), "workload", kind)
        async with desk.reports.turn():
            return _download(await page_report.report(request, kind), "report", kind)

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in STATIC:
            raise HTTPException(404)
        return Response(_text(name), media_type=STATIC[name], headers={"Cache-Control": "max-age=60"})

    return router


def problem(http: Request, sentence: str, status: int) -> Response:
    """An error where it will be read: in the page's place for answers, or as JSON."""
    if http.scope["path"] == "/answer":
        return HTMLResponse(_render("page_stopped.html.j2", {"problem": sentence}), status)
    if http.scope["path"] == "/offers":
        return HTMLResponse("", status)
    return JSONResponse({"error": sentence}, status)


def _page(desk: Desk, pairs: Pairs) -> Response:
    """The form with what was asked, and the answer or why there is none."""
    try:
        question = from_query(pairs)
    except BadInput as error:
        return _whole(desk, Question(), {"problem": str(error)}, 422)
    except ValidationError as error:
        return _whole(desk, Question(), {"problem": invalid(error)[0]}, 422)
    try:
        return _whole(desk, question, {**_answer(desk, question), **_offers(desk, question, FIRST_PATIENCE_S)}, 200)
    except QwenfitError as error:
        return _whole(desk, question, {"problem": str(error)}, 422)


def _whole(desk: Desk, question: Question, told: dict[str, Any], status: int) -> Response:
    form = {
        "question": question,
        "choices": choices(desk.allow_auto),
        "model_name": listed_model(question.model),
        "rows": [listed_row(row, desk.allow_auto) for row in question.devices],
        "spread": question.nodes > 1 or any((question.tp, question.pp, question.dp, question.ep)),
        "ctx_text": tokens_text(question.ctx_tokens),
        "moved": _moved(question)["moved"],
        "contexts": [tokens_text(tokens) for tokens in CONTEXTS],
        "last_step": len(CONTEXTS) - 1,
        "max_rows": MAX_ROWS,
        "max_devices": MAX_DEVICES,
        "max_seqs": MAX_ASKED_SEQS,
        "max_nodes": MAX_NODES,
        "max_parallel": MAX_PARALLEL,
    }
    return HTMLResponse(_render("page.html.j2", {"problem": None, **form, **told}), status)


def _answer(desk: Desk, question: Question) -> dict[str, Any]:
    found = desk.plan(question)
    reported = found.fits and AUTO not in found.request.devices and question.seqs <= page_report.MAX_USERS
    return {
        "view": view(found),
        "link": f"/?{query(question)}",
        "query": query(question),
        "reports": _report_kinds() if reported else [],
        "max_users": page_report.MAX_USERS,
        "runner_up_titles": phrases.RUNNER_UP_TITLES,
        "how_sure": phrases.HOW_SURE,
    }


def _offers(desk: Desk, question: Question, patience_s: float) -> dict[str, Any]:
    found = desk.offers(question, patience_s)
    return {
        "offer_titles": OFFER_TITLES,
        "offer_rows": offer_rows(found),
        "offer_sources": offer_sources(found),
        "offers_complete": found.complete,
    }


def _moved(question: Question) -> dict[str, Any]:
    """Where the slider stands and what it says, for the question as it was understood."""
    return {"moved": {"step": slider_step(question.ctx_tokens), "says": f"{question.ctx_tokens:,} tokens"}}


def _report_kinds() -> list[str]:
    return [kind for kind in ("html", "md", "json", "yaml") if kind != "html" or page_report.has_html()]


def _download(text: str, name: str, kind: str) -> Response:
    disposition = {"Content-Disposition": f'attachment; filename="{name}.{kind}"'}
    return Response(text, media_type=MEDIA[kind], headers=disposition)


def _render(name: str, told: dict[str, Any]) -> str:
    return _templates().get_template(name).render(told)


@lru_cache
def _templates() -> Environment:
    return Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@lru_cache
def _text(name: str) -> str:
    return _folder().joinpath(name).read_text(encoding="utf-8")


def _folder() -> Traversable:
    return files(__package__ or "qwenfit.cli")
