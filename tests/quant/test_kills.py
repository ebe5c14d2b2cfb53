"""The command `qwen-quant`, killed with SIGKILL at random moments of its work and gone on with: the same bytes, always.

    pytest -m slow -s tests/quant/test_kills.py                 20 killed runs of the default format, 4 of each other
    QWENFIT_KILLS_SEED=7 pytest -m slow -s tests/quant/test_kills.py

A moment is drawn, in CPU seconds, between the first file of a run and its end, as an undisturbed one has them; before
it there is nothing to go on with. After a kill the target is complete or does not exist; a run that goes on may be
killed again (one time in three). Then every file is compared. The command in the model card says --resume where it was
given, which is the one difference allowed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="the calibration text is tokenized: pip install tokenizers")

SMALL_HYBRID = Path(__file__).parents[1] / "data" / "small_hybrid"
COMMAND = [sys.executable, "-c", "import sys; from qwenfit.cli.quant import main; sys.exit(main())"]
SEED = int(os.environ.get("QWENFIT_KILLS_SEED", "22"))
TOKENS = ("--tokens", "2048")
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "compressed-tensors": (20, ("--method", "gptq", "--sym", *TOKENS)),
    "gptq": (4, ("--method", "gptq", "--format", "gptq", *TOKENS)),
    "awq": (4, ("--method", "awq", "--format", "awq", *TOKENS)),
    "no full-precision targets": (4, ("--method", "gptq", "--no-gptaq", "--asym", *TOKENS)),
    "gguf": (4, ("--format", "gguf", "--gguf-type", "q4_0", *TOKENS)),
    "rtn": (4, ("--bits", "8", "--method", "rtn")),
}


def files(folder: Path) -> dict[str, bytes]:
    """Every file by its path below `folder`; the model card without --resume."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {**found, "README.md": found["README.md"].replace(b" --resume", b"")}


class Run:
    """One checkpoint of a folder `work`, made by a command that may be killed."""

    def __init__(self, work: Path, source: Path, options: tuple[str, ...], draw: random.Random) -> None:
        work.mkdir()
        self.work, self.draw = work, draw
        self.command = [*COMMAND, str(source), "out", *options]

    @property
    def partial(self) -> bool:
        return (self.work / ".out.partial").exists()

    def start(self, *more: str) -> "subprocess.Popen[Any]":
        """The command, on one thread or two, as chance has it."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.draw.choice((1, 2)))}
        streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([*self.command, *more], cwd=self.work, env=environment, **streams)

    def finish(self, *more: str) -> tuple[float, float]:
        """Undisturbed to the end: CPU seconds until the first file and in all."""
        process, first_s, total_s = self.start(*more), None, 0.0
        while process.poll() is None:
            total_s = max(total_s, cpu_s(process.pid))
            if first_s is None and self.partial:
                first_s = total_s
            time.sleep(0.002)
        words = process.communicate()[1].decode()
        assert process.returncode == 0, words
        assert sorted(path.name for path in self.work.iterdir()) == ["out"]
        return first_s or 0.0, total_s

    def kill(self, moment_s: float, *more: str) -> bool:
        """After so many CPU seconds, which do not depend on how busy the machine is. False where it was done before."""
        process = self.start(*more)
        while process.poll() is None and cpu_s(process.pid) < moment_s:
            time.sleep(0.002)
        process.kill()
        words = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), words
        return process.returncode != 0


def cpu_s(pid: int) -> float:
    """Of a process that runs, from Linux's own account of it; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def disturbed(run: Run, span_s: tuple[float, float]) -> list[float]:
    """Killed once at least, and gone on with to the end: the moments of its kills."""
    moments: list[float] = []
    more: tuple[str, ...] = ()
    while True:
        moment_s = run.draw.uniform(*span_s)
        if run.kill(moment_s, *more):
            moments.append(moment_s)
            if (run.work / "out").exists():  # killed behind the last step: then it has to be complete
                return moments
            more = ("--resume",) if run.partial else ()
            if run.draw.random() > 1 / 3:
                run.finish(*more)
                return moments
        elif moments:
            return moments
        else:
            shutil.rmtree(run.work / "out")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="moments are CPU seconds as Linux counts them")
@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments(name: str, tmp_path: Path) -> None:
    runs, options = CASES[name]
    draw = random.Random(SEED)
    span_s = Run(tmp_path / "whole", SMALL_HYBRID, options, draw).finish()
    expected = files(tmp_path / "whole" / "out")
    print(f"\nseed {SEED}, {runs} runs of {span_s[0]:.2f} to {span_s[1]:.2f} CPU s: {' '.join(options)}")
    for number in range(runs):
        run = Run(tmp_path / f"run-{number}", SMALL_HYBRID, options, draw)
        moments = disturbed(run, span_s)
        print(f"  run {number}: killed after {', '.join(f'{moment:.2f}' for moment in moments)} CPU s", flush=True)
        made = files(run.work / "out")
        assert sorted(made) == sorted(expected)
        unlike = [name for name in made if made[name] != expected[name]]
        assert not unlike, f"run {number} of seed {SEED}"


def test_killed_and_killed_again(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, without drawing: as soon as there is something, and some layers later."""
    from qwenfit.cli.quant import main

    source, options = checkpoint("qwen3_5"), ("--sym", "--group-size", "32", "--tokens", "512")
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    monkeypatch.setattr(sys, "argv", ["qwen-quant", str(source), "out", *options])
    assert main() == 0
    run = Run(tmp_path / "killed", source, options, random.Random(0))
    for layers, more in ((0, ()), (2, ("--resume",))):
        process = run.start(*more)
        while process.poll() is None and not layer_is_done(tmp_path / "killed", layers):
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode != 0 and run.partial and not (tmp_path / "killed" / "out").exists()
    run.finish("--resume")
    assert files(run.work / "out") == files(tmp_path / "whole" / "out")


def layer_is_done(work: Path, layers: int) -> bool:
    """Whether the journal of a run says that so many layers are written."""
    state = work / ".out.partial" / ".state.json"  # replaced in one step, so it is always whole
    return state.exists() and json.loads(state.read_text())["layer"] >= layers
