"""Small checkpoints as they are released: random weights under the releases' names, a byte-level tokenizer, a template.

Weights are large enough that every layer matters: norms around their released values, matrices of unit gain, gates and
decays that are neither shut nor open.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the quantizer needs torch: pip install 'qwenfit[quant]'")

DATA = Path(__file__).parent.parent / "data"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WIDE = {  # rows of 256 and more, as blocks of 256 weights need them
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}

FOR_KERNELS = {  # multiples of 64, GPTQ's and AWQ's groups of 64, Marlin's tiles
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint("qwen3_5" | "qwen3_5_moe", is_wide=False, sees=False, for_kernels=False, **changes of config.json) ->
    its folder; read only. sees: with a vision tower, as the releases are. for_kernels: sides that every kernel of the
    engines takes."""
    made: dict[str, Path] = {}

    def make(name: str, is_wide: bool = False, sees: bool = False, for_kernels: bool = False, **changes: Any) -> Path:
        changes = {**(FOR_KERNELS if for_kernels else {}), **changes}
        key = f"{name} {is_wide} {sees} {changes!r}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            write_checkpoint(made[key], name, {**(WIDE if is_wide else {}), **changes}, sees=sees)
        return made[key]

    return make


@pytest.fixture(scope="session")
def rounded() -> Callable[..., Any]:
    """rounded(matrix, Scheme, scale dtype) -> Quantized: to nearest, without a search, by arithmetic of this file."""
    return round_to_grid


@pytest.fixture(scope="session")
def quantized_checkpoint() -> Callable[..., Any]:
    """quantized_checkpoint(source folder, target, file module, scheme of a module's name or None) writes a checkpoint
    with this room's writers -> {name in the source: the matrix that its codes stand for, float32}.
    """
    return write_quantized


def round_to_grid(matrix: Any, scheme: Any, dtype: Any) -> Any:
    from qwenfit.quant.quantized import Quantized

    size = matrix.shape[1] // scheme.groups(matrix.shape[1])
    values, top = matrix.float().unflatten(1, (-1, size)), 2**scheme.bits - 1
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    if scheme.symmetric and scheme.bits < 8:
        # Half of the groups get a negative scale, as the solvers give it: whatever reads a file multiplies by it.
        scales = (torch.where(high > -low, -high, -low) / 2 ** (scheme.bits - 1)).to(dtype).float()
        zeros = torch.full_like(scales, 2 ** (scheme.bits - 1))
    elif scheme.symmetric:
        scales = (2 * values.abs().amax(-1) / top).to(dtype).float()
        zeros = torch.full_like(scales, 2 ** (scheme.bits - 1))
    else:
        scales = ((high - low) / top).to(dtype).float()
        zeros = (-low / scales).round().clamp(0, top)
    codes = (values / scales[..., None] + zeros[..., None]).round().clamp(0, top)
    parts = (codes.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8))
    return Quantized(*parts, scheme.bits, size, scheme.symmetric)


def write_quantized(source_folder: Path, target: Path, form: Any, scheme_of: Callable[[str], Any]) -> dict[str, Any]:
    from qwenfit.quant.output import open_output
    from qwenfit.quant.shards import Entry, Shards
    from qwenfit.quant.source import open_source

    source = open_source(str(source_folder))
    entries, schemes, matrices, kept = [], {}, {}, []
    for name in source.names():
        parts = split_experts(name, source.shape(name))
        found = {module: scheme_of(module) for module, _ in parts}
        if any(found.values()):
            for module, where in parts:
                schemes[module], matrices[module] = found[module], (name, where)
                shape = source.tensor(name)[where].shape
                described = form.module_entries(*shape, found[module])
                entries += [Entry(f"{module}.{ending}", *entry) for ending, entry in described.items()]
        else:
            entries.append(Entry(name, source.dtype(name), source.shape(name)))
            if len(source.shape(name)) == 2 and name.endswith(".weight"):
                kept.append(name.removesuffix(".weight"))
    output = open_output(str(target), source.folder)
    shards, fake = Shards(output.folder, entries), {}
    for module, (name, where) in matrices.items():
        scheme = schemes[module]
        weight = round_to_grid(source.tensor(name)[where], scheme, form.SCALE_DTYPE)
        more = {"activation_bits": 8} if scheme.activation_bits else {}
        for ending, tensor in form.module_tensors(weight, **more).items():
            shards.write(f"{module}.{ending}", tensor)
        fake.setdefault(name, torch.empty(source.shape(name)))[where] = weight.dequantize()
    for name in set(source.names()) - set(fake):
        shards.copy(name, source)
    shards.finish()
    output.finish(source, form.quantization_config(schemes, kept), {"README.md": "made by a test\n"})
    return fake


def split_experts(name: str, shape: tuple[int, ...]) -> list[tuple[str, Any]]:
    """(module, where in the source tensor): a stack of experts is stored matrix by matrix."""
    parent, _, leaf = name.rpartition(".")
    if not parent.endswith("mlp.experts"):
        return [(name.removesuffix(".weight"), slice(None))]
    if leaf == "down_proj":
        return [(f"{parent}.{expert}.down_proj", (expert,)) for expert in range(shape[0])]
    half = shape[1] // 2
    return [
        (f"{parent}.{expert}.{part}_proj", (expert, rows))
        for expert in range(shape[0])
        for part, rows in (("gate", slice(0, half)), ("up", slice(half, None)))
    ]


def with_vision(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a text model inside that of a release: its class, a small tower, and ids of images."""
    text = {key: value for key, value in config.items() if key != "architectures"}
    name = config["model_type"].removesuffix("_text")
    tower = {
        "model_type": name, "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "in_channels": 3,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": config["hidden_size"],
        "num_position_embeddings": 64, "deepstack_visual_indexes": [], "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "architectures": [config["architectures"][0].replace("ForCausalLM", "ForConditionalGeneration")],
        "model_type": name,
        "text_config": text,
        "vision_config": tower,
        "tie_word_embeddings": config["tie_word_embeddings"],
        **{name: config["vocab_size"] - 1 - number for number, name in enumerate(ids)},
    }


def write_checkpoint(
    folder: Path, name: str, changes: dict[str, Any], dtype: Any = torch.bfloat16, sees: bool = False
) -> None:
    from safetensors.torch import save_file

    from qwenfit.profiles.model_catalog import model

    known = json.loads((DATA / f"tiny_{name}.json").read_text(encoding="utf-8"))
    allowed = set(known) | {"vision_config", "text_config", "mlp_only_layers"}
    config = {**known, **{key: value for key, value in changes.items() if key in allowed}}
    whole = with_vision(config) if sees else config
    (folder / "config.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for label, tensor in model(str(folder / "config.json")).expanded():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.role == "linear_attn.A_log":
            values = values.mul(0.5)
        elif len(tensor.shape) == 1:
            values = values.mul(0.2) + (1 if tensor.role == "linear_attn.norm" else 0)
        elif "conv1d" in label:
            values = values.mul(0.5)
        elif tensor.role == "embedding":
            values = values.mul(0.1)  # a head that shares it then gives logits of a few units
        else:
            values = values.mul(1.5 * tensor.shape[-1] ** -0.5)
        tensors[label] = values.to(torch.float32 if tensor.dtype == "F32" else dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, config["vocab_size"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 256],  "temperature": 0.6}\n')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """256 bytes, a few merges, and a last word that is not filled up: 512 is more than there are tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(256)}
    merges = [["t", "h"], ["th", "e"], [letters[32], "the"]]
    vocab.update({"".join(pair): 258 + number for number, pair in enumerate(merges)})
    special = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    added = [{"id": 256, "content": "<|endoftext|>", **special}, {"id": 257, "content": "<|im_end|>", **special}]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_only]},
        "post_processor": None,
        "decoder": bytes_only,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
    }
    assert len(vocab) + len(added) < vocab_size
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
