"""A checkpoint folder as a model: one module after another, read, laid out and moved to the device.

What is in memory at once is the model and one group of matrices that share an input (gate and up of an MLP, say), read
and laid on top of each other on the CPU. What no kernel can take apart again stays as it is stored
(`layout/checkpoint.py`).
"""

import torch

from ..layout.checkpoint import open_checkpoint
from ..operations import Operations, operations_for
from .assembly import assemble
from .configuration import read_configuration
from .heap import weights_in_pages
from .model import Model


def load(
    folder: str,
    drafts: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    operations: Operations | None = None,
    layers: int | None = None,
) -> Model:
    """The model in a checkpoint folder, bf16 or quantized; the prediction layer only with drafts; `layers`: the first
    of them only.

    operations None: those that `operations_for` chooses for the device. ValueError in one sentence where the folder is
    damaged, of another architecture, or quantized in a way that the runtime does not have.
    """
    configuration = read_configuration(folder).with_layers(layers)
    where = torch.device(device)
    with weights_in_pages():
        source = open_checkpoint(folder)
        return assemble(source, configuration, dtype, where, operations or operations_for(where), drafts > 0)
