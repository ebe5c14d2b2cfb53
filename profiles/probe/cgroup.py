"""What the control groups of this process leave it: memory and CPU time, of version 1 and 2, of every ancestor.

A group is limited by each group above it, so the least counts. /proc/self/cgroup says which group, /proc/self/mountinfo
where groups are mounted and which part of their tree a container sees (proc(5), cgroups(7)). Files: version 2 has
memory.max, memory.high, memory.current, cpu.max; version 1 memory.limit_in_bytes, memory.usage_in_bytes,
cpu.cfs_quota_us, cpu.cfs_period_us, and `hierarchical_memory_limit` in memory.stat, which also knows groups above the
mount (Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst). Of what a group uses, inactive pages of
files are given back at need (as Kubernetes counts its working set).
"""

import re

from ..frozen import dataclass
from .tree import Tree
from .values import parsed

NO_LIMIT_BYTES = 1 << 60  # version 1 says 2^63 less a page where there is none
LEAST_BYTES = 1 << 20
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit. `is_inside`: whether the process lies in a group that looks like a container's, and which."""

    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    cpus: float | None = None
    container: str | None = None


def cgroup_limits(tree: Tree) -> Limits:
    """The least limits of this process's groups and all above them. Nothing raises; no groups, no limits."""
    groups = _groups(tree)
    mounts = _mounts(tree)
    amounts = [_memory(tree, folder, version) for version, folder in _folders("memory", groups, mounts)]
    shares = [_cpus(tree, folder, version) for version, folder in _folders("cpu", groups, mounts)]
    return Limits(
        memory_bytes=min((limit for limit, _ in amounts if limit is not None), default=None),
        memory_free_bytes=min((free for _, free in amounts if free is not None), default=None),
        cpus=min((share for share in shares if share is not None), default=None),
        container=_container(groups),
    )


def _groups(tree: Tree) -> dict[str, str]:
    """Controller -> path of this process's group; "" is version 2."""
    found: dict[str, str] = {}
    for line in (tree.text("proc/self/cgroup") or "").splitlines():
        _, first, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if first and colon:
            found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _mounts(tree: Tree) -> dict[str, tuple[str, str]]:
    """Controller -> (the group that is mounted, where); "" is version 2."""
    found: dict[str, tuple[str, str]] = {}
    for line in (tree.text("proc/self/mountinfo", 1 << 20) or "").splitlines():
        head, _, tail = line.partition(" - ")
        before, after = head.split(" "), tail.split(" ")
        if len(before) < 5 or len(after) < 3:
            continue
        root, place = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word) for word in before[3:5])
        if after[0] == "cgroup2":
            found.setdefault("", (root, place))
        elif after[0] == "cgroup":
            for controller in after[2].split(","):
                found.setdefault(controller, (root, place))
    return found


def _folders(controller: str, groups: dict[str, str], mounts: dict[str, tuple[str, str]]) -> list[tuple[int, str]]:
    """(version, folder) of this process's group and of all above it that are mounted, the innermost first."""
    version, key = (1, controller) if controller in mounts else (2, "")
    if key not in mounts:
        return []
    root, place = mounts[key]
    path, place = groups.get(key, "/"), place.strip("/")
    inside = path.removeprefix(root.rstrip("/")) if path == root or path.startswith(root.rstrip("/") + "/") else "/"
    names = [name for name in inside.split("/") if name]
    if ".." in names:  # a group outside of what this namespace sees
        names = []
    depths = range(min(len(names), MAX_DEPTH), -1, -1)
    return [(version, "/".join([place, *names[:depth]])) for depth in depths]


def _memory(tree: Tree, folder: str, version: int) -> tuple[int | None, int | None]:
    """(limit, what is left of it) of one group."""
    stat = dict(line.split(" ", 1) for line in (tree.text(f"{folder}/memory.stat") or "").splitlines() if " " in line)
    if version == 2:
        limits = [
            tree.number(f"{folder}/{name}", LEAST_BYTES, NO_LIMIT_BYTES) for name in ("memory.max", "memory.high")
        ]
        used = tree.number(f"{folder}/memory.current")
        given_back = parsed(stat.get("inactive_file"), 0, NO_LIMIT_BYTES)
    else:
        limits = [
            tree.number(f"{folder}/memory.limit_in_bytes", LEAST_BYTES, NO_LIMIT_BYTES),
            parsed(stat.get("hierarchical_memory_limit"), LEAST_BYTES, NO_LIMIT_BYTES),
        ]
        used = tree.number(f"{folder}/memory.usage_in_bytes")
        given_back = parsed(stat.get("total_inactive_file"), 0, NO_LIMIT_BYTES)
    limit = min((one for one in limits if one is not None), default=None)
    if limit is None:
        return None, None
    taken = max(0, (used or 0) - (given_back or 0))
    return limit, max(0, limit - taken)


def _cpus(tree: Tree, folder: str, version: int) -> float | None:
    if version == 2:
        quota, _, period = (tree.line(f"{folder}/cpu.max") or "").partition(" ")
        quota_us, period_us = parsed(quota, 1, 1 << 40), parsed(period, 1, 1 << 40)
    else:
        quota_us = tree.number(f"{folder}/cpu.cfs_quota_us", 1, 1 << 40)
        period_us = tree.number(f"{folder}/cpu.cfs_period_us", 1, 1 << 40)
    return quota_us / period_us if quota_us and period_us else None


def _container(groups: dict[str, str]) -> str | None:
    """The kind of container that the names of the groups tell of."""
    paths = " ".join(groups.values())
    for kind, words in (
        ("kubernetes", ("kubepods",)),
        ("docker", ("/docker", "docker-")),
        ("podman", ("libpod",)),
        ("lxc", ("/lxc",)),
        ("slurm", ("slurm",)),
    ):
        if any(word in paths for word in words):
            return kind
    return None
