"""Files of /proc and /sys below a root of choice: read whole and bounded, and None where they cannot be.

A test gives the root of a recorded tree. Nothing blocks: what is no regular file is opened without waiting.
"""

import os
import re

LIMIT_BYTES = 64 << 10
LIMIT_NAMES = 4096


class Tree:
    """Paths are written as below "/", without it: "proc/meminfo"."""

    def __init__(self, root: str = "/") -> None:
        self.root = root

    @property
    def is_real(self) -> bool:
        return self.root == "/"

    def text(self, path: str, limit_bytes: int = LIMIT_BYTES) -> str | None:
        """The first `limit_bytes` of a file; None where there is none or it cannot be read."""
        try:
            handle = os.open(os.path.join(self.root, path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError):
            return None
        try:
            parts, left = [], limit_bytes
            while left > 0 and (part := os.read(handle, min(left, 1 << 16))):
                parts.append(part)
                left -= len(part)
        except OSError:  # sysfs says EIO or EINVAL for what the device does not have; a folder says EISDIR
            return None
        finally:
            os.close(handle)
        return b"".join(parts).decode("utf-8", "replace")

    def line(self, path: str) -> str | None:
        """The first line without the white space around it, or None where that leaves nothing."""
        text = self.text(path, 4096)
        return text.strip().partition("\n")[0].strip() or None if text else None

    def number(self, path: str, low: int = 0, high: int = 1 << 63) -> int | None:
        """The whole number in a file, decimal or 0x..., if it lies from `low` to `high`."""
        text = self.line(path) or ""
        if not re.fullmatch(r"-?\d{1,20}|0x[0-9a-fA-F]{1,16}", text, re.ASCII):
            return None
        value = int(text, 16) if "x" in text else int(text)
        return value if low <= value <= high else None

    def names(self, path: str, pattern: str = ".*") -> list[str]:
        """What lies in a folder and matches, in the order of the numbers in their names; [] where there is none."""
        try:
            found = os.listdir(os.path.join(self.root, path))
        except (OSError, ValueError):
            return []
        kept = [name for name in found if re.fullmatch(pattern, name)]
        return sorted(kept, key=lambda name: ([int(part) for part in re.findall(r"\d{1,9}", name)], name))[:LIMIT_NAMES]

    def exists(self, path: str) -> bool:
        return os.path.exists(os.path.join(self.root, path))


def count_of(ranges: str | None) -> int | None:
    """How many numbers a kernel's list holds: "0-3,8" is 5. None where it is none."""
    found = numbers_of(ranges)
    return len(found) if found else None


def numbers_of(ranges: str | None, most: int = 65536) -> set[int]:
    """The numbers of a kernel's list: "0-3,8" is {0, 1, 2, 3, 8}; empty where it is malformed."""
    found: set[int] = set()
    for part in (ranges or "").strip().split(","):
        match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", part.strip(), re.ASCII)
        if not match:
            return set()
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= most:
            return set()
        found.update(range(first, last + 1))
    return found
