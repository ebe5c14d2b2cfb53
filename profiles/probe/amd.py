"""AMD's GPUs by sysfs: /sys/class/drm/card*/device of the amdgpu driver, /sys/class/kfd of ROCm; rocm-smi otherwise.

Files and units: Linux Documentation/gpu/amdgpu/driver-misc.rst and thermal.rst (mem_info_vram_total and _used in bytes,
pp_dpm_mclk with its clocks in MHz and a star at the one in use, hwmon power1_cap in microwatts), and
drivers/gpu/drm/amd/amdkfd/kfd_topology.c (properties of a node: gfx_target_version, simd_count, cpu_cores_count,
drm_render_minor; nodes of GPUs that a container was not given cannot be read). Which targets are APUs, whose memory is
the host's: LLVM's AMDGPUUsage, table of processors; a node with both CPU cores and SIMDs is one, too.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..frozen import replace
from ..machine import Gpu, Pcie
from .tree import Tree
from .values import Unseen, parsed, plain_text, whole, why

VENDOR = 0x1002
LEAST_BYTES = 64 << 20
MAX_BYTES = 64 << 40
# Transfers per second and lane, in 10^9, of each generation of PCIe, as current_link_speed writes them.
GENERATIONS = {"2.5": 1, "5": 2, "5.0": 2, "8": 3, "8.0": 3, "16": 4, "16.0": 4, "32": 5, "32.0": 5, "64": 6, "64.0": 6}
OLDER_APUS = ("gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036", "gfx1103")
APUS = frozenset((*OLDER_APUS, "gfx1150", "gfx1151", "gfx1152", "gfx1153"))
OTHER_VENDORS = {0x8086: "Intel", 0x10DE: "NVIDIA"}


def amd_gpus(
    tree: Tree, run: Callable[[list[str]], str], environment: Mapping[str, str], unseen: Unseen
) -> tuple[tuple[Gpu, ...], dict[str, str]]:
    """AMD's GPUs in the order of their cards, and the version of the driver where it says one."""
    cards = [
        f"sys/class/drm/{card}/device"
        for card in tree.names("sys/class/drm", r"card\d{1,4}")
        if tree.number(f"sys/class/drm/{card}/device/vendor") == VENDOR
    ]
    nodes = _kfd_nodes(tree)
    found = [_gpu(tree, folder, index, nodes, unseen) for index, folder in enumerate(cards)]
    if (nodes or cards) and not any(gpu.memory_bytes for gpu in found):
        found = _by_rocm_smi(run, unseen) or found
    elif not cards and not nodes:
        return (), {}
    version = plain_text(tree.line("sys/module/amdgpu/version"), 40)
    return tuple(_visible(found, environment)), {"amdgpu": version} if version else {}


def _gpu(tree: Tree, folder: str, index: int, nodes: list[dict[str, int]], unseen: Unseen) -> Gpu:
    where = f"GPU {index}"
    minors = [parsed(name.removeprefix("renderD"), 0, 1 << 20) for name in tree.names(f"{folder}/drm", r"renderD\d+")]
    node = next((node for node in nodes if node.get("drm_render_minor") in minors), None)
    if node is None:
        why_not = "it is not given to this process" if nodes else "ROCm's driver is not loaded"
        unseen.add("compute capability", f"/sys/class/kfd has no node that can be read: {why_not}", where)
        node = {}
    total = tree.number(f"{folder}/mem_info_vram_total", LEAST_BYTES, MAX_BYTES)
    used = tree.number(f"{folder}/mem_info_vram_used", 0, total or MAX_BYTES)
    if total is None:
        unseen.add("memory", "its mem_info_vram_total cannot be read", where)
    elif used is None:
        unseen.add("free memory", "its mem_info_vram_used cannot be read", where)
    target = _target(node.get("gfx_target_version"))
    is_apu = node.get("cpu_cores_count", 0) > 0 or target in APUS
    shared = None
    if is_apu:  # what the firmware set aside, and what the driver may take of the host's memory besides
        shared = tree.number(f"{folder}/mem_info_gtt_total", 0, MAX_BYTES) or 0
        shared_used = tree.number(f"{folder}/mem_info_gtt_used", 0, MAX_BYTES) or 0
        total, used = (total or 0) + shared or None, (used or 0) + shared_used
    clock, max_clock = _clocks_hz(tree.text(f"{folder}/pp_dpm_sclk"))
    memory_clock, max_memory_clock = _clocks_hz(tree.text(f"{folder}/pp_dpm_mclk"))
    return Gpu(
        index=index,
        vendor="amd",
        title=plain_text(tree.line(f"{folder}/product_name")) or _title(tree, folder),
        kind="unified" if is_apu else "discrete",
        memory_bytes=total,
        used_bytes=used,
        free_bytes=max(0, total - used) if total is not None and used is not None else None,
        shared_bytes=shared,
        compute_capability=target,
        clock_hz=clock,
        max_clock_hz=max_clock,
        memory_clock_hz=memory_clock,
        max_memory_clock_hz=max_memory_clock,
        power_limit_w=_power_w(tree, folder),
        pcie=_pcie(tree, folder),
        visible=bool(node) or not nodes,
    )


def _kfd_nodes(tree: Tree) -> list[dict[str, int]]:
    """Properties of the nodes that compute."""
    found = []
    for name in tree.names("sys/class/kfd/kfd/topology/nodes", r"\d{1,4}"):
        text = tree.text(f"sys/class/kfd/kfd/topology/nodes/{name}/properties") or ""
        pairs = (line.split() for line in text.splitlines())
        node = {
            pair[0]: value for pair in pairs if len(pair) == 2 and (value := parsed(pair[1], 0, 1 << 64)) is not None
        }
        if node.get("simd_count"):
            found.append(node)
    return found


def _target(version: int | None) -> str | None:
    """90402 -> gfx942, 110000 -> gfx1100, 90010 -> gfx90a: major, minor and stepping, the last two in hexadecimal."""
    if not version or not 1 <= version // 10000 <= 99:
        return None
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _title(tree: Tree, folder: str) -> str:
    """The name in libdrm's table of device and revision, else the number of the device."""
    device = tree.number(f"{folder}/device", 0, 0xFFFF)
    revision = tree.number(f"{folder}/revision", 0, 0xFF)
    for table in ("usr/share/libdrm/amdgpu.ids", "opt/amdgpu/share/libdrm/amdgpu.ids"):
        for line in (tree.text(table, 1 << 20) or "").splitlines():
            words = [word.strip() for word in line.split(",", 2)]
            if len(words) == 3 and f"{device or 0:04X},{revision or 0:02X}" == f"{words[0].upper()},{words[1].upper()}":
                return plain_text(words[2]) or "AMD GPU"
    return f"AMD GPU {device:04x}" if device else "AMD GPU"


def _clocks_hz(text: str | None) -> tuple[int | None, int | None]:
    """ "0: 96Mhz *\\n1: 1249Mhz" -> (96 MHz, 1249 MHz): the one in use, and the highest."""
    found = re.findall(r"^\d+: (\d{1,6})M[Hh]z ?(\*?)", text or "", re.M | re.ASCII)
    now = next((int(mhz) * 10**6 for mhz, star in found if star), None)
    return now, max((int(mhz) * 10**6 for mhz, _ in found), default=None)


def _power_w(tree: Tree, folder: str) -> float | None:
    for name in tree.names(f"{folder}/hwmon", r"hwmon\d+"):
        cap = tree.number(f"{folder}/hwmon/{name}/power1_cap", 10**6, 10**11)
        if cap:
            return cap / 1e6
    return None


def _pcie(tree: Tree, folder: str) -> Pcie | None:
    def generation(name: str) -> int | None:
        return GENERATIONS.get((tree.line(f"{folder}/{name}") or "").partition(" ")[0])

    found = Pcie(
        generation("current_link_speed"),
        tree.number(f"{folder}/current_link_width", 1, 64),
        generation("max_link_speed"),
        tree.number(f"{folder}/max_link_width", 1, 64),
    )
    return found if any((found.generation, found.lanes, found.max_generation, found.max_lanes)) else None


def _by_rocm_smi(run: Callable[[list[str]], str], unseen: Unseen) -> list[Gpu]:
    """What rocm-smi tells, whose keys changed with its versions: they are looked for by what they begin with."""
    from json import loads

    try:
        told = loads(run(["rocm-smi", "--showmeminfo", "vram", "--showproductname", "--json"]))
        cards = {name: card for name, card in told.items() if re.fullmatch(r"card\d{1,4}", name)}
        ordered = sorted(cards.items(), key=lambda pair: int(pair[0][4:]))
        return [_told(card, index) for index, (_, card) in enumerate(ordered) if isinstance(card, dict)]
    except Exception as error:  # not installed, no permission, not JSON
        unseen.add("AMD GPUs by rocm-smi", why(error))
        return []


def _told(card: dict[str, Any], index: int) -> Gpu:
    def first(*beginnings: str) -> str:
        return next((str(card[key]) for begin in beginnings for key in card if key.startswith(begin)), "")

    total = parsed(first("VRAM Total Memory (B)"), LEAST_BYTES, MAX_BYTES)
    used = parsed(first("VRAM Total Used Memory (B)"), 0, total or 0)
    target = first("GFX Version")
    return Gpu(
        index=index,
        vendor="amd",
        title=plain_text(first("Card Series", "Card series", "Card Model", "Card model")) or "AMD GPU",
        memory_bytes=total,
        used_bytes=used,
        free_bytes=total - used if total is not None and used is not None else None,
        compute_capability=target if re.fullmatch(r"gfx[0-9a-f]{3,5}", target) else None,
    )


def _visible(found: list[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """HIP_VISIBLE_DEVICES, or else CUDA_VISIBLE_DEVICES, names what HIP gives to a process, by index (HIP
    documentation, environment variables; ROCR_VISIBLE_DEVICES leaves some out before that)."""
    shown = [gpu for gpu in found if gpu.visible]
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        asked = environment.get(name)
        if asked is None and name == "HIP_VISIBLE_DEVICES":
            asked = environment.get("CUDA_VISIBLE_DEVICES")
        if asked is None:
            continue
        places: list[int] = []
        for word in asked[:65536].split(","):
            place = whole(parsed(word, 0, 1 << 16), 0, len(shown) - 1)
            if place is None:
                break
            if place not in places:
                places.append(place)
        shown = [shown[place] for place in places]
    rest = [gpu for gpu in found if not any(gpu is one for one in shown)]
    return [replace(gpu, visible=True) for gpu in shown] + [replace(gpu, visible=False) for gpu in rest]


def other_gpus(tree: Tree, seen: set[str], unseen: Unseen) -> None:
    """GPUs on the bus that no driver told of: a sentence each kind."""
    for vendor, name in OTHER_VENDORS.items():
        cards = [
            card
            for card in tree.names("sys/bus/pci/devices")
            if tree.number(f"sys/bus/pci/devices/{card}/vendor") == vendor
            and (tree.number(f"sys/bus/pci/devices/{card}/class") or 0) >> 16 == 0x03
        ]
        if cards and name.lower() not in seen:
            told = "its driver tells nothing" if name == "NVIDIA" else "it is not asked for its memory"
            unseen.add(f"{name} GPU on the PCI bus", f"{told}; give --gpu NAME, `qwen-plan devices` lists them")
