"""`qwen-plan serve` as it is typed: where it is, that it answers there, ends when told, and why it cannot start."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from importlib.util import find_spec
from typing import Any

import pytest

from qwenfit.cli import serve
from qwenfit.planner import Request, plan

MISSING = [name for name in ("fastapi", "uvicorn", "jinja2", "limits") if find_spec(name) is None]
needs_the_extra = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (qwenfit[serve])")
COMMAND = [sys.executable, "-m", "qwenfit.cli.plan", "serve"]


@contextmanager
def serving(*arguments: str, prepare: Callable[[], None] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its first line."""
    started = subprocess.Popen(
        [*COMMAND, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    try:
        assert started.stdout
        yield started, started.stdout.readline().strip()
    finally:
        started.kill()
        started.communicate()


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@needs_the_extra
def test_it_answers_until_it_is_told_to_stop(interruptible: Callable[[], None]) -> None:
    with serving(prepare=interruptible if os.name == "posix" else None) as (process, url):
        assert url.startswith("http://127.0.0.1:") and url.endswith("/")
        status, body = get(f"{url}plan.json?gpu=rtx3060&ctx=256K")
        assert status == 200 and json.loads(body)["fits"] is True
        assert get(url, Host="evil.example")[0] == 400
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130, said
        assert "Traceback" not in said and said.splitlines() == [f"qwen-plan: the page is at {url} (Ctrl-C ends it)"]


@needs_the_extra
def test_the_address_as_json() -> None:
    with serving("--json", "--host", "localhost") as (process, line):
        told = json.loads(line)
        assert told["schema"] == 1 and get(f"{told['url']}api/names")[0] == 200
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode in (0, -signal.SIGTERM)


@needs_the_extra
def test_a_port_that_is_taken(qwen_plan: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = qwen_plan("serve", "--port", str(port))
    assert done.status == 2 and done.stdout == ""
    assert done.stderr.startswith(f"qwen-plan: 127.0.0.1:{port} cannot be had (address already in use): give another")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--host", "0.0.0.0"), "--allow-host says under which name"),
        (("--host", "no such host"), "--host no such host"),
        (("--host", "192.0.2.1"), "192.0.2.1:8035 cannot be had"),  # TEST-NET-1: no machine's address
        (("--port", "70000"), "--port"),
        (("--port", "x"), "--port"),
        (("there",), "there"),
    ],
)
@needs_the_extra
def test_what_cannot_be(qwen_plan: Any, arguments: tuple[str, ...], says: str) -> None:
    done = qwen_plan("serve", *arguments)
    assert done.status == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenfit.cli import serve
    from qwenfit.profiles.errors import BadInput, install_hint

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in ("fastapi", "limits") else True)
    with pytest.raises(BadInput) as caught:
        serve.serve("127.0.0.1", 0, False, [], False)
    assert str(caught.value) == f"the page needs fastapi, limits: {install_hint('serve')}"


@needs_the_extra
@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_over_ipv6() -> None:
    with serving("--host", "::1") as (_, url):
        assert url.startswith("http://[::1]:") and get(f"{url}api/names")[0] == 200


def test_help_and_completion_know_it(qwen_plan: Any) -> None:
    assert "serve " in qwen_plan("--help").stdout
    told = qwen_plan("serve", "--help").stdout
    assert all(option in told for option in ("--host", "--port", "--allow-auto", "--allow-host", "--json"))


def test_the_collector_waits_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """One collection once nobody has asked for a while, and none before somebody asks again."""
    requests, heard = iter([0, 5, 9, 9, 9, 9, 12, 12]), []
    monkeypatch.setattr(gc, "collect", lambda: heard.append("collected"))

    def asked() -> int:
        found = next(requests)
        heard.append(str(found))
        return found

    with pytest.raises(StopIteration):
        serve._collect_when_quiet(asked, lambda _seconds: None)
    assert heard == ["0", "5", "9", "9", "collected", "9", "9", "12", "12", "collected"]


def ask_and_forget() -> None:
    """20 answers, and everything that the planner remembers of them."""
    for tokens in range(1000, 21000, 1000):
        plan(Request(devices=("rtx3090", "rtx4090"), model="35b-a3b", ctx_tokens=tokens)).to_json()
    for found in gc.get_objects():
        if isinstance(found, _lru_cache_wrapper) and found.__module__.startswith("qwenfit.planner"):
            found.cache_clear()


def test_answers_leave_no_cycles_behind() -> None:
    """That is why the collector may wait: everything that was made for answers goes with its last reference. 5,000 and
    more objects would be left if each plan were in a cycle with what it was made of."""
    gc.collect()
    gc.disable()
    try:
        ask_and_forget()
        assert gc.collect() < 500
    finally:
        gc.enable()
