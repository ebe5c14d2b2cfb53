"""Who solves: this process, or a Ray cluster (`pip install 'qwenfit[ray]'`).

    with workers_at("ray://head:10001") as workers:
        shared = workers.share(factor)                       # sent to the cluster once
        for solved in workers.map(solve_module, jobs): ...   # in the order of the jobs

A job is a function of its arguments alone, and gives the same bits on any number of threads (`tasks.py`), so where it
runs does not show in the result. A worker that dies costs its task: Ray runs it again elsewhere.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any

from ..profiles.errors import BadInput, Unsupported, install_hint

MOST_WAITING = 2
"""Jobs per worker that are under way or done and not taken: more would only fill the cluster's memory."""
RETRIES = 3


class Here:
    """Jobs run one after another in this process; each takes all of its threads."""

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """function(*job) for every job."""
        for job in jobs:
            yield function(*job)


class RayCluster:
    """Jobs run on the workers of a cluster, one CPU each."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._limit = MOST_WAITING * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def share(self, value: Any) -> Any:
        """A reference that jobs may have as an argument in place of the value."""
        return self._ray.put(value)

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """function(*job) for every job, in their order; a few are under way at a time."""
        remote = self._ray.remote(max_retries=RETRIES, num_cpus=1)(function)
        waiting: deque[Any] = deque()
        for job in jobs:
            waiting.append(remote.remote(*job))
            if len(waiting) >= self._limit:
                yield self._got(waiting.popleft())
        while waiting:
            yield self._got(waiting.popleft())

    def _got(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayError as error:
            raise BadInput(
                f"the Ray cluster gave up: {_line(error)}; the same command with --resume goes on"
            ) from error


@contextmanager
def workers_at(address: str | None) -> Iterator[Here | RayCluster]:
    """None: this process. `auto`: the cluster that this machine is part of; `ray://HOST:PORT`: another one.

    `Unsupported` without Ray; `BadInput` where there is no cluster, or it has another qwenfit.
    """
    if address is None:
        yield Here()
        return
    if address != "auto" and not address.startswith("ray://"):
        raise BadInput(f"--workers {address}: give auto, or ray://HOST:PORT")
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise Unsupported(f"--workers needs Ray: {install_hint('ray')}") from error
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, namespace="qwenfit")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadInput(f"--workers {address}: there is no cluster ({_line(error)})") from error
    try:
        cluster = RayCluster(ray)
        [theirs] = cluster.map(_version, [()])
        if theirs != _version():
            raise BadInput(f"--workers {address}: the cluster has qwenfit {theirs}, here is {_version()}")
        yield cluster
    finally:
        ray.shutdown()


def _version() -> str:
    """Of qwenfit and of torch, which decide about bits."""
    return f"{version('qwenfit')} with torch {version('torch')}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
