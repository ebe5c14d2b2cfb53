"""llama-server's launch line. Flags as `common/arg.cpp` has them at b11434."""

from ...profiles.formats import WeightFormat
from ...profiles.model import Model
from .engine import Setup
from .launch import base_name, node_address, shell_line
from .llamacpp_cache import DEFAULT_BATCH_TOKENS, padded
from .llamacpp_devices import MAX_IMAGE_TOKENS

ALL_LAYERS = 99
RPC_PORT = 50052  # of ggml-rpc-server unless told otherwise


def server_line(
    setup: Setup,
    types: tuple[str, str],
    ctx_tokens: int,
    seqs: int,
    ubatch: int,
    layer_counts: tuple[int, ...],
    on_host_layers: int,
    cache_ram_mib: int | None,
) -> str:
    """One line for a POSIX shell.

    `-c` is what all slots share, in whole blocks of 256 tokens: without `--kv-unified` each gets its n-th part.
    `layer_counts` are layers per device, empty on a CPU; `on_host_layers` layers leave their experts in host memory.
    """
    model, (k_type, v_type) = setup.model, types
    words: list[object] = ["llama-server", "-m", gguf_name(model, setup.weights, bool(setup.mtp))]
    words += ["-c", padded(ctx_tokens) * seqs, "-np", seqs, "--no-kv-unified"]
    words += ["-ngl", ALL_LAYERS if layer_counts else 0, "-fa", "on", "-ctk", k_type, "-ctv", v_type]
    words += ["-b", max(DEFAULT_BATCH_TOKENS, ubatch), "-ub", ubatch, "--fit", "off"]
    if len(layer_counts) > 1:
        *others, last = layer_counts
        words += ["-sm", "layer", "-ts", ",".join(map(str, [*others, last + 1 + bool(setup.mtp)]))]
    if setup.nodes > 1:  # remote devices come before local ones (`llama.cpp`, llama_prepare_model_devices)
        words += ["--rpc", ",".join(f"{node_address(node)}:{RPC_PORT}" for node in range(1, setup.nodes))]
    if on_host_layers:
        words += ["--n-cpu-moe", on_host_layers]
    if setup.mtp:
        words += ["--spec-type", "draft-mtp", "--spec-draft-n-max", setup.mtp, "-ctkd", k_type, "-ctvd", v_type]
    if setup.vision:
        words += ["--mmproj", mmproj_name(model)]
        if setup.options.image_tokens:
            words += ["--image-max-tokens", min(setup.options.image_tokens, MAX_IMAGE_TOKENS)]
    factor = model.yarn_factor(ctx_tokens)
    if factor is not None:
        words += ["--rope-scaling", "yarn", "--rope-scale", f"{factor:g}"]
        words += ["--yarn-orig-ctx", trained_tokens(model, ctx_tokens)]
    if cache_ram_mib is not None:
        words += ["--cache-ram", cache_ram_mib]
    return shell_line(words)


def rpc_line(node: int) -> str:
    """What another box runs: it offers all its accelerators (`tools/rpc/rpc-server.cpp`)."""
    return shell_line(["ggml-rpc-server", "-H", node_address(node), "-p", RPC_PORT])


def gguf_name(model: Model, fmt: WeightFormat, mtp: bool = False) -> str:
    """The file itself where the model was read from one, else the name under which such files are published."""
    if model.path is not None and is_gguf(model):
        return model.path
    kind = (fmt.file_type or fmt.name).upper()
    return f"{base_name(model)}-{'MTP-' if mtp else ''}{kind}.gguf"


def is_gguf(model: Model) -> bool:
    """Whether it was read from a GGUF file, however that spells its ending."""
    return (model.quantization or {}).get("method") == "gguf"


def mmproj_name(model: Model) -> str:
    return f"mmproj-{base_name(model)}-F16.gguf"


def trained_tokens(model: Model, ctx_tokens: int) -> int:
    rope = model.yarn_rope(ctx_tokens) or {}
    original = rope.get("original_max_position_embeddings")
    return original if isinstance(original, int) else model.max_position_embeddings
