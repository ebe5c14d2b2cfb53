"""SGLang's launch line."""

from .engine import Setup
from .launch import HEAD_ADDRESS, checkpoint_name, compact_json, rope_overrides, shell_line

DIST_INIT_PORT = 20000  # as in SGLang's guide to several boxes; any free one


def launch_line(
    setup: Setup, ctx_tokens: int, seqs: int, fraction: float, slots: int, chunk_tokens: int, radix: bool, node: int = 0
) -> str:
    """`seqs`, `slots` and `chunk_tokens` are those of one replica. Replicas that share experts are attention groups
    inside one tensor-parallel world, whose totals SGLang divides among them (`arg_groups/parallel_hook.py`,
    `mem_cache/kv_cache_configurator.py`); replicas of dense models each get what the line says."""
    model, groups = setup.model, setup.expert_dp
    seqs, slots, chunk_tokens = seqs * groups, slots * groups, chunk_tokens * groups
    words: list[object] = []
    overrides = rope_overrides(model, ctx_tokens)
    if overrides is not None:
        words.append("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1")
    words += ["python", "-m", "sglang.launch_server", "--model-path", checkpoint_name(model, setup.weights)]
    words += ["--context-length", ctx_tokens, "--max-running-requests", seqs]
    words += ["--mem-fraction-static", fraction, "--max-mamba-cache-size", slots]
    words += ["--chunked-prefill-size", chunk_tokens, "--mamba-ssm-dtype", setup.state_dtype]
    kv_dtype = {"bf16": "auto", "bfloat16": "auto", "fp8": "fp8_e4m3"}.get(setup.kv_dtype, setup.kv_dtype)
    words += ["--kv-cache-dtype", kv_dtype]
    words += ["--mamba-radix-cache-strategy", "extra_buffer"] if radix else ["--disable-radix-cache"]
    if model.has_vision and not setup.vision:
        words.append("--language-model-only")
    if setup.tp * groups > 1:
        words += ["--tp-size", setup.tp * groups]
    if setup.pp > 1:
        words += ["--pp-size", setup.pp]
    if setup.dp > 1:
        words += ["--attn-dp-size" if groups > 1 else "--dp-size", setup.dp]
    if setup.ep > 1:
        words += ["--ep-size", setup.ep]
    if setup.mtp:
        words += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", setup.mtp]
        words += ["--speculative-eagle-topk", 1, "--speculative-num-draft-tokens", setup.mtp + 1]
    if not setup.options.cuda_graphs:
        words += ["--disable-decode-cuda-graph", "--disable-prefill-cuda-graph"]
    if overrides is not None:
        words += ["--json-model-override-args", compact_json(overrides)]
    if setup.nodes > 1:
        words += ["--dist-init-addr", f"{HEAD_ADDRESS}:{DIST_INIT_PORT}", "--nnodes", setup.nodes, "--node-rank", node]
    return shell_line(words)
