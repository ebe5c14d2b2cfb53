"""Our methods beside llm-compressor's and GPTQModel's GPTQ on a trained model: divergence on text nobody calibrated on.

    python tests/bench/gptq_models.py --peer llm-compressor=VENV/bin/python --peer gptqmodel=VENV/bin/python
    python tests/bench/gptq_models.py --case 4:128:sym --seeds 3 --calibration tests/data/small_hybrid/calibration.txt

Every tool gets the same token sequences and quantizes the same modules (all text linears but in_proj_a and in_proj_b),
by its own pipeline with its own defaults, in a process and an environment of its own (`pip install
llmcompressor==0.14.0.1`, `pip install gptqmodel==7.6.0`). What comes back are the matrices that its codes stand for, so
all are judged alike: by `evaluate`, in float32, against the bf16 checkpoint. Three bits, which no file format of ours
holds, go through the same solver.

One seed is one draw of calibration sequences; the figures are means over seeds, the error is that of the mean.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SMALL_HYBRID = Path(__file__).parents[1] / "data" / "small_hybrid"
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
    "gptq, full-precision targets": {"method": "gptq", "targets": True},
}
CASES = ("4:128:sym", "4:128:asym", "4:32:sym", "4:32:asym", "3:128:sym", "3:128:asym")
KEPT = ("lm_head", "re:.*in_proj_a$", "re:.*in_proj_b$")


class Grid(NamedTuple):
    """What matrices are rounded to, for all tools alike. The name of a case is `bits:group_size:sym|asym`."""

    bits: int
    group_size: int
    symmetric: bool
    activation_bits: None = None

    @classmethod
    def named(cls, case: str) -> "Grid":
        bits, group_size, kind = case.split(":")
        return cls(int(bits), int(group_size), kind == "sym")


def run_llm_compressor(source: str, sequences: Tensor, grid: Grid) -> dict[str, Tensor]:
    """`oneshot` with GPTQModifier, as its examples have it, on a bfloat16 model."""
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationArgs,
        QuantizationScheme,
    )
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in sequences.tolist()]
    group: Any = "group"
    weights = QuantizationArgs(num_bits=grid.bits, symmetric=grid.symmetric, strategy=group, group_size=grid.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=list(KEPT)),
        max_seq_length=sequences.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight_scale.detach().float().unsqueeze(2)
            zero = 0.0 if grid.symmetric else module.weight_zero_point.detach().float().unsqueeze(2)
            values = module.weight.detach().float().unflatten(1, (-1, grid.group_size))
            # The model holds them rounded to bfloat16; a file holds the codes.
            found[name] = (((values / scale + zero).round() - zero) * scale).flatten(1)
    return found


def run_gptqmodel(source: str, sequences: Tensor, grid: Grid) -> dict[str, Tensor]:
    """`GPTQModel.load` and `quantize`; the matrices as its solver hands them to its packer, before scales are fp16."""
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports]
    from gptqmodel.quantization.gptq import GPTQ  # pyright: ignore[reportMissingImports]

    found: dict[str, Tensor] = {}
    quantize = GPTQ.quantize

    def recorded(self: Any, *arguments: Any, **named: Any) -> Any:
        answer = quantize(self, *arguments, **named)
        found[self._named_module.full_name] = answer[0].detach().float().clone()
        return answer

    GPTQ.quantize = recorded
    config = QuantizeConfig(bits=grid.bits, group_size=grid.group_size, sym=grid.symmetric)
    model = GPTQModel.load(source, config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in sequences.tolist()]
    model.quantize(rows, batch_size=1)
    return found


PEERS = {"llm-compressor": run_llm_compressor, "gptqmodel": run_gptqmodel}


def run_ours(source: str, sequences: Tensor, grid: Grid, method: str, targets: bool = False) -> dict[str, Tensor]:
    """What `quantize` does with a dense model, without its files: 3 bits and other grids can be measured, too."""
    from qwenfit.kernels.runtime.configuration import read_configuration
    from qwenfit.quant.activations import Activations
    from qwenfit.quant.decoder import DecoderLayer, Stream
    from qwenfit.quant.grid import rtn
    from qwenfit.quant.modules import list_modules
    from qwenfit.quant.pipeline import TARGET_SHARE
    from qwenfit.quant.source import open_source
    from qwenfit.quant.weights import Weights

    opened, configuration = open_source(source), read_configuration(source)
    modules = [module for module in list_modules(opened) if module.layer is not None]
    weights, found = Weights(opened, modules, torch.device("cpu")), {}
    if method == "rtn":
        return {module.name: rtn(weights.module(module), levels(grid)).dequantize() for module in modules}
    streams = []
    shared = [sequences[: math.ceil(TARGET_SHARE * len(sequences))]] if targets else []
    for own in (sequences, *shared):
        hidden = Activations(own.numel(), configuration.hidden_size)
        hidden[:] = weights.embedded(own)
        streams.append(Stream(hidden, own.shape[1]))
    for number in range(configuration.num_layers):
        leaves = {module.leaf for module in modules if module.layer == number}
        layers = [DecoderLayer(weights.layer(number), configuration, number) for _ in streams]
        change = smoothed if method == "awq" else solved
        changed = change(layers, streams, leaves, grid)
        names = weights.layer_names(number)
        found.update({names[leaf].removesuffix(".weight"): matrix for leaf, matrix in changed.items()})
    return found


def levels(grid: Grid) -> Any:
    from qwenfit.quant.grid import Grid as Levels

    return Levels(grid.bits, grid.group_size, grid.symmetric, torch.bfloat16)


def solved(layers: list[Any], streams: list[Any], leaves: set[str], grid: Grid) -> dict[str, Tensor]:
    """A layer's matrices after GPTQ, by leaf; the streams go on behind the layer."""
    from qwenfit.quant.cholesky import factorize
    from qwenfit.quant.gptq import gptq
    from qwenfit.quant.layer_solver import accumulated
    from qwenfit.quant.modules import STAGES
    from qwenfit.quant.quantized import Quantized
    from qwenfit.quant.solve import TARGET_DAMPING, UNMOVED_PER_COLUMN, needed_damping

    found = {}
    for stage in layers[0].stages:
        inputs = [layer.enter(stage, stream) for layer, stream in zip(layers, streams, strict=True)]
        hessian = accumulated(inputs, [layers[0].weights[leaf] for leaf in STAGES[stage] if leaf in leaves])
        cross = hessian.cross_mean(UNMOVED_PER_COLUMN * hessian.columns) if hessian.has_cross else None
        damping = max(0.01, needed_damping(hessian.columns, hessian.tokens), TARGET_DAMPING if cross else 0)
        factor = factorize(hessian.mean(), damping=damping, overwrite=True)
        for leaf in leaves.intersection(STAGES[stage]):
            weight = layers[0].weights[leaf]
            parts = gptq(weight, factor, grid.bits, grid.group_size, symmetric=grid.symmetric, cross=cross)
            quantized = Quantized(*parts, grid.bits, grid.group_size, grid.symmetric)
            found[leaf] = layers[0].weights[leaf] = quantized.dequantize()
        for layer, stream, x in zip(layers, streams, inputs, strict=True):
            layer.leave(stage, stream, x)
    return found


def smoothed(layers: list[Any], streams: list[Any], leaves: set[str], grid: Grid) -> dict[str, Tensor]:
    """The same after AWQ, with what its scales changed elsewhere."""
    from qwenfit.quant.smoother import smooth_layer

    (layer,), (stream,) = layers, streams
    answer = smooth_layer(layer, stream, {leaf: levels(grid) for leaf in leaves})
    found = {**{leaf: one.weight.dequantize() for leaf, one in answer.solved.items()}, **answer.plain}
    layer.weights.update(found)
    for stage in layer.stages:
        layer.leave(stage, stream, layer.enter(stage, stream))
    return found


def ask(peer: str, python: str, source: str, sequences: Tensor, case: str) -> dict[str, Tensor]:
    """Run a peer in its own process. RuntimeError with its last words where it fails."""
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    with tempfile.TemporaryDirectory() as folder:
        save_file({"sequences": sequences}, f"{folder}/sequences")
        command = [python, __file__, "--tool", peer, "--folder", folder, "--source", source, "--case", case]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{peer}: {done.stderr[-3000:]}")
        return load_file(f"{folder}/answer")


def work(options: argparse.Namespace) -> None:
    """What a child process does: one tool, one case, its matrices into a file."""
    sequences = load_file(f"{options.folder}/sequences")["sequences"]
    found = PEERS[options.tool](options.source, sequences, Grid.named(options.case[0]))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{options.folder}/answer")


def judge(source: str, matrices: dict[str, Tensor], sequences: Tensor) -> Any:
    """`Evaluation` of the checkpoint with these tensors in place of its own."""
    from qwenfit.quant.evaluate import evaluate

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(Path(source, "config.json"), Path(folder, "config.json"))
        tensors = load_file(f"{source}/model.safetensors")
        for name, matrix in matrices.items():
            key = f"{name}.weight"
            assert tensors[key].shape == matrix.shape, name
            tensors[key] = matrix
        save_file(tensors, f"{folder}/model.safetensors")
        return evaluate(folder, source, sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our methods beside others' GPTQ on a trained model")
    parser.add_argument("--source", default=str(SMALL_HYBRID))
    parser.add_argument("--case", action="append", help=f"bits:group_size:sym|asym, {', '.join(CASES)}")
    parser.add_argument("--calibration", help="default: the text that ships with the package")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sequence-tokens", type=int, default=256)
    parser.add_argument("--heldout", default=str(SMALL_HYBRID / "heldout.txt"))
    parser.add_argument("--heldout-tokens", type=int, default=16384)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON, the interpreter of its environment")
    parser.add_argument("--ours", action="append", choices=OURS, help="default: all")
    parser.add_argument("--json", help="a file for every single figure")
    parser.add_argument("--tool", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tool:
        work(options)
        return
    from qwenfit.quant.calibration import choose_sequences, consecutive_sequences, read_text, read_tokenizer
    from qwenfit.quant.modules import list_modules
    from qwenfit.quant.source import open_source

    tokenizer, length = read_tokenizer(options.source), options.sequence_tokens
    heldout = consecutive_sequences(read_text(options.heldout), tokenizer, length, options.heldout_tokens)
    text, rows = read_text(options.calibration), []
    expected = [module.name for module in list_modules(open_source(options.source)) if module.layer is not None]
    print(f"calibrated on {text.name}, {options.tokens} tokens in sequences of {length}, {options.seeds} seeds\n")
    print("| bits:group | tool | KL, nats per token | +- | perplexity | top-1 agreement |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for case in options.case or CASES:
        tools = {**dict.fromkeys(options.ours or OURS), **dict(one.split("=", 1) for one in options.peer)}
        for tool, python in tools.items():
            found = []
            for seed in range(options.seeds if tool != "rtn" else 1):
                sequences = choose_sequences(text, tokenizer, options.tokens, length, seed)
                grid = Grid.named(case)
                matrices = (
                    ask(tool, python, options.source, sequences, case)
                    if python
                    else run_ours(options.source, sequences, grid, **OURS[tool])
                )
                assert set(expected) <= set(matrices), f"{tool} left out {set(expected) - set(matrices)}"
                found.append(judge(options.source, matrices, heldout))
            kls = [one.mean_kl for one in found]
            error = statistics.stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else found[0].mean_kl_error
            perplexity, agreement = (
                statistics.mean(getattr(one, key) for one in found) for key in ("perplexity", "top1_agreement")
            )
            figures = f"{statistics.mean(kls):.5f} | {error:.5f} | {perplexity:.3f} | {agreement:.4f}"
            print(f"| {case} | {tool} | {figures} |", flush=True)
            rows.append({"case": case, "tool": tool, "kl": kls, "perplexity": [one.perplexity for one in found]})
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
