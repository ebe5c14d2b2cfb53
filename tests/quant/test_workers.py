"""Who solves does not show in the result. The cluster's tests need Ray: `bash tests/engines/run ray`.

A local cluster of two workers is started as its users start one; a worker is killed in the middle of its task once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.quant import Recipe, quantize
from qwenfit.quant.workers import Here, workers_at

SMALL = Recipe(group_size=32, tokens=256, sequence_tokens=64)


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the model card, which says how long and by what command."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "README.md"}


def test_without_an_address_it_is_this_process() -> None:
    with workers_at(None) as here:
        assert isinstance(here, Here) and here.share(3) == 3
        assert list(here.map(divmod, [(7, 2), (9, 4)])) == [(3, 1), (2, 1)]


def test_what_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="give auto, or ray://"), workers_at("10.0.0.1"):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Unsupported, match=r"pip install 'qwenfit\[ray\]'"), workers_at("auto"):
        pass


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A head with two CPUs on this machine, found by `auto`."""
    pytest.importorskip("ray", reason="the cluster's tests need Ray: bash tests/engines/run ray")
    words = ["start", "--head", "--block", "--num-cpus=2", "--port=0", "--include-dashboard=false"]
    command = [sys.executable, "-m", "ray.scripts.scripts", *words, "--object-store-memory=200000000"]
    log = tmp_path_factory.mktemp("ray") / "head.log"
    with open(log, "w") as output:
        # A session of its own: `ray stop` would look for processes by their names, and find others.
        head = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        for _ in range(600):
            if "Ray runtime started" in log.read_text():
                break
            assert head.poll() is None, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


@pytest.mark.engines
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("name", "form"), [("qwen3_5", "compressed-tensors"), ("qwen3_5_moe", "gptq")])
def test_a_cluster_gives_the_same_bytes(checkpoint: Callable[..., Path], tmp_path: Path, name: str, form: str) -> None:
    folder, recipe = str(checkpoint(name)), Recipe(group_size=32, tokens=256, sequence_tokens=64, format=form)
    quantize(folder, str(tmp_path / "here"), recipe)
    quantize(folder, str(tmp_path / "there"), recipe, workers="auto")
    assert files(tmp_path / "here") == files(tmp_path / "there")


def die_once(mark: str, number: int) -> int:
    """The first to come kills its worker."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return number
    os.kill(os.getpid(), 9)
    return -1


def fail(number: int) -> int:
    raise ValueError(f"number {number} is wrong")


@pytest.mark.engines
@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_costs_its_task(tmp_path: Path) -> None:
    mark = str(tmp_path / "killed")
    with workers_at("auto") as workers:
        assert list(workers.map(die_once, [(mark, number) for number in range(6)])) == list(range(6))
        with pytest.raises(ValueError, match="number 4 is wrong"):
            list(workers.map(fail, [(4,)]))
    assert os.path.exists(mark)


@pytest.mark.engines
@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_in_the_middle_of_a_run(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever worker is alive after the first modules is killed, again and again, while the run goes on."""
    psutil = pytest.importorskip("psutil", reason="finds the workers: pip install psutil")
    folder = str(checkpoint("qwen3_5"))
    quantize(folder, str(tmp_path / "here"), SMALL)
    killed: list[int] = []

    def kill(progress: object) -> None:
        if len(killed) < 3:
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or ())
                if title.startswith(("ray::solve", "ray::IDLE")):  # not its agents: Ray stops without them
                    killed.append(process.pid)
                    process.kill()
                    break
            time.sleep(0.1)

    quantize(folder, str(tmp_path / "there"), SMALL, workers="auto", watch=kill)
    assert killed and files(tmp_path / "here") == files(tmp_path / "there")
