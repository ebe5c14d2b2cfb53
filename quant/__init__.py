"""The way to a smaller checkpoint: `quantize(source, target, recipe) -> Summary`. Needs torch; importing this does
not."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Summary, quantize
    from .recipe import Recipe, Rule

__all__ = ["Recipe", "Rule", "Summary", "quantize"]
_PLACES = {"quantize": "pipeline", "Summary": "pipeline", "Recipe": "recipe", "Rule": "recipe"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
