"""What stands in front of the page: whose Host header, how much, how often; headers; and no error but a sentence."""

from typing import Any

import pytest

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


@pytest.mark.parametrize("host", ["127.0.0.1:8035", "localhost", "LOCALHOST:1", "[::1]:8035"])
def test_its_own_names(page: Any, host: str) -> None:
    assert page().get("/api/names", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8035", "", "a b", "[::2]"]
)
def test_other_names_are_refused(page: Any, host: str) -> None:
    """A page elsewhere whose name was made to point here (DNS rebinding) gets nothing."""
    answered = page().get("/", headers={"Host": host})
    assert answered.status_code == 400 and "Host header" in answered.json()["error"]


def test_a_name_that_was_allowed(page: Any) -> None:
    client = page(hosts=["planner.example"])
    assert client.get("/api/names", headers={"Host": "planner.example:80"}).status_code == 200
    assert client.get("/api/names").status_code == 400


def test_large_bodies(page: Any) -> None:
    client = page()
    within, beyond = b" " * (64 * 1024 - 2) + b"{}", b" " * (64 * 1024) + b"{}"
    as_json = {"Content-Type": "application/json"}
    assert client.post("/api/plan", content=within, headers=as_json).status_code == 200
    for content in (beyond, iter([beyond[:1000]] * 100)):  # with its length, and in chunks that do not say it
        answered = client.post("/api/plan", content=content, headers=as_json)
        assert answered.status_code == 413 and answered.json() == {"error": "the body is larger than 65,536 bytes"}


def test_the_rate(page: Any) -> None:
    client = page(rate="3/minute")
    assert [client.get("/api/names").status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    answered = client.get("/api/names")
    assert 1 <= int(answered.headers["retry-after"]) <= 60
    assert answered.json()["error"].startswith("too many requests: ask again in ")


def test_reports_have_a_rate_of_their_own(page: Any) -> None:
    client = page(report_rate="1/minute")
    assert [client.get("/report.md?seqs=x").status_code for _ in range(2)] == [422, 429]
    assert client.get("/api/names").status_code == 200


@pytest.mark.parametrize("path", ["/", "/answer", "/api/names", "/static/page.css", "/nowhere", "/answer?ctx=x"])
def test_headers_on_every_answer(page: Any, path: str) -> None:
    answered = page().get(path)
    for name, begins in HEADERS.items():
        assert answered.headers[name].startswith(begins), name
    assert not {"access-control-allow-origin", "server", "x-powered-by"} & set(answered.headers)


def test_our_own_mistake_is_a_sentence_too(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr("qwenfit.cli.page_desk.Desk.plan", broken)
    monkeypatch.setattr("qwenfit.cli.page_desk.Desk.warm", lambda self: None)
    for path in ("/api/plan", "/plan.json"):
        client = page(raises=False)
        answered = client.post(path, json={}) if path.startswith("/api") else client.get(path)
        assert answered.status_code == 500 and "secret" not in answered.text
        assert answered.json()["error"].startswith("a bug in qwenfit") and answered.headers["x-frame-options"] == "DENY"


def test_who_waits_too_long_is_turned_away() -> None:
    anyio = pytest.importorskip("anyio")
    pytest.importorskip("fastapi")
    pytest.importorskip("limits")
    from threading import Event

    from qwenfit.cli.page_guard import Busy, Turns

    async def both() -> list[object]:
        turns, done, told = Turns(1, 0.05), Event(), []

        async def first() -> None:
            told.append(await turns.run(lambda: done.wait(5)))

        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await anyio.sleep(0.02)
            try:
                await turns.run(lambda: None)
            except Busy:
                told.append("busy")
            done.set()
        told.append(await turns.run(lambda: "after"))
        return told

    assert anyio.run(both) == ["busy", True, "after"]
