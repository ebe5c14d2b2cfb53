"""Values as drivers and files give them, made safe: bounded, of one line, and a note of what could not be had."""

from typing import Any

MAX_TEXT_CHARACTERS = 100
MAX_SENTENCES = 64


class Unseen:
    """What could not be seen. The same thing missing for the same reason on several GPUs is one sentence."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[str]] = {}

    def add(self, what: str, why: str, where: str = "") -> None:
        """`what` (memory), why it is not known (NVML says Not Supported), and `where` (GPU 0)."""
        places = self._found.setdefault((what, why), [])
        if where and where not in places:
            places.append(where)

    def sentences(self) -> tuple[str, ...]:
        told = [
            f"{what}{f' of {listed(places)}' if places else ''}: {why}" for (what, why), places in self._found.items()
        ]
        if len(told) > MAX_SENTENCES:
            told[MAX_SENTENCES:] = [f"and {len(told) - MAX_SENTENCES} things more"]
        return tuple(told)


def listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"; after eight of them the number of the rest."""
    if len(names) > 8:
        return f"{', '.join(names[:8])} and {len(names) - 8} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plain_text(value: Any, limit: int = MAX_TEXT_CHARACTERS) -> str | None:
    """One line of at most `limit` printable characters; None where nothing printable is left."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return None
    kept = "".join(char if char.isprintable() else " " for char in value[: 4 * limit])
    return " ".join(kept.split())[:limit] or None


def whole(value: Any, low: int, high: int) -> int | None:
    """The number if it is a whole one from `low` to `high`. NVML's "not available" is 2^32-1 or 2^64-1: outside."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        return None
    return value


def parsed(text: str | None, low: int, high: int) -> int | None:
    """The decimal number in `text`, bounded; None for anything else, also for thousands of digits."""
    digits = (text or "").strip()
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        return None
    return whole(int(digits), low, high)


def why(error: BaseException) -> str:
    """What went wrong, as the end of a sentence."""
    try:
        said = plain_text(str(error), 200)
    except Exception:  # an error that cannot even be shown
        said = None
    return said or type(error).__name__
