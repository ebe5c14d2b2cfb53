"""A source and a recipe, resolved: which module gets which scheme, and which files come of it, to the byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..profiles.errors import Unsupported
from .folder_result import FolderResult
from .gguf_result import GgufResult
from .modules import Module, list_modules
from .quantized import Scheme
from .recipe import KEEP, Recipe, resolve
from .source import Source


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """recipe: completed. found: every module that some recipe could quantize; modules: those that this one does."""

    source: Source
    recipe: Recipe
    found: Sequence[Module]
    modules: Sequence[Module]
    schemes: Mapping[str, Scheme]
    result: FolderResult | GgufResult

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized modules, scales and zero points included."""
        return 8 * self.result.quantized_bytes / sum(module.rows * module.columns for module in self.modules)

    @property
    def source_bytes(self) -> int:
        return sum(self.source.bytes(name) for name in self.source.names())


def lay_out(source: Source, recipe: Recipe) -> Layout:
    """`QwenfitError` in one sentence for what no file can hold."""
    found = list_modules(source)
    whole = recipe.completed(source.model.is_moe, max((module.columns for module in found), default=0))
    if whole.lm_head != KEEP and not any(module.part == "lm_head" for module in found):
        instead = "quantize the embeddings" if whole.format == "gguf" else "leave out --lm-head"
        raise Unsupported(f"the head shares the embedding's weights: {instead}")
    schemes, _ = resolve(whole, found)
    modules = [module for module in found if module.name in schemes]
    if whole.format == "gguf":
        return Layout(source, whole, found, modules, schemes, GgufResult(source, modules, schemes))
    return Layout(source, whole, found, modules, schemes, FolderResult(source, whole.format, modules, schemes))
