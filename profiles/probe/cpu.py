"""The CPU by /proc/cpuinfo and /sys: what it is called, what it can do, and how much of it this process may use.

Names of the features are the kernel's own (arch/x86/include/asm/cpufeatures.h, arch/arm64/include/asm/hwcap.h). ARM
gives numbers instead of a name: those of its implementers and parts stand in arch/arm64/include/asm/cputype.h.
"""

from collections.abc import Callable, Mapping
from platform import machine

from ..machine import Cpu, NumaNode
from .tree import Tree, count_of, numbers_of
from .values import Unseen, parsed, plain_text, whole

CPUINFO_LIMIT_BYTES = 8 << 20  # a thousand CPUs at 2 KB of flags each, and some
MAX_NODES = 1024
MAX_BYTES = 1 << 50

# What the kernels and engines here ask for.
X86 = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512vl", "avx512_vnni")
NEWER_X86 = ("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16")
ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme")
FEATURES = frozenset((*X86, *NEWER_X86, *ARM))
ARM_PARTS = {
    ("0x41", "0xd03"): "ARM Cortex-A53",
    ("0x41", "0xd05"): "ARM Cortex-A55",
    ("0x41", "0xd08"): "ARM Cortex-A72",
    ("0x41", "0xd0b"): "ARM Cortex-A76",
    ("0x41", "0xd0c"): "ARM Neoverse-N1",
    ("0x41", "0xd40"): "ARM Neoverse-V1",
    ("0x41", "0xd42"): "ARM Cortex-A78AE",
    ("0x41", "0xd49"): "ARM Neoverse-N2",
    ("0x41", "0xd4f"): "ARM Neoverse-V2",
    ("0x41", "0xd84"): "ARM Neoverse-V3",
    ("0x41", "0xd85"): "ARM Cortex-X925",
    ("0x41", "0xd87"): "ARM Cortex-A725",
    ("0x41", "0xd8e"): "ARM Neoverse-N3",
    ("0xc0", "0xac3"): "Ampere-1",
    ("0xc0", "0xac4"): "Ampere-1A",
}

# What speeds are known by, in the words of profiles/cpu.yaml: vendor, family and models of arch/x86/include/asm/
# intel-family.h and of AMD's revision guides; of one model number the newest that has all the features.
X86_MODELS = (
    ("GenuineIntel", 6, (85,), ("avx512_bf16",), "cooper-lake"),
    ("GenuineIntel", 6, (85,), ("avx512_vnni",), "cascade-lake"),
    ("GenuineIntel", 6, (85,), (), "skylake-x"),
    ("GenuineIntel", 6, (106, 108), (), "ice-lake"),
    ("GenuineIntel", 6, (143,), (), "sapphire-rapids"),
    ("GenuineIntel", 6, (207,), (), "emerald-rapids"),
    ("GenuineIntel", 6, (173, 174), (), "granite-rapids"),
    ("AuthenticAMD", 23, range(0x30, 0x100), (), "zen2"),
    ("AuthenticAMD", 25, (*range(0x10), *range(0x20, 0x60)), (), "zen3"),
    ("AuthenticAMD", 25, (*range(0x10, 0x20), *range(0x60, 0xB0)), (), "zen4"),
    ("AuthenticAMD", 26, range(0x100), (), "zen5"),
)
ARM_MODELS = {
    "ARM Cortex-A76": "cortex-a76",
    "ARM Neoverse-N1": "neoverse-n1",
    "ARM Neoverse-V1": "neoverse-v1",
    "ARM Neoverse-V2": "neoverse-v2",
}


def linux_cpu(tree: Tree, quota_cpus: float | None, unseen: Unseen) -> Cpu:
    """The CPU of this machine, and the part of it that this process may use."""
    blocks = _blocks(tree)
    if not blocks:
        unseen.add("CPU model and instruction sets", "/proc/cpuinfo cannot be read")
    first = blocks[0] if blocks else {}
    last = blocks[-1] if blocks else {}
    online = count_of(tree.line("sys/devices/system/cpu/online")) or sum("processor" in block for block in blocks)
    allowed = numbers_of(_status(tree).get("Cpus_allowed_list"))
    if not allowed:
        unseen.add("CPUs that this process may use", "/proc/self/status has no Cpus_allowed_list; all are taken")
    on_line = numbers_of(tree.line("sys/devices/system/cpu/online"))
    usable = (allowed & on_line if on_line else allowed) or on_line
    cpus = len(usable) or online or None
    flags = (first.get("flags") or first.get("Features") or "").split()
    return Cpu(
        title=plain_text(first.get("model name")) or _arm_title(blocks),
        architecture=machine() if tree.is_real else _architecture(first),
        online_cpus=online or None,
        cpus=cpus,
        cores=_cores(tree, blocks, usable) or cpus,
        sockets=len({block["physical id"] for block in blocks if "physical id" in block}) or None,
        quota_cpus=quota_cpus,
        features=tuple(dict.fromkeys(flag for flag in flags if flag in FEATURES)),
        numa=_numa(tree),
        board=plain_text(last.get("Model") or tree.line("proc/device-tree/model")),
        microarchitecture=_microarchitecture(first, flags) or ARM_MODELS.get(_arm_title(blocks) or ""),
    )


def mac_cpu(sysctl: Callable[[str], str], unseen: Unseen) -> Cpu:
    """The CPU that macOS tells of (sysctl hw, machdep.cpu)."""

    def number(name: str) -> int | None:
        return parsed(_asked(sysctl, name), 1, 1 << 16)

    title = plain_text(_asked(sysctl, "machdep.cpu.brand_string"))
    cpus = number("hw.logicalcpu")
    for what, found in (("CPU model", title), ("number of CPUs", cpus)):
        if found is None:
            unseen.add(what, "sysctl does not say")
    arm = {"asimd": "AdvSIMD", "asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16", "sme": "FEAT_SME"}
    features = tuple(flag for flag, name in arm.items() if _asked(sysctl, f"hw.optional.arm.{name}").strip() == "1")
    return Cpu(
        title, machine() or "arm64", cpus, cpus, number("hw.physicalcpu") or cpus, number("hw.packages"), None, features
    )


def other_cpu(count: int | None, environment: Mapping[str, str], unseen: Unseen) -> Cpu:
    """Where there is neither /proc nor sysctl: what Python and the environment know."""
    unseen.add("instruction sets and NUMA nodes of the CPU", "this operating system is not asked for them")
    cpus = whole(count, 1, 1 << 16)
    return Cpu(plain_text(environment.get("PROCESSOR_IDENTIFIER")), machine() or "unknown", cpus, cpus, cpus)


def _asked(sysctl: Callable[[str], str], name: str) -> str:
    try:
        return sysctl(name)
    except Exception:  # no such name on this Mac, no such tool
        return ""


def _blocks(tree: Tree) -> list[dict[str, str]]:
    """One mapping per paragraph of /proc/cpuinfo: a logical CPU each, and on some ARM boards one about the board."""
    text = tree.text("proc/cpuinfo", CPUINFO_LIMIT_BYTES) or ""
    found: list[dict[str, str]] = []
    for paragraph in text.split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        block = {name.strip(): value.strip() for name, colon, value in pairs if colon}
        if block:
            found.append(block)
    return found


def _status(tree: Tree) -> dict[str, str]:
    lines = (line.partition(":") for line in (tree.text("proc/self/status") or "").splitlines())
    return {name: value.strip() for name, colon, value in lines if colon}


def _cores(tree: Tree, blocks: list[dict[str, str]], usable: set[int]) -> int | None:
    """Physical cores among the usable CPUs: by cpuinfo (x86), else by their siblings."""
    named = {
        parsed(block.get("processor"), 0, 1 << 16): (block["physical id"], block["core id"])
        for block in blocks
        if {"physical id", "core id"} <= set(block)
    }
    if named:
        return len({core for number, core in named.items() if not usable or number in usable}) or None
    siblings = {
        tree.line(f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") or str(number)
        for number in usable
    }
    return len(siblings) or None


def _arm_title(blocks: list[dict[str, str]]) -> str | None:
    """ "ARM Cortex-X925 and ARM Cortex-A725": each kind of core by the name of its part, or by its numbers."""
    kinds: list[str] = []
    for block in blocks:
        implementer, part = block.get("CPU implementer"), block.get("CPU part")
        if implementer and part:
            title = ARM_PARTS.get((implementer.lower(), part.lower()), f"ARM part {implementer}:{part}")
            if title not in kinds:
                kinds.append(title)
    return plain_text(" and ".join(kinds[:3]))


def _architecture(block: Mapping[str, str]) -> str:
    return "aarch64" if "CPU implementer" in block else "x86_64" if "flags" in block else "unknown"


def _microarchitecture(block: Mapping[str, str], flags: list[str]) -> str | None:
    family, model = (parsed(block.get(name), 0, 1 << 16) for name in ("cpu family", "model"))
    for vendor, own_family, models, features, name in X86_MODELS:
        same = (block.get("vendor_id"), family) == (vendor, own_family) and model in models
        if same and set(features) <= set(flags):
            return name
    return None


def _numa(tree: Tree) -> tuple[NumaNode, ...]:
    found = []
    for name in tree.names("sys/devices/system/node", r"node\d{1,4}")[:MAX_NODES]:
        folder, node = f"sys/devices/system/node/{name}", int(name.removeprefix("node"))
        memory = _meminfo(tree.text(f"{folder}/meminfo"))
        cpus = count_of(tree.line(f"{folder}/cpulist")) or 0
        found.append(NumaNode(node, cpus, memory.get("MemTotal"), memory.get("MemFree")))
    return tuple(found)


def _meminfo(text: str | None) -> dict[str, int]:
    """ "Node 0 MemTotal:  24684096 kB" -> {"MemTotal": bytes}."""
    found: dict[str, int] = {}
    for line in (text or "").splitlines():
        words = line.split()
        if len(words) >= 4 and words[2].endswith(":") and (kib := parsed(words[3], 0, MAX_BYTES >> 10)) is not None:
            found[words[2].removesuffix(":")] = kib << 10
    return found
