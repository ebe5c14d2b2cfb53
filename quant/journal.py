"""What an interrupted run leaves behind, so that another one goes on: how many layers are written, and the tokens.

A step is safe once its tensors are on the disk, then the hidden states that the next layer reads, then one small file
that names both and takes the place of the old one in a single rename. A run that is killed in between finds the step
before, and writes the same bytes again.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..profiles.errors import BadInput
from ..profiles.json_file import read_json_object
from .output import Output
from .placed_file import refuse
from .shards import write_text

SCHEMA = 1


class Journal:
    """identity: what a resumed run must have in common with the first (source, recipe, versions): name -> text."""

    def __init__(self, output: Output, identity: Mapping[str, str]) -> None:
        self.output, self.identity = output, dict(identity)

    def read(self) -> dict[str, Any] | None:
        """{"layer": layers that are done, "results": ...}, or None where nothing is done yet.

        `BadInput` where the interrupted run was of another source or recipe.
        """
        path = self.output.journal("state.json")
        if not self.output.resumed or not os.path.exists(path):
            return None
        state = read_json_object(path)
        if state.get("schema") != SCHEMA:
            raise BadInput(f"{path} is of another version of qwenfit: --overwrite begins anew")
        for name, text in self.identity.items():
            if state.get("identity", {}).get(name) != text:
                raise BadInput(
                    f"{self.output.target} was begun with another {name}: --overwrite begins anew, or give the same"
                )
        return state

    def hidden(self, layer: int, rows: int, columns: int) -> Tensor:
        """The hidden states before a layer, float32 [rows, columns]. `BadInput` where the file is not theirs."""
        path = self._hidden_path(layer)
        try:
            size = os.path.getsize(path)
            if size != 4 * rows * columns:
                raise BadInput(f"{path} has {size} bytes, not {4 * rows * columns}: --overwrite begins anew")
            return torch.from_file(path, shared=False, size=rows * columns).view(rows, columns).clone()
        except (OSError, RuntimeError) as error:
            raise BadInput(f"{path} cannot be read ({error}): --overwrite begins anew") from error

    def write(self, layer: int, results: list[dict[str, Any]], hidden: Tensor | None) -> None:
        """`layer` layers are done; hidden: what the next one reads. The shards are on the disk already."""
        try:
            if hidden is not None:
                with open(self._hidden_path(layer), "wb") as file:
                    file.write(hidden.contiguous().view(-1).view(torch.uint8).numpy().data)
                    file.flush()
                    os.fsync(file.fileno())
            path = self.output.journal("state.json")
            state = {"schema": SCHEMA, "identity": self.identity, "layer": layer, "results": results}
            write_text(path + ".new", json.dumps(state))
            os.replace(path + ".new", path)
        except OSError as error:
            refuse(self.output.folder, error)
        with suppress(OSError):
            os.unlink(self._hidden_path(layer - 1))

    def _hidden_path(self, layer: int) -> str:
        return self.output.journal(f"hidden-{layer}")
