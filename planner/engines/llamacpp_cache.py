"""llama.cpp's context memory: key-value cells, recurrent state, output rows. Every figure is the engine's own.

- `llama-kv-cache.cpp`: a cell of one attention layer holds a row of K and a row of V, KV x D elements each, in blocks
  of the cache type. `-c` is padded to 256 cells; with `--kv-unified` all sequences share them, otherwise each gets its
  n-th part, padded to 256 again (`llama-context.cpp`).
- `llama-memory-recurrent.cpp`: one state per sequence, always F32, whatever the context: the convolution's last K-1
  columns and the state matrix of every Gated DeltaNet layer; 1 + n of them where n draft tokens may be rolled back.
- multi-token prediction runs in a context of its own: one attention layer's cells, no state
  (`common/speculative.cpp`, `common_speculative_init_result`); its cache type is f16 unless `-ctkd`, `-ctvd` say
  otherwise.
- `llama_context::output_reserve`: one row of logits per sequence at boot, in host memory.
"""

from ...profiles.errors import BadInput, UnknownName, Unsupported
from ...profiles.frozen import dataclass
from ...profiles.ggml import GGML_TYPES
from ...profiles.model import Model
from .llamacpp_compute import DRAFT, WHOLE, Batch, batch_tokens, compute_bytes

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # common/arg.cpp kv_cache_types
FLOAT_TYPES = frozenset(("f32", "f16", "bf16"))
CELL_PADDING = 256
DEFAULT_BATCH_TOKENS = 2048  # -b
DEFAULT_UBATCH_TOKENS = 512  # -ub
STATE_BYTES = 4


@dataclass(frozen=True, slots=True)
class LlamaCppPool:
    """What the engine prints at boot for one context, and for the one of multi-token prediction beside it."""

    kv_cache_bytes: int
    recurrent_state_bytes: int
    compute_buffer_bytes: (
        int  # as one backend holds it: a CPU build, or host and device together with little difference
    )
    output_buffer_bytes: int
    cells: int  # per stream
    streams: int
    mtp_kv_cache_bytes: int = 0
    mtp_compute_buffer_bytes: int = 0
    mtp_output_buffer_bytes: int = 0


def kv_pool(
    model: Model,
    *,
    version: str | None = None,
    kv_dtype: str = "f16",
    mtp: int = 0,
    ctx_tokens: int,
    seqs: int = 1,
    ubatch: int = DEFAULT_UBATCH_TOKENS,
    flash_attn: bool = True,
    kv_unified: bool = False,
    batch: int = DEFAULT_BATCH_TOKENS,
    outputs: int | None = None,
) -> LlamaCppPool:
    """The cache arithmetic alone, without devices.

    `ctx_tokens` is `-c`: what all `seqs` sequences share. `kv_dtype` is one type or "K/V" (`q8_0/q5_0`). `outputs` are
    rows of logits per ubatch: None as llama-server asks for them (seqs x (1 + mtp)), 0 as many as the batch, which is
    the library's default. `version` is there for the day on which the rules change; b11434's are known.

    Raises BadInput (a ValueError) for numbers below 1, Unsupported for a quantized V without flash attention.
    """
    least = {"ctx_tokens": ctx_tokens, "seqs": seqs, "ubatch": ubatch, "batch": batch}
    for name, value in least.items():
        if value < 1:
            raise BadInput(f"{name} of {value}: give 1 or more")
    if mtp < 0 or (outputs is not None and outputs < 0):
        raise BadInput(f"mtp of {mtp} and outputs of {outputs}: give 0 or more")
    k_type, v_type = cache_types(kv_dtype)
    if not flash_attn and v_type not in FLOAT_TYPES:
        raise Unsupported(f"a {v_type} V cache needs flash attention: leave flash_attn on, or keep V in f16")
    streams, cells = cache_cells(ctx_tokens, seqs, kv_unified)
    total = cells * streams
    tokens = min(total, ctx_tokens, batch, ubatch)
    rows = seqs * (1 + mtp) if outputs is None else outputs or min(ctx_tokens, batch)
    shape = Batch(
        tokens=batch_tokens(total, tokens, seqs),
        seqs=seqs,
        streams=streams,
        outputs=min(tokens, rows),
        cells=cells,
        flash_attn=flash_attn,
        rotate_k=k_type not in FLOAT_TYPES,
        rotate_v=v_type not in FLOAT_TYPES,
        drafts=mtp,
    )
    output_bytes = 4 * model.vocab_size * seqs
    draft_kv = draft_compute = 0
    if mtp:
        draft_kv = total * cell_bytes(model, k_type, v_type)
        draft = Batch(shape.tokens, seqs, streams, min(tokens, seqs), cells, flash_attn, shape.rotate_k, shape.rotate_v)
        draft_compute = compute_bytes(model, draft, DRAFT)
    return LlamaCppPool(
        kv_cache_bytes=total * model.full_attention_layers * cell_bytes(model, k_type, v_type),
        recurrent_state_bytes=recurrent_bytes(model, seqs, mtp),
        compute_buffer_bytes=compute_bytes(model, shape, WHOLE),
        output_buffer_bytes=output_bytes,
        cells=cells,
        streams=streams,
        mtp_kv_cache_bytes=draft_kv,
        mtp_compute_buffer_bytes=draft_compute,
        mtp_output_buffer_bytes=output_bytes if mtp else 0,
    )


def cache_types(kv_dtype: str) -> tuple[str, str]:
    """K and V types of "q8_0" or "q8_0/q5_0". UnknownName for a type that llama.cpp has no cache of."""
    k_type, _, v_type = kv_dtype.partition("/")
    for name in (k_type, v_type or k_type):
        if name not in CACHE_TYPES:
            raise UnknownName(f"llama.cpp has no {name!r:.40} cache: give {', '.join(CACHE_TYPES)}, or two as K/V")
    return k_type, v_type or k_type


def cache_cells(ctx_tokens: int, seqs: int, unified: bool) -> tuple[int, int]:
    """(streams, cells of each)."""
    cells = padded(ctx_tokens)
    return (1, cells) if unified else (seqs, padded(cells // seqs))


def padded(tokens: int) -> int:
    return max(1, -(-tokens // CELL_PADDING)) * CELL_PADDING


def cell_bytes(model: Model, k_type: str, v_type: str) -> int:
    """One cell of one attention layer."""
    elements = model.num_key_value_heads * model.head_dim
    return _row_bytes(elements, k_type) + _row_bytes(elements, v_type)


def recurrent_bytes(model: Model, seqs: int, mtp: int = 0) -> int:
    """The states of all Gated DeltaNet layers, with those that a rollback of `mtp` draft tokens needs."""
    return model.linear_attention_layers * layer_state_bytes(model) * seqs * (1 + mtp)


def layer_state_bytes(model: Model) -> int:
    """One state of one Gated DeltaNet layer."""
    return STATE_BYTES * ((model.linear_conv_kernel_dim - 1) * model.conv_dim + model.state_elements)


def _row_bytes(elements: int, cache_type: str) -> int:
    block_elements, block_bytes = GGML_TYPES[cache_type.upper()]
    return elements // block_elements * block_bytes
