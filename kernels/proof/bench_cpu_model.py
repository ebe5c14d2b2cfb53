"""The whole model beside llama.cpp: decode at several depths and prefill, in turn within each round.

Ours: random int4 weights (group 128, symmetric) at the real shapes, lm_head (and a tied embedding) as --head says,
bfloat16 KV cache. Theirs: what the .gguf holds (Q4_0 files have a Q6_K head), f16 KV cache, by llama-bench. A decode
step of ours is the layers, lm_head and the choice of the largest logit. The bytes that each reads per token are
printed, for they are not the same.
"""

import argparse
import json
import statistics
import subprocess
import time
from dataclasses import replace
from typing import Any

import torch

from ...profiles.formats import weight_format
from ..bench_cpu import random_weight
from ..cpu.path import cpu_path
from ..layout.packing import QuantizedWeight
from ..runtime import model as forward_pass
from ..runtime.measuring import fill_caches
from ..runtime.memory import Buffers, Settings, allocate
from ..runtime.model import Model, decode_step, prefill_step, weight_bytes
from ..runtime.synthetic import synthetic


def compare(options: argparse.Namespace, threads: int) -> list[dict[str, object]]:
    """Rows of one table: what, ours, theirs, the median of the rounds' ratios."""
    model = model_with_head(options.model, options.head)
    deepest = max(options.depths)
    settings = Settings(deepest + options.tokens + options.prompt_tokens, 1)
    buffers = allocate(model.configuration, settings, model.dtype, "cpu")
    fill_caches(buffers)
    embedding = 0 if model.embedding is model.lm_head else _bytes(model.embedding)
    print(f"\n{options.model}, int4 g128, {options.head} head, {threads} thread(s), {options.rounds} rounds")
    print(f"{(weight_bytes(model) - embedding) / 1e9:.2f} GB of weights per token\n")
    print("| what | ours tok/s | llama.cpp tok/s | median ratio |\n| --- | ---: | ---: | ---: |")
    rows = [_row(f"decode at {depth:,}", options, threads, model, buffers, depth) for depth in options.depths]
    if options.prompt_tokens:
        rows.append(_row(f"prefill of {options.prompt_tokens}", options, threads, model, buffers, None))
    return rows


def model_with_head(name: str, head: str) -> Model:
    """A synthetic int4 model whose lm_head is bf16, int8 or int4; a tied embedding is the same tensor."""
    model = synthetic(name, weight_format("int4-sym"), operations=cpu_path())
    if head == "bf16":
        return model
    vocabulary, hidden = model.configuration.vocab_size, model.configuration.hidden_size
    packed = random_weight(vocabulary, hidden, int(head.removeprefix("int")), 128)
    if model.operations.arrange:
        packed = model.operations.arrange(packed)  # as a model that is loaded would have it
    tied = model.lm_head is model.embedding
    return replace(model, lm_head=packed, embedding=packed if tied else model.embedding)


@torch.inference_mode()
def ours(model: Model, buffers: Buffers, depth: int | None, tokens: int) -> float:
    """Tokens per second: `tokens` decode steps from `depth` on, or one prompt of `tokens` (depth None)."""
    if depth is None:
        prompt = torch.arange(tokens) % model.configuration.vocab_size
        start = time.perf_counter()
        hidden = forward_pass.forward(model, prompt, prefill_step(model, buffers, [0], [0], [tokens]), buffers)
        forward_pass.logits(model, hidden[-1:])
        return tokens / (time.perf_counter() - start)
    token = torch.tensor([1])
    start = time.perf_counter()
    for position in range(depth, depth + tokens):
        hidden = forward_pass.forward(model, token, decode_step(model, buffers, [0], [position]), buffers)
        token = forward_pass.logits(model, hidden).argmax(-1)
    return tokens / (time.perf_counter() - start)


def theirs(options: argparse.Namespace, threads: int, depth: int | None, tokens: int) -> float:
    """Tokens per second as llama-bench prints them, one repetition after its own warm-up."""
    work = ["-p", str(tokens), "-n", "0"] if depth is None else ["-p", "0", "-n", str(tokens), "-d", str(depth)]
    command = [options.llama_bench, "-m", options.gguf, "-t", str(threads), "-r", "1", "-o", "json", *work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"llama-bench failed: {done.stderr.strip().splitlines()[-1:]}")
    result: Any = json.loads(done.stdout)
    return float(result[0]["avg_ts"])


def _row(
    what: str, options: argparse.Namespace, threads: int, model: Model, buffers: Buffers, depth: int | None
) -> dict[str, object]:
    tokens = options.prompt_tokens if depth is None else options.tokens
    ours(model, buffers, depth, min(tokens, 64))
    mine, other = [], []
    for _ in range(options.rounds):
        mine.append(ours(model, buffers, depth, tokens))
        if options.llama_bench:
            other.append(theirs(options, threads, depth, tokens))
            mine[-1] = (mine[-1] + ours(model, buffers, depth, tokens)) / 2  # before and after
    ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True)) if other else None
    middle = statistics.median(other) if other else None
    print(
        f"| {what} | {statistics.median(mine):.2f} | {f'{middle:.2f}' if middle else ''} | "
        f"{f'{ratio:.2f}' if ratio else ''} |",
        flush=True,
    )
    return {
        "what": what,
        "model": options.model,
        "head": options.head,
        "threads": threads,
        "ours_tokens_per_s": statistics.median(mine),
        "theirs_tokens_per_s": middle,
        "ratio": ratio,
    }


def _bytes(weight: QuantizedWeight | torch.Tensor) -> int:
    return weight.bytes if isinstance(weight, QuantizedWeight) else weight.nbytes
