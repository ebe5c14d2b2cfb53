"""How an engine's lines are written down as data: what begins a boot, which line says which bytes, and in which units.

A pattern is tried only on lines that hold its `needle`, and has no repetition inside a repetition, so that reading is
linear in the log whatever stands in it.
"""

import re
from collections.abc import Callable, Mapping

from ...profiles.frozen import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNITS = {"B": 1, "bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1 << 40}
NUMBER = r"-?\d{1,40}(?:\.\d{1,12})?"
PARTS = ("weights", "kv_cache", "recurrent_state", "activation", "graph", "runtime")

Rank = tuple[int, int, int]
"""Places of a process: data, pipeline and tensor parallel."""
RANK_0: Rank = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class LoggedPart:
    """One figure: the true one lies within `resolution_bytes` of `bytes`."""

    part: str  # weights, kv_cache, recurrent_state, activation, graph or runtime
    place: str  # device0, device1, ... or host
    bytes: int
    resolution_bytes: int
    line: str  # the engine's words, without what stood around them
    covers: tuple[str, ...] = ()  # other parts whose bytes are in this figure


@dataclass(frozen=True, slots=True)
class PartFormat:
    """A line that says how much memory something takes.

    Groups of `pattern`: `a` to `f` are numbers that are added; `unit` where the line names it; `place` the name of a
    buffer. `covers` are parts whose bytes are in the same figure. A further line for the same part and place is added
    to the first (`again="add"`), or replaces it within one context (`"replace"`).
    """

    needle: str
    pattern: re.Pattern[str]
    part: str
    versions: str
    source: str
    unit: int = 1
    decimals: int = 0  # at least so many stand behind the point, or were rounded away there
    covers: tuple[str, ...] = ()
    again: str = "replace"
    after_ready: bool = False  # earlier ones are forecasts
    group: str = ""  # lines of one group replace each other; by default each needle is its own


@dataclass(frozen=True, slots=True)
class WordFormat:
    """A line that says a setting or another figure. Group `value`; `kind` is int, float, bool, text, bytes, or list (of
    texts, in the order of their lines)."""

    needle: str
    pattern: re.Pattern[str]
    key: str
    kind: str = "int"
    setting: bool = True  # what was asked for; otherwise a fact that came out
    unit: int = 1  # of kind bytes
    first: bool = False  # the first line that says it counts, not the last


@dataclass(frozen=True, slots=True)
class Dialect:
    """One engine's lines."""

    engine: str
    marks: tuple[str, ...]  # that only this engine prints
    starts: tuple[str, ...]  # a new boot begins, if the one before has said anything of memory
    contexts: tuple[str, ...]  # a further context of the same process: its lines are added to those of the first
    ready: tuple[str, ...]
    death_words: tuple[str, ...]  # one of them stands in every line of `deaths`
    deaths: tuple[re.Pattern[str], ...]  # the engine's own sentence when memory runs out
    parts: tuple[PartFormat, ...]
    words: tuple[WordFormat, ...]
    rank: Callable[[str], Rank]
    place: Callable[[str | None, int, frozenset[str]], str]
    """Of a buffer's name (None: the line has none), the number of its device by rank, and all names in the boot."""
    derive: Callable[[dict[str, object], dict[str, object], tuple[LoggedPart, ...]], tuple[LoggedPart, ...]]
    """Brings settings and facts into the planner's words; gives the parts, and those that follow from them."""


def no_rank(line: str) -> Rank:
    return RANK_0


def device_place(name: str | None, number: int, names: frozenset[str]) -> str:
    return f"device{number}"


def word(text: str, kind: str, unit: int = 1) -> object:
    """The value behind a match. ValueError where the text is none of that kind."""
    if kind == "int":
        return int(text.replace(",", "")[:18])
    if kind == "float":
        return float(text[:40])
    if kind == "bytes":
        return round(float(text[:40]) * unit)
    if kind == "bool":
        return text.lower() in ("true", "1", "yes")
    return text


def integer(values: Mapping[str, object], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text_of(values: Mapping[str, object], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) and value else None


def words(needle: str, key: str, value: str, **told: object) -> WordFormat:
    """A word that follows its needle at once."""
    return WordFormat(needle, re.compile(re.escape(needle) + value), key, **told)  # type: ignore[arg-type]
