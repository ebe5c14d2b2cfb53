"""The probe behind `--gpu auto`, against a made NVML, made files and a made sysctl: no machine is assumed."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qwenfit.profiles import device, devices
from qwenfit.profiles import this_machine as probe

MIB = 1 << 20
GIB = 1 << 30


class FakeNVMLError(Exception):
    pass


def fake_nvml(*cards: tuple[str | bytes, int | None, int], count_fails: bool = False) -> SimpleNamespace:
    """Cards as (name, total bytes or None where NVML has no figure, free bytes)."""

    def count() -> int:
        if count_fails:
            raise FakeNVMLError("driver not loaded")
        return len(cards)

    def memory(index: int) -> SimpleNamespace:
        _, total_bytes, free_bytes = cards[index]
        if total_bytes is None:
            raise FakeNVMLError("not supported")
        return SimpleNamespace(total=total_bytes, free=free_bytes)

    return SimpleNamespace(
        NVMLError=FakeNVMLError,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda index: cards[index][0],
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetCudaComputeCapability=lambda index: (9, 0),
        nvmlDeviceGetMaxClockInfo=lambda index, kind: 2000,
        nvmlDeviceGetMemoryBusWidth=lambda index: 512,
    )


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def install(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_a_known_card_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_nvml((b"NVIDIA GeForce RTX 3060", 12288 * MIB, 9 * GIB)))
    (found,) = probe.this_machine()
    assert found.name == "rtx3060"
    assert found.usable_bytes == 9 * GIB
    assert found.memory_bandwidth_bytes_per_s == device("rtx3060").memory_bandwidth_bytes_per_s
    assert found.measured["free_bytes"] == 9 * GIB
    assert device("rtx3060").usable_bytes != 9 * GIB, "the catalog's own object is left alone"


def test_an_idle_card_has_no_more_than_the_catalog_says(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_nvml(("NVIDIA GeForce RTX 3060", 12288 * MIB, 12288 * MIB)))
    (found,) = probe.this_machine()
    assert found.usable_bytes == device("rtx3060").usable_bytes


def test_several_cards_in_the_order_that_cuda_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (("NVIDIA GeForce RTX 3090", 24576 * MIB, 24 * GIB), ("NVIDIA GeForce RTX 3060", 12288 * MIB, 12 * GIB))
    install(monkeypatch, fake_nvml(*cards))
    assert [found.name for found in probe.this_machine()] == ["rtx3090", "rtx3060"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert [found.name for found in probe.this_machine()] == ["rtx3060", "rtx3090"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [found.name for found in probe.this_machine()] == ["rtx3060"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert [found.kind for found in probe.this_machine()] == ["cpu"]


def test_a_card_that_no_catalog_has(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_nvml(("NVIDIA RTX 9999 Ti", 40 * GIB, 39 * GIB)))
    (found,) = probe.this_machine()
    assert (found.vendor, found.compute_capability, found.memory_bytes) == ("nvidia", "9.0", 40 * GIB)
    assert found.usable_bytes == 39 * GIB
    assert found.memory_bandwidth_bytes_per_s == 256_000_000_000  # 2000 MHz, two transfers, 64 bytes


def test_one_memory_for_cpu_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_nvml(("NVIDIA GB10", None, 0)))
    monkeypatch.setattr(probe, "_host_memory", lambda: (122570 * MIB, 100 * GIB))
    (found,) = probe.this_machine()
    assert (found.name, found.usable_bytes) == ("dgx-spark", 100 * GIB)


@pytest.mark.parametrize("nvml", [None, fake_nvml(count_fails=True), SimpleNamespace(), fake_nvml()])
def test_without_a_driver_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> None:
    install(monkeypatch, nvml)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(probe, "_host_memory", lambda: (32 * GIB, 20 * GIB))
    (found,) = probe.this_machine()
    assert (found.kind, found.vendor, found.memory_bytes, found.usable_bytes) == ("cpu", "cpu", 32 * GIB, 20 * GIB)


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    monkeypatch.setattr(sys, "platform", "darwin")
    told = {"machdep.cpu.brand_string": "Apple M1", "hw.memsize": str(16 * GIB), "iogpu.wired_limit_mb": "0"}
    monkeypatch.setattr(probe, "_sysctl", told.__getitem__)
    assert probe.this_machine() == (device("m1-16gb"),)
    told["iogpu.wired_limit_mb"] = "14336"
    (raised,) = probe.this_machine()
    assert (raised.name, raised.usable_bytes) == ("m1-16gb", 14 * GIB)


def test_a_container_has_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/memory.max": 8 * GIB, "/sys/fs/cgroup/memory.current": 3 * GIB}
    monkeypatch.setattr(probe, "_meminfo", lambda: (64 * GIB, 50 * GIB))
    monkeypatch.setattr(probe, "_number", files.get)
    assert probe._host_memory() == (8 * GIB, 5 * GIB)


# Names as nvidia-smi prints them, with NVML's total in MiB: from public nvidia-smi listings.
NVML_NAMES = [
    ("NVIDIA GeForce RTX 3060", 8192, "rtx3060-8gb"),
    ("NVIDIA GeForce RTX 3060 Laptop GPU", 6144, "rtx3060-laptop"),
    ("NVIDIA GeForce RTX 3060 Ti", 8192, "rtx3060ti"),
    ("NVIDIA GeForce RTX 4090", 24564, "rtx4090"),
    ("NVIDIA GeForce RTX 4090 D", 24564, "rtx4090d"),
    ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx4060ti-16gb"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, "rtx4070tisuper"),
    ("NVIDIA GeForce RTX 5090", 32607, "rtx5090"),
    ("Tesla T4", 15360, "t4"),
    ("Tesla V100-SXM2-32GB", 32768, "v100-32gb"),
    ("Tesla V100-PCIE-16GB", 16384, "v100-pcie-16gb"),
    ("NVIDIA A10G", 23028, "a10g"),
    ("NVIDIA A100-SXM4-80GB", 81920, "a100-80gb"),
    ("NVIDIA A100 80GB PCIe", 81920, "a100-pcie-80gb"),
    ("NVIDIA A100-PCIE-40GB", 40960, "a100-pcie-40gb"),
    ("NVIDIA L40S", 46068, "l40s"),
    ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm"),
    ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
    ("NVIDIA H100 NVL", 95830, "h100-nvl"),
    ("NVIDIA H200", 143771, "h200-sxm"),
    ("NVIDIA GH200 480GB", 97871, "gh200-96gb"),
    ("NVIDIA B200", 183359, "b200"),
    ("NVIDIA GB200", 189471, "gb200"),
    ("NVIDIA RTX A6000", 49140, "rtxa6000"),
    ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx6000-ada"),
    ("Quadro RTX 6000", 24576, "quadro-rtx6000"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "rtx-pro-6000"),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887, "rtx-pro-6000-maxq"),
    ("Orin (nvgpu)", 62840, "jetson-agx-orin-64gb"),
    ("NVIDIA Thor", 125772, "jetson-thor"),
    ("NVIDIA GeForce MX150", 2048, None),
    ("NVIDIA RTX 2000 Ada Generation Laptop GPU", 8188, None),
]


@pytest.mark.parametrize(("title", "memory_mib", "name"), NVML_NAMES)
def test_names_as_nvml_gives_them(title: str, memory_mib: int, name: str | None) -> None:
    catalog = [one for one in devices() if one.vendor == "nvidia"]
    found = probe.matching(title, memory_mib * MIB, catalog)
    assert (found.name if found else None) == name
