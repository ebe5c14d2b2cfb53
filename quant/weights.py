"""Matrices of a source as the quantizer takes them: module by module, layer by layer, row by row of the embedding."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..profiles.errors import BadInput
from .modules import LEAVES, Module
from .source import Source


class Weights:
    """Reads from a source onto a device, in the source's dtype. modules: all of `list_modules`."""

    def __init__(self, source: Source, modules: Iterable[Module], device: torch.device) -> None:
        self.source, self.device = source, device
        self._experts = {(module.layer, module.leaf): module for module in modules if module.expert is not None}

    def module(self, module: Module, rows: slice = slice(None), *, is_checked: bool = True) -> Tensor:
        """A module's matrix [rows, columns], or some of its rows; of a stack of experts its expert's only are read.

        is_checked: see `Source.tensor`.
        """
        if len(self.source.shape(module.tensor)) == 3 and module.expert is not None:
            expert = self.source.tensor(module.tensor, slice(module.expert, module.expert + 1), is_checked=is_checked)[
                0
            ]
            return expert[module.first_row : module.first_row + module.rows][rows].to(self.device)
        return self.source.tensor(module.tensor, rows, is_checked=is_checked).to(self.device)

    def expert(self, layer: int, expert: int, name: str) -> Tensor:
        """gate_proj, up_proj or down_proj of an expert, however experts are stored."""
        return self.module(self._experts[layer, f"mlp.experts.{expert}.{name}"])

    def layer_names(self, number: int) -> dict[str, str]:
        """Tensors of a layer but for its experts: leaf -> name. Matrices have leaves without `.weight`."""
        names = {}
        for name in self.source.names():
            leaf = layer_leaf(name, number)
            if leaf is not None and ".experts." not in leaf:
                bare = leaf.removesuffix(".weight")
                is_matrix = bare in LEAVES or bare.startswith("linear_attn.in_proj")
                names[bare if is_matrix else leaf] = name
        return names

    def layer(self, number: int) -> dict[str, Tensor]:
        """A layer but for its experts: matrices by their leaf (`mlp.gate_proj`), others by name and ending."""
        return {leaf: self.source.tensor(name).to(self.device) for leaf, name in self.layer_names(number).items()}

    def layer_bytes(self, number: int) -> int:
        """What `layer` takes."""
        names = (name for name in self.source.names() if ".experts." not in name)
        return sum(self.source.bytes(name) for name in names if layer_leaf(name, number) is not None)

    def check_tokens(self, tokens: Tensor) -> None:
        """`BadInput` where the embedding has no row for a token."""
        if int(tokens.max()) >= self.source.shape(self._embedding())[0]:
            raise BadInput(f"{self.source.folder}: tokenizer.json has more tokens than the embedding has rows")

    def embedded(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding for tokens [...], float32 [N, E]; each row is read once, the table never as a whole."""
        name = self._embedding()
        distinct, where = tokens.flatten().unique(return_inverse=True)
        rows = torch.cat([self.source.tensor(name, slice(int(row), int(row) + 1)) for row in distinct])
        return rows.float()[where].to(self.device)

    def _embedding(self) -> str:
        name = next((name for name in self.source.names() if name.endswith("embed_tokens.weight")), None)
        if name is None:
            raise BadInput(f"{self.source.folder} has no embed_tokens.weight; finish the download")
        return name


def layer_leaf(name: str, number: int) -> str | None:
    """What comes behind `layers.N.` in a tensor's name; None for other layers, the prediction layer and the vision."""
    before, found, leaf = name.partition(f"layers.{number}.")
    return leaf if found and "mtp." not in before and "visual." not in before else None
