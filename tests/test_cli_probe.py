"""`qwen-plan probe`: the page, the one JSON document, the file that is written, and exit statuses."""

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenfit.cli import probe as command
from qwenfit.cli.output import Screen
from qwenfit.cli.plan import main
from qwenfit.cli.probe_page import document, page
from qwenfit.profiles.errors import BadInput
from qwenfit.profiles.machine import Machine
from qwenfit.profiles.machine_profile import Ceilings
from qwenfit.profiles.probe import probe
from qwenfit.profiles.this_machine import devices_here

SCREEN = Screen(100, False, True)
FOUND = Ceilings(
    15e9, 14e9, None, {"fp32": 110e9, "int8": 300e9}, (14e9, 19e9), 0.6, "C kernels, 2 threads", ("not bf16",)
)


@pytest.fixture
def two_gpus(made_nvml: Any, recorded: Callable[[str], str]) -> Machine:
    running = [SimpleNamespace(pid=4711, usedGpuMemory=3 << 30)]
    cards = {}, {"nvmlDeviceGetUUID": "GPU-7", "nvmlDeviceGetComputeRunningProcesses": running}
    nvml = made_nvml(*cards, broken={"nvmlDeviceGetEnforcedPowerLimit": 4})
    return probe(recorded("epyc-9174f-2s"), nvml=nvml, environment={}, system="linux", places={"current folder": "."})


def test_a_page_says_what_is_here(two_gpus: Machine) -> None:
    here = devices_here(two_gpus)
    lines = page(two_gpus, here, [None, None], SCREEN).splitlines()
    text = " ".join(" ".join(lines).split())
    assert all(len(line) <= 100 for line in lines)
    assert "32 usable in 2 sockets, 64 threads" in text
    assert "NUMA 0: 32 CPUs, 377.2 GiB; 1: 32 CPUs, 377.2 GiB" in text
    assert "NVIDIA H100 80GB HBM3, 79.1 GiB free of 79.6 GiB, capability 9.0, 345 of 1,980 MHz" in text
    assert "PCIe 5 x16 (at most 5 x16), beside python3 3.0 GiB" in text
    assert "drivers nvidia 580.95.05, cuda 13.0" in text
    assert "- power limit of GPU 0 and GPU 1: NVML says Insufficient Permissions" in text
    assert "h100-sxm: 79.1 GiB usable (free now" in text and "3.4 TB/s" in text


def test_a_cpu_is_told_how_to_get_a_speed(recorded: Callable[[str], str]) -> None:
    machine = probe(recorded("container-v1"), nvml=None, environment={}, system="linux", places={})
    here = devices_here(machine)
    text = " ".join(page(machine, here, [None], SCREEN).split())
    assert "5.0 GiB can be had of 62.5 GiB; its control groups allow 8.0 GiB" in text
    assert "8 usable (of 16 threads of the machine), CPU time of 2.5" in text
    assert "`qwen-plan probe --measure --output here.yaml`, then `--gpu here.yaml`" in text
    measured = " ".join(page(machine, here, [FOUND], SCREEN).split())
    assert "read 15.0 GB/s, between 14.0 GB/s and 19.0 GB/s" in measured
    assert "other work ran beside and took 40% of the CPU time: measure again" in measured
    assert "matmul fp32 110.0 GFLOP/s, int8 300.0 GFLOP/s" in measured and "not bf16" in measured


def test_one_document(two_gpus: Machine) -> None:
    told = json.loads(document(two_gpus, devices_here(two_gpus), [FOUND, None]))
    assert told["schema"] == 1 and set(told) == {"schema", "machine", "devices", "measured"}
    assert told["machine"]["gpus"][0]["power_limit_w"] is None and told["machine"]["unseen"]
    assert [one["name"] for one in told["devices"]] == ["h100-sxm"] * 2
    assert told["measured"][0]["read_bytes_per_s"] == 15_000_000_000 and told["measured"][1] is None


def test_on_this_machine(qwen_plan: Any, tmp_path: Path) -> None:
    """The whole way: probe, write, plan with the file; nothing is replaced unasked; the JSON is one document."""
    file = str(tmp_path / "here.yaml")
    done = qwen_plan("probe", "--output", file)
    assert (done.status, done.stderr) == (0, f"qwen-plan: wrote {file}: `qwen-plan --gpu {file}` plans with it\n")
    assert "`--gpu auto` plans with" in done.stdout
    planned = qwen_plan("--gpu", file, "--model", "0.8b", "--ctx", "4096", "--json")
    assert planned.status in (0, 1) and json.loads(planned.stdout)["schema"] == 1
    again = qwen_plan("probe", "--output", file)
    assert again.status == 2 and again.stderr == f"qwen-plan: {file} is there already: --overwrite replaces it\n"
    done = qwen_plan("probe", "--output", file, "--overwrite", "--json")
    assert done.status == 0 and json.loads(done.stdout)["devices"]
    assert [one.name for one in tmp_path.iterdir()] == ["here.yaml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--output", "here.txt"), "a profile is a .yaml file"),
        (("--output", "no/such/folder/here.yaml"), "cannot be written: No such file or directory"),
        (("--format", "github"), "a machine has table, json"),
        (("--json", "--format", "markdown"), "a machine has table, json"),
        (("nonsense",), "unexpected extra argument"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    qwen_plan: Any, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = qwen_plan("probe", *arguments, cwd=tmp_path)
    assert done.status == 2 and sentence in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
    assert not list(tmp_path.iterdir())


def test_measuring_without_torch_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    importing = builtins.__import__

    def without_torch(name: str, *rest: Any) -> Any:
        if name == "torch" or "machine_speed" in name:
            raise ImportError("No module named 'torch'")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    file = tmp_path / "here.yaml"
    assert main(["probe", "--measure", "--output", str(file)]) == 2
    said = capsys.readouterr()
    assert "pip install 'qwenfit[quant]'" in said.err and "No module named 'torch'" in said.err
    assert not said.out and not file.exists()


def test_measuring_goes_into_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recorded: Callable[[str], str], tmp_path: Path
) -> None:
    machine = probe(recorded("container-v1"), nvml=None, environment={}, system="linux", places={})
    monkeypatch.setattr(command, "probe", lambda: machine)
    threads: list[int] = []

    def measure_cpu(count: int, free_bytes: int) -> Ceilings:
        threads.append(count)
        return FOUND

    fake = SimpleNamespace(measure_cpu=measure_cpu, measure_cuda=None, cuda_uuids=tuple)
    monkeypatch.setitem(sys.modules, "qwenfit.kernels.proof.machine_speed", fake)  # type: ignore[arg-type]
    file = tmp_path / "here.yaml"
    assert main(["probe", "--measure", "--output", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert threads == [3] and told["devices"][0]["memory_bandwidth_bytes_per_s"] == 15_000_000_000
    text = file.read_text(encoding="utf-8")
    assert "memory_bandwidth_bytes_per_s: 15000000000" in text and "# Other work ran beside" in text
    assert main(["--gpu", str(file), "--model", "0.8b", "--ctx", "4096", "--engine", "llama.cpp"]) == 0
    assert "Decodes ~" in capsys.readouterr().out


def test_gpus_are_measured_by_their_uuid_and_like_ones_once(monkeypatch: pytest.MonkeyPatch, two_gpus: Machine) -> None:
    """CUDA may count them otherwise than NVML does."""
    measured: list[int] = []

    def measure_cuda(index: int) -> Ceilings:
        measured.append(index)
        return FOUND

    here = devices_here(two_gpus)
    uuids = ("GPU-7", here[0].gpu.uuid if here[0].gpu else "")
    fake = SimpleNamespace(measure_cpu=None, measure_cuda=measure_cuda, cuda_uuids=lambda: uuids)
    monkeypatch.setitem(sys.modules, "qwenfit.kernels.proof.machine_speed", fake)  # type: ignore[arg-type]
    assert command._measured(two_gpus, here) == (FOUND, FOUND)
    assert measured == [1]
    fake.cuda_uuids = tuple
    with pytest.raises(BadInput, match="this torch does not reach H100"):
        command._measured(two_gpus, here)
