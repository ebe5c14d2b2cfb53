"""The model card of a quantized checkpoint: README.md with the hub's front matter, and how the checkpoint was made.

It says nothing that was not measured or given: the command, versions, seed, recipe, calibration, sizes and errors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_LIBRARIES = {"gguf": "gguf"}
_WORST = 10


@dataclass(frozen=True, slots=True)
class Card:
    """What the card is to say.

    base_model: the repository of the source, None for a folder of unknown origin. versions: package -> version.
    recipe: the resolved recipe as YAML. calibration: one sentence, e.g. "8192 tokens of the text that ships with
    qwenfit 0.1.0". measurements: what -> value, in the order of the table. errors: module -> relative output error.
    """

    name: str
    format: str
    method: str
    command: str
    versions: Mapping[str, str]
    seed: int
    recipe: str
    calibration: str
    source_fingerprint: str
    bytes: int
    source_bytes: int
    bits_per_weight: float
    base_model: str | None = None
    license: str | None = None
    has_vision: bool = False
    tags: Sequence[str] = ()
    measurements: Mapping[str, float | int | str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    fallbacks: Sequence[str] = ()  # experts that the calibration never reached


def model_card(card: Card) -> str:
    """The text of README.md; the same card gives the same bytes."""
    parts = [_front_matter(card), f"# {_line(card.name)}\n", _summary(card), _how_made(card)]
    if card.measurements:
        rows = "".join(f"| {_line(what)} | {_number(value)} |\n" for what, value in card.measurements.items())
        parts.append(f"## Measured\n\n| what | value |\n| --- | --- |\n{rows}")
    if card.errors:
        parts.append(_worst(card.errors))
    if card.fallbacks:
        names = "".join(f"- `{_line(name)}`\n" for name in card.fallbacks)
        parts.append(f"## Rounded without calibration\n\nThe calibration text never reached these:\n\n{names}")
    return "\n".join(parts)


def _front_matter(card: Card) -> str:
    fields: dict[str, object] = {}
    if card.base_model:
        fields.update(base_model=card.base_model, base_model_relation="quantized")
    fields["library_name"] = _LIBRARIES.get(card.format, "transformers")
    fields["pipeline_tag"] = "image-text-to-text" if card.has_vision and card.format != "gguf" else "text-generation"
    if card.license:
        fields["license"] = card.license
    fields["tags"] = list(dict.fromkeys(["qwen3.5", "quantized", card.format, *card.tags]))
    # A JSON value is a YAML one, whatever characters it has.
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())
    return f"---\n{lines}---\n"


def _summary(card: Card) -> str:
    origin = f" of {_line(card.base_model)}" if card.base_model else ""
    return (
        f"Weights{origin} in {card.bits_per_weight:.2f} bits each: "
        f"{card.bytes / 1e9:.3f} GB, {card.bytes / card.source_bytes:.0%} of the original "
        f"({card.source_bytes / 1e9:.3f} GB). Format {card.format}, method {card.method}.\n"
    )


def _how_made(card: Card) -> str:
    versions = ", ".join(f"{_line(name)} {_line(version)}" for name, version in card.versions.items())
    return (
        "## How it was made\n\n"
        f"{_fenced(card.command, 'sh')}\n"
        f"- versions: {versions}\n"
        f"- seed: {card.seed}\n"
        f"- calibration: {_line(card.calibration)}\n"
        f"- source: sha256 `{_line(card.source_fingerprint)}` over names, sizes, times and headers of its files\n\n"
        f"Recipe, resolved:\n\n{_fenced(card.recipe, 'yaml')}"
    )


def _worst(errors: Mapping[str, float]) -> str:
    worst = sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:_WORST]
    rows = "".join(f"| `{_line(module)}` | {_number(error)} |\n" for module, error in worst)
    return (
        f"## Errors by module\n\nRelative error of a module's output on the calibration text; {len(errors)} modules, "
        f"the worst first:\n\n| module | error |\n| --- | --- |\n{rows}"
    )


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _line(text: str | None) -> str:
    """Somebody else's words inside a line or a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("`", "'")


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _line(str(value))
