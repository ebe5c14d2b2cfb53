"""Generate from a checkpoint folder, and say how fast and in how much memory.

    python -m qwenfit.kernels.run FOLDER --prompt "Once upon a time" --tokens 64
    python -m qwenfit.kernels.run FOLDER --prompt-tokens 9707,1879 --prompt-tokens 40 --seqs 2 --kv-dtype int8 --mtp 2
    python -m qwenfit.kernels.run qwen3.5-0.8b --random int4 --prompt-tokens 1,2,3 --ctx 32768

--ctx, --seqs, --kv-dtype, --state-dtype and --mtp say what is allocated before the first token, as `qwen-plan` plans
it. Every --prompt and every --prompt-tokens is a sequence of its own. --prompt takes the folder's tokenizer.json, where
the package `tokenizers` is installed; token ids need neither. Without a prompt every sequence reads --prompt-length
random tokens, and no token stops it: a measurement. --random takes the shapes of a model of the catalog (or of a
config.json) and draws its weights in a format of `qwen-plan --weights`: for memory and speed, where there is no
checkpoint. --layers takes the first layers only, for a machine that is too small for all.

--depth fills every sequence with that many random tokens in chunks, for --limit-s seconds at most, and decodes behind
them (`runtime/measuring.py`): that is how a plan is verified.

Planned are bytes by the formulas of the plan, allocated those of the tensors; scratch is what a chunk may take, and
beside it what it took. Runtime is what else there is in the peak: on a CPU that of the whole process, Python and torch
in it; on a GPU what the driver counts for the process, where it says so.

An error is one sentence on stderr and exit status 2.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..profiles.checkpoint import read_folder
from ..profiles.formats import weight_format
from .runtime.generate import Generation, generate
from .runtime.loading import load
from .runtime.measuring import Measured, measure
from .runtime.memory import (
    CPU_CHUNK_TOKENS,
    GPU_CHUNK_TOKENS,
    Settings,
    allocate,
    kv_bytes,
    reserve_scratch,
    scratch_bytes,
    state_bytes,
)
from .runtime.model import weight_bytes
from .runtime.process_memory import driver_bytes, peak_bytes, restart_peak, used_bytes
from .runtime.sampling import Sampling
from .runtime.synthetic import synthetic

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the memory table, in bytes; None where there is no such number."""

    name: str
    planned_bytes: int | None
    allocated_bytes: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        report = run(options)
    except (ValueError, ImportError, torch.OutOfMemoryError) as error:
        print(f"qwenfit.kernels.run: {_sentence(error)}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options.json else _rendered(report))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load, allocate, generate: everything that is printed, as JSON has it. ValueError in one sentence."""
    device = _device(options.device)
    start_bytes = used_bytes(device)
    tokenizer = None if options.random else _tokenizer(options.folder, is_needed=bool(options.prompt))
    chunk = options.prefill_chunk or (CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS)
    seqs = options.seqs or max(1, len(options.prompt) + len(options.prompt_tokens))
    settings = Settings(options.ctx, seqs, options.kv_dtype, options.state_dtype, chunk, options.mtp)
    dtype = DTYPES[options.dtype]
    if options.random:
        fmt = weight_format(options.random)
        model = synthetic(options.folder, fmt, options.mtp, dtype, device, layers=options.layers)
    else:
        model = load(options.folder, options.mtp, dtype, device, layers=options.layers)
    scratch = scratch_bytes(model.configuration, settings, device.type == "cpu")
    reserve_scratch(scratch, device)
    buffers = allocate(model.configuration, settings, dtype, device)
    restart_peak(device)
    before = used_bytes(device)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if options.depth:
        found = measure(model, buffers, options.depth, options.tokens, options.limit_s, options.seed)
        tokens: Sequence[Sequence[int]] = ()
        speed = _measured(found)
    else:
        prompts = _prompts(options, tokenizer, settings, model.configuration.vocab_size)
        stop_tokens = () if options.ignore_stop or not (options.prompt or options.prompt_tokens) else None
        generation = generate(model, buffers, prompts, options.tokens, sampling, stop_tokens)
        tokens, speed = generation.tokens, _speed(generation)
    peak, driver = peak_bytes(device), driver_bytes(device)
    parts = (
        Part("weights", _stored_bytes(options), weight_bytes(model)),
        Part("kv_cache", kv_bytes(model.configuration, settings), buffers.kv_bytes),
        Part("recurrent_state", state_bytes(model.configuration, settings), buffers.state_bytes),
        Part("scratch", scratch, max(0, peak - before)),
    )
    total = peak if driver is None else driver
    rest = (
        None if device.type == "cuda" and driver is None else total - sum(part.allocated_bytes or 0 for part in parts)
    )
    parts += (Part("runtime", None, rest), Part("peak", None, total))
    return {
        "model": options.folder,
        "architecture": model.configuration.architecture,
        "layers": model.configuration.num_layers,
        "dtype": options.dtype,
        "device": str(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "settings": asdict(settings),
        "sampling": None if options.depth else asdict(sampling),
        "operations": dict(model.operations.choices),
        "memory": {part.name: {"planned": part.planned_bytes, "allocated": part.allocated_bytes} for part in parts},
        "start_bytes": start_bytes,
        "speed": speed,
        "tokens": tokens,
        "text": [tokenizer.decode(list(text)) for text in tokens] if tokenizer else None,
    }


def _speed(found: Generation) -> dict[str, Any]:
    """Tokens per second are of all sequences together; drafts that were accepted count as tokens."""
    decode = found.decode_tokens / found.decode_s if found.decode_tokens else None
    return {
        "prefill_tokens": found.prefill_tokens,
        "prefill_tokens_per_s": found.prefill_tokens / found.prefill_s,
        "decode_tokens": found.decode_tokens,
        "decode_tokens_per_s": decode,
        "steps": found.steps,
        "drafted": found.drafted,
        "accepted": found.accepted,
    }


def _measured(found: Measured) -> dict[str, Any]:
    """The same keys, and what was filled in rather than computed."""
    gained = round(found.steps * found.sequences * found.accepted_per_step)
    return {
        "prefill_tokens": found.depth_tokens * found.sequences,
        "prefill_tokens_per_s": found.prefill_tokens_per_s,
        "decode_tokens": gained,
        "decode_tokens_per_s": found.decode_tokens_per_s,
        "steps": found.steps,
        "drafted": None,
        "accepted": gained - found.steps * found.sequences,
        "depth_tokens": found.depth_tokens,
        "computed_tokens": found.computed_tokens,
        "prefill_is_estimated": found.is_estimated,
        "first_chunk_s": found.first_chunk_s,
        "last_chunk_s": found.last_chunk_s,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwenfit.kernels.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="a checkpoint folder; with --random a model of the catalog or a config.json")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-tokens", action="append", default=[], metavar="1,2,3", help="the same as token ids")
    parser.add_argument("--prompt-length", type=int, default=512, help="random tokens, where no prompt is given")
    parser.add_argument("--tokens", type=int, default=64, help="to generate, per sequence")
    parser.add_argument("--ctx", type=int, default=4096, help="tokens of context per sequence")
    parser.add_argument("--seqs", type=int, default=0, help="sequences to make room for; else as many as prompts")
    parser.add_argument("--kv-dtype", default="bf16", help="bf16 (the dtype of the model) or int8")
    parser.add_argument("--state-dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--prefill-chunk", type=int, default=0, help="tokens of prompt at once: 512, on a GPU 2048")
    parser.add_argument("--mtp", type=int, default=0, help="draft tokens per step")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="what is computed in")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-stop", action="store_true", help="stop tokens do not stop it")
    parser.add_argument("--random", metavar="FORMAT", help="draw weights in this format: int4, int8, bf16, int4-g64")
    parser.add_argument("--layers", type=int, help="only the first of them")
    parser.add_argument("--depth", type=int, default=0, help="fill every sequence with that many tokens, then decode")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="with --depth: time for reading them")
    parser.add_argument("--json", action="store_true")
    return parser


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA or ROCm device here: give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _tokenizer(folder: str, is_needed: bool) -> Any:
    """`tokenizers.Tokenizer` of the folder, or None where there is none and none is needed."""
    path = os.path.join(folder, "tokenizer.json")
    has_package = importlib.util.find_spec("tokenizers") is not None
    if not has_package or not os.path.exists(path):
        if is_needed:
            lack = f"{path} is missing" if has_package else "--prompt needs `pip install tokenizers`"
            raise ValueError(f"{lack}; or give token ids with --prompt-tokens")
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def _prompts(options: argparse.Namespace, tokenizer: Any, settings: Settings, vocab_size: int) -> list[list[int]]:
    prompts = [list(tokenizer.encode(text).ids) for text in options.prompt]
    for text in options.prompt_tokens:
        try:
            prompts.append([int(word) for word in text.split(",")])
        except ValueError:
            raise ValueError(f"--prompt-tokens {text[:60]!r}: give token ids with commas between them") from None
    if prompts:
        return prompts
    length = min(options.prompt_length, settings.ctx_tokens - 1)
    draw = torch.Generator().manual_seed(options.seed)
    return torch.randint(0, vocab_size, (settings.seqs, max(1, length)), generator=draw).tolist()


def _stored_bytes(options: argparse.Namespace) -> int | None:
    """Bytes of the text (and the prediction layer, with drafts) in the files: what the plan counts for a folder."""
    if options.random or options.layers:
        return None
    parts = ("text", "mtp") if options.mtp else ("text",)
    tensors = read_folder(options.folder).tensors
    return sum(tensor.stored_bytes * tensor.count for tensor in tensors if tensor.part in parts)


def _rendered(report: dict[str, Any]) -> str:
    settings, speed = report["settings"], report["speed"]
    lines = [
        f"{report['model']}: {report['architecture']} in {report['dtype']} on {report['device']}, "
        f"{settings['seqs']} x {settings['ctx_tokens']} tokens",
        "",
        f"{'GiB':<16}{'planned':>10}{'allocated':>11}",
    ]
    for name, part in report["memory"].items():
        lines.append(f"{name.replace('_', ' '):<16}{_gib(part['planned']):>10}{_gib(part['allocated']):>11}")
    lines += ["", f"prefill  {speed['prefill_tokens']:>6} tokens  {speed['prefill_tokens_per_s']:>9.1f} tokens/s"]
    if speed.get("prefill_is_estimated"):
        lines[-1] += f"  (from {speed['computed_tokens']} tokens that were read; the others were filled in)"
    if speed["decode_tokens_per_s"] is not None:
        lines.append(f"decode   {speed['decode_tokens']:>6} tokens  {speed['decode_tokens_per_s']:>9.1f} tokens/s")
    if speed["drafted"]:
        lines.append(f"drafts   {speed['accepted']} of {speed['drafted']} accepted, {speed['steps']} steps")
    lines += ["", *(f"{name:<26} {reason}" for name, reason in report["operations"].items()), ""]
    for number, text in enumerate(report["tokens"]):
        words = report["text"][number] if report["text"] else " ".join(map(str, text))
        lines.append(f"[{number}] {words}")
    return "\n".join(lines)


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / GIB:.3f}"


def _sentence(error: BaseException) -> str:
    """The first line of what went wrong: torch's out-of-memory errors go on for a paragraph."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
