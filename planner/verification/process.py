"""One process of our own, in a session of its own: started, watched, and stopped with everything that it started.

Its output goes into a file, up to a limit. On Linux the kernel ends it if we die, however that happens; elsewhere only
`stop` does. Everything that it started is its session, and what left that session but was seen as a child of it.
What they hold at most is their resident memory, looked at twice a second: the file pages of a mapped checkpoint count,
as they do for whoever has to have the memory.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from ...profiles.errors import BadInput
from ...profiles.frozen import dataclass

LOOK_S = 0.5
LOOK_SHARE = 0.02  # of the time, at most: looking at the memory of many processes costs milliseconds of theirs
GRACE_S = 20.0
KILL_S = 5.0
MAX_OUTPUT_BYTES = 256 << 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Kin:
    """A process by its number and the clock tick of its start: numbers are given out again, pairs are not."""

    pid: int
    started: int


class OwnProcess:
    """Runs from `with` on until it is left, whatever happens inside. BadInput where the program cannot be started.

    `output` and `errors` are paths; without `errors` the first is one log of both. Where they grow beyond
    MAX_OUTPUT_BYTES it is ended, and `flooded`.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], output: str, errors: str | None = None
    ) -> None:
        self.words = tuple(words)
        self.peak_bytes = 0
        self.flooded = False
        self._family: frozenset[Kin] = frozenset()
        self._files = (output, errors) if errors else (output,)
        self._done = threading.Event()
        with open(output, "wb") as out, open(errors or os.devnull, "wb") as err:
            try:
                self._process = subprocess.Popen(
                    self.words,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err if errors else subprocess.STDOUT,
                    env={**os.environ, **environment},
                    start_new_session=True,
                    preexec_fn=_die_with_parent(os.getpid()) if sys.platform == "linux" else None,
                )
            except OSError as error:
                raise BadInput(f"{self.words[0]} cannot be started: {error.strerror or error}") from None
        self.pid = self._process.pid
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __enter__(self) -> "OwnProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs; a signal is negative."""
        return self._process.poll()

    def wait(self, limit_s: float) -> int | None:
        """The exit status, None where it still runs after `limit_s` seconds."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End all of them: asked first, forced after a while. Nothing is left behind, and nobody else is touched."""
        try:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and self._is_alive():
                time.sleep(0.05)
        finally:
            self._end()
            self._process.wait()
            self._done.set()
            self._watcher.join(LOOK_S * 4)

    def _end(self) -> None:
        """Until none is left: who is killed may have started another one just before."""
        deadline = time.monotonic() + KILL_S
        while True:
            self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            if not self._is_alive() or time.monotonic() > deadline:
                return
            time.sleep(0.02)

    def _is_alive(self) -> bool:
        return self.status is None or bool(self.family())

    def family(self) -> frozenset[Kin]:
        """Who is alive of its session and of what that started, zombies left out. Empty where there is no /proc."""
        self._family = family(self.pid, self._family)
        return self._family

    def _signal(self, number: int) -> None:
        if sys.platform == "win32":
            if self.status is None:
                self._process.terminate()
            return
        if sys.platform != "linux":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            return
        for pid in {*(one.pid for one in self.family()), *((self.pid,) if self.status is None else ())}:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def _watch(self) -> None:
        pause = LOOK_S
        while not self._done.wait(pause):
            began = time.perf_counter()
            self.peak_bytes = max(self.peak_bytes, resident_bytes([one.pid for one in self.family()]))
            if not self.flooded and _sizes(self._files) > MAX_OUTPUT_BYTES:
                self.flooded = True
                self._end()
            pause = max(LOOK_S, (time.perf_counter() - began) / LOOK_SHARE)


def family(session: int, known: Iterable[Kin] = ()) -> frozenset[Kin]:
    """Processes of a session, their descendants, and those `known` that are alive still (Linux; elsewhere none)."""
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return frozenset()
    kin: dict[int, Kin] = {}
    parents: dict[int, int] = {}
    members: set[int] = set()
    known = frozenset(known)
    for name in names:
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if len(fields) < 20 or fields[0] in ("Z", "X"):
            continue
        one = Kin(int(name), int(fields[19]))
        kin[one.pid], parents[one.pid] = one, int(fields[1])
        if fields[3] == str(session) or one in known:
            members.add(one.pid)
    while found := {pid for pid, parent in parents.items() if parent in members and pid not in members}:
        members |= found
    return frozenset(kin[pid] for pid in members)


def resident_bytes(pids: Sequence[int]) -> int:
    """Of all of them together. Of several, a page that n processes share counts a n-th (proportional set size)."""
    if len(pids) == 1:  # its page tables need no walk then, which takes 10 ms per GiB
        return _kilobytes(f"/proc/{pids[0]}/status", "VmRSS:") << 10
    return sum(
        (_kilobytes(f"/proc/{pid}/smaps_rollup", "Pss:") or _kilobytes(f"/proc/{pid}/status", "VmRSS:")) << 10
        for pid in pids
    )


def _kilobytes(path: str, field: str) -> int:
    """0 where it is hidden, or the process is gone."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            found = [line.split()[1] for line in file if line.startswith(field)]
    except OSError:
        return 0
    return int(found[0]) if found and found[0].isdigit() else 0


def _sizes(paths: Iterable[str]) -> int:
    total = 0
    for path in paths:
        with suppress(OSError):
            total += os.path.getsize(path)
    return total


def _die_with_parent(parent: int) -> Callable[[], None]:
    import ctypes

    libc = ctypes.CDLL(None)

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before the tie was made
            os._exit(1)

    return tie
