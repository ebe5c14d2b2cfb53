"""What stands between the network and the page: whose Host header, how often, how much at a time, and which headers.

`TrustedHostMiddleware` (a page of another site cannot reach a local server under its own name), `limits` (a moving
window per client address) and Starlette's limit of the body do the work; this file says how much of each.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from math import ceil
from time import time
from typing import Any, TypeVar

from anyio import CapacityLimiter, move_on_after, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import Response
from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from ..profiles.errors import QwenfitError
from .output import clean

MAX_BODY_BYTES = 64 << 10
RATE = "120/second; 3000/minute"  # per client address: a slider that is dragged asks at every frame
REPORT_RATE = "6/minute"  # a capacity report simulates for seconds
AT_ONCE, WAIT_S = 2, 5.0
REPORTS_AT_ONCE, REPORT_WAIT_S = 1, 30.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
SENTENCES = {
    400: "the request cannot be read: /openapi.json describes what is taken",
    404: "there is no such page: the planner is at /, and /openapi.json describes the API",
    405: "this address does not take that method: /openapi.json says which it takes",
    413: f"the body is larger than {MAX_BODY_BYTES:,} bytes",
}
# What the two middlewares say in plain text.
IN_PLAIN_TEXT = {
    400: "this server is not known under the name in the Host header: `qwen-plan serve --allow-host` adds one",
    413: SENTENCES[413],
}
BUG = "a bug in qwenfit: whoever started the server finds it in the log; please report it"

T = TypeVar("T")
Render = Callable[[Request, str, int], Response]
Next = Callable[[Request], Awaitable[Response]]


class Busy(Exception):
    """No turn came in time."""


class Turns:
    """So many pieces of work at a time, each in a thread. Who waits longer than `wait_s` is turned away with Busy."""

    def __init__(self, at_once: int, wait_s: float) -> None:
        self._limiter, self._wait_s = CapacityLimiter(at_once), wait_s

    async def run(self, work: Callable[[], T]) -> T:
        async with self.turn():
            return await to_thread.run_sync(work)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        with move_on_after(self._wait_s) as waiting:
            await self._limiter.acquire()
        if waiting.cancelled_caught:
            raise Busy
        try:
            yield
        finally:
            self._limiter.release()


def guard(app: FastAPI, hosts: list[str], rate: str, report_rate: str, render: Render) -> None:
    """Puts the checks in front of the app, the headers on its answers, and one sentence in place of every error."""
    window = MovingWindowRateLimiter(MemoryStorage())
    every, reports = parse_many(rate), parse_many(report_rate)

    async def limited(request: Request, call_next: Next) -> Response:
        client = request.client.host if request.client else ""
        for item in reports if request.scope["path"].startswith("/report") else every:
            if not window.hit(item, client):
                wait_s = _wait_s(window, item, client)
                answer = render(request, f"too many requests: ask again in {wait_s} s", 429)
                answer.headers["Retry-After"] = str(wait_s)
                return answer
        return await call_next(request)

    async def with_headers(request: Request, call_next: Next) -> Response:
        answer = await call_next(request)
        if answer.status_code in IN_PLAIN_TEXT and answer.headers["content-type"].startswith("text/plain"):
            answer = render(request, IN_PLAIN_TEXT[answer.status_code], answer.status_code)
        return add_headers(answer)

    app.middleware("http")(limited)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.middleware("http")(with_headers)
    for kind, sentence in _SENTENCE.items():
        app.add_exception_handler(kind, _handler(sentence, render))


def add_headers(answer: Response) -> Response:
    for name, value in HEADERS.items():
        answer.headers.setdefault(name, value)
    return answer


def _wait_s(window: MovingWindowRateLimiter, item: RateLimitItem, client: str) -> int:
    return max(1, ceil(window.get_window_stats(item, client).reset_time - time()))


def _handler(sentence: Callable[[Any], tuple[str, int]], render: Render) -> Any:
    async def handle(request: Request, error: Exception) -> Response:
        return add_headers(render(request, *sentence(error)))

    return handle


def _http(error: HTTPException) -> tuple[str, int]:
    return SENTENCES.get(error.status_code, "the request cannot be answered"), error.status_code


def invalid(error: RequestValidationError | ValidationError) -> tuple[str, int]:
    """The first thing that is wrong: where, and what. The value itself is not repeated."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
    what = clean(str(first["msg"]))[:200]
    return f"{clean(where)[:200]}: {what}" if where else what, 422


_SENTENCE: dict[type[Exception], Callable[[Any], tuple[str, int]]] = {
    QwenfitError: lambda error: (clean(str(error))[:1000], 422),
    ValidationError: invalid,
    RequestValidationError: invalid,
    HTTPException: _http,
    Busy: lambda error: ("the server is busy with other questions: ask again", 503),
    Exception: lambda error: (BUG, 500),
}
