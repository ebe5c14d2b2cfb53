"""What `--gpu auto` plans with, on machines that are made or recorded: none is assumed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenfit.planner import Request, plan
from qwenfit.profiles import BadInput, device, devices, devices_of
from qwenfit.profiles import this_machine as here
from qwenfit.profiles.machine import Cpu, Gpu, Machine, Ram, System
from qwenfit.profiles.probe import probe

MIB = 1 << 20
GIB = 1 << 30
Recorded = Callable[[str], str]


def card(title: str, total_mib: int, free_mib: int | None = None, **changes: Any) -> dict[str, Any]:
    free = (total_mib if free_mib is None else free_mib) * MIB
    memory = SimpleNamespace(total=total_mib * MIB, used=total_mib * MIB - free, free=free)
    return {"nvmlDeviceGetName": title, "nvmlDeviceGetMemoryInfo": memory, **changes}


def found_by(nvml: Any, root: str = "/nowhere", **environment: str) -> list[Any]:
    machine = probe(root, nvml=nvml, environment=environment, system="linux", places={})
    return [one.device for one in here.devices_here(machine)]


def made(*gpus: Gpu, ram_bytes: int = 64 * GIB) -> Machine:
    ram = Ram(ram_bytes, ram_bytes - 4 * GIB)
    return Machine(System("Linux", "6.8", "3.12"), Cpu("a CPU", "x86_64", 8, 8, 8), ram, gpus=gpus)


def test_a_known_card_with_what_is_free(made_nvml: Any) -> None:
    (found,) = found_by(made_nvml(card("NVIDIA GeForce RTX 3060", 12288, 9 * 1024)))
    assert (found.name, found.usable_bytes) == ("rtx3060", 9 * GIB)
    assert found.memory_bandwidth_bytes_per_s == device("rtx3060").memory_bandwidth_bytes_per_s
    assert found.measured["free_bytes"]["value"] == 9 * GIB
    assert device("rtx3060").usable_bytes != 9 * GIB, "the catalog's own object is left alone"


def test_an_idle_card_has_no_more_than_the_catalog_says(made_nvml: Any) -> None:
    (found,) = found_by(made_nvml(card("NVIDIA GeForce RTX 3060", 12288)))
    assert found.usable_bytes == device("rtx3060").usable_bytes


def test_several_cards_in_the_order_that_cuda_sees(made_nvml: Any) -> None:
    nvml = made_nvml(card("NVIDIA GeForce RTX 3090", 24576), card("NVIDIA GeForce RTX 3060", 12288))
    for shown, names in (("0,1", ["rtx3090", "rtx3060"]), ("1,0", ["rtx3060", "rtx3090"]), ("1", ["rtx3060"])):
        assert [one.name for one in found_by(nvml, CUDA_VISIBLE_DEVICES=shown)] == names
    assert [one.kind for one in found_by(nvml, CUDA_VISIBLE_DEVICES="-1")] == ["cpu"]


def test_a_card_that_no_catalog_has(made_nvml: Any) -> None:
    """2,000 MHz, two transfers, 64 bytes."""
    clocks = {"nvmlDeviceGetMaxClockInfo": {1: 2000, 2: 2000}, "nvmlDeviceGetMemoryBusWidth": 512}
    (found,) = found_by(made_nvml(card("NVIDIA RTX 9999 Ti", 40 * 1024, 39 * 1024, **clocks)))
    assert (found.name, found.compute_capability, found.memory_bytes) == ("nvidia-rtx-9999-ti", "9.0", 40 * GIB)
    assert found.usable_bytes == 39 * GIB
    assert found.memory_bandwidth_bytes_per_s == 256_000_000_000


def test_a_slot_with_fewer_lanes_is_the_link(made_nvml: Any) -> None:
    """PCIe 3 x4 moves 3.94 GB/s (8 GT/s, 128b/130b); an RTX 3060 alone would move 31.5."""
    slot = {"nvmlDeviceGetMaxPcieLinkGeneration": 3, "nvmlDeviceGetMaxPcieLinkWidth": 4}
    (found,) = found_by(made_nvml(card("NVIDIA GeForce RTX 3060", 12288, **slot)))
    assert found.host_link_bytes_per_s == 3_938_400_000
    (wide,) = found_by(made_nvml(card("NVIDIA GeForce RTX 3060", 12288)))
    assert wide.host_link_bytes_per_s == device("rtx3060").host_link_bytes_per_s


def test_one_memory_for_cpu_and_gpu(made_nvml: Any, recorded: Recorded) -> None:
    """A GB10's NVML says "not supported": what is free is what /proc/meminfo says, 100 GiB in the recorded tree."""
    (found,) = found_by(
        made_nvml({"nvmlDeviceGetName": "NVIDIA GB10"}, broken={"nvmlDeviceGetMemoryInfo": 3}), recorded("dgx-spark")
    )
    assert (found.name, found.usable_bytes) == ("dgx-spark", 100 * GIB)


def test_memory_that_cannot_be_seen_is_the_catalogs_where_the_name_says_it(made_nvml: Any) -> None:
    broken = {"nvmlDeviceGetMemoryInfo": 999}
    (found,) = found_by(made_nvml({"nvmlDeviceGetName": "NVIDIA H100 80GB HBM3"}, broken=broken))
    assert found.name == "h100-sxm" and "could not be seen" in found.usable_source
    (unknown,) = found_by(made_nvml({"nvmlDeviceGetName": "NVIDIA GeForce RTX 3080"}, broken=broken))
    assert unknown.kind == "cpu" or unknown.name.startswith("rtx3080")


@pytest.mark.parametrize("nvml", [None, SimpleNamespace(), SimpleNamespace(nvmlInit=lambda: None)])
def test_without_a_driver_it_is_the_cpu(recorded: Recorded, nvml: Any) -> None:
    (found,) = found_by(nvml, recorded("container-v1"))
    assert (found.kind, found.vendor, found.memory_bytes, found.usable_bytes) == ("cpu", "cpu", 8 * GIB, 5 * GIB)
    assert found.memory_bandwidth_bytes_per_s == 0 and "control groups" in found.usable_source


def test_amd_by_target_and_memory(recorded: Recorded) -> None:
    """MI300X and RX 7900 XTX; 5 of the latter's 24 GiB are taken. Its slot here is PCIe 4 x8."""
    instinct, radeon = found_by(None, recorded("mi300x-and-7900xtx"))
    assert instinct.name == "mi300x" and instinct.usable_bytes <= device("mi300x").usable_bytes
    assert (radeon.name, radeon.usable_bytes) == ("rx7900xtx", 25753026560 - 5368709120)
    assert radeon.host_link_bytes_per_s == 8 * 1_969_000_000


@pytest.mark.parametrize(
    ("target", "memory_gib", "title", "name"),
    [
        ("gfx1100", 20, "AMD Radeon RX 7900 XT", "rx7900xt"),
        ("gfx942", 255.98, "AMD Instinct MI325X", "mi325x"),
        ("gfx1201", 16, "AMD Radeon RX 9070 XT", "rx9070xt"),
        ("gfx1199", 99, "AMD Radeon Future", "amd-radeon-future"),
    ],
)
def test_other_cards_of_amd(target: str, memory_gib: float, title: str, name: str) -> None:
    size = int(memory_gib * GIB)
    gpu = Gpu(0, "amd", title, memory_bytes=size, used_bytes=0, free_bytes=size, compute_capability=target)
    ((found, _),) = here.devices_here(made(gpu))
    assert found.name == name and found.usable_bytes <= size


def test_an_apu_has_the_hosts_memory_and_a_small_one_is_left_to_the_screen() -> None:
    """Strix Halo of 128 GB: 64 GiB set aside, 31 more from the host, of which 60 GiB are free."""
    apu = Gpu(0, "amd", "AMD Radeon Graphics", "unified", 95 * GIB, 1 * GIB, 94 * GIB, 31 * GIB, "gfx1151")
    ((found, _),) = here.devices_here(made(apu))
    assert (found.name, found.usable_bytes) == ("strix-halo-96gb", 94 * GIB)
    small = Gpu(0, "amd", "AMD Radeon Graphics", "unified", 32 * GIB, 0, 32 * GIB, 31 * GIB, "gfx1036")
    assert here.devices_here(made(small))[0].device.kind == "cpu"


def test_a_mac() -> None:
    gpu = Gpu(0, "apple", "Apple M1", "unified", 16 * GIB)
    assert here.devices_here(made(gpu))[0].device is device("m1-16gb")
    raised = Gpu(0, "apple", "Apple M1", "unified", 16 * GIB, free_bytes=14 * GIB)
    ((found, _),) = here.devices_here(made(raised))
    assert (found.name, found.usable_bytes) == ("m1-16gb", 14 * GIB)


def test_a_profile_adds_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The speeds of the file, the memory of now; a file about another machine is refused."""
    (now,) = here.this_machine()
    if now.kind != "cpu":
        pytest.skip("this machine has a GPU")
    file = tmp_path / "here.yaml"
    text = (
        f"name: this-cpu\ntitle: {now.title!r}\nvendor: cpu\nkind: cpu\narchitecture: x\nmemory_gib: 1\n"
        "memory_bandwidth_bytes_per_s: 12300000000\nflops_per_s: {fp32: 99000000000}\n"
    )
    file.write_text(text, encoding="utf-8")
    monkeypatch.setenv("QWENFIT_PROFILE", str(file))
    (found,) = devices_of("auto")
    assert found.memory_bandwidth_bytes_per_s == 12_300_000_000 and found.flops_per_s == {"fp32": 99_000_000_000}
    assert found.memory_bytes == now.memory_bytes
    file.write_text(text.replace("this-cpu", "that-cpu"), encoding="utf-8")
    with pytest.raises(BadInput, match="none of its devices is here"):
        devices_of("auto")


def test_auto_knows_how_much_host_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of this machine: experts may move to the host's free memory, which is not taken for granted then."""
    monkeypatch.setattr(here, "this_machine", lambda: (device("rtx3060"),))
    monkeypatch.setattr(here, "free_host_bytes", lambda: 40 * GIB)
    asked = plan(Request(model="35b-a3b", devices=("auto",), engine="llama.cpp"))
    assert asked.request.options.host_memory_bytes == 40 * GIB
    assert not any("host memory was not given" in warning for warning in asked.best.warnings)
    assert asked.best.host.weights.mid > 10 * GIB


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
    found = here.matching(title, memory_mib * MIB, catalog)
    assert (found.name if found else None) == name
