"""One process of our own, in a session of its own: started, watched, and stopped with everything that it started.

Its output goes into a file. On Linux the kernel ends it if we die, however that happens; elsewhere only `stop` does.
What it holds at most is the resident memory of its session, looked at twice a second: the file pages of a mapped
checkpoint count, as they do for whoever has to have the memory.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from ...profiles.errors import BadInput

LOOK_S = 0.5
GRACE_S = 20.0
_PR_SET_PDEATHSIG = 1


class OwnProcess:
    """Runs from `with` on until it is left, whatever happens inside. BadInput where the program cannot be started.

    `output` and `errors` are paths; the same path for both is one log.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], output: str, errors: str | None = None
    ) -> None:
        self.words = tuple(words)
        self.peak_bytes = 0
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
        """End the session: asked first, forced after a while. Nothing is left behind, and nobody else is touched."""
        try:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and (self.status is None or any(_session(self.pid))):
                time.sleep(0.05)
        finally:
            self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            self._process.wait()
            self._done.set()
            self._watcher.join(LOOK_S * 4)

    def _signal(self, number: int) -> None:
        if sys.platform == "win32":
            if self.status is None:
                self._process.terminate()
            return
        if sys.platform != "linux":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            return
        for pid in {*_session(self.pid), *((self.pid,) if self.status is None else ())}:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _watch(self) -> None:
        while not self._done.wait(LOOK_S):
            self.peak_bytes = max(self.peak_bytes, session_bytes(self.pid))


def session_bytes(session: int) -> int:
    """Resident bytes of a session's processes; pages that they share count once (Linux; elsewhere 0)."""
    return sum(map(_resident_bytes, _session(session)))


def _session(session: int) -> Iterator[int]:
    """Processes of a session, zombies left out, from /proc; none on other systems."""
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return
    for name in names:
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if len(fields) > 3 and fields[3] == str(session) and fields[0] not in ("Z", "X"):
            yield int(name)


def _resident_bytes(pid: int) -> int:
    """Proportional set size (a page that n processes share counts a n-th), resident set size where that is hidden."""
    for path, field in ((f"/proc/{pid}/smaps_rollup", "Pss:"), (f"/proc/{pid}/status", "VmRSS:")):
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                found = [line.split()[1] for line in file if line.startswith(field)]
        except OSError:
            continue
        if found and found[0].isdigit():
            return int(found[0]) << 10
    return 0


def _die_with_parent(parent: int) -> Callable[[], None]:
    import ctypes

    libc = ctypes.CDLL(None)

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before the tie was made
            os._exit(1)

    return tie
