"""SGLang's cache arithmetic: slots of recurrent state first, tokens of attention cache from what is left.

Read in sglang 0.5.23: `mem_cache/kv_cache_configurator.py` (`_handle_max_mamba_cache`, `_calculate_mamba_ratio`,
`resolve_max_num_reqs`), `model_executor/pool_configurator.py` (`DefaultPoolConfigurator`), `configs/mamba_utils.py`,
`arg_groups/speculative_hook.py`. Arithmetic is done in GiB as floats there, and so it is here, to round alike.

All bytes are those of one tensor-parallel rank. Pool bytes are what SGLang calls rest memory: free after loading, less
what `mem_fraction_static` keeps back.
"""

from functools import lru_cache
from itertools import accumulate

from ...profiles.errors import BadInput, UnknownName, Unsupported
from ...profiles.frozen import dataclass
from ...profiles.model import Model

GIB = 1 << 30
KV_BYTES = {"bf16": 2, "auto": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8": 1}
STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FULL_MEMORY_RATIO = 0.9  # --mamba-full-memory-ratio: state pool to attention pool
SPECULATIVE_RUNNING_REQUESTS = 48  # --max-running-requests where drafts are on and nobody gave it
# Slots that a running request can hold: itself, the state it started from and one to write; with extra buffers also the
# states tracked for the radix cache, two where scheduling overlaps.
SLOTS_PER_REQUEST = {"no_buffer": 3, "extra_buffer": 5, "extra_buffer_lazy": 4}


@dataclass(frozen=True, slots=True)
class SglangPool:
    """What SGLang says at boot about its two pools (per rank)."""

    state_slots: int  # max_mamba_cache_size
    state_slots_per_request: int
    kv_cache_tokens: int  # max_total_num_tokens
    max_running_requests: int
    cell_bytes: int  # one token in the attention cache, all layers
    state_bytes_per_request: int  # one slot, all layers of the fullest pipeline stage


@dataclass(frozen=True, slots=True)
class Cells:
    """Sizes that do not depend on the budget."""

    state_bytes: int
    cell_bytes: int  # of the fullest pipeline stage
    slots_per_request: int
    draft_tokens: int  # D: drafted and the one that follows; 0 without drafts

    def state_pool_bytes(self, slots: int, running: int) -> int:
        """State of `slots` and a padding slot, and of every draft position of `running` requests and a padding one."""
        return self.state_bytes * (slots + 1 + self.draft_tokens * (running + 1 if self.draft_tokens else 0))


@lru_cache(maxsize=1024)
def stage_layers(num_layers: int, pp: int) -> tuple[range, ...]:
    """Layers of each pipeline stage: what does not divide goes to the last stages (`distributed/utils.py`,
    `get_pp_indices`; vLLM's rule is another)."""
    least, rest = divmod(num_layers, pp)
    sizes = [least + (stage >= pp - rest) for stage in range(pp)]
    ends = accumulate(sizes)
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


@lru_cache(maxsize=4096)
def cells(
    model: Model,
    tp: int = 1,
    pp: int = 1,
    kv_dtype: str = "bf16",
    state_dtype: str = "float32",
    radix: bool = True,
    strategy: str = "extra_buffer",
    mtp: int = 0,
) -> Cells:
    """Bytes of a slot and of a token. The convolution stays in bf16. `mtp` draft steps add a layer to the cache."""
    if kv_dtype not in KV_BYTES:
        raise UnknownName(f"no cache type {kv_dtype!r} is known for SGLang: give one of {', '.join(KV_BYTES)}")
    if state_dtype not in STATE_BYTES:
        raise UnknownName(f"SGLang has no state type {state_dtype!r}: give one of {', '.join(STATE_BYTES)}")
    if strategy not in SLOTS_PER_REQUEST:
        raise UnknownName(f"SGLang has no strategy {strategy!r}: give one of {', '.join(SLOTS_PER_REQUEST)}")
    heads = (model.num_attention_heads, model.linear_num_key_heads, model.linear_num_value_heads)
    if tp < 1 or any(count % tp for count in heads) or mtp < 0 or not 1 <= pp <= len(model.layer_types):
        raise Unsupported(
            f"{model.name} does not split over {tp} x {pp} ranks: {heads} heads, {model.num_layers} layers"
        )
    columns = model.linear_conv_kernel_dim - 1
    layer_bytes = (2 * columns * model.conv_dim + STATE_BYTES[state_dtype] * model.state_elements) // tp
    token_bytes = max(1, model.num_key_value_heads // tp) * 2 * model.head_dim * KV_BYTES[kv_dtype]
    stages = stage_layers(len(model.layer_types), pp)
    attention = [model.layer_types[stage.start : stage.stop].count("full_attention") for stage in stages]
    states = max(len(stage) - count for stage, count in zip(stages, attention, strict=True))
    cell_bytes = token_bytes * max(attention)
    if mtp:
        cell_bytes += int(cell_bytes * max(1, model.mtp_num_hidden_layers) / max(attention))
    return Cells(layer_bytes * states, cell_bytes, SLOTS_PER_REQUEST[strategy] if radix else 1, mtp + 1 if mtp else 0)


def pool(
    sizes: Cells,
    pool_bytes: int,
    ctx_tokens: int,
    radix: bool = True,
    max_running_requests: int | None = None,
    max_mamba_cache_size: int | None = None,
    page_tokens: int = 1,
) -> SglangPool:
    """Both pools as SGLang sizes them. Raises BadInput (a ValueError) where they do not start."""
    if ctx_tokens < 1:
        raise BadInput(f"context of {ctx_tokens} tokens: give 1 or more")
    per_request, drafts, ratio = sizes.state_bytes, sizes.draft_tokens, sizes.slots_per_request
    if drafts and max_running_requests is None:
        max_running_requests = SPECULATIVE_RUNNING_REQUESTS
    rest_gib = pool_bytes / GIB
    if max_mamba_cache_size is not None:
        slots = max_mamba_cache_size
    elif not radix and max_running_requests is not None:
        slots = max(1, max_running_requests)
    else:
        budget = rest_gib * FULL_MEMORY_RATIO / (1 + FULL_MEMORY_RATIO) * GIB
        slots = int((budget - per_request * (1 + drafts)) // (per_request * (1 + drafts / ratio)))
    if drafts and max_running_requests is not None:
        running = (
            slots if not radix and max_mamba_cache_size is None else min(max(1, max_running_requests), slots // ratio)
        )
        rest_gib -= per_request * (running + 1) * drafts / GIB
    rest_gib -= (slots + 1) * per_request / GIB
    if slots <= 0 or rest_gib <= 0:
        raise BadInput(
            f"SGLang needs more than {max(0, pool_bytes):,} bytes for its pools: "
            f"a state slot takes {per_request:,} bytes and a request up to {ratio} of them"
        )
    tokens = int(rest_gib * GIB) // sizes.cell_bytes // page_tokens * page_tokens
    if max_running_requests is None:
        wanted = max(min(int(tokens / ctx_tokens * 512), 4096), 2048)
    else:
        wanted = max(1, max_running_requests)
    running = min(wanted, tokens // 2, slots // ratio)
    if running <= 0:
        raise BadInput(
            f"SGLang cannot run one request in {pool_bytes:,} bytes: {slots} state slots, {tokens:,} tokens, "
            f"and a request takes up to {ratio} slots"
        )
    return SglangPool(slots, ratio, tokens, running, sizes.cell_bytes, per_request)
