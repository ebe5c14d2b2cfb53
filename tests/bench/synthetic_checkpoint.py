"""A checkpoint of a family member's real names and shapes with random weights, for benches of the quantizer.

    python tests/bench/synthetic_checkpoint.py 9b path/to/config.json OUT       (19.3 GB, two minutes)

config.json: the model's own, from the hub. Weights are drawn from 2^26 normal values, scaled as trained ones are, so
that layers neither vanish nor explode; the tokenizer knows bytes and a few words.
"""

import argparse
import runpy
import shutil
from math import prod
from pathlib import Path

import torch

from qwenfit.kernels.layout.checkpoint import DTYPES
from qwenfit.profiles.model_catalog import model
from qwenfit.quant.shards import Entry, Shards

FIXTURES = Path(__file__).parents[1] / "quant" / "conftest.py"
DRAWN, BLOCK = 1 << 26, 1 << 25


def scale_of(role: str, label: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(standard deviation, mean) of a tensor's values."""
    if role == "linear_attn.A_log" or "conv1d" in label:
        return 0.5, 0.0
    if len(shape) == 1:
        return 0.2, float(role == "linear_attn.norm")
    return (0.1, 0.0) if role == "embedding" else (1.2 * shape[-1] ** -0.5, 0.0)


def write(name: str, config: Path, folder: Path) -> int:
    """Bytes of all tensors."""
    folder.mkdir(parents=True)
    shutil.copy(config, folder / "config.json")
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = list(model(name).expanded())
    shards = Shards(str(folder), [Entry(label, one.dtype, tuple(one.shape)) for label, one in tensors])
    for number, (label, one) in enumerate(tensors):
        spread, mean = scale_of(one.role, label, tuple(one.shape))
        rows, row = (one.shape[0], prod(one.shape[1:])) if one.shape else (1, 1)
        step = max(1, BLOCK // row)
        for at in range(0, rows, step):
            count = min(step, rows - at) * row
            start = (number * 7919 + at * 31) % (DRAWN - count)
            values = drawn[start : start + count].float() * spread + mean
            shape = (min(step, rows - at), *one.shape[1:]) if one.shape else ()
            shards.write(label, values.view(shape).to(DTYPES[one.dtype]), at)
    shards.finish()
    runpy.run_path(str(FIXTURES))["write_tokenizer"](folder, 1000)
    return sum(entry.bytes for entry in shards.entries.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    print(f"{write(chosen.model, chosen.config, chosen.folder) / 1e9:.1f} GB in {chosen.folder}")


if __name__ == "__main__":
    main()
