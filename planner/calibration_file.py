"""Calibrations as YAML files: written from a fit, read with suspicion.

A factor beyond sixteen or an interval without its middle is refused, and so is a part that an engine computes exactly.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..profiles.errors import BadInput
from ..profiles.yaml_file import read_yaml
from .calibration import LARGEST_FACTOR, LARGEST_SPREAD, PARTS, Calibration, Factor

Count = Annotated[int, Field(ge=1, le=1_000_000)]
HEAD = """# Estimated constants, refitted from receipts by `qwen-plan calibrate`, for `qwen-plan --calibration FILE`.
# factor: what the built-in constants of a part are multiplied by; low and high: the interval, as shares of its middle.
"""


class _Factor(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    engine: Literal["vllm", "sglang", "llama.cpp"]
    part: Literal["activation", "graph", "runtime"]
    versions: Annotated[str, Field(pattern=r"^(|b?\d{1,6}(\.\d{1,4}){0,2})$")] = ""
    architecture: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,40}$")] = ""
    receipts: Count
    sources: Count
    factor: Annotated[float, Field(ge=1 / LARGEST_FACTOR, le=LARGEST_FACTOR)]
    low: Annotated[float, Field(ge=1 / LARGEST_SPREAD, le=1)]
    high: Annotated[float, Field(ge=1, le=LARGEST_SPREAD)]


class _Calibration(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Annotated[Literal[1], Field(alias="schema")]
    factors: Annotated[list[_Factor], Field(min_length=1, max_length=400)]


def read_calibration(path: str) -> Calibration:
    """The calibration in a file. BadInput, with file and line, for anything else."""
    document = read_yaml(path)
    checked = document.checked(_Calibration)
    seen: set[tuple[str, str, str, str]] = set()
    factors: list[Factor] = []
    for place, one in enumerate(checked.factors):
        if one.part not in PARTS[one.engine]:
            raise document.error(("factors", place), f"{one.engine} computes its {one.part} exactly: no factor for it")
        key = one.engine, one.part, one.versions, one.architecture
        if key in seen:
            raise document.error(("factors", place), f"{' '.join(filter(None, key))} has a factor already")
        seen.add(key)
        factors.append(Factor(**one.model_dump()))
    return Calibration(document.where, tuple(factors))


def text(made: Calibration) -> str:
    """The file. BadInput where there is nothing to write."""
    if not made.factors:
        raise BadInput("these receipts say nothing of estimated constants: there is nothing to calibrate")
    lines = [HEAD + "schema: 1", "factors:"]
    for one in made.factors:
        lines += [
            f"  - engine: {one.engine}",
            f"    part: {one.part}",
            *([f'    versions: "{one.versions}"'] if one.versions else []),
            *([f"    architecture: {one.architecture}"] if one.architecture else []),
            f"    receipts: {one.receipts}",
            f"    sources: {one.sources}",
            f"    factor: {one.factor:.4f}",
            f"    low: {min(one.low, 1.0):.4f}",
            f"    high: {max(one.high, 1.0):.4f}",
        ]
    return "\n".join(lines) + "\n"
