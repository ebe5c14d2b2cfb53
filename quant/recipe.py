"""What is to be quantized, how: options of the command, a YAML file over them, and the scheme of every module.

A recipe file says what the options say, under the same names, and more about single modules:

    bits: 4
    group_size: 128
    method: gptq
    modules:                        # the first that matches a module's full name wins; 16 keeps it as it is
      - {match: "linear_attn\\.out_proj$", bits: 8}
      - {match: "layers\\.(0|1)\\..*", bits: 8, group_size: 64}

`resolve` turns it into a scheme per module. What engines fuse gets one scheme: a rule that names one of them names all.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..profiles.errors import BadInput, Unsupported
from ..profiles.json_file import short
from .gguf_codes import group_columns
from .module_rules import check_fused, fused_with
from .modules import Module
from .quantized import Scheme

METHODS = ("gptq", "awq", "rtn")
FORMATS = ("compressed-tensors", "gptq", "awq", "gguf")
GROUP_SIZES = (32, 64, 128, -1)
GGUF_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q6_K": 6, "Q8_0": 8}
GGUF_TYPES = {4: "Q4_K", 6: "Q6_K", 8: "Q8_0"}
"""Of GGML's block types that are written: their bits, and what is taken for so many bits."""
TARGET_COLUMNS = 9216
"""Those of down_proj of the 4B. At 12,288 (9B) the second pass takes a layer of 8,192 tokens beyond 3 CPU-minutes on
two ordinary cores (docs/quantization.md), so there --gptaq has to be asked for."""
KEEP = 16
FLAGS = ("symmetric", "full_precision_targets")
PARTS = ("lm_head", "embeddings", "shared_experts", "mtp")
LIMIT_BYTES = 1 << 16
MOST_PATTERN = 1000


@dataclass(frozen=True, slots=True)
class Rule:
    """match: a regular expression searched in a module's full name. bits: 4, 8, or 16 to keep it as it is;
    in GGUF files also 6."""

    match: str
    bits: int
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """What `quantize` takes. None where the answer follows from the rest: `completed` fills it in.

    symmetric: None is asymmetric where the format and its loaders take it. method: None is gptq for 4 bits and rtn for
    8, which needs no calibration. gguf_type: of GGML's block types the one for most matrices, which then says bits and
    groups; None for the one of `bits`. activation_bits: 8 for W8A8. lm_head, embeddings, shared_experts, mtp: bits, 16
    keeps them; 6 and quantized embeddings are for GGUF files, which engines read so; mtp.fc stays elsewhere.
    calibration: a file, None the text that ships with the package. full_precision_targets: gptq aims at the outputs of
    the full-precision stream (GPTAQ), for a second forward pass per layer; None is yes for dense models of at most
    TARGET_COLUMNS columns. Experts have no such targets, and what is left of the gain was not measured.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool | None = None
    method: str | None = None
    format: str = "compressed-tensors"
    gguf_type: str | None = None
    activation_bits: int | None = None
    lm_head: int = KEEP
    embeddings: int = KEEP
    shared_experts: int = KEEP
    mtp: int = KEEP
    calibration: str | None = None
    tokens: int = 8192
    sequence_tokens: int = 512
    seed: int = 0
    damping: float = 0.01
    full_precision_targets: bool | None = None
    modules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        _check("bits", self.bits, (4, 6, 8))
        _check("group_size", self.group_size, GROUP_SIZES)
        _check("method", self.method, (*METHODS, None))
        _check("format", self.format, FORMATS)
        _check("gguf_type", self.gguf_type, (*GGUF_BITS, None))
        _check("activation_bits", self.activation_bits, (8, None))
        for name in PARTS:
            _check(name, getattr(self, name), (4, 6, 8, KEEP))
        for name in ("tokens", "sequence_tokens"):
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= 1 << 24:
                raise BadInput(f"{name} is {getattr(self, name)!r}: give a number from 1 to 16,777,216")
        if not 0 < self.damping < 1:
            raise BadInput(f"damping is {self.damping!r}: give a part of the mean diagonal, 0.01 for instance")
        for rule in self.modules:
            _check("bits of a rule", rule.bits, (4, 6, 8, KEEP))
            _check("group_size of a rule", rule.group_size, (*GROUP_SIZES, None))

    @property
    def needs_calibration(self) -> bool:
        return self.method in ("gptq", "awq")

    def completed(self, is_moe: bool, columns: int) -> "Recipe":
        """With what was left open; columns: of the model's widest matrix. `Unsupported` for combinations that no format
        or loader has."""
        if self.format == "gguf":
            return self._completed_for_gguf(is_moe, columns)
        if self.gguf_type:
            raise Unsupported(f"{self.gguf_type} is a type of GGUF files: add --format gguf")
        if 6 in (self.bits, *(getattr(self, part) for part in PARTS), *(rule.bits for rule in self.modules)):
            raise Unsupported(f"6 bits are for --format gguf: {self.format} has 4 and 8")
        if self.embeddings != KEEP:
            raise Unsupported(f"{self.format} keeps embeddings, as engines read them so: --embeddings is for gguf")
        method = self.method or ("rtn" if self.bits == 8 or self.activation_bits else "gptq")
        symmetric = self.symmetric
        if symmetric is None:
            # compressed-tensors with zero points loads everywhere but in experts (`compressed_tensors_file.py`).
            takes_zeros = self.format == "awq" or (self.format == "compressed-tensors" and not is_moe)
            symmetric = not (takes_zeros and self.bits == 4)
        targets = self._targets(method, is_moe, columns)
        whole = replace(self, method=method, symmetric=symmetric, full_precision_targets=targets)
        if whole.activation_bits:
            whole = replace(whole, bits=8, group_size=-1, symmetric=True)
        if whole.format == "awq" and (whole.bits != 4 or whole.symmetric):
            raise Unsupported("AWQ files hold asymmetric 4-bit weights only: take --format compressed-tensors or gptq")
        if whole.activation_bits and whole.format != "compressed-tensors":
            raise Unsupported(f"{whole.format} stores weights only: W8A8 is for --format compressed-tensors")
        if whole.bits == 8 and whole.symmetric is False:
            raise Unsupported("8-bit weights are written symmetric: leave out --asym")
        return whole

    def _completed_for_gguf(self, is_moe: bool, columns: int) -> "Recipe":
        kind = self.gguf_type or GGUF_TYPES[self.bits]
        bits = GGUF_BITS[kind]
        method = self.method or ("rtn" if bits == 8 else "gptq")
        if method == "awq":
            raise Unsupported("--method awq is for folders; GGUF files take gptq (K-quants too) and rtn")
        if self.activation_bits:
            raise Unsupported("GGUF stores weights only: W8A8 is for --format compressed-tensors")
        targets = self._targets(method, is_moe, columns)
        return replace(self, bits=bits, gguf_type=kind, method=method, symmetric=None, full_precision_targets=targets)

    def _targets(self, method: str, is_moe: bool, columns: int) -> bool:
        if self.full_precision_targets and method != "gptq":
            raise Unsupported(f"full-precision targets are for gptq: leave out --gptaq, or --method {method}")
        if self.full_precision_targets is not None:
            return self.full_precision_targets
        return method == "gptq" and not is_moe and columns <= TARGET_COLUMNS

    def text(self) -> str:
        """The recipe as YAML, resolved: what is written beside the checkpoint."""
        import yaml

        values = {name: value for name, value in asdict(self).items() if value is not None}
        values["modules"] = [{k: v for k, v in asdict(rule).items() if v is not None} for rule in self.modules]
        return yaml.safe_dump(values, sort_keys=False)


def read_recipe(path: str, base: Recipe) -> Recipe:
    """`base` with what the YAML file at `path` says instead. `BadInput`, naming file and key, for anything else."""
    import yaml

    try:
        if os.path.getsize(path) > LIMIT_BYTES:
            raise BadInput(f"{path} has more than {LIMIT_BYTES:,} bytes: that is no recipe")
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file.read(LIMIT_BYTES))
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:  # a number of 5,000 digits
        raise BadInput(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: a recipe is a list of `name: value`")
    known = {field.name: field for field in fields(Recipe)}
    for name in data:
        if name not in known:
            raise BadInput(f"{path}: {short(name)} is not one of {', '.join(known)}")
    values = {name: value for name, value in data.items() if name != "modules"}
    for name, value in values.items():
        if not isinstance(value, _types(name)) or (isinstance(value, bool) and name not in FLAGS):
            raise BadInput(f"{path}: {name} is {short(value)}")
    if "modules" in data:
        values["modules"] = tuple(_rule(path, entry) for entry in _list(path, data["modules"]))
    try:
        return replace(base, **values)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def resolve(recipe: Recipe, modules: Iterable[Module]) -> tuple[dict[str, Scheme], list[str]]:
    """(module -> scheme for what is quantized, modules that stay) of a completed recipe.

    Groups that do not divide a module's columns are an error that names it, unless its rule or kind keeps it.
    """
    modules = list(modules)
    wanted: dict[str, Scheme | None] = {}
    places: dict[str, int] = {}
    for module in modules:
        key, rule = fused_with(module.name), first_rule(recipe.modules, module.name)
        place = len(recipe.modules) if rule is None else recipe.modules.index(rule)
        if place < places.get(key, len(recipe.modules) + 1):  # the first rule of the file, whichever of them it names
            places[key], wanted[key] = place, _scheme(recipe, module, rule)
    schemes, kept = {}, []
    for module in modules:
        scheme = wanted[fused_with(module.name)]
        if scheme is None:
            kept.append(module.name)
            continue
        try:
            scheme.groups(module.columns)
        except ValueError as error:
            instead = "take another format" if scheme.kind else "choose another group size"
            raise BadInput(f"{module.name}: {error}; {instead}, or keep it with a rule") from error
        schemes[module.name] = scheme
    if not schemes:
        raise BadInput("the recipe keeps every module: there is nothing to quantize")
    check_fused(schemes, kept)
    return schemes, kept


def _scheme(recipe: Recipe, module: Module, rule: Rule | None) -> Scheme | None:
    bits = rule.bits if rule else _bits_by_part(recipe, module)
    if bits == KEEP:
        return None
    if recipe.format == "gguf":
        kind = GGUF_TYPES[bits]
        if recipe.gguf_type and bits == GGUF_BITS[recipe.gguf_type]:
            kind = recipe.gguf_type
        return Scheme(bits, group_columns(kind), kind not in ("Q4_1", "Q4_K"), kind=kind)
    group_size = rule.group_size if rule and rule.group_size else recipe.group_size
    symmetric = bool(recipe.symmetric) or bits == 8
    return Scheme(bits, group_size, symmetric, recipe.activation_bits if bits == 8 else None)


def _bits_by_part(recipe: Recipe, module: Module) -> int:
    if module.name == "mtp.fc" and recipe.format != "gguf":
        # SGLang's is a plain Linear (`models/qwen3_5_mtp.py`): it would skip the codes and draft from random weights.
        # Qwen's FP8 and NVIDIA's NVFP4 releases keep it, too.
        return KEEP
    if module.part in PARTS:
        return getattr(recipe, module.part)
    return recipe.bits


def first_rule(rules: tuple[Rule, ...], name: str) -> Rule | None:
    """The rule that decides about a module's full name. The prediction layer, which has a layer 0 of its own, is meant
    by rules that say `mtp` only."""
    named = (rule for rule in rules if "mtp" in rule.match) if name.startswith("mtp.") else rules
    return next((rule for rule in named if re.search(rule.match, name)), None)


def _check(name: str, value: object, known: tuple[object, ...]) -> None:
    if isinstance(value, bool | float) or value not in known:
        shown = ", ".join(str(one) for one in known if one is not None)
        raise BadInput(f"{name} is {value!r}: it is one of {shown}")


def _types(name: str) -> tuple[type, ...]:
    if name in ("method", "format", "gguf_type", "calibration"):
        return (str,)
    return (float, int) if name == "damping" else (bool,) if name in FLAGS else (int,)


def _list(path: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > 1000:
        raise BadInput(f"{path}: modules is a list of at most 1,000 rules like {{match: ..., bits: 8}}")
    return value


def _rule(path: str, entry: Any) -> Rule:
    if not isinstance(entry, Mapping) or not {"match", "bits"} <= set(entry) <= {"match", "bits", "group_size"}:
        raise BadInput(f"{path}: a rule is {{match: ..., bits: 4, 8 or 16, group_size: ...}}, not {short(entry)}")
    match = entry["match"]
    try:
        if not isinstance(match, str) or len(match) > MOST_PATTERN:
            raise re.error("not a text of at most 1,000 characters")
        re.compile(match)
    except re.error as error:
        raise BadInput(f"{path}: match {short(match)} is no regular expression ({error})") from error
    return Rule(match, entry["bits"], entry.get("group_size"))
