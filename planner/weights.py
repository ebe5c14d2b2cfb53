"""Weight bytes as they fall on one tensor-parallel rank: per layer, experts apart, and what lies outside the layers.

Matrices are cut as vLLM and SGLang cut them (vLLM `models/qwen3_5.py`, `layers/mamba/gdn/`, `layers/linear.py`):
projections into heads, experts' and MLP's inner width by their rows, projections out of them by their columns,
embedding and lm_head by the vocabulary. Each shard is priced by its own shape, so scales of a group that no longer
divides are paid by every rank.
"""

from functools import lru_cache

from ..profiles.errors import Unsupported
from ..profiles.formats import Piece, WeightFormat, pieces
from ..profiles.frozen import dataclass, replace
from ..profiles.model import Model
from ..profiles.storage import Storage, storage_bytes

VOCABULARY_PADDING = 64  # vLLM and SGLang `vocab_parallel_embedding.py`, DEFAULT_VOCAB_PADDING_SIZE

_BY_ROWS = frozenset(
    (
        *(
            f"linear_attn.{name}"
            for name in ("in_proj_qkv", "in_proj_z", "in_proj_qkvz", "in_proj_a", "in_proj_b", "in_proj_ba")
        ),
        *("linear_attn.conv1d", "linear_attn.A_log", "linear_attn.dt_bias"),
        "self_attn.q_proj",
        *(
            f"{block}.{name}"
            for block in ("mlp", "experts", "shared_expert")
            for name in ("gate_proj", "up_proj", "gate_up_proj")
        ),
        *("vision.attn.qkv", "vision.mlp.fc1", "vision.merger.fc1"),
    )
)
# vLLM replicates the fused in_proj_ba under GPTQ and AWQ: a shard would be narrower than a Marlin tile (pull request
# 36329)
_DECAY = frozenset(f"linear_attn.{name}" for name in ("in_proj_a", "in_proj_b", "in_proj_ba"))
_BY_KEY_VALUE_HEADS = frozenset(("self_attn.k_proj", "self_attn.v_proj"))
_BY_COLUMNS = frozenset(
    (
        *("linear_attn.out_proj", "self_attn.o_proj", "mlp.down_proj", "experts.down_proj", "shared_expert.down_proj"),
        *("vision.attn.proj", "vision.mlp.fc2", "vision.merger.fc2"),
    )
)
_BY_VOCABULARY = frozenset(("embedding", "lm_head"))
_BIASES_BY_ROWS = ("attn.qkv.bias", "blocks.{layer}.mlp.linear_fc1.bias", "merger.linear_fc1.bias")
_FIRST_DIMENSION = frozenset(("linear_attn.conv1d", "linear_attn.A_log", "linear_attn.dt_bias", "vision.bias"))


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Bytes on one of `tp` ranks. `layers` leaves out the routed experts, which are in `experts`."""

    layers: tuple[int, ...]  # per text layer
    experts: tuple[int, ...]  # per text layer, 0 where dense
    embedding: int
    lm_head: int  # 0 where tied
    norm: int  # final norm
    vision: int  # of a GGUF: the mmproj file; 0 where the format has no vision tower
    mtp: int  # without its experts; of a GGUF: the block as a file that keeps it has it
    mtp_experts: int

    @property
    def text(self) -> int:
        """Everything but vision and multi-token prediction."""
        return sum(self.layers) + sum(self.experts) + self.embedding + self.lm_head + self.norm


@lru_cache(maxsize=8192)
def weight_table(model: Model, fmt: WeightFormat, tp: int = 1, dp: int = 1, ep: int = 1) -> WeightTable:
    """Bytes per place. Key-value heads repeat once there are more ranks than heads; norms, routers,
    shared_expert_gate and mtp.fc lie on every rank; a vision tower whose heads `tp` does not divide lies there whole
    (vLLM `is_vit_use_data_parallel`).

    At `tp` 1 the parts that the format's files hold sum to `checkpoint_bytes`, less a GGUF's metadata and GPTQ's g_idx:
    an order of columns that nothing permutes is released after loading (vLLM `marlin_make_empty_g_idx`).
    Tensors read from headers ("checkpoint") are cut in proportion. `Unsupported` where `tp` does not divide the heads
    or widths.

    `dp` replicas share the routed experts: those are dealt out whole over `ep` ranks, the first of which get one more
    where they do not divide (vLLM 0.32 `fused_moe/expert_map_manager.py`, `determine_expert_map`), or at `ep` 1 each is
    cut over tp x dp ranks. The shared expert lies whole on every rank then (vLLM `use_sequence_parallel_moe`).
    """
    if tp != 1:
        _check(model, tp)
    if dp != 1 and ep == 1 and model.moe_intermediate_size % (tp * dp):
        raise Unsupported(
            f"the experts of {model.name} have {model.moe_intermediate_size} rows, which {tp} x {dp} ranks do not "
            f"divide: --ep {tp * dp} deals them out whole"
        )
    runs: dict[tuple[tuple[int, ...], bool], int] = {}  # bytes per layer, by the layers and whether routed experts
    outside = {"embedding": 0, "lm_head": 0, "norm": 0, "vision": 0, "mtp": 0, "mtp_experts": 0}
    for piece in pieces(model, fmt):
        routed = piece.role.startswith("experts.")
        if dp == ep == 1:
            size = _rank_bytes(piece, model, fmt, tp) * piece.per_layer
        elif not routed:
            whole = dp > 1 and piece.role.startswith("shared_expert.")
            size = _rank_bytes(piece, model, fmt, 1 if whole else tp) * piece.per_layer
        elif ep > 1:
            most = -(-model.num_experts // ep)  # that a rank gets
            size = -(-_rank_bytes(piece, model, fmt, 1) * piece.per_layer * most // model.num_experts)
        else:
            size = _rank_bytes(piece, model, fmt, tp * dp) * piece.per_layer
        part = piece.tensor.part
        if part == "vision":
            outside["vision"] += size * (len(piece.layers) or 1)
        elif part == "mtp":
            outside["mtp_experts" if routed else "mtp"] += size * (len(piece.layers) or 1)
        elif piece.layers:
            run = piece.layers, routed
            runs[run] = runs.get(run, 0) + size
        else:
            outside[piece.role if piece.role in _BY_VOCABULARY else "norm"] += size
    layers, experts = [0] * model.num_layers, [0] * model.num_layers
    for (places, routed), size in runs.items():
        column = experts if routed else layers
        for layer in places:
            column[layer] += size
    return WeightTable(tuple(layers), tuple(experts), **outside)


def _rank_bytes(piece: Piece, model: Model, fmt: WeightFormat, tp: int) -> int:
    storage = _resident(piece.storage)
    if tp == 1 and piece.role not in _BY_VOCABULARY:
        return storage_bytes(piece.shape, storage)
    if fmt.family == "checkpoint":
        share, ranks = _share(piece, model, fmt, tp)
        return -(-storage_bytes(piece.shape, storage) * share // ranks)
    return storage_bytes(_shard(piece, model, fmt, tp), storage)


def _resident(storage: Storage) -> Storage:
    return replace(storage, column_bytes=0) if storage.column_bytes else storage


def _share(piece: Piece, model: Model, fmt: WeightFormat, tp: int) -> tuple[int, int]:
    """The fraction of a tensor that one rank holds, as numerator and denominator."""
    role = piece.role
    if piece.part == "vision":
        if model.vision is None or model.vision.num_heads % tp:
            return 1, 1
        if role == "vision.bias":
            return (1, tp) if piece.tensor.name.endswith(_BIASES_BY_ROWS) else (1, 1)
    if role in _BY_KEY_VALUE_HEADS:
        heads = model.num_key_value_heads
        return max(1, heads // tp), heads
    if role in _DECAY and fmt.dialect in ("gptq", "awq"):
        return 1, 1
    if role in _BY_ROWS or role in _BY_COLUMNS or role in _BY_VOCABULARY:
        return 1, tp
    if role == "self_attn.qkv_proj":
        queries, heads = 2 * model.num_attention_heads, model.num_key_value_heads
        return queries // tp + 2 * max(1, heads // tp), queries + 2 * heads
    return 1, 1


def _shard(piece: Piece, model: Model, fmt: WeightFormat, tp: int) -> tuple[int, ...]:
    shape, role = piece.shape, piece.role
    if role in _BY_VOCABULARY and piece.part == "text" and fmt.family == "safetensors":
        shape = (-(-shape[0] // VOCABULARY_PADDING) * VOCABULARY_PADDING, *shape[1:])
    share, ranks = _share(piece, model, fmt, tp)
    if ranks == 1:
        return shape
    if role in _BY_COLUMNS:
        return (*shape[:-1], -(-shape[-1] * share // ranks))
    place = 0 if role in _FIRST_DIMENSION or len(shape) < 2 else len(shape) - 2
    return (*shape[:place], -(-shape[place] * share // ranks), *shape[place + 1 :])


def _obstacle(model: Model, tp: int) -> str | None:
    """What `tp` does not divide."""
    counts = {
        "query heads": model.num_attention_heads,
        "linear-attention key heads": model.linear_num_key_heads,
        "linear-attention value heads": model.linear_num_value_heads,
        "rows of the MLP": model.intermediate_size,
        "rows of an expert": model.moe_intermediate_size,
        "rows of the shared expert": model.shared_expert_intermediate_size,
        "padded tokens of the vocabulary": -(-model.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING,
    }
    for what, count in counts.items():
        if count % tp:
            return f"{count} {what}"
    heads = model.num_key_value_heads
    return f"{heads} key-value heads" if heads % tp and tp % heads else None


def _check(model: Model, tp: int) -> None:
    if tp < 1:
        raise Unsupported(f"tensor-parallel size {tp} is no number of ranks; 1 keeps the model whole")
    obstacle = _obstacle(model, tp)
    if obstacle is None:
        return
    fitting = [str(ranks) for ranks in range(1, 65) if _obstacle(model, ranks) is None]
    raise Unsupported(
        f"{model.name} cannot be split over {tp} tensor-parallel ranks: they do not divide {obstacle}; "
        f"{', '.join(fitting[:-1])}{' or ' if len(fitting) > 1 else ''}{fitting[-1]} would do"
    )
