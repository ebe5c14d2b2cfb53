"""Memory, disks, the operating system, and what hints at a container."""

import os
import platform
import sys
from collections.abc import Callable, Mapping

from ..machine import Disk, Ram, System
from .cgroup import Limits
from .tree import Tree
from .values import Unseen, parsed, plain_text, whole, why

MAX_BYTES = 1 << 60
LEAST_RAM_BYTES = 1 << 20


def linux_ram(tree: Tree, limits: Limits, unseen: Unseen) -> Ram:
    """Memory by /proc/meminfo, within the limits of the control groups."""
    told: dict[str, int] = {}
    for line in (tree.text("proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        kib = parsed((rest.split() or [""])[0], 0, MAX_BYTES >> 10)
        if kib is not None:
            told.setdefault(name, kib << 10)
    total = told.get("MemTotal") or None
    if total is None or total < LEAST_RAM_BYTES:
        total = _sysconf_bytes() if tree.is_real else None
        unseen.add("host memory", "/proc/meminfo has no MemTotal")
    available = told.get("MemAvailable")
    if available is None:
        unseen.add("free host memory", "/proc/meminfo has no MemAvailable; all of it is taken to be free")
    return Ram(
        total,
        min(available, total) if available is not None and total else available,
        limits.memory_bytes if limits.memory_bytes is not None and (not total or limits.memory_bytes < total) else None,
        limits.memory_free_bytes,
        told.get("SwapFree"),
    )


def mac_ram(sysctl: Callable[[str], str], unseen: Unseen) -> Ram:
    try:
        total = parsed(sysctl("hw.memsize"), LEAST_RAM_BYTES, MAX_BYTES)
    except Exception as error:  # no such tool, a sandbox
        total = None
        unseen.add("host memory", f"sysctl: {why(error)}")
    unseen.add("free host memory", "macOS tells it in no number that counts; all of it is taken to be free")
    return Ram(total)


def other_ram(unseen: Unseen) -> Ram:
    total = whole(_sysconf_bytes() or _windows_bytes(), LEAST_RAM_BYTES, MAX_BYTES)
    if total is None:
        unseen.add("host memory", "this operating system does not tell it")
    unseen.add("free host memory", "it is not asked for on this operating system; all of it is taken to be free")
    return Ram(total)


def disks(places: Mapping[str, str], unseen: Unseen) -> tuple[Disk, ...]:
    """The disk under each place: {what it is for: path}. A path that is not there yet counts as the folder above it."""
    found = []
    for place, path in places.items():
        try:
            while path and not os.path.exists(path) and os.path.dirname(path) != path:
                path = os.path.dirname(path)
            total, free = _disk_bytes(path or ".")
            if whole(total, 0, 1 << 63) is None or whole(free, 0, total) is None:
                raise OSError("the file system gives sizes that cannot be")
            found.append(Disk(place, total, free))
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            unseen.add(f"disk of the {place}", plain_text(said, 200) or "the file system does not say")
    return tuple(found)


def hub_cache(environment: Mapping[str, str]) -> str:
    """Where checkpoints from the hub lie (huggingface_hub, constants.py: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME)."""
    home = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface"
    )
    return os.path.expanduser(environment.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def linux_system(tree: Tree, group: str | None, environment: Mapping[str, str], unseen: Unseen) -> System:
    release = dict(line.split("=", 1) for line in (tree.text("etc/os-release") or "").splitlines() if "=" in line)
    kernel = plain_text(tree.line("proc/sys/kernel/osrelease"))
    if kernel is None:
        unseen.add("kernel", "/proc/sys/kernel/osrelease cannot be read")
    hints = [group] if group else []
    if tree.exists(".dockerenv"):
        hints.append("docker")
    if tree.exists("run/.containerenv"):
        hints.append("podman")
    if "KUBERNETES_SERVICE_HOST" in environment:
        hints.append("kubernetes")
    if "microsoft" in (kernel or "").lower():
        hints.append("wsl")
    if " hypervisor" in (tree.text("proc/cpuinfo", 8192) or ""):
        hints.append("virtual machine")
    name = plain_text(release.get("PRETTY_NAME", "").strip("\"'")) or "Linux"
    return System(name, kernel, platform.python_version(), tuple(dict.fromkeys(hints)))


def other_system(name: str) -> System:
    if name == "darwin":
        return System(f"macOS {platform.mac_ver()[0]}".strip(), platform.release() or None, platform.python_version())
    title = plain_text(f"{platform.system()} {platform.release()}") or name
    return System(title, plain_text(platform.version()), platform.python_version())


def _disk_bytes(path: str) -> tuple[int, int]:
    if sys.platform != "win32":
        found = os.statvfs(path)
        return found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    import shutil

    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def _sysconf_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _windows_bytes() -> int | None:
    try:
        from ctypes import byref, c_ulonglong, windll  # type: ignore[attr-defined]

        installed_kib = c_ulonglong()
        windll.kernel32.GetPhysicallyInstalledSystemMemory(byref(installed_kib))
        return installed_kib.value << 10
    except (ImportError, AttributeError, OSError):
        return None
