"""vLLM's cache arithmetic: one pool of equal blocks that attention pages and recurrent states share.

A block holds one page of every layer of a group. Attention pages are made long enough (in tokens) to be as large as the
state of a Gated DeltaNet layer, which is padded to them; layers of one kind are split into groups of the same size; a
request then takes `ceil(ctx / block)` blocks per attention group and a fixed number per state group. Read in vLLM:
`platforms/interface.py` (`_align_hybrid_block_size`), `v1/core/kv_cache_utils.py`
(`_get_kv_cache_groups_uniform_page_size`, `_get_kv_cache_bytes_per_block`, `get_kv_cache_configs`),
`v1/kv_cache_interface.py` (`MambaSpec`), `layers/mamba/mamba_utils.py` (`gated_delta_net_state_shape`).

All bytes are those of one tensor-parallel rank. This file knows no devices and no weights.
"""

from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate
from operator import sub

from ...profiles.errors import BadInput, UnknownName, Unsupported
from ...profiles.frozen import dataclass
from ...profiles.model import Model
from .versions import since

DEFAULT_VERSION = "0.32"
KERNEL_BLOCK_TOKENS = (
    16  # FlashAttention 2 and 3, FlashInfer, Triton, ROCm; 128 on the CPU backend and FlashAttention 4
)

# Bytes of one token in one layer for one key-value head of D elements: keys and values, and scales where there are any.
# Per-token-head types keep one fp32 scale for K and one for V; int4 packs two to a byte; nvfp4 keeps an fp8 scale for
# every 16 elements (`customize_spec` of the Triton and FlashInfer backends).
KV_HEAD_BYTES = {
    "bf16": lambda dim: 4 * dim,
    "fp8": lambda dim: 2 * dim,
    "int8_per_token_head": lambda dim: 2 * dim + 8,
    "fp8_per_token_head": lambda dim: 2 * dim + 8,
    "int4_per_token_head": lambda dim: dim + 8,
    "nvfp4": lambda dim: 2 * (dim // 2 + dim // 16),
}
ALIASES = {"auto": "bf16", "bfloat16": "bf16", "float16": "bf16", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}
STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class VllmPool:
    """What vLLM says at boot about its cache (per rank), and what one request at full length needs."""

    block_tokens: int
    bytes_per_block: int
    blocks_per_request: int
    num_blocks: int
    kv_cache_tokens: int  # "GPU KV cache size"
    max_concurrency: float  # "Maximum concurrency for ... tokens per request"
    bytes_needed: int  # blocks of one request at full length
    min_pool_bytes: int  # the least that starts: with the null block from 0.30 on


@dataclass(frozen=True, slots=True)
class Layout:
    """How the pool is cut for one model and setting; budget and context come later."""

    block_tokens: int
    page_bytes: int
    attention_groups: int
    state_groups: int
    states_per_group: int  # blocks that one request holds in each state group
    stage_bytes_per_block: tuple[int, ...]  # per pipeline stage
    null_blocks: int  # that the check at boot sets aside

    @property
    def bytes_per_block(self) -> int:
        return max(self.stage_bytes_per_block)

    @property
    def state_blocks(self) -> int:
        """Blocks of one request that hold recurrent state, whatever its length."""
        return self.state_groups * self.states_per_group

    def blocks_per_request(self, ctx_tokens: int) -> int:
        return self.attention_groups * -(-ctx_tokens // self.block_tokens) + self.state_blocks


def prefix_caching_default(version: str) -> bool:
    """Whether vLLM caches prefixes of these models unless told otherwise."""
    return since(version, "0.26")


def head_bytes(kv_dtype: str, head_dim: int) -> int:
    """Bytes of one token, layer and key-value head. Raises UnknownName for a type that is not vLLM's."""
    size = KV_HEAD_BYTES.get(ALIASES.get(kv_dtype, kv_dtype))
    if size is None:
        raise UnknownName(f"vLLM has no cache type {kv_dtype!r}: give one of {', '.join(KV_HEAD_BYTES)}")
    return size(head_dim)


def check_tensor_parallel(model: Model, tp: int) -> None:
    """Raises Unsupported where vLLM could not split the heads over `tp` ranks."""
    for what, heads in (
        ("attention heads", model.num_attention_heads),
        ("linear key heads", model.linear_num_key_heads),
        ("linear value heads", model.linear_num_value_heads),
    ):
        if tp < 1 or heads % tp:
            raise Unsupported(
                f"{model.name} has {heads} {what}, which vLLM cannot split over {tp} tensor-parallel ranks"
            )
    kv_heads = model.num_key_value_heads
    if kv_heads % tp and tp % kv_heads:
        raise Unsupported(
            f"{model.name} has {kv_heads} key-value heads, which neither split over {tp} ranks nor repeat"
        )


@lru_cache(maxsize=1024)
def stage_layers(num_layers: int, pp: int) -> tuple[range, ...]:
    """Layers of each pipeline stage: what does not divide goes to the stages before the last (`get_pp_indices`)."""
    sizes = [num_layers // pp] * pp
    for extra in range(num_layers % pp):
        sizes[-2 - extra] += 1
    return tuple(range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True))


@lru_cache(maxsize=4096)
def layout(
    model: Model,
    version: str = DEFAULT_VERSION,
    tp: int = 1,
    pp: int = 1,
    kv_dtype: str = "bf16",
    state_dtype: str = "float32",
    prefix_caching: bool = True,
    mtp: int = 0,
    kernel_block_tokens: int = KERNEL_BLOCK_TOKENS,
) -> Layout:
    """The cut of the pool. `mtp` draft tokens add one attention layer, and to each request as many states and columns
    of the convolution. With prefix caching ("align") a request holds one state more, the last that can be shared."""
    check_tensor_parallel(model, tp)
    if state_dtype not in STATE_BYTES:
        raise UnknownName(f"vLLM has no state type {state_dtype!r}: give one of {', '.join(STATE_BYTES)}")
    if mtp < 0 or not 1 <= pp <= len(model.layer_types):
        raise BadInput(
            f"{mtp} draft tokens over {pp} pipeline stages: give 0 or more, and 1 to {len(model.layer_types)}"
        )
    if not model.full_attention_layers or not model.linear_attention_layers:
        raise Unsupported(f"{model.name} is no hybrid: vLLM's pool for it is another than the one described here")
    token_bytes = max(1, model.num_key_value_heads // tp) * head_bytes(kv_dtype, model.head_dim)
    columns = model.linear_conv_kernel_dim - 1 + mtp
    state_bytes = (2 * columns * model.conv_dim + STATE_BYTES[state_dtype] * model.state_elements) // tp
    block_tokens = kernel_block_tokens * -(-state_bytes // (kernel_block_tokens * token_bytes))

    attention = [layer for layer, kind in enumerate(model.layer_types) if kind == "full_attention"]
    states = [layer for layer, kind in enumerate(model.layer_types) if kind != "full_attention"]
    if mtp:
        attention.append(len(model.layer_types))  # the draft layer, on the last stage
    fewer, more = sorted((len(attention), len(states)))
    group_size = more if more < 1.5 * fewer else fewer
    groups = _groups(attention, group_size) + _groups(states, group_size)
    stages = stage_layers(len(model.layer_types), pp)
    ends = [0, *(stage.stop for stage in stages[:-1]), len(model.layer_types) + 1]  # the draft layer is behind the last
    before = [[bisect_left(group, end) for end in ends] for group in groups]  # layers of each group
    fullest = [max(counts) for counts in zip(*(map(sub, upto[1:], upto) for upto in before), strict=True)]
    stage_bytes_per_block = tuple([block_tokens * token_bytes * count for count in fullest])
    return Layout(
        block_tokens=block_tokens,
        page_bytes=block_tokens * token_bytes,
        attention_groups=-(-len(attention) // group_size),
        state_groups=-(-len(states) // group_size),
        states_per_group=mtp + (2 if prefix_caching else 1),
        stage_bytes_per_block=stage_bytes_per_block,
        null_blocks=1 if since(version, "0.30") else 0,
    )


def _groups(layers: list[int], size: int) -> list[list[int]]:
    """Groups of one kind of layer, dealt out in turn so that pipeline stages get a share of each."""
    count = -(-len(layers) // size)
    return [layers[start::count] for start in range(count)]


def pool(layout: Layout, version: str, pool_bytes: int, ctx_tokens: int) -> VllmPool:
    """What vLLM prints for a cache of `pool_bytes` per rank and a longest request of `ctx_tokens`.

    Raises BadInput (a ValueError) where one such request does not fit, as vLLM then does not start.
    """
    if ctx_tokens < 1:
        raise BadInput(f"context of {ctx_tokens} tokens: give 1 or more")
    block_bytes = layout.bytes_per_block
    blocks_per_request = layout.blocks_per_request(ctx_tokens)
    bytes_needed = blocks_per_request * block_bytes
    min_pool_bytes = bytes_needed + layout.null_blocks * block_bytes
    if pool_bytes < min_pool_bytes:
        raise BadInput(
            f"vLLM {version} needs {min_pool_bytes:,} bytes of cache for one request of {ctx_tokens:,} tokens and has "
            f"{max(0, pool_bytes):,}; the longest that fits is {longest_ctx_tokens(layout, pool_bytes):,} tokens"
        )
    num_blocks = pool_bytes // block_bytes
    max_concurrency = num_blocks / blocks_per_request
    if since(version, "0.20"):
        kv_cache_tokens = int(max_concurrency * ctx_tokens)
    else:
        kv_cache_tokens = num_blocks // (layout.attention_groups + layout.state_groups) * layout.block_tokens
    return VllmPool(
        block_tokens=layout.block_tokens,
        bytes_per_block=block_bytes,
        blocks_per_request=blocks_per_request,
        num_blocks=num_blocks,
        kv_cache_tokens=kv_cache_tokens,
        max_concurrency=max_concurrency,
        bytes_needed=bytes_needed,
        min_pool_bytes=min_pool_bytes,
    )


def longest_ctx_tokens(layout: Layout, pool_bytes: int) -> int:
    """The longest single request that a pool takes, 0 where none fits."""
    blocks = pool_bytes // layout.bytes_per_block - layout.null_blocks - layout.state_blocks
    return max(0, blocks // layout.attention_groups * layout.block_tokens)
