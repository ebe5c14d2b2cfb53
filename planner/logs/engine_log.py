"""An engine's boot log as data: what was allocated where, with which settings, and how the boot ended.

    read_log_file("vllm.log").parts[0]  # LoggedPart("weights", "device0", 16106127360, 5368710, "Model loading ...")

Of several boots in one log the last complete one is read. What a line rounds away is `resolution_bytes`.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from ...profiles.errors import BadInput
from ...profiles.frozen import dataclass, field
from . import llamacpp_log, ollama_log, sglang_log, vllm_log
from .dialect import UNITS, Dialect, LoggedPart, PartFormat, Rank, WordFormat, integer, text_of, word
from .log_file import LogText, read_log_text, text_lines
from .redaction import file_name, model_name, redact

DIALECTS = {
    dialect.engine: dialect
    for dialect in (vllm_log.DIALECT, sglang_log.DIALECT, ollama_log.DIALECT, llamacpp_log.DIALECT)
}
READ_AS = {"ktransformers": "sglang"}  # a fork that kept the lines
ABSURD_BYTES = 1 << 50
MAX_PARTS = 4096


@dataclass(frozen=True, slots=True)
class EngineLog:
    """What a boot came to."""

    engine: str
    version: str | None
    model: str | None  # as the log names it, without its path
    settings: Mapping[str, object] = field(default_factory=dict)  # ctx_tokens, seqs, kv_dtype, tp, ...
    parts: tuple[LoggedPart, ...] = ()  # one per part and place
    facts: Mapping[str, object] = field(default_factory=dict)  # what else it says: kv_cache_tokens, load_s, ...
    died: str | None = None  # its own sentence, where it ran out of memory
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """As many as the log tells apart."""
        return len({part.place for part in self.parts if part.place != "host"})


def read_log_file(path: str, engine: str | None = None) -> EngineLog:
    """The boot in a file, or on standard input where `path` is `-`. BadInput where there is none."""
    where = "standard input" if path == "-" else path[:300] if path.isprintable() else ascii(path[:300])
    return _read(read_log_text(path), engine, where)


def read_log(text: str, engine: str | None = None) -> EngineLog:
    """The boot in a text. BadInput where there is none, or the numbers are absurd."""
    return _read(LogText(text_lines(text), 0), engine, "this text")


def _read(log: LogText, engine: str | None, where: str) -> EngineLog:
    pages = _Pages(log.lines)
    dialect = _dialect(pages, engine, where)
    boots = [boot for boot in _boots(dialect, pages, where) if boot.says_something]
    if not boots:
        raise BadInput(_nothing(dialect, where))
    complete = [place for place, boot in enumerate(boots) if boot.complete]
    chosen = complete[-1] if complete else len(boots) - 1
    notes: list[str] = []
    if len(boots) > 1:
        notes.append(f"{len(boots)} boots in the log: number {chosen + 1}, the last {_kind(complete)}, is read")
        later = [boot.died for boot in boots[chosen + 1 :] if boot.died]
        notes += [f"a later boot ended with: {later[-1]}"] if later else []
    if log.skipped_bytes:
        notes.append(f"{log.skipped_bytes >> 20} MiB between the log's beginning and end were not read")
    return boots[chosen].result((READ_AS.get(engine or "") and engine) or dialect.engine, notes)


def _kind(complete: list[int]) -> str:
    return "complete one" if complete else "of which none is complete"


def _dialect(pages: "_Pages", engine: str | None, where: str) -> Dialect:
    if engine is not None:
        name = engine.partition("@")[0].strip().lower()
        found = DIALECTS.get(READ_AS.get(name, name))
        if found is None:
            raise BadInput(f"no boot log of {redact(engine)} is known: there are {', '.join(DIALECTS)}")
        return found
    hits = {name: len(pages.holding(dialect.marks)) for name, dialect in DIALECTS.items()}
    best = max(hits, key=lambda name: hits[name])
    if not hits[best]:
        raise BadInput(
            f"{where} is no boot log of {', '.join(DIALECTS)}: give what the engine printed from its start on, or name "
            "it with --engine"
        )
    return DIALECTS["ollama"] if best == "llama.cpp" and hits["ollama"] else DIALECTS[best]


def _nothing(dialect: Dialect, where: str) -> str:
    sentence = f"{where} has no line in which {dialect.engine} says how much memory it took"
    if dialect.engine in ("llama.cpp", "ollama"):
        return f"{sentence}: start llama-server with -lv 4, for newer builds are silent about it otherwise"
    return f"{sentence}: give the log from its start on"


@dataclass(frozen=True, slots=True)
class _Figure:
    """A match, before places are known."""

    form: PartFormat
    name: str | None
    rank: Rank
    context: int
    bytes: int
    resolution_bytes: int
    line: str


class _Boot:
    """What the lines since a start have said."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.figures: list[_Figure] = []
        self.words: dict[tuple[bool, str], object] = {}
        self.context = 0
        self.ready = False
        self.died: str | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.figures or self.died)

    @property
    def complete(self) -> bool:
        said = {figure.form.part for figure in self.figures}
        return self.died is None and ((self.ready and bool(said)) or {"weights", "kv_cache"} <= said)

    def note(self, form: WordFormat, text: str) -> None:
        key = (form.setting, form.key)
        if form.first and key in self.words:
            return
        if form.kind == "list":
            before = self.words.get(key)
            told = text.strip()[:80]
            self.words[key] = f"{before}; {told}" if before else told
            return
        try:
            self.words[key] = word(text.strip(), form.kind, form.unit)
        except (ValueError, OverflowError):
            return

    def result(self, engine: str, notes: list[str]) -> EngineLog:
        settings = {key: value for (setting, key), value in self.words.items() if setting}
        facts = {key: value for (setting, key), value in self.words.items() if not setting}
        parts = self.dialect.derive(settings, facts, tuple(self._parts(settings)))
        version, model = text_of(settings, "version"), text_of(settings, "model")
        file = settings.pop("file", None)
        settings.pop("version", None)
        settings.pop("model", None)
        if isinstance(file, str) and (name := file_name(file)):
            settings["file"] = name
        return EngineLog(
            engine=engine,
            version=version,
            model=model_name(model) if model else None,
            settings=settings,
            parts=parts,
            facts=facts,
            died=_sentence(redact(self.died)) if self.died else None,
            notes=tuple(notes),
        )

    def _parts(self, settings: Mapping[str, object]) -> Iterator[LoggedPart]:
        figures = _finest(self.figures)
        names = frozenset(figure.name for figure in figures if figure.name)
        numbers = _numbers([figure.rank for figure in figures], settings)
        kept: dict[object, _Figure] = {}
        for at, figure in enumerate(figures):
            form = figure.form
            own = at if form.again == "add" else -1
            kept[form.part, form.group or form.needle, figure.name, figure.rank, figure.context, own] = figure
        sums: dict[tuple[str, str], LoggedPart] = {}
        for figure in kept.values():
            place = self.dialect.place(figure.name, numbers[figure.rank], names)
            part = LoggedPart(
                figure.form.part, place, figure.bytes, figure.resolution_bytes, figure.line, figure.form.covers
            )
            before = sums.get((part.part, place))
            sums[part.part, place] = _sum(before, part) if before else part
        yield from sums.values()


def _sentence(text: str) -> str:
    """Without a last sentence that was cut."""
    whole, stop, _ = text.rpartition(". ")
    return f"{whole}." if stop and len(text) > 200 and not text.endswith(".") else text


def _sum(one: LoggedPart, other: LoggedPart) -> LoggedPart:
    return LoggedPart(
        one.part,
        one.place,
        one.bytes + other.bytes,
        one.resolution_bytes + other.resolution_bytes,
        f"{one.line}; {other.line}"[:400],
        tuple(dict.fromkeys((*one.covers, *other.covers))),
    )


def _finest(figures: list[_Figure]) -> list[_Figure]:
    """Of an engine that wraps another: the inner one's lines where there are any of buffers."""
    inner = [figure for figure in figures if "msg=" not in figure.form.needle]
    outer = len(inner) < len(figures)
    return inner if outer and any(figure.form.part == "weights" for figure in inner) else figures


def _numbers(ranks: list[Rank], settings: Mapping[str, object]) -> dict[Rank, int]:
    tensor = integer(settings, "tp") or 1 + max((rank[2] for rank in ranks), default=0)
    stages = integer(settings, "pp") or 1 + max((rank[1] for rank in ranks), default=0)
    return {rank: (rank[0] * stages + rank[1]) * tensor + rank[2] for rank in ranks}


class _Pages:
    """Lines that hold words, found in all of them at once: of millions of lines an engine's boot is a few hundred."""

    def __init__(self, lines: tuple[str, ...]) -> None:
        self.lines = lines
        self.text = "\n".join(lines)
        self.ends = list(accumulate(len(line) + 1 for line in lines))

    def holding(self, words: Iterable[str]) -> set[int]:
        """Numbers of the lines that hold one of the words."""
        found: set[int] = set()
        for wanted in set(words):
            at = self.text.find(wanted)
            while at >= 0:
                number = bisect_right(self.ends, at)
                found.add(number)
                at = self.text.find(wanted, self.ends[number])
        return found


def _boots(dialect: Dialect, pages: _Pages, where: str) -> list[_Boot]:
    boots = [_Boot(dialect)]
    needles = {form.needle for form in (*dialect.parts, *dialect.words)}
    needles |= {*dialect.starts, *dialect.contexts, *dialect.ready, *dialect.death_words}
    for number in sorted(pages.holding(needles)):
        line, boot = pages.lines[number], boots[-1]
        if boot.says_something and any(start in line for start in dialect.starts):
            boot = _Boot(dialect)
            boots.append(boot)
        if any(mark in line for mark in dialect.contexts):
            boot.context += 1
        for form in dialect.parts:
            if form.needle in line and (boot.ready or not form.after_ready):
                match = form.pattern.search(line)
                if match:
                    figure = _figure(dialect, form, match.groupdict(), match[0], line, boot.context, where)
                    if figure and len(boot.figures) < MAX_PARTS:
                        boot.figures.append(figure)
        for form in dialect.words:
            if form.needle in line:
                match = form.pattern.search(line)
                if match:
                    boot.note(form, match["value"])
        if any(word in line for word in dialect.death_words):
            for pattern in dialect.deaths:
                match = pattern.search(line)
                if match:
                    boot.died = boot.died or match[0]
                    break
        if not boot.ready and any(mark in line for mark in dialect.ready):
            boot.ready, boot.died = True, None
    return boots


def _figure(
    dialect: Dialect,
    form: PartFormat,
    groups: Mapping[str, str | None],
    matched: str,
    line: str,
    context: int,
    where: str,
) -> _Figure | None:
    unit = UNITS.get(groups.get("unit") or "", form.unit)
    numbers = [text for name in "abcdef" if (text := groups.get(name))]
    if any(text.startswith("-") for text in numbers):  # vLLM: a budget that the weights have spent
        return None
    amounts = [float(text) * unit for text in numbers]
    if sum(amounts) > ABSURD_BYTES:
        raise BadInput(f"{where} says {sum(amounts):.3g} bytes of {form.part}, which no machine has: it is no real log")
    steps = [unit / 10 ** max(form.decimals, len(text.partition(".")[2])) for text in numbers]
    if unit == 1:  # whole bytes
        steps = [0.0]
    return _Figure(
        form,
        groups.get("place"),
        dialect.rank(line),
        context,
        round(sum(amounts)),
        -int(-sum(steps) // 2),
        " ".join(redact(matched).split())[:200],
    )
