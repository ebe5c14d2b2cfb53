"""Estimated constants refitted from receipts: by what factor the built-in ones are off, for which engine and where.

A factor belongs to one estimated part (activations, graphs, runtime) of one engine, and where there is enough also to a
family of versions and to an architecture of devices; the most special one counts. What an engine computes exactly
(weights, caches, states) has no factor: a receipt that contradicts it shows a rule that is wrong, not a constant.

The fit is robust and slow to believe: the median of the logarithms of logged over planned, one vote per source, drawn
towards the next more general factor (at the end, to the built-in constant) as if that were `PRIOR_WITNESSES` sources
more. The interval holds every residual, and stays as wide as it was where few have spoken. How good it is, `held_out`
says: every source is left out in turn, and predicted from the others.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from statistics import median

from ..profiles.device import Device
from ..profiles.frozen import dataclass
from .engines.versions import release
from .receipt import Receipt, rescored
from .scores import PartScore

# What a log says and an estimate stands behind. llama.cpp's buffers are its own arithmetic.
PARTS: Mapping[str, tuple[str, ...]] = {
    "vllm": ("activation", "graph", "runtime"),
    "sglang": ("activation", "graph", "runtime"),
    "llama.cpp": ("runtime",),
    "native": ("activation", "runtime"),
}
PRIOR_WITNESSES = 3
WITNESSES_OF_A_FAMILY = 3  # sources that a family of versions or an architecture needs for a factor of its own
FOLDS = 50
LARGEST_FACTOR = 16.0  # beyond it the receipt is of something else
LARGEST_SPREAD = 16.0
SMALLEST_MEASURED_BYTES = 1 << 20  # below it the log's rounding is most of the figure

Bounds = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Factor:
    """What a part's built-in constants are multiplied by. `low` and `high` are the ends as shares of the middle."""

    engine: str
    part: str
    versions: str  # a family such as 0.31 or b11; empty: all
    architecture: str  # of the devices; empty: all
    receipts: int
    sources: int
    factor: float
    low: float
    high: float

    def scaled(self, bounds: Bounds) -> Bounds:
        middle = bounds[1] * self.factor
        return middle * self.low, middle, middle * self.high


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Factors by which estimates are corrected. Compared by identity: one file, one value."""

    name: str  # of the file, or where it came from
    factors: tuple[Factor, ...]

    def factor(self, engine: str, version: str, devices: tuple[Device, ...], part: str) -> Factor | None:
        """The most special factor that there is. Devices of several architectures get the general one."""
        architectures = {device.architecture for device in devices}
        own = architectures.pop() if len(architectures) == 1 else ""
        found = {
            (one.versions, one.architecture): one for one in self.factors if one.engine == engine and one.part == part
        }
        family = version_family(version)
        for key in ((family, own), (family, ""), ("", own), ("", "")):
            if key in found:
                return found[key]
        return None


@dataclass(frozen=True, slots=True)
class Witness:
    """One receipt's word on one part."""

    source: str
    engine: str
    part: str
    versions: str
    architecture: str
    ratio: float  # logged over planned with the built-in constants
    below: float  # the built-in interval's ends, as shares of its middle
    above: float
    measured_bytes: int
    planned_bytes: int


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Errors of one part over all receipts: shares of what was logged, in the median and at worst."""

    engine: str
    part: str
    receipts: int
    before: float
    after: float  # each source predicted from the others
    worst_before: float
    worst_after: float
    within: float  # share of the receipts that the interval holds, predicted from the others


def version_family(version: str | None) -> str:
    """`0.31.2` is of 0.31, `b11434` of b11: releases that share rules far more often than not."""
    numbers = release(version or "")
    if not numbers:
        return ""
    if (version or "").startswith("b") or (len(numbers) == 1 and numbers[0] >= 1000):
        return f"b{numbers[0] // 1000}"
    return ".".join(map(str, numbers[:2]))


def fit(receipts: Sequence[Receipt], name: str = "receipts") -> Calibration:
    """Factors of everything that the receipts say of estimated parts. Empty where they say nothing."""
    return _fitted(witnesses(receipts), name)


def witnesses(receipts: Iterable[Receipt]) -> tuple[Witness, ...]:
    """What receipts say of estimated parts beside the built-in constants. Those of boots that died say nothing."""
    found: list[Witness] = []
    for receipt in receipts:
        if receipt.log.died:
            continue
        scores = rescored(receipt) or receipt.scores
        engine, version = _engine_of(receipt)
        architectures = {device.architecture for device in receipt.devices}
        own = architectures.pop() if len(architectures) == 1 else ""
        for one in scores:
            if _speaks(engine, one):
                planned = one.planned
                found.append(
                    Witness(
                        source=receipt.group,
                        engine=engine,
                        part=one.part,
                        versions=version_family(version),
                        architecture=own,
                        ratio=one.measured_bytes / planned.mid,
                        below=planned.low / planned.mid,
                        above=planned.high / planned.mid,
                        measured_bytes=one.measured_bytes,
                        planned_bytes=planned.mid,
                    )
                )
    return tuple(found)


def _engine_of(receipt: Receipt) -> tuple[str, str]:
    """Name and version. Ollama's devices run llama.cpp."""
    engine, _, version = (receipt.request.engine or "").partition("@")
    return ("llama.cpp" if engine == "ollama" else engine), version


def _speaks(engine: str, one: PartScore) -> bool:
    if one.part not in PARTS.get(engine, ()) or one.planned.exact or one.place == "host":
        return False
    if one.planned.mid <= 0 or one.measured_bytes < max(SMALLEST_MEASURED_BYTES, 2 * one.resolution_bytes):
        return False
    return 1 / LARGEST_FACTOR <= one.measured_bytes / one.planned.mid <= LARGEST_FACTOR


def _fitted(found: Sequence[Witness], name: str) -> Calibration:
    factors: list[Factor] = []
    for engine, part in sorted({(one.engine, one.part) for one in found}):
        own = [one for one in found if (one.engine, one.part) == (engine, part)]
        general = _factor(own, "", "", 1.0)
        factors.append(general)
        for versions in sorted({one.versions for one in own} - {""}):
            of_version = [one for one in own if one.versions == versions]
            parent = general
            if _enough(of_version) and len(of_version) < len(own):
                parent = _factor(of_version, versions, "", general.factor)
                factors.append(parent)
            for architecture in sorted({one.architecture for one in of_version} - {""}):
                there = [one for one in of_version if one.architecture == architecture]
                if _enough(there) and len(there) < len(of_version):
                    factors.append(_factor(there, versions, architecture, parent.factor))
        for architecture in sorted({one.architecture for one in own} - {""}):
            there = [one for one in own if one.architecture == architecture]
            if _enough(there) and len(there) < len(own):
                factors.append(_factor(there, "", architecture, general.factor))
    return Calibration(name, tuple(factors))


def _enough(found: Sequence[Witness]) -> bool:
    return len({one.source for one in found}) >= WITNESSES_OF_A_FAMILY


def _factor(found: Sequence[Witness], versions: str, architecture: str, parent: float) -> Factor:
    votes: dict[str, list[float]] = {}
    for one in found:
        votes.setdefault(one.source, []).append(log(one.ratio))
    heard = median([median(logs) for logs in votes.values()])
    trust = len(votes) / (len(votes) + PRIOR_WITNESSES)
    middle = trust * heard + (1 - trust) * log(parent)
    residuals = [log(one.ratio) - middle for one in found]
    # as wide as it was until more have spoken than the built-in constant counts for
    width = 1 - max(0, len(votes) - PRIOR_WITNESSES) / (len(votes) + PRIOR_WITNESSES)
    below = min(median([log(max(one.below, 1 / LARGEST_SPREAD)) for one in found]) * width, *residuals, 0.0)
    above = max(median([log(one.above) for one in found]) * width, *residuals, 0.0)
    return Factor(
        engine=found[0].engine,
        part=found[0].part,
        versions=versions,
        architecture=architecture,
        receipts=len(found),
        sources=len(votes),
        factor=exp(middle),
        low=max(exp(below), 1 / LARGEST_SPREAD),
        high=min(exp(above), LARGEST_SPREAD),
    )


def held_out(receipts: Sequence[Receipt]) -> tuple[HeldOut, ...]:
    """Errors before, and after a calibration by everybody else: every source is left out in turn, of more than `FOLDS`
    several at once."""
    found = witnesses(receipts)
    before: dict[tuple[str, str], list[float]] = {}
    after: dict[tuple[str, str], list[float]] = {}
    inside: dict[tuple[str, str], list[bool]] = {}
    sources = sorted({one.source for one in found})
    for fold in range(min(len(sources), FOLDS)):
        out = set(sources[fold::FOLDS])
        others = _fitted([one for one in found if one.source not in out], "the others")
        for receipt in (one for one in receipts if one.group in out and not one.log.died):
            engine, _ = _engine_of(receipt)
            told = _by_part(rescored(receipt, others))
            for one in rescored(receipt) or receipt.scores:
                if not _speaks(engine, one):
                    continue
                key = engine, one.part
                predicted = told.get((one.part, one.place), one)
                before.setdefault(key, []).append(abs(one.error))
                after.setdefault(key, []).append(abs(predicted.error))
                inside.setdefault(key, []).append(predicted.within)
    return tuple(
        HeldOut(
            *key,
            receipts=len(before[key]),
            before=median(before[key]),
            after=median(after[key]),
            worst_before=max(before[key]),
            worst_after=max(after[key]),
            within=sum(inside[key]) / len(inside[key]),
        )
        for key in sorted(before)
    )


def _by_part(scores: Sequence[PartScore] | None) -> Mapping[tuple[str, str], PartScore]:
    return {(one.part, one.place): one for one in scores or ()}
