"""Our GPTQ beside llm-compressor's and GPTQModel's, on the same weight and the same calibration tokens.

    python tests/bench/gptq_solver.py --peer llm-compressor=VENV/bin/python --peer gptqmodel=VENV/bin/python
    python tests/bench/gptq_solver.py --shape 4096x12288 --tokens 2048 --bits 4 --group-size 128
    python tests/bench/gptq_solver.py --matrices FILE.safetensors --group-size 64      # of `real_matrices.py`
    python tests/bench/gptq_solver.py --hessian-only --shape 64x12288 --tokens 8192

Each tool runs in a process of its own, ours too, one after the other: CPU seconds (user + system) of the Hessian and of
the solve with its factorisation, peak memory, and the error tr(dW H dW^T) / tr(W H W^T) on the tokens of the
calibration and on as many that nobody saw. Peers are called as their own pipelines call them, with their defaults; each
needs an environment of its own (`pip install llmcompressor==0.14.0.1`, `pip install gptqmodel==7.6.0`). Quote ratios of
one run: a shared machine's seconds swing.

Calibration reaches each tool as its own pipeline hands it on: theirs a sequence at a time, ours as many as it takes.
Tokens of our own making have a spectrum that falls as a power, channels of unlike size and a few outliers.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SHAPES = ("8192x4096", "4096x12288")
OURS = "qwenfit"
SEQUENCE_TOKENS = 512
DIRECTIONS = 512
Measured = Iterator[tuple[str, float, Tensor]]
"""What a tool yields: "hessian" with its CPU seconds, then "solve" with its own and the matrix that the codes stand
for. Who does not ask for the second has the Hessian alone."""


def activations(tokens: int, columns: int, seed: int) -> Tensor:
    """float32 [tokens, columns]: 512 shared directions of falling weight, noise, log-normal channels, 4 outliers."""
    make = torch.Generator().manual_seed(0)  # the same directions and channels for every seed of tokens
    count = min(DIRECTIONS, columns)
    spectrum = torch.arange(1, count + 1).float().pow(-0.6)
    directions = torch.randn(count, columns, generator=make) * spectrum.unsqueeze(1)
    channels = torch.randn(columns, generator=make).mul_(0.5).exp_()
    channels[torch.randperm(columns, generator=make)[:4]] *= 20
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, count, generator=draw) @ directions
    return x.add_(torch.randn(tokens, columns, generator=draw), alpha=0.5).mul_(channels)


def weight(rows: int, columns: int) -> Tensor:
    make = torch.Generator().manual_seed(2)
    return torch.randn(rows, columns, generator=make).mul_(0.02).bfloat16().float()


class Clock:
    """CPU seconds between two looks."""

    def __init__(self) -> None:
        self._then = 0.0
        self.lap_s()

    def lap_s(self) -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        then, self._then = self._then, used.ru_utime + used.ru_stime
        return self._then - then


def run_ours(w: Tensor, x: Tensor, bits: int, group_size: int, symmetric: bool) -> Measured:
    from qwenfit.quant.cholesky import factorize
    from qwenfit.quant.gptq import gptq
    from qwenfit.quant.hessian import Hessian
    from qwenfit.quant.quantized import Quantized

    clock = Clock()
    sums = Hessian(w.shape[1])
    sums.add(x)
    hessian = sums.mean()
    yield "hessian", clock.lap_s(), w
    factor = factorize(hessian, overwrite=True)
    del hessian, sums
    codes, scales, zeros = gptq(w, factor, bits, group_size, symmetric=symmetric)
    solve_s = clock.lap_s()
    size = w.shape[1] // scales.shape[1]
    yield "solve", solve_s, Quantized(codes, scales, zeros, bits, size, symmetric).dequantize()


def run_llm_compressor(w: Tensor, x: Tensor, bits: int, group_size: int, symmetric: bool) -> Measured:
    import llmcompressor.modifiers.gptq.helpers as helpers  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
        ActivationOrdering,
        QuantizationArgs,
    )
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # pyright: ignore[reportMissingImports]
    from llmcompressor.observers import Observer  # pyright: ignore[reportMissingImports]

    layout: dict[str, Any] = {"strategy": "channel"} if group_size == -1 else {"group_size": group_size}
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, actorder=ActivationOrdering.STATIC, observer="memoryless_minmax", **layout
    )
    module = torch.nn.Linear(*reversed(w.shape), bias=False)
    module.weight.data = w
    module.requires_grad_(False)
    clock = Clock()
    hessian, samples = helpers.make_empty_hessian(module), torch.zeros(())
    for sequence in x.split(SEQUENCE_TOKENS):
        hessian, samples = helpers.accumulate_hessian(sequence[None], module, hessian, samples)
    yield "hessian", clock.lap_s(), w
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=arguments, module=module)
    observer(module.weight)
    parameters = observer.get_qparams()
    batch = helpers.prepare_batch([module], [parameters], {module: hessian}, {module: samples})
    del hessian
    weights, hessians, scale, zero_point, global_scale = batch
    del batch
    done, _, _ = quantize_weight(
        weights=weights,
        hessians=hessians,
        scale=scale,
        zero_point=zero_point,
        global_scale=global_scale,
        quant_args=arguments,
    )
    yield "solve", clock.lap_s(), done[0]


def run_gptqmodel(w: Tensor, x: Tensor, bits: int, group_size: int, symmetric: bool) -> Measured:
    from gptqmodel.quantization.config import QuantizeConfig  # pyright: ignore[reportMissingImports]
    from gptqmodel.quantization.gptq import GPTQ  # pyright: ignore[reportMissingImports]

    module = torch.nn.Linear(*reversed(w.shape), bias=False)
    module.weight.data = w
    settings = {"act_group_aware": False} if group_size == -1 else {}
    task = GPTQ(module, QuantizeConfig(bits=bits, group_size=group_size, sym=symmetric, **settings))
    task.quantizer.configure(perchannel=True)
    clock = Clock()
    with torch.inference_mode():
        for number, sequence in enumerate(x.split(SEQUENCE_TOKENS)):
            task.add_batch(sequence[None], sequence[None], batch_index=number)
        task.finalize_hessian()
        yield "hessian", clock.lap_s(), w
        done = task.quantize()[0]
    yield "solve", clock.lap_s(), done.clone()


TOOLS: dict[str, Callable[..., Measured]] = {
    OURS: run_ours,
    "llm-compressor": run_llm_compressor,
    "gptqmodel": run_gptqmodel,
}


def output_error(w: Tensor, rounded: Tensor, x: Tensor) -> float:
    """|X (W - Q)^T|^2 / |X W^T|^2, which is tr(dW H dW^T) / tr(W H W^T)."""
    wanted = got = 0.0
    for rows in range(0, len(w), 1024):
        part = w[rows : rows + 1024]
        wanted += float((x @ part.t()).double().square().sum())
        got += float((x @ (part - rounded[rows : rows + 1024]).t()).double().square().sum())
    return got / wanted


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, weight, tokens, unseen tokens) of one shape, or of every matrix of a file that falls into groups."""
    if not options.matrices:
        rows, columns = map(int, options.shape[0].split("x"))
        tokens, unseen = (activations(options.tokens, columns, seed) for seed in (1, 3))
        yield options.shape[0], weight(rows, columns), tokens, unseen
        return
    with safe_open(options.matrices, "pt") as file:
        for name in sorted(key.removesuffix(".weight") for key in list(file.keys()) if key.endswith(".weight")):
            w, x, unseen = (file.get_tensor(f"{name}.{kind}") for kind in ("weight", "tokens", "unseen"))
            if w.shape[1] % max(1, options.group_size) == 0:
                yield name, w, x, unseen


def work(options: argparse.Namespace) -> None:
    """What a child process does: one tool, its cases, one JSON document."""
    torch.set_num_threads(options.threads)
    # Once for nothing: imports, kernels that are compiled at the first call.
    list(
        TOOLS[options.tool](
            weight(32, 256), activations(256, 256, seed=1), options.bits, options.group_size, not options.asym
        )
    )
    answers = {name: measured(options, w, x, unseen) for name, w, x, unseen in cases(options)}
    Path(options.answer).write_text(json.dumps(answers))


def measured(options: argparse.Namespace, w: Tensor, x: Tensor, unseen: Tensor) -> dict[str, float]:
    answer, rounded = {"hessian_s": math.nan, "solve_s": math.nan}, w
    for step, seconds, made in TOOLS[options.tool](w.clone(), x, options.bits, options.group_size, not options.asym):
        answer[f"{step}_s"], rounded = seconds, made
        if options.hessian_only:
            break
    answer["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rounded = rounded.detach().float()
    answer["error"] = output_error(w, rounded, x)
    answer["unseen_error"] = output_error(w, rounded, unseen)
    return answer


def ask(tool: str, python: str, shape: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run a tool in its own process: figures by matrix. RuntimeError with its last words where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "GPTQMODEL_CPU_WORKERS": "2"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [python, __file__, "--tool", tool, "--answer", str(answer), "--shape", shape]
        for name in ("tokens", "bits", "group_size", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--asym"] if options.asym else []
        command += ["--hessian-only"] if options.hessian_only else []
        command += ["--matrices", os.path.abspath(options.matrices)] if options.matrices else []
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{tool}: {done.stderr[-2000:]}")
        return json.loads(answer.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Our GPTQ beside two others'")
    parser.add_argument("--shape", action="append", help="rows x columns; several times for several")
    parser.add_argument("--matrices", help="a file of `real_matrices.py` instead of shapes")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hessian-only", action="store_true", help="leave out the solve")
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON, the interpreter of its environment")
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tool:
        work(options)
        return
    tools = {OURS: sys.executable, **dict(peer.split("=", 1) for peer in options.peer)}
    print("| matrix | tool | Hessian CPU s | solve CPU s | ours / theirs | peak GB | error | error, unseen tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in ["file"] if options.matrices else options.shape or SHAPES:
        ours: dict[str, dict[str, float]] = {}
        for tool, python in tools.items():
            found = ask(tool, python, shape, options)
            ours = ours or found
            for name, a in found.items():
                ratios = f"{ours[name]['hessian_s'] / a['hessian_s']:.2f}, {ours[name]['solve_s'] / a['solve_s']:.2f}"
                print(
                    f"| {name} | {tool} | {a['hessian_s']:.1f} | {a['solve_s']:.1f} | {ratios} | {a['peak_gb']:.2f} "
                    f"| {a['error']:.3e} | {a['unseen_error']:.3e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
