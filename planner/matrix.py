"""A matrix of questions with requirements, as a CI job asks it: every cell planned, checked, compared with last time.

A row is a product of devices, models, contexts and numbers of sequences; a cell is one of its questions. What was
"only just" enough (the expected figure passes, the cautious end of the interval does not) passes with a caution.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..profiles.errors import BadInput, UnknownName, Unsupported
from ..profiles.frozen import dataclass
from .plan import EnginePlan, Plan
from .request import Request

MAX_CELLS = 20_000
GIB = 1 << 30
FIXED = (  # fields of the request that a row may fix
    *("engine", "weights", "kv_dtype", "state_dtype", "mtp", "vision"),
    *("tp", "pp", "dp", "ep", "nodes", "interconnect"),
)
PLAIN = Request()
Interval = tuple[float, float, float]  # low, mid, high


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a cell must satisfy. None: not asked."""

    must_fit: bool = True
    min_decode_tokens_per_s: float | None = None  # of all sequences together, as `speed` in the JSON
    max_memory_bytes: int | None = None  # on the fullest device


@dataclass(frozen=True, slots=True)
class Cell:
    """One question and what its answer must satisfy; `line` is where the file asks it."""

    request: Request
    requirements: Requirements
    line: int

    @property
    def key(self) -> str:
        """What makes it the same question as one in another run."""
        request = self.request
        fixed = [
            f"{name}={getattr(request, name)}"
            for name in FIXED
            if getattr(request, name) not in (None, False, getattr(PLAIN, name))
        ]
        asked = f"{','.join(request.devices)} {request.model} {request.ctx_tokens}x{request.seqs}"
        return " ".join((asked, *fixed))


@dataclass(frozen=True, slots=True)
class Verdict:
    """A cell's answer in plain figures. `failures` are requirements that do not hold, in words."""

    cell: Cell
    fits: bool
    engine: str | None
    weights: str | None
    kv_dtype: str | None
    memory_bytes: Interval | None  # of the fullest device
    decode_tokens_per_s: Interval | None  # None: no speed is known
    max_ctx_tokens: int
    max_seqs: int
    command: str | None
    failures: tuple[str, ...]
    cautions: tuple[str, ...]
    job_hours: Interval | None = None  # of the request's job; None: not asked, does not fit, or no speed is known
    job_kwh: Interval | None = None  # None also where nobody says what the devices draw
    job_usd: Interval | None = None  # energy, and the devices where their price is known

    @property
    def passes(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, object]:
        request, asked = self.cell.request, self.cell.requirements
        return {
            "key": self.cell.key,
            "line": self.cell.line,
            "device": ",".join(request.devices),
            "nodes": request.nodes,
            "model": request.model,
            "ctx_tokens": request.ctx_tokens,
            "seqs": request.seqs,
            "must_fit": asked.must_fit,
            "min_decode_tokens_per_s": asked.min_decode_tokens_per_s,
            "max_memory_bytes": asked.max_memory_bytes,
            "passes": self.passes,
            "fits": self.fits,
            "engine": self.engine,
            "weights": self.weights,
            "kv_dtype": self.kv_dtype,
            "memory_bytes": _interval_json(self.memory_bytes),
            "decode_tokens_per_s": _interval_json(self.decode_tokens_per_s),
            "job_tokens": request.prices.job_tokens,
            "job_hours": _interval_json(self.job_hours),
            "job_kwh": _interval_json(self.job_kwh),
            "job_usd": _interval_json(self.job_usd),
            "max_ctx_tokens": self.max_ctx_tokens,
            "max_seqs": self.max_seqs,
            "command": self.command,
            "failures": list(self.failures),
            "cautions": list(self.cautions),
        }


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one cell since an older run. `kind`: worse, better, changed, new or gone."""

    key: str
    kind: str
    what: str
    line: int | None


def cells_of(
    line: int, devices: Sequence[str], models: Sequence[str], base: Request, contexts: Sequence[int],
    seqs: Sequence[int], requirements: Requirements,
) -> Iterator[Cell]:  # fmt: skip
    """The product of a row; `base` carries what all its cells share."""
    from .search import variant

    for device in devices:
        for model in models:
            for ctx_tokens in contexts:
                for number in seqs:
                    asked = variant(base, devices=(device,), model=model, ctx_tokens=ctx_tokens, seqs=number)
                    yield Cell(asked, requirements, line)


def refuse_duplicates(cells: Sequence[Cell], where: str) -> None:
    """BadInput for a question that is asked twice, with both lines, and for more cells than a job should ask."""
    if len(cells) > MAX_CELLS:
        raise BadInput(
            f"{where} asks for {len(cells):,} cells: {MAX_CELLS:,} are the most; split it into several files"
        )
    seen: dict[str, int] = {}
    for cell in cells:
        if cell.key in seen:
            first = seen[cell.key]
            raise BadInput(
                f"{where}, line {cell.line}: asks again what line {first} asks: {cell.key}; keep one of them"
            )
        seen[cell.key] = cell.line


def answer(cells: Iterable[Cell], where: str, plan: Callable[[Request], Plan]) -> tuple[Verdict, ...]:
    """Every cell planned and checked. BadInput, with the line, for names that do not exist."""
    verdicts = []
    for cell in cells:
        try:
            verdicts.append(_judged(cell, plan(cell.request).best))
        except Unsupported as reason:
            verdicts.append(_refused(cell, str(reason)))
        except (BadInput, UnknownName) as error:
            raise BadInput(f"{where}, line {cell.line}: {error}") from None
    return tuple(verdicts)


def _judged(cell: Cell, best: EnginePlan) -> Verdict:
    fullest = max(best.devices, key=lambda share: share.memory.total.mid / share.usable_bytes).memory.total
    memory = (float(fullest.low), float(fullest.mid), float(fullest.high))
    decode = decode_tokens_per_s(best)
    failures: list[str] = []
    cautions: list[str] = []
    asked = cell.requirements
    if asked.must_fit and not best.fits:
        failures.append(f"does not fit: {best.reasons[0] if best.reasons else 'no reason given'}")
    elif asked.must_fit and best.tight:
        cautions.append("fits, but only just: not at the upper end of the interval")
    if asked.max_memory_bytes is not None:
        limit = f"{asked.max_memory_bytes / GIB:.2f} GiB"
        if memory[1] > asked.max_memory_bytes:
            failures.append(f"takes {memory[1] / GIB:.2f} GiB, more than the {limit} allowed")
        elif memory[2] > asked.max_memory_bytes:
            cautions.append(f"may take up to {memory[2] / GIB:.2f} GiB, more than the {limit} allowed")
    if asked.min_decode_tokens_per_s is not None:
        _judge_speed(asked.min_decode_tokens_per_s, decode, failures, cautions)
    limits = best.limits
    return Verdict(
        cell, best.fits, f"{best.engine} {best.engine_version}", best.weights, best.kv_dtype, memory, decode,
        limits.max_ctx_tokens, limits.max_seqs, best.command if best.fits else None, tuple(failures), tuple(cautions),
        *_job(best, decode),
    )  # fmt: skip


def _job(best: EnginePlan, decode: Interval | None) -> tuple[Interval | None, Interval | None, Interval | None]:
    """Hours, kWh and dollars of the job that was asked for, on a plan that fits."""
    tokens, energy = best.prices.job_tokens, best.energy
    if not tokens or not decode or not best.fits:
        return None, None, None
    low, mid, high = (tokens / rate / 3600 for rate in decode)
    if energy is None or energy.job is None:
        return (high, mid, low), None, None
    kwh, usd = energy.job.kwh, energy.job.usd
    return (high, mid, low), (kwh.low, kwh.mid, kwh.high), (usd.low, usd.mid, usd.high)


def _judge_speed(least: float, decode: Interval | None, failures: list[str], cautions: list[str]) -> None:
    if decode is None:
        failures.append(f"no speed is known for it, and {least:g} tokens/s are asked for")
    elif decode[1] < least:
        failures.append(f"decodes {decode[1]:.1f} tokens/s, less than the {least:g} asked for")
    elif decode[0] < least:
        cautions.append(f"may decode as little as {decode[0]:.1f} tokens/s, less than the {least:g} asked for")


def _refused(cell: Cell, reason: str) -> Verdict:
    failures = (f"cannot run: {reason}",) if cell.requirements.must_fit else ()
    return Verdict(cell, False, None, None, None, None, None, 0, 0, None, failures, ())


def decode_tokens_per_s(best: EnginePlan) -> Interval | None:
    """Of all sequences together, behind a short prompt: what `--json` says under `speed`; None where nobody knows."""
    if best.speed is None:
        return None
    rate = best.speed.start.decode_tokens_per_s
    return rate.low, rate.mid, rate.high


def changes(old: Mapping[str, Mapping[str, Any]], verdicts: Sequence[Verdict], tolerance: float) -> tuple[Change, ...]:
    """What changed since an older run (its cells by key), worst first.

    Worse: a requirement that held fails now, what fitted no longer does, memory grew or decoding slowed down by more
    than the share `tolerance`. A new cell that fails counts as worse too: nothing says that it ever held.
    """
    found = []
    for verdict in verdicts:
        before, key, line = old.get(verdict.cell.key), verdict.cell.key, verdict.cell.line
        if before is None:
            kind, what = ("new", "new") if verdict.passes else ("worse", f"new: {'; '.join(verdict.failures)}")
            found.append(Change(key, kind, what, line))
        else:
            change = _compared(before, verdict, tolerance)
            if change:
                found.append(Change(key, *change, line))
    now = {verdict.cell.key for verdict in verdicts}
    found += [Change(key, "gone", "no longer asked", None) for key in old if key not in now]
    order = ("worse", "better", "changed", "new", "gone")
    return tuple(sorted(found, key=lambda change: order.index(change.kind)))


def _compared(before: Mapping[str, Any], now: Verdict, tolerance: float) -> tuple[str, str] | None:
    """(kind, in words), or None where nothing changed beyond the tolerance."""
    worse: list[str] = []
    better: list[str] = []
    other: list[str] = []
    if before["fits"] != now.fits:
        (better if now.fits else worse).append("fits now" if now.fits else "no longer fits")
    if before["passes"] != now.passes:
        if now.passes:
            better.append("passes now")
        else:
            worse += [failure for failure in now.failures if failure not in before["failures"]] or ["fails now"]
    for name, unit, scale, more_is_worse in (
        ("memory_bytes", "GiB", GIB, True),
        ("decode_tokens_per_s", "tokens/s", 1, False),
    ):
        was, value = before[name], getattr(now, name)
        if not was or not value or abs(value[1] - was["mid"]) <= tolerance * was["mid"]:
            continue
        told = f"{was['mid'] / scale:.2f} to {value[1] / scale:.2f} {unit}"
        (worse if (value[1] > was["mid"]) == more_is_worse else better).append(told)
    for name in ("engine", "weights", "kv_dtype"):
        if before[name] != getattr(now, name):
            other.append(f"{name} {before[name] or 'none'} to {getattr(now, name) or 'none'}")
    # Another choice of weights or cache takes other memory: growth is a loss only where the choice stayed the same.
    if other and before["fits"] == now.fits and before["passes"] == now.passes:
        other, worse, better = other + worse + better, [], []
    kind = "worse" if worse else "better" if better else "changed"
    told = worse + better + other
    return (kind, "; ".join(told)) if told else None


def _interval_json(interval: Interval | None) -> dict[str, float] | None:
    return dict(zip(("low", "mid", "high"), interval, strict=True)) if interval else None
