"""`app()`: the planner as a web application, page and API. `qwen-plan serve` runs it; any ASGI server can."""

from collections.abc import Sequence

from fastapi import FastAPI

from .page_api import api
from .page_desk import Desk
from .page_guard import RATE, REPORT_RATE, guard
from .page_web import problem, web

LOCAL = ("127.0.0.1", "localhost", "[::1]")
SUMMARY = "Does a Qwen3.5 model fit, how far does the context reach, how fast is it, how is it launched? Unofficial."


def app(
    allow_auto: bool = False, hosts: Sequence[str] = LOCAL, rate: str = RATE, report_rate: str = REPORT_RATE
) -> FastAPI:
    """`hosts` are the names in the address that a browser may use; rates are per client address, as `limits` writes
    them. No documentation pages: theirs fetch scripts from elsewhere."""
    made = FastAPI(title="qwen-plan", summary=SUMMARY, docs_url=None, redoc_url=None)
    desk = Desk(allow_auto)
    desk.warm()
    made.include_router(web(desk))
    made.include_router(api(desk))
    guard(made, list(hosts), rate, report_rate, problem)
    return made
