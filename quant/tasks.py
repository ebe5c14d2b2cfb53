"""Work in pieces of a fixed size, one piece per thread: the same bytes come out whatever the number of threads.

A BLAS that shares one product among its threads cuts it differently for two threads than for one, and then sums in
another order. Here the pieces are cut beforehand, by sizes that do not know how many threads there are, and every
piece is computed by one thread with torch set to one. It also spares the barriers of an OpenMP team, which on a shared
machine spin for most of the time that a small operation takes.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Argument = TypeVar("Argument")
Value = TypeVar("Value")


class Tasks:
    """What `one_thread_each` yields: `run` calls functions on its threads."""

    def __init__(self, pool: Executor | None) -> None:
        self._pool = pool

    def run(self, function: Callable[[int], object], arguments: Iterable[int]) -> None:
        """Call `function` with every argument and return when all are done; the first exception is raised again."""
        if self._pool is None:
            for argument in arguments:
                function(argument)
            return
        for future in [self._pool.submit(function, argument) for argument in arguments]:
            future.result()


def one_ahead(
    function: Callable[[Argument], Value], arguments: Iterable[Argument], threads: int = 1
) -> Iterator[Value]:
    """function(argument) for one argument after the other; while a value is in use the next one is on its way, in a
    thread of its own: for reading. Two values are in memory at most.

    threads: torch's there. With one, an operation beside other work does not wait for a team of threads, which spins.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as reader:
        coming: Future[Value] | None = None
        for argument in arguments:
            waiting, coming = coming, reader.submit(function, argument)
            if waiting is not None:
                yield waiting.result()
                del waiting
        if coming is not None:
            yield coming.result()


class Aside:
    """One call at a time in a thread of its own, while the caller goes on: for waiting for a disk.

    Used as a context: its end waits for the last call. An exception of a call is raised by the next `is_free` or
    `wait`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[object] | None = None

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def is_free(self) -> bool:
        """Whether the call before this one is done."""
        if self._running is None or not self._running.done():
            return self._running is None
        self.wait()
        return True

    def start(self, function: Callable[..., object], *arguments: object) -> None:
        """function(*arguments), behind the call before this one."""
        self.wait()
        self._running = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Returns when nothing is under way."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


@contextmanager
def one_thread_each(device: torch.device | str = "cpu") -> Iterator[Tasks]:
    """As many threads as torch.get_num_threads() says, each with a torch of one thread; only the caller for a GPU.

    torch's setting is the process's: do not enter it in two threads at once.
    """
    if torch.device(device).type != "cpu":
        yield Tasks(None)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield Tasks(None)
        else:
            # torch keeps the number per thread and starts a new thread with the process's.
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield Tasks(pool)
    finally:
        torch.set_num_threads(threads)
