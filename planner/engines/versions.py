"""Which of two engine releases is newer."""

from functools import lru_cache


@lru_cache(maxsize=256)
def release(version: str) -> tuple[int, ...]:
    """The numbers of `0.32.0`, `v0.5.23` or `0.20.1rc1`, as far as they go; empty where there are none."""
    numbers: list[int] = []
    for part in version.lstrip("vb").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits[:9]))
        if digits != part:
            break
    return tuple(numbers)


def since(version: str, first: str) -> bool:
    """Whether a release has what came with `first`. `0.30` stands for `0.30.0`, an empty version for the newest."""
    numbers = release(version)
    return not numbers or numbers >= release(first)
