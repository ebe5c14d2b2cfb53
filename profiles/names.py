"""Names as people type them: what counts as the same name, and which names are near to a wrong one.

`fold` drops what carries no meaning (case, spaces, hyphens, the vendor's own words), so that "NVIDIA GeForce RTX 3060",
"rtx_3060" and "RTX3060" are one name, and "A100 80G" is "a100-80gb".
"""

from collections.abc import Iterable

# Words that a driver, a shop or a person adds to a device's name, and that tell no two devices apart.
_VENDOR_WORDS = ("nvidia", "geforce", "quadro", "tesla", "amd", "radeon", "instinct", "intel", "core", "apple", "aws")
_FILLERS = frozenset((*_VENDOR_WORDS, "graphics", "gpu", "generation", "edition", "series", "r", "tm"))
_GLUED = ("nvidia", "geforce", "radeon", "instinct", "tesla", "apple")
_MAX_TYPED_CHARACTERS = 100


def fold(name: str) -> str:
    """The name without case, separators and fillers: equal for spellings of the same device."""
    spaced = "".join(letter if letter.isalnum() else " " for letter in name[:_MAX_TYPED_CHARACTERS].casefold())
    words = spaced.split()
    kept = [_unglue(word) for word in words if word not in _FILLERS] or words
    folded = "".join(kept)
    if folded.endswith("gib"):
        return folded[:-2] + "b"
    # "a100-80g" means the 80 GB one; "rx7900g" would not end in a digit and a g.
    return folded + "b" if folded.endswith("g") and folded[-2:-1].isdigit() else folded


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """At most `count` of `names` that look like `name` or contain it, the most similar first."""
    from difflib import get_close_matches

    by_fold: dict[str, str] = {}
    for known in names:
        by_fold.setdefault(fold(known), known)
    folded = fold(name)
    near = get_close_matches(folded, by_fold, n=count, cutoff=0.6)
    if not near and len(folded) >= 3:
        near = [known for known in by_fold if folded in known][:count]
    return [by_fold[match] for match in near]


def did_you_mean(name: str, names: Iterable[str], count: int = 3) -> str:
    """ "did you mean a, b or c? " with the nearest names, or nothing where none is near."""
    near = nearest(name, names, count)
    return f"did you mean {join_or(near)}? " if near else ""


def join_or(names: list[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def quote(name: str) -> str:
    """What somebody typed, as it may stand in a sentence: one line, no control characters, not too long."""
    text = ascii(name) if not name.isprintable() else f"'{name}'"
    return text if len(text) <= 80 else f"{text[:77]}...'"


def _unglue(word: str) -> str:
    for filler in _GLUED:
        if word.startswith(filler) and len(word) > len(filler):
            return word[len(filler) :]
    return word
