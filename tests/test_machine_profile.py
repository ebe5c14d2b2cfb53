"""The file that `qwen-plan probe --output` writes: `--gpu FILE` takes it, and plans as with the machine itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner import Request, plan
from qwenfit.profiles import device, devices_of
from qwenfit.profiles import this_machine as here
from qwenfit.profiles.device import Device
from qwenfit.profiles.device_file import parse_yaml
from qwenfit.profiles.errors import BadInput
from qwenfit.profiles.frozen import replace
from qwenfit.profiles.machine_profile import Ceilings, profile_yaml, with_ceilings
from qwenfit.profiles.probe import probe

GIB = 1 << 30
ON = "2026-11-22"
CPU = Ceilings(15e9, 14e9, None, {"fp32": 110e9, "bf16": 25e9, "int8": 300e9}, (14e9, 16e9), 1.0, "C kernels")
GPU = Ceilings(3.0e12, 2.9e12, 55e9, {"fp32": 50e12, "bf16": 700e12}, (2.9e12, 3.1e12), None, "torch")
UUIDS = [f"GPU-{number}0000000-0000-4444-8888-aaaaaaaaaaaa" for number in range(8)]
BUSY = SimpleNamespace(total=81559 << 20, used=40000 << 20, free=41559 << 20)


def cards(*busy: bool) -> list[dict[str, Any]]:
    memory = [{"nvmlDeviceGetMemoryInfo": BUSY} if one else {} for one in busy]
    return [{"nvmlDeviceGetUUID": UUIDS[place], **changes} for place, changes in enumerate(memory)]


def read_back(devices: Sequence[Device], folder: Path) -> tuple[Device, ...]:
    file = folder / "here.yaml"
    file.write_text(profile_yaml(devices, ["a comment"]), encoding="utf-8")
    return devices_of(str(file))


def figures(one: Device) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__slots__ if name != "path"}


def found_here(root: str, nvml: Any) -> list[Device]:
    machine = probe(root, nvml=nvml, environment={}, system="linux", places={})
    return [one.device for one in here.devices_here(machine)]


@pytest.mark.parametrize("name", ["container-v1", "epyc-9174f-2s", "raspberry-pi-5", "mi300x-and-7900xtx"])
def test_what_is_written_is_what_is_read(recorded: Callable[[str], str], tmp_path: Path, name: str) -> None:
    devices = found_here(recorded(name), None)
    assert [figures(one) for one in read_back(devices, tmp_path)] == [figures(one) for one in devices]


def test_eight_gpus_of_two_kinds(made_nvml: Any, tmp_path: Path) -> None:
    """Like ones are one entry with a count, and one object again; the busy one stands apart, at its place or not."""
    devices = found_here("/nowhere", made_nvml(*cards(*[False] * 7, True)))
    back = read_back(devices, tmp_path)
    assert [figures(one) for one in back] == [figures(one) for one in devices]
    assert len(set(back)) == len(set(devices)) == 2
    text = (tmp_path / "here.yaml").read_text(encoding="utf-8")
    assert text.count("count: 7") == 1
    assert len(parse_yaml(text.encode(), "here.yaml")["devices"]) == 2


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("busy", [(False,), (True,), (False, False), (False, True)])
def test_a_plan_with_the_file_is_the_plan_with_the_machine(
    made_nvml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: tuple[bool, ...], measured: bool
) -> None:
    devices = found_here("/nowhere", made_nvml(*cards(*busy)))
    if measured:
        changed = {one: with_ceilings(one, GPU, ON) for one in devices}
        devices = [changed[one] for one in devices]
    file = tmp_path / "here.yaml"
    file.write_text(profile_yaml(devices), encoding="utf-8")
    monkeypatch.setattr(here, "this_machine", lambda: tuple(devices))
    monkeypatch.setattr(here, "free_host_bytes", lambda: 0)
    asked = {"model": "27b", "ctx_tokens": 65536, "seqs": 4}
    by_machine = plan(Request(devices=("auto",), **asked)).to_json()
    by_file = plan(Request(devices=(str(file),), **asked)).to_json()
    # What a plan tells of its devices says where their figures are from, and its digest is of that too.
    told = [
        {key: value for key, value in one.items() if key not in ("profiles", "sha256")} for one in (by_machine, by_file)
    ]
    assert told[0] == told[1]
    assert by_machine["plans"][0]["speed"] is not None  # type: ignore[index]


def test_a_cpu_has_no_speed_before_it_was_measured(recorded: Callable[[str], str], tmp_path: Path) -> None:
    (cpu,) = found_here(recorded("epyc-9174f-2s"), None)
    (back,) = read_back([cpu], tmp_path)
    assert back.memory_bandwidth_bytes_per_s == 0
    assert "memory_bandwidth_bytes_per_s: null" in (tmp_path / "here.yaml").read_text(encoding="utf-8")
    path = str(tmp_path / "here.yaml")
    assert plan(Request(model="0.8b", devices=(path,), engine="llama.cpp")).best.speed is None
    (back,) = read_back([with_ceilings(cpu, CPU, ON)], tmp_path)
    assert back.memory_bandwidth_bytes_per_s == 15_000_000_000
    assert back.measured["bf16_flops_per_s"] == {
        "value": 25_000_000_000,
        "by": "C kernels",
        "on": ON,
        "source": "qwen-plan probe --measure, on this machine",
    }


def test_what_the_planner_gets_of_it() -> None:
    """A CPU: what was measured, and bf16 only where it beats fp32. A known GPU: the vendor's figures, which the speed
    model was fitted to, unless it reads less than eight tenths of them."""
    cpu = with_ceilings(replace(device("rtx3060"), memory_bandwidth_bytes_per_s=0, flops_per_s={}), CPU, ON)
    assert cpu.memory_bandwidth_bytes_per_s == 15_000_000_000
    assert cpu.flops_per_s == {"fp32": 110_000_000_000, "int8": 300_000_000_000}
    whole = device("h100-sxm")
    gpu = with_ceilings(whole, GPU, ON)
    assert gpu.memory_bandwidth_bytes_per_s == whole.memory_bandwidth_bytes_per_s
    assert gpu.flops_per_s == whole.flops_per_s and gpu.measured["copy_bytes_per_s"]
    assert gpu.host_link_bytes_per_s == min(55_000_000_000, whole.host_link_bytes_per_s or 10**15)
    slow = with_ceilings(whole, Ceilings(1.5e12, None, None, {}), ON)
    assert slow.memory_bandwidth_bytes_per_s == 1_500_000_000_000


@pytest.mark.parametrize(
    ("low", "high", "share", "disturbed"),
    [(14e9, 16e9, 1.0, False), (14e9, 19e9, 1.0, True), (14e9, 15e9, 0.7, True), (14e9, 15e9, None, False)],
)
def test_other_work_is_noticed(low: float, high: float, share: float | None, disturbed: bool) -> None:
    assert Ceilings(15e9, None, None, {}, (low, high), share).is_disturbed == disturbed


def test_measurements_that_cannot_be_are_left_out() -> None:
    absurd = Ceilings(1e30, 3.0, float("nan"), {"fp32": float("inf"), "int8": 1.0})
    found = with_ceilings(device("rtx3060"), absurd, ON)
    assert found.memory_bandwidth_bytes_per_s == device("rtx3060").memory_bandwidth_bytes_per_s
    assert not {"copy_bytes_per_s", "fp32_flops_per_s", "int8_flops_per_s"} & set(found.measured)


@settings(deadline=None)
@given(title=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=80))
def test_any_title_survives(title: str) -> None:
    """Quotes, colons, hashes, braces, "no", 1e5, words of other YAMLs: text stays text."""
    named = replace(device("rtx3060"), title=title)
    assert parse_yaml(profile_yaml([named]).encode(), "x")["title"] == title
    assert parse_yaml(profile_yaml([named, named]).encode(), "x")["devices"][0]["title"] == title


def test_a_box_takes_a_file_of_several(tmp_path: Path) -> None:
    file = tmp_path / "box.yaml"
    file.write_text("devices:\n  - {like: rtx3090, count: 2}\n  - like: rtx4090\n", encoding="utf-8")
    found = devices_of(f"{file},rtx3060")
    assert [one.memory_bytes // GIB for one in found] == [24, 24, 24, 12] and found[0] is found[1]
    assert [one.name for one in found] == ["rtx3090", "rtx3090", "rtx4090", "rtx3060"]
    assert len(devices_of(f"2x{file}")) == 6
    with pytest.raises(BadInput, match="holds 3 devices"):
        device(str(file))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("devices: []\n", "devices must be a list of devices, at least one"),
        ("devices: {like: rtx3090}\n", "devices must be a list"),
        ("devices: [{like: rtx3090}]\nname: x\n", "the only key of the file"),
        ("devices: [rtx3090]\n", "device 1: holds 'rtx3090'"),
        ("devices: [{like: rtx3090, count: 0}]\n", "device 1: count must be a whole number"),
        ("devices: [{like: rtx3090, count: 1025}]\n", "at most 1024"),
        ("devices: [{like: rtx3090}, {like: rtx9999}]\n", "device 2: like: "),
        ("devices: [{like: rtx3090}, {like: rtx3090, memory: 3}]\n", "device 2: unknown key 'memory'"),
        ("like: rtx3090\ncount: 2\n", "unknown key 'count'"),
    ],
)
def test_wrong_lists_are_sentences(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "box.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=sentence):
        devices_of(str(file))
