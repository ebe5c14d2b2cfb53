"""What of a machine goes into files that others read: enough to compare figures, and nobody's name."""

import getpass
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenfit.profiles.machine import machine_record
from qwenfit.profiles.probe import probe
from qwenfit.profiles.this_machine import machine_json

MACHINES = sorted(file.stem for file in (Path(__file__).parent / "data" / "machines").glob("*.json"))


def test_nothing_of_this_machine_tells_whose_it_is() -> None:
    text = json.dumps(machine_json())
    private = [socket.gethostname(), os.path.expanduser("~"), os.getcwd(), getpass.getuser(), os.uname().version]
    for word in private:
        # "vm" and "root" are words that occur in others; they must not stand alone.
        alone = f'"{word}"' if len(word) < 5 else word
        assert alone not in text, word
    assert "/" not in text.replace("GNU/Linux", "")


@pytest.mark.parametrize("name", MACHINES)
def test_nor_of_recorded_ones(recorded: Callable[[str], str], made_nvml: Any, name: str) -> None:
    """A kernel named after somebody, a board's serial number, unique ids, UUIDs, processes: all are in the sources."""
    running = [SimpleNamespace(pid=4711, usedGpuMemory=1 << 30)]
    nvml = made_nvml({"nvmlDeviceGetComputeRunningProcesses": running})
    machine = probe(recorded(name), nvml=nvml, environment={"HOME": "/home/anna"}, system="linux")
    assert machine.gpus[0].uuid and machine.gpus[0].processes
    text = json.dumps(machine_record(machine))
    for word in ("anna", "1000000012345678", "8b1c0ffee5e41a1d", "11673270660693242239", "GPU-5e37", "4711", "python3"):
        assert word not in text, word
    assert "/" not in text.replace("GNU/Linux", "")


def test_it_says_what_figures_depend_on(recorded: Callable[[str], str]) -> None:
    record = machine_record(probe(recorded("mi300x-and-7900xtx"), nvml=None, environment={}, system="linux", places={}))
    assert record["kernel"] == "6.8.0" and record["system"] == "Ubuntu 24.04.1 LTS"
    assert record["cpu"]["cores"] == 4 and "avx512_vnni" in record["cpu"]["features"]
    assert [gpu["title"] for gpu in record["gpus"]] == ["AMD Instinct MI300X OAM", "AMD Radeon RX 7900 XTX"]
    assert record["drivers"] == {"amdgpu": "6.12.12"}


def test_the_whole_machine_is_json_with_units_in_its_keys(made_nvml: Any) -> None:
    told = probe("/nowhere", nvml=made_nvml({}), environment={}, system="linux").to_json()
    json.dumps(told, allow_nan=False)
    numbers = {key for key, value in told["gpus"][0].items() if isinstance(value, int | float) and value is not True}
    assert all(key == "index" or key.endswith(("_bytes", "_hz", "_w", "_bits", "_enabled")) for key in numbers), numbers
