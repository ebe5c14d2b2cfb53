"""`qwen-plan serve`: the planner as a page and an API on this machine. 0 after SIGTERM, 130 after Ctrl-C, 2 where it
cannot start."""

import gc
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.util import find_spec
from json import dumps
from threading import Thread
from time import sleep

from ..profiles.errors import BadInput, install_hint
from .output import say, write

NEEDS = ("fastapi", "uvicorn", "jinja2", "limits")
EVERYWHERE = ("", "0.0.0.0", "::")
BACKLOG = 128
KEEP_ALIVE_S = 30
DRAIN_S = 3
MAX_CONNECTIONS = 256
QUIET_S = 30.0
COLLECTIONS_OF_ALL = 1000  # of younger objects, before Python's collector goes through all of them: about 8 million


def serve(host: str, port: int, allow_auto: bool, allow_hosts: Sequence[str], json: bool) -> None:
    """Serves until it is told to stop. The address goes to stdout once the port is open."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise BadInput(f"the page needs {', '.join(missing)}: {install_hint('serve')}")
    if host in EVERYWHERE and not allow_hosts:
        raise BadInput(
            f"--host {host or '0.0.0.0'} answers on every address of this machine: --allow-host says under which name "
            "or address people ask for it"
        )
    with closing(_listening(host, port)) as listening:
        url = _url(host, listening.getsockname()[1])
        write(dumps({"schema": 1, "url": url}) + "\n" if json else f"{url}\n")
        say(f"qwen-plan: the page is at {url} (Ctrl-C ends it)")
        _run(listening, allow_auto, [host, *allow_hosts])


def _run(listening: socket.socket, allow_auto: bool, hosts: Sequence[str]) -> None:
    import uvicorn

    from .page import LOCAL, app

    names = [*LOCAL, *(_bracketed(name) for name in hosts if name not in EVERYWHERE)]
    config = uvicorn.Config(
        app(allow_auto, names),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    server = uvicorn.Server(config)
    _leave_cycles()
    Thread(target=_collect_when_quiet, args=(lambda: server.server_state.total_requests,), daemon=True).start()
    server.run(sockets=[listening])


def _leave_cycles() -> None:
    """Python's collector does not go through all objects while somebody waits. With what the planner remembers that is
    0.1 to 0.4 s at a time, for nothing: answers have no cycles in them, and go with their last reference."""
    gc.collect()
    gc.freeze()
    young, older, _ = gc.get_threshold()
    gc.set_threshold(young, older, COLLECTIONS_OF_ALL)


def _collect_when_quiet(asked: Callable[[], int], wait: Callable[[float], None] = sleep) -> None:
    """Goes through all objects once after requests, when there was none for `QUIET_S`. `asked`: requests so far."""
    seen = done = asked()
    while True:
        wait(QUIET_S)
        now = asked()
        if now == seen != done:
            gc.collect()
            done = now
        seen = now


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. BadInput where it cannot be had."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise BadInput(f"--host {host}: no address of this machine ({_why(error)})") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise BadInput(f"{host}:{port} cannot be had ({_why(error)}): give another --port, or 0 for any") from None
    return made


def _why(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _url(host: str, port: int) -> str:
    return f"http://{'127.0.0.1' if host in EVERYWHERE else _bracketed(host)}:{port}/"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
