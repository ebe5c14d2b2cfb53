"""vLLM's launch line."""

from .engine import Setup
from .launch import HEAD_ADDRESS, checkpoint_name, compact_json, rope_overrides
from .versions import since

PIXELS_PER_IMAGE_TOKEN = 1024  # patches of 16 x 16 pixels, merged 2 x 2
SMALLEST_IMAGE_PIXELS = 65536  # preprocessor_config.json, shortest_edge
DATA_PARALLEL_PORT = 29550  # ParallelConfig.data_parallel_rpc_port


def launch_words(setup: Setup, ctx_tokens: int, seqs: int, batch_tokens: int, prefix_caching: bool) -> list[object]:
    """Everything but the size of the cache, as words; variables of the environment come first."""
    model, options = setup.model, setup.options
    words: list[object] = []
    overrides = rope_overrides(model, ctx_tokens)
    if overrides is not None:
        words.append("VLLM_ALLOW_LONG_MAX_MODEL_LEN=1")
    if setup.weights.name == "fp8" and not setup.weights.is_released(model) and not model.stored:
        words += ["vllm", "serve", model.repo, "--quantization", "fp8"]  # not published so: quantized while loading
    else:
        words += ["vllm", "serve", checkpoint_name(model, setup.weights)]
    words += ["--max-model-len", ctx_tokens, "--max-num-seqs", seqs, "--max-num-batched-tokens", batch_tokens]
    kv_dtype = "auto" if setup.kv_dtype in ("bf16", "bfloat16") else setup.kv_dtype
    words += ["--kv-cache-dtype", kv_dtype, "--mamba-ssm-cache-dtype", setup.state_dtype]
    words.append("--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching")
    if model.has_vision and not setup.vision:
        words.append("--language-model-only")
    elif model.has_vision and options.image_tokens is not None:
        pixels = options.image_tokens * PIXELS_PER_IMAGE_TOKEN
        size = {"size": {"shortest_edge": min(pixels, SMALLEST_IMAGE_PIXELS), "longest_edge": pixels}}
        words += ["--mm-processor-kwargs", compact_json(size)]
    if setup.tp > 1:
        words += ["--tensor-parallel-size", setup.tp]
    if setup.pp > 1:
        words += ["--pipeline-parallel-size", setup.pp]
    if setup.dp > 1:
        words += ["--data-parallel-size", setup.dp]
    if setup.ep > 1:
        words.append("--enable-expert-parallel")
    if setup.mtp:
        words += ["--speculative-config", compact_json({"method": "mtp", "num_speculative_tokens": setup.mtp})]
    if not options.cuda_graphs:
        words.append("--enforce-eager")
    if overrides is not None:
        words += ["--hf-overrides", compact_json(overrides)]
    return words


def node_words(setup: Setup, node: int) -> list[object]:
    """What the line of one box says beside the others: its place among them (--nnodes). Before 0.32 replicas that each
    lie in one box are told by the first replica of the box instead (--data-parallel-start-rank), for `arg_utils.py`
    did not yet infer that from the place."""
    if setup.replica_nodes == 1 and setup.dp > 1 and not since(setup.version, "0.32"):
        local = setup.dp // setup.nodes
        words: list[object] = ["--data-parallel-size-local", local, "--data-parallel-address", HEAD_ADDRESS]
        words += ["--data-parallel-rpc-port", DATA_PARALLEL_PORT]
        return words if node == 0 else [*words, "--data-parallel-start-rank", node * local, "--headless"]
    words = ["--nnodes", setup.nodes, "--node-rank", node, "--master-addr", HEAD_ADDRESS]
    return words if node == 0 else [*words, "--headless"]
