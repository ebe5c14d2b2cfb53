"""A process of our own: it ends with all that it started, and what it took is seen. Helpers are interpreters started
here; no process of the test's survives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenfit.planner.verification import process
from qwenfit.planner.verification.process import OwnProcess, family, resident_bytes
from qwenfit.profiles.errors import BadInput

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions are read from Linux' /proc")

CHILD_AND_GRANDCHILD = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
code = f"import subprocess, time; subprocess.Popen({sleep!r}); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
print(child.pid, flush=True)
time.sleep(60)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
RUNAWAY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def until(holds: Callable[[], object], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_children_and_grandchildren_end_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with OwnProcess(python(CHILD_AND_GRANDCHILD), {}, str(log)) as own:
        until(lambda: len(own.family()) == 3)
        everybody = [one.pid for one in own.family()]
        assert own.pid in everybody and own.status is None
    assert all(map(is_gone, everybody)) and not family(own.pid)
    assert own.status == -signal.SIGTERM


def test_one_that_does_not_listen_is_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    log = tmp_path / "log"
    with OwnProcess(python(DEAF), {}, str(log)) as own:
        until(lambda: log.read_text() == "deaf\n")
    assert own.status == -signal.SIGKILL and is_gone(own.pid)


def test_a_child_that_left_the_session_is_found(tmp_path: Path) -> None:
    """Some servers start workers with setsid; the first process may be gone when they are to be stopped."""
    log = tmp_path / "log"
    with OwnProcess(python(RUNAWAY), {}, str(log)) as own:
        until(lambda: log.read_text().strip() and len(own.family()) == 2)
        child = int(log.read_text())
        assert os.getsid(child) != own.pid
        os.kill(own.pid, signal.SIGKILL)
        until(lambda: own.status is not None)
        assert not is_gone(child)
    assert is_gone(child)


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen(python("import time; time.sleep(60)"))
    try:
        with OwnProcess(python("print(1)"), {}, str(tmp_path / "log")) as own:
            assert own.wait(20) == 0
            assert other.pid not in {one.pid for one in own.family()}
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_it_is_stopped_whatever_is_raised_inside(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), OwnProcess(python("import time; time.sleep(60)"), {}, str(tmp_path / "l")):
        raise KeyboardInterrupt


def test_it_dies_with_us(tmp_path: Path) -> None:
    """We are killed by what nobody can catch: the kernel ends the process that we started."""
    code = f"""
import time
from qwenfit.planner.verification.process import OwnProcess
with OwnProcess([{sys.executable!r}, "-c", "import time; time.sleep(60)"], {{}}, {str(tmp_path / "log")!r}) as own:
    print(own.pid, flush=True)
    time.sleep(60)
"""
    helper = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    try:
        assert helper.stdout
        pid = int(helper.stdout.readline())
        assert not is_gone(pid)
    finally:
        helper.kill()
        helper.communicate()
    until(lambda: is_gone(pid))


def test_a_known_allocation_is_in_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB in a child, beside two interpreters of some 10 MB each."""
    monkeypatch.setattr(process, "LOOK_S", 0.02)
    child = "import time; held = bytearray(b'x') * (64 << 20); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with OwnProcess(python(code), {}, str(tmp_path / "log")) as own:
        assert own.wait(30) == 0
    assert 64 << 20 < own.peak_bytes < 114 << 20
    assert resident_bytes([]) == 0 and resident_bytes([own.pid]) == 0


def test_one_that_prints_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOOK_S", 0.02)
    monkeypatch.setattr(process, "MAX_OUTPUT_BYTES", 1 << 20)
    log = tmp_path / "log"
    with OwnProcess(python("while True: print('x' * 1000)"), {}, str(log)) as own:
        assert own.wait(20) == -signal.SIGKILL and own.flooded
    assert log.stat().st_size > 1 << 20


def test_output_errors_and_environment(tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    code = "import os, sys; print(os.environ['WHAT']); print('wrong', file=sys.stderr); sys.exit(3)"
    with OwnProcess(python(code), {"WHAT": "told"}, str(out), str(err)) as own:
        assert own.wait(20) == 3
    assert (out.read_text(), err.read_text()) == ("told\n", "wrong\n")
    with OwnProcess(python(code), {"WHAT": "told"}, str(out)) as own:
        own.wait(20)
    assert sorted(out.read_text().split()) == ["told", "wrong"]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^/nowhere/llama-server cannot be started: No such file or directory$"):
        OwnProcess(["/nowhere/llama-server"], {}, str(tmp_path / "log"))
    (tmp_path / "text").write_text("no program")
    with pytest.raises(BadInput, match="cannot be started: Permission denied"):
        OwnProcess([str(tmp_path / "text")], {}, str(tmp_path / "log"))
