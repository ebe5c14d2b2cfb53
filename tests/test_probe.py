"""What is read from /proc and /sys, of recorded and made machines (tests/data/machines says where each is from)."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenfit.profiles.machine import Machine
from qwenfit.profiles.probe import probe
from qwenfit.profiles.probe.amd import _target
from qwenfit.profiles.probe.cpu import linux_cpu
from qwenfit.profiles.probe.tree import Tree, numbers_of
from qwenfit.profiles.probe.values import Unseen, plain_text, whole

KIB, GIB = 1 << 10, 1 << 30
Recorded = Callable[[str], str]


def looked(root: str, **changes: Any) -> Machine:
    """The machine below `root`, with no NVML, no tools, no disks and an empty environment."""

    def no_tool(command: list[str]) -> str:
        raise FileNotFoundError(2, "No such file or directory", command[0])

    given: dict[str, Any] = {"nvml": None, "environment": {}, "run": no_tool, "system": "linux", "places": {}}
    return probe(root, **{**given, **changes})


def test_the_machine_of_docs_cpu(recorded: Recorded) -> None:
    found = looked(recorded("cascade-lake-vm"))
    assert found.cpu.title == "Intel(R) Xeon(R) Processor @ 2.50GHz"
    assert (found.cpu.cpus, found.cpu.cores, found.cpu.sockets, found.cpu.quota_cpus) == (2, 2, 1, None)
    assert "avx512_vnni" in found.cpu.features and "amx_int8" not in found.cpu.features
    assert found.ram.total_bytes == 24684096 * KIB and found.ram.limit_bytes is None
    assert found.ram.usable_bytes == found.ram.available_bytes
    assert found.system.container == ("docker", "virtual machine")
    assert [node.cpus for node in found.cpu.numa] == [2]
    assert found.unseen == ()


def test_a_container_of_version_1_has_what_it_was_given(recorded: Recorded) -> None:
    """8 GiB, of which 4 are used and 1 of those given back at need; 2.5 CPUs; 8 of the host's 16."""
    found = looked(recorded("container-v1"))
    assert (found.ram.total_bytes, found.ram.limit_bytes) == (65536000 * KIB, 8 * GIB)
    assert found.ram.usable_bytes == 5 * GIB
    assert (found.cpu.quota_cpus, found.cpu.cpus, found.cpu.online_cpus) == (2.5, 8, 16)
    assert found.cpu.threads == 3  # two and a half CPUs' time
    assert "docker" in found.system.container


def test_the_least_limit_of_all_ancestors_counts(recorded: Recorded) -> None:
    """The pod may take 32 GiB and has used 1, but the slice above it has 16 GiB and 4 left of them; 4 CPUs' time."""
    found = looked(recorded("container-v2"))
    assert (found.ram.limit_bytes, found.ram.usable_bytes) == (16 * GIB, 4 * GIB)
    assert found.cpu.quota_cpus == 4 and found.cpu.threads == 4
    assert found.system.container[0] == "kubernetes"


def test_a_container_with_groups_of_its_own_sees_them_as_the_root(recorded: Recorded) -> None:
    """docker run --memory 4g --cpus 1.5 with control groups of version 2: its own group is mounted as /."""
    root = recorded("container-v2")
    Path(root, "proc/self/cgroup").write_text("0::/\n")
    for name, text in (("memory.max", "4294967296"), ("memory.current", "1073741824"), ("cpu.max", "150000 100000")):
        Path(root, "sys/fs/cgroup", name).write_text(f"{text}\n")
    found = looked(root)
    assert (found.ram.limit_bytes, found.ram.usable_bytes, found.cpu.quota_cpus) == (4 * GIB, 3 * GIB, 1.5)


def test_what_hints_at_a_container(recorded: Recorded) -> None:
    root = recorded("raspberry-pi-5")
    assert looked(root).system.container == ()
    Path(root, "run").mkdir()
    Path(root, "run/.containerenv").write_text("")
    Path(root, "proc/sys/kernel/osrelease").write_text("6.6.87.2-microsoft-standard-WSL2\n")
    found = looked(root, environment={"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert found.system.container == ("podman", "kubernetes", "wsl")


def test_two_sockets_with_smt(recorded: Recorded) -> None:
    found = looked(recorded("epyc-9174f-2s"))
    assert (found.cpu.sockets, found.cpu.cores, found.cpu.cpus) == (2, 32, 64)
    assert [(node.node, node.cpus) for node in found.cpu.numa] == [(0, 32), (1, 32)]
    assert found.cpu.numa[1].free_bytes == 370000000 * KIB
    assert "avx512_bf16" in found.cpu.features
    assert found.ram.limit_bytes is None and found.cpu.quota_cpus is None


def test_affinity_leaves_one_socket(recorded: Recorded) -> None:
    root = recorded("epyc-9174f-2s")
    Path(root, "proc/self/status").write_text("Cpus_allowed_list:\t0-7,32-39\n")
    found = looked(root)
    assert (found.cpu.cpus, found.cpu.cores, found.cpu.online_cpus) == (16, 8, 64)


def test_arm_names_its_cores_by_their_parts(recorded: Recorded) -> None:
    found = looked(recorded("dgx-spark"))
    assert found.cpu.title == "ARM Cortex-A725 and ARM Cortex-X925"
    assert (found.cpu.architecture, found.cpu.cores) == ("aarch64", 20)
    assert {"asimd", "i8mm", "bf16", "sve2"} <= set(found.cpu.features)


def test_a_board_without_numa_or_nvml(recorded: Recorded) -> None:
    found = looked(recorded("raspberry-pi-5"))
    assert found.cpu.title == "ARM Cortex-A76" and found.cpu.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.cpu.numa == () and "i8mm" not in found.cpu.features and "asimddp" in found.cpu.features
    assert "1000000012345678" not in str(found.to_json())


def test_amd_by_sysfs(recorded: Recorded) -> None:
    """kfd's target 90402 is gfx942; the other card's name is in libdrm's table; a connector is no card."""
    found = looked(recorded("mi300x-and-7900xtx"))
    instinct, radeon = found.gpus
    assert (instinct.title, instinct.compute_capability) == ("AMD Instinct MI300X OAM", "gfx942")
    assert (instinct.memory_bytes, instinct.free_bytes) == (206141652992, 206141652992 - 312475648)
    assert (instinct.power_limit_w, instinct.max_memory_clock_hz) == (750.0, 1_300_000_000)
    assert (radeon.title, radeon.compute_capability) == ("AMD Radeon RX 7900 XTX", "gfx1100")
    assert radeon.pcie is not None
    assert (radeon.pcie.generation, radeon.pcie.max_generation, radeon.pcie.max_lanes) == (1, 4, 8)
    assert (radeon.clock_hz, radeon.max_clock_hz) == (1_200_000_000, 2_526_000_000)
    assert found.drivers == {"amdgpu": "6.12.12"} and found.unseen == ()


@pytest.mark.parametrize(
    ("environment", "titles"),
    [
        ({}, ["AMD Instinct MI300X OAM", "AMD Radeon RX 7900 XTX"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, ["AMD Radeon RX 7900 XTX"]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, ["AMD Radeon RX 7900 XTX", "AMD Instinct MI300X OAM"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, ["AMD Radeon RX 7900 XTX"]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "5"}, []),
    ],
)
def test_what_hip_shows(recorded: Recorded, environment: dict[str, str], titles: list[str]) -> None:
    found = looked(recorded("mi300x-and-7900xtx"), environment=environment)
    assert [gpu.title for gpu in found.gpus if gpu.visible] == titles
    assert len(found.gpus) == 2


@pytest.mark.parametrize(
    ("version", "target"),
    [
        (90402, "gfx942"),
        (90010, "gfx90a"),
        (110000, "gfx1100"),
        (110501, "gfx1151"),
        (0, None),
        (None, None),
        (7, None),
    ],
)
def test_targets_are_written_in_hexadecimal(version: int | None, target: str | None) -> None:
    """Names of LLVM's AMDGPUUsage; MI200 reports 90010."""
    assert _target(version) == target


def test_a_card_whose_node_is_kept_from_a_container_is_not_planned_with(recorded: Recorded) -> None:
    root = recorded("mi300x-and-7900xtx")
    os.unlink(f"{root}/sys/class/kfd/kfd/topology/nodes/1/properties")
    found = looked(root)
    assert [gpu.title for gpu in found.gpus if gpu.visible] == ["AMD Radeon RX 7900 XTX"]
    assert any("not given to this process" in sentence for sentence in found.unseen)


ROCM_SMI = """{"card0": {"VRAM Total Memory (B)": "206141652992", "VRAM Total Used Memory (B)": "312475648",
"Card Series": "AMD Instinct MI300X OAM", "GFX Version": "gfx942"}, "system": {"Driver version": "6.12.12"}}"""


def test_rocm_smi_where_sysfs_has_no_memory(recorded: Recorded) -> None:
    root = recorded("mi300x-and-7900xtx")
    for card in (1, 2):
        os.unlink(f"{root}/sys/class/drm/card{card}/device/mem_info_vram_total")
    (gpu,) = looked(root, run=lambda command: ROCM_SMI).gpus
    assert (gpu.title, gpu.memory_bytes, gpu.compute_capability) == ("AMD Instinct MI300X OAM", 206141652992, "gfx942")
    for garbage in ("", "[]", "{", '{"card0": 3}', '{"card0": {"VRAM Total Memory (B)": "9' + "9" * 99 + '"}}'):
        found = looked(root, run=lambda command, garbage=garbage: garbage)
        assert not any(gpu.memory_bytes for gpu in found.gpus)


def test_a_mac() -> None:
    told = {
        "machdep.cpu.brand_string": "Apple M1",
        "hw.memsize": str(16 * GIB),
        "iogpu.wired_limit_mb": "14336",
        "hw.logicalcpu": "8",
        "hw.physicalcpu": "8",
        "hw.optional.arm.FEAT_DotProd": "1",
    }
    found = looked("/nowhere", system="darwin", run=lambda command: told[command[-1]])
    (gpu,) = found.gpus
    assert (gpu.title, gpu.kind, gpu.memory_bytes, gpu.free_bytes) == ("Apple M1", "unified", 16 * GIB, 14 * GIB)
    assert (found.cpu.cores, found.cpu.features) == (8, ("asimddp",))
    told["machdep.cpu.brand_string"] = "Intel(R) Core(TM) i7"
    assert looked("/nowhere", system="darwin", run=lambda command: told[command[-1]]).gpus == ()


def test_gpus_that_nobody_asks_are_said(recorded: Recorded) -> None:
    root = recorded("raspberry-pi-5")
    for slot, vendor in (("0000:03:00.0", "0x8086"), ("0000:04:00.0", "0x10de")):
        folder = Path(root, "sys/bus/pci/devices", slot)
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor)
        (folder / "class").write_text("0x030000")
    unseen = looked(root).unseen
    assert [sentence.split(" GPU ")[0] for sentence in unseen] == ["Intel", "NVIDIA"]


def test_nothing_at_all_is_a_machine_and_sentences(tmp_path: Path) -> None:
    for system in ("linux", "darwin", "win32"):
        found = looked(str(tmp_path), system=system)
        assert found.unseen and all(": " in sentence and "\n" not in sentence for sentence in found.unseen)
        assert found.gpus == () and found.cpu.threads >= 1


def test_this_very_machine() -> None:
    """Whatever runs these tests: it has memory, a CPU and a disk, and every sentence is one line."""
    found = probe()
    assert 0 < found.ram.usable_bytes <= found.ram.usable_total_bytes
    assert 1 <= found.cpu.threads <= (os.cpu_count() or 1)
    assert any(disk.place == "current folder" and disk.free_bytes <= disk.total_bytes for disk in found.disks)
    assert all(sentence.isprintable() for sentence in (*found.unseen, *found.notes))
    if sys.platform.startswith("linux"):
        assert found.cpu.cpus == len(os.sched_getaffinity(0))


CARD = "sys/class/drm/card1/device"
PATHS = (
    *("proc/cpuinfo", "proc/meminfo", "proc/self/status", "proc/self/cgroup", "proc/self/mountinfo", "etc/os-release"),
    *("sys/devices/system/cpu/online", "sys/devices/system/node/node0/cpulist"),
    *("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.stat"),
    *(f"{CARD}/vendor", f"{CARD}/mem_info_vram_total", f"{CARD}/pp_dpm_mclk"),
    "sys/class/kfd/kfd/topology/nodes/1/properties",
)
GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from(
        [b"-1", b"9" * 4000, b"0-9999999", b"::", b"a:b:c\n:::\n", b"0::/../..\n", b"\x1b[31m: 3", b"1 " * 9]
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(st.sampled_from(PATHS), GARBAGE, max_size=6))
def test_any_bytes_in_any_file(recorded: Recorded, files: dict[str, bytes]) -> None:
    root = recorded("mi300x-and-7900xtx")
    for path, content in files.items():
        Path(root, path).parent.mkdir(parents=True, exist_ok=True)
        Path(root, path).write_bytes(content)
    found = looked(root)
    assert found.ram.usable_bytes >= 0 and found.cpu.threads >= 1
    assert all(sentence.isprintable() for sentence in found.unseen)
    assert str(found.cpu.title).isprintable() and all(gpu.title.isprintable() for gpu in found.gpus)


def test_a_file_that_would_wait_or_never_end(tmp_path: Path) -> None:
    tree = Tree(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_text("x" * 200_000)
    assert tree.text("fifo") == ""
    assert len(tree.text("long") or "") == 64 << 10
    assert tree.text("missing") is None and tree.text("") is None and tree.number("long") is None


@pytest.mark.parametrize(
    ("ranges", "numbers"),
    [("0-3,8", {0, 1, 2, 3, 8}), ("0", {0}), ("", set()), ("3-1", set()), ("0-99999999", set()), ("0-3,x", set())],
)
def test_lists_of_the_kernel(ranges: str, numbers: set[int]) -> None:
    assert numbers_of(ranges) == numbers


@pytest.mark.parametrize("value", [True, 3.5, "7", None, -1, 2**64 - 1])
def test_what_is_no_sane_number(value: object) -> None:
    assert whole(value, 0, 1 << 40) is None


def test_text_is_one_plain_line() -> None:
    assert plain_text(b"A\x1b[31m\nB\0\xff") == "A [31m B �"
    assert plain_text(" \t") is None and plain_text(7) is None and len(plain_text("x" * 999) or "") == 100


def test_what_is_missing_alike_is_one_sentence() -> None:
    unseen = Unseen()
    for index in range(3):
        unseen.add("power limit", "NVML says Not Supported", f"GPU {index}")
    assert unseen.sentences() == ("power limit of GPU 0, GPU 1 and GPU 2: NVML says Not Supported",)


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "name"),
    [
        ("GenuineIntel", 6, 85, "avx512f avx512_vnni", "cascade-lake"),
        ("GenuineIntel", 6, 85, "avx512f", "skylake-x"),
        ("GenuineIntel", 6, 143, "amx_tile", "sapphire-rapids"),
        ("AuthenticAMD", 25, 0x11, "avx512_bf16", "zen4"),
        ("AuthenticAMD", 25, 0x21, "avx2", "zen3"),
        ("AuthenticAMD", 26, 0x02, "avx_vnni", "zen5"),
        ("GenuineIntel", 6, 9999, "avx2", None),
        ("Nobody", 6, 85, "avx2", None),
    ],
)
def test_microarchitectures_by_their_numbers(
    vendor: str, family: int, model: int, flags: str, name: str | None, tmp_path: Path
) -> None:
    """Family and model as /proc/cpuinfo tells them: 6/85 is three generations, which their features tell apart."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        f"processor : 0\nvendor_id : {vendor}\ncpu family : {family}\nmodel : {model}\nflags : {flags}\n\n"
    )
    assert linux_cpu(Tree(str(tmp_path)), None, Unseen()).microarchitecture == name
