"""NVIDIA's GPUs, by an NVML that is made here and fails wherever it is told to: the rest must stay."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenfit.profiles.machine import Gpu, Machine
from qwenfit.profiles.probe import probe
from qwenfit.profiles.this_machine import devices_here

MIB = 1 << 20
NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, UNKNOWN = 3, 4, 6, 999
CALLS = [
    "nvmlDeviceGetAttributes",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetCudaComputeCapability",
    "nvmlDeviceGetCurrPcieLinkGeneration",
    "nvmlDeviceGetCurrPcieLinkWidth",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetMaxClockInfo",
    "nvmlDeviceGetMaxMigDeviceCount",
    "nvmlDeviceGetMaxPcieLinkGeneration",
    "nvmlDeviceGetMaxPcieLinkWidth",
    "nvmlDeviceGetMemoryBusWidth",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetMigDeviceHandleByIndex",
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetName",
    "nvmlDeviceGetUUID",
    "nvmlInit",
    "nvmlShutdown",
    "nvmlSystemGetCudaDriverVersion",
    "nvmlSystemGetDriverVersion",
    "nvmlSystemGetProcessName",
]
HIDING = {"nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"}


def memory(total_mib: int, free_mib: int) -> SimpleNamespace:
    return SimpleNamespace(total=total_mib * MIB, used=(total_mib - free_mib) * MIB, free=free_mib * MIB)


def part(place: int, total_mib: int, profile: str) -> dict[str, Any]:
    return {
        "nvmlDeviceGetName": f"NVIDIA H100 80GB HBM3 MIG {profile}",
        "nvmlDeviceGetMemoryInfo": memory(total_mib, total_mib - 20),
        "nvmlDeviceGetUUID": f"MIG-{place}{place}{place}{place}aaaa-0000-4444-8888-aaaaaaaaaaaa",
        "nvmlDeviceGetAttributes": SimpleNamespace(gpuInstanceSliceCount=int(profile[0])),
    }


# 1g.10gb and 3g.40gb: 1 and 4 of 8 slices of memory (NVIDIA, MIG user guide, profiles of H100).
CUT = {"nvmlDeviceGetMigMode": [1, 1], "parts": [part(1, 9856, "1g.10gb"), part(2, 40448, "3g.40gb")]}
BUSY = {
    "nvmlDeviceGetUUID": "GPU-77777777-0000-4444-8888-aaaaaaaaaaaa",
    "nvmlDeviceGetMemoryInfo": memory(81559, 41559),
    "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=4711, usedGpuMemory=39000 * MIB)],
}


def whole_gpu(found: Machine, index: int) -> Gpu:
    return next(gpu for gpu in found.gpus if gpu.index == index and gpu.mig is None)


def looked(nvml: Any, **environment: str) -> Machine:
    return probe("/nowhere", nvml=nvml, environment=environment, system="linux", places={})


def test_everything_that_it_tells(made_nvml: Any) -> None:
    nvml = made_nvml({}, BUSY, CUT)
    found = looked(nvml)
    assert set(CALLS) == nvml.called, "the list above is the list of what is asked"
    gpu = whole_gpu(found, 0)
    assert (gpu.title, gpu.compute_capability, gpu.power_limit_w) == ("NVIDIA H100 80GB HBM3", "9.0", 700.0)
    assert (gpu.memory_bytes, gpu.used_bytes, gpu.free_bytes) == (81559 * MIB, 600 * MIB, 80959 * MIB)
    assert (gpu.clock_hz, gpu.max_clock_hz, gpu.max_memory_clock_hz) == (345_000_000, 1_980_000_000, 2_619_000_000)
    assert gpu.pcie is not None and (gpu.pcie.max_generation, gpu.pcie.max_lanes) == (5, 16)
    assert found.drivers == {"nvidia": "580.95.05", "cuda": "13.0"}
    (process,) = whole_gpu(found, 1).processes
    assert (process.pid, process.memory_bytes, process.name) == (4711, 39000 * MIB, "python3"), "no path, no arguments"


def test_what_others_hold_is_not_planned_with(made_nvml: Any) -> None:
    idle, busy = (here.device for here in devices_here(looked(made_nvml({}, BUSY))))
    assert busy.usable_bytes == 41559 * MIB < idle.usable_bytes
    assert busy.usable_source == "free now; 38.09 GiB are held by 1 other process"
    assert idle.name == busy.name == "h100-sxm" and idle is not busy


def test_devices_that_are_alike_are_one_object(made_nvml: Any) -> None:
    """Engines ask whether ranks are alike by identity."""
    uuid = "GPU-99999999-0000-4444-8888-aaaaaaaaaaaa"
    first, second = (here.device for here in devices_here(looked(made_nvml({}, {"nvmlDeviceGetUUID": uuid}))))
    assert first is second


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [NOT_SUPPORTED, NO_PERMISSION, UNKNOWN])
def test_any_one_call_may_fail(made_nvml: Any, call: str, number: int) -> None:
    """The rest stays as it was, and a call that fails for no good reason is said."""
    cards = ({}, BUSY, CUT)
    intact, found = looked(made_nvml(*cards)), looked(made_nvml(*cards, broken={call: number}))
    assert devices_here(found)
    if call in HIDING:
        assert found.gpus == () and found.unseen
        return
    assert len(found.gpus) >= 3
    if number != NOT_SUPPORTED:
        assert found.unseen, call
    before, after = whole_gpu(intact, 0), whole_gpu(found, 0)
    lost = {name for name in before.__slots__ if getattr(after, name) != getattr(before, name)}
    assert len(lost - {"visible"}) <= 4, (call, lost)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    broken=st.dictionaries(
        st.sampled_from(CALLS), st.sampled_from([NOT_SUPPORTED, NO_PERMISSION, UNKNOWN]), max_size=12
    )
)
def test_any_calls_may_fail(made_nvml: Any, broken: dict[str, int]) -> None:
    found = looked(made_nvml({}, BUSY, CUT, broken=broken))
    assert all(sentence.isprintable() for sentence in found.unseen)
    here = devices_here(found)
    assert here and all(one.device.usable_bytes > 0 for one in here if one.gpu)


ABSURD = st.one_of(
    st.none(),
    st.integers(-(2**65), 2**65),
    st.floats(allow_nan=True),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.lists(st.integers(-5, 2**40), max_size=3),
    st.just(SimpleNamespace(total=10**30, free=-4, used="x", pid=-1)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(absurd=st.dictionaries(st.sampled_from([name for name in CALLS if "DeviceGet" in name]), ABSURD, max_size=8))
def test_absurd_values_are_left_out(made_nvml: Any, absurd: dict[str, Any]) -> None:
    for clock in ("nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo"):
        if clock in absurd:
            absurd[clock] = {1: absurd[clock], 2: absurd[clock]}
    absurd.pop("nvmlDeviceGetCount", None)
    absurd.pop("nvmlDeviceGetHandleByIndex", None)
    absurd.pop("nvmlDeviceGetMigDeviceHandleByIndex", None)
    found = looked(made_nvml({**CUT, **absurd}))
    assert all(gpu.title.isprintable() and len(gpu.title) <= 110 for gpu in found.gpus)
    assert all(64 * MIB <= gpu.memory_bytes <= 64 << 40 for gpu in found.gpus if gpu.memory_bytes is not None)
    assert devices_here(found)


def test_a_name_that_would_move_the_cursor(made_nvml: Any) -> None:
    (gpu,) = looked(made_nvml({"nvmlDeviceGetName": b"NVIDIA\x1b[2J H100\n80GB\0"})).gpus
    assert gpu.title == "NVIDIA [2J H100 80GB"


@pytest.mark.parametrize(
    ("asked", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("0,7,1", [0]),  # the list ends at the first that is wrong
        ("1,1", []),
        ("GPU-77777777-0000-4444-8888-aaaaaaaaaaaa", [1]),
        ("GPU-7", [1]),  # a beginning that only one has
        ("gpu-7,0", [1, 0]),
        ("GPU-", []),  # that all have
        ("nonsense", []),
        (" 1 , 2 ", [1, 2]),
    ],
)
def test_what_cuda_shows(made_nvml: Any, asked: str | None, indices: list[int]) -> None:
    third = {"nvmlDeviceGetUUID": "GPU-99999999-0000-4444-8888-aaaaaaaaaaaa"}
    environment = {} if asked is None else {"CUDA_VISIBLE_DEVICES": asked}
    found = looked(made_nvml({}, BUSY, third), **environment)
    assert [gpu.index for gpu in found.gpus if gpu.visible] == indices
    assert len(found.gpus) == 3


@pytest.mark.parametrize(
    ("asked", "title"),
    [
        (None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        ("0", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        ("MIG-2222aaaa-0000-4444-8888-aaaaaaaaaaaa", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"),
        ("MIG-2", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"),
    ],
)
def test_of_mig_a_process_gets_one_instance(made_nvml: Any, asked: str | None, title: str) -> None:
    found = looked(made_nvml(CUT, BUSY), **({} if asked is None else {"CUDA_VISIBLE_DEVICES": asked}))
    assert [gpu.title for gpu in found.gpus if gpu.visible] == [title]
    assert len(found.gpus) == 4, "the GPU, its two instances, the other GPU"
    assert any("MIG instances" in note for note in found.notes)


def test_an_instance_is_a_share_of_its_gpu(made_nvml: Any) -> None:
    """3g.40gb of an H100: half of the memory's bandwidth, three sevenths of the FLOPS."""
    ((device, gpu),) = devices_here(looked(made_nvml(CUT), CUDA_VISIBLE_DEVICES="MIG-2"))
    whole = devices_here(looked(made_nvml({})))[0].device
    assert gpu is not None and gpu.mig is not None and (gpu.mig.compute_slices, gpu.mig.memory_slices) == (3, 4)
    assert device.name == "h100-sxm-mig-3g.40gb" and device.usable_bytes == (40448 - 20) * MIB
    assert device.memory_bandwidth_bytes_per_s == whole.memory_bandwidth_bytes_per_s // 2
    assert device.flops_per_s["bf16"] == int(whole.flops_per_s["bf16"] * 3 / 7)


def test_unlike_gpus_are_counted_otherwise_by_cuda(made_nvml: Any) -> None:
    small = {"nvmlDeviceGetName": "NVIDIA GeForce RTX 3060", "nvmlDeviceGetMemoryInfo": memory(12288, 12000)}
    assert any("CUDA_DEVICE_ORDER" in note for note in looked(made_nvml({}, small)).notes)
    assert not looked(made_nvml({}, small), CUDA_DEVICE_ORDER="PCI_BUS_ID").notes


def test_own_memory_is_not_somebody_elses(made_nvml: Any) -> None:
    from os import getpid

    own = {"nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=getpid(), usedGpuMemory=MIB)]}
    assert looked(made_nvml(own)).gpus[0].processes == ()


def test_without_the_library_it_is_one_sentence(made_nvml: Any) -> None:
    found = looked(made_nvml(broken={"nvmlInit": 12}))
    assert found.gpus == () and any(sentence.startswith("NVIDIA GPUs: NVML says") for sentence in found.unseen)
