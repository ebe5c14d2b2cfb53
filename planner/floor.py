"""What a setup takes at the very least, so that what cannot win is not priced: weights, cache and states to the byte.

No engine takes less: all of them round up from here, keep copies, and need room to compute in. The tightest device
lacks no less than what is missing on the average, and some stage has its full share of the layers, rounded up.
"""

from functools import lru_cache

from ..profiles.device import Device
from ..profiles.formats import WeightFormat
from ..profiles.frozen import dataclass
from ..profiles.model import Model
from .engines.engine import Engine, Setup
from .engines.support import kinds
from .weights import weight_table
from .work import CONV_BYTES, KV_BITS, STATE_BYTES

COPYING = ("nvidia", "amd")  # `llamacpp_devices.py`, BACKENDS
LARGEST_EXACT_HEAD = 256  # elements; KV_BITS counts scales per head as of heads of that size


@dataclass(frozen=True, slots=True, eq=False)
class Floor:
    """Bytes of one setup. Per rank: a layer of each kind, and how many of them some stage has at least."""

    ranks: int
    dp: int
    tp: int
    bare_bytes: int  # weights without the experts that may move, less the room on all devices
    token_bytes: int  # per layer of attention and token of context
    seq_bytes: int  # per other layer and sequence: states
    copy_bytes: int  # per token of context on every rank: scratch of flash attention
    attention_layers: int  # over all stages, as the engine counts them
    other_layers: int
    stage: "FullStage | None"  # None: one stage
    expert_bytes: int = 0  # that may move, as far as they go
    host_bytes: int | None = None  # room for them; None: not bounded
    shared_bytes: int | None = None  # room for them that host and devices share, beyond the devices' own

    def missing_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """Where this is above 0, `shortfall_bytes` of the setup's estimate is not below it."""
        replica_seqs = -(-seqs // self.dp)
        attention, state = replica_seqs * ctx_tokens * self.token_bytes, replica_seqs * self.seq_bytes
        cached = attention * self.attention_layers + state * self.other_layers
        bare = self.bare_bytes + cached * self.tp * self.dp
        missing = bare // self.ranks
        if self.stage:
            missing = max(missing, self.stage.missing_bytes(attention, state))
        missing += replica_seqs * ctx_tokens * self.copy_bytes
        # in host memory lies what has no room on the devices, however many layers' experts move
        if self.host_bytes is not None and bare + self.expert_bytes > self.host_bytes:
            missing = max(missing, self.expert_bytes - self.host_bytes)
        if self.shared_bytes is not None:
            missing = max(missing, bare + self.expert_bytes - self.shared_bytes)
        return missing


@dataclass(frozen=True, slots=True, eq=False)
class FullStage:
    """Layers that some stage has at least: of attention, of the other kind, and of both together."""

    attention_layers: int
    other_layers: int
    layers: int
    attention_bytes: int  # weights of one layer on one rank, the lightest
    other_bytes: int
    room_bytes: int  # of the largest device

    def missing_bytes(self, attention: int, state: int) -> int:
        """`attention`, `state`: what one sequence's layer of each kind keeps, times the sequences."""
        attention += self.attention_bytes
        state += self.other_bytes
        both = self.layers * (attention if attention < state else state)
        return max(self.attention_layers * attention, self.other_layers * state, both) - self.room_bytes


def floor(engine: Engine, setup: Setup) -> Floor | None:
    """None where the engine rearranges weights so that they may take less than they do in the files."""
    if not engine.loads_as_stored:
        return None
    model, options, devices, tp = setup.model, setup.options, setup.devices, setup.tp
    room, largest = _room(devices)
    weights = _weights(model, setup.weights)
    moves = engine.offloads and model.is_moe and options.offload_experts is not False and devices[0].vendor != "cpu"
    expert_bytes, host_bytes, shared_bytes = 0, None, None
    if moves and engine.parallelism == "layers":  # other engines rearrange what they keep in host memory
        expert_bytes = weights.experts
        if devices[0].kind == "unified":
            shared_bytes = sum(device.memory_bytes for device in devices) - room
        else:
            host_bytes = options.host_memory_bytes
    stage = None
    if setup.pp > 1:
        attention, other = model.full_attention_layers, model.linear_attention_layers
        lightest = weights.lightest_bare if moves or setup.dp > 1 or setup.ep > 1 else weights.lightest
        stage = FullStage(
            attention_layers=-(-attention // setup.pp),
            other_layers=-(-other // setup.pp),
            layers=-(-(attention + other) // setup.pp),
            attention_bytes=lightest[0] // tp,
            other_bytes=lightest[1] // tp,
            room_bytes=largest,
        )
    attention_layers, other_layers = _cached_layers(engine.pool, model, setup.pp, setup.mtp > 0)
    copies = (
        engine.copies_cache and setup.kv_dtype != "f16" and all(device.vendor in COPYING for device in kinds(devices))
    )
    return Floor(
        ranks=len(devices),
        dp=setup.dp,
        tp=tp,
        bare_bytes=setup.dp * weights.dense + (0 if moves else weights.experts) - room,
        token_bytes=_token_bytes(model, setup.kv_dtype, tp),
        seq_bytes=_states(engine, setup) * _state_bytes(model, setup.state_dtype, tp),
        copy_bytes=_token_bytes(model, "f16", tp) if copies else 0,
        attention_layers=attention_layers,
        other_layers=other_layers,
        stage=stage,
        expert_bytes=expert_bytes,
        host_bytes=host_bytes,
        shared_bytes=shared_bytes,
    )


@lru_cache(maxsize=4096)
def _room(devices: tuple[Device, ...]) -> tuple[int, int]:
    """On all devices, and on the largest."""
    return sum(device.usable_bytes for device in devices), max(device.usable_bytes for device in devices)


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    dense: int  # layers, norm and lm_head, which are read from the devices
    experts: int  # the routed ones
    lightest: tuple[int, int]  # layer of attention, and of the other kind
    lightest_bare: tuple[int, int]  # the same without routed experts


@lru_cache(maxsize=4096)
def _weights(model: Model, fmt: WeightFormat) -> _Weights:
    table = weight_table(model, fmt)
    kinds = [kind == "full_attention" for kind in model.layer_types]
    both = [layer + expert for layer, expert in zip(table.layers, table.experts, strict=True)]
    lightest, bare = (
        (
            min([size for size, attends in zip(sizes, kinds, strict=True) if attends], default=0),
            min([size for size, attends in zip(sizes, kinds, strict=True) if not attends], default=0),
        )
        for sizes in (both, table.layers)
    )
    dense = sum(table.layers) + table.norm + (table.lm_head or table.embedding)
    return _Weights(dense, sum(table.experts), lightest, bare)


@lru_cache(maxsize=4096)
def _cached_layers(pool: str, model: Model, pp: int, drafts: bool) -> tuple[int, int]:
    """Layers of attention, the draft's among them, and others that cache memory is taken for, over all stages."""
    attention, other = model.full_attention_layers + drafts, model.linear_attention_layers
    if pool == "fullest":
        return pp * (-(-model.full_attention_layers // pp) + drafts), pp * -(-other // pp)
    if pool == "layers" or not attention or not other:
        return attention, other
    # vllm_pool.py, `layout`: a block holds as many pages as the stage has layers of the group that has most there
    fewer, more = sorted((attention, other))
    size = more if more < 1.5 * fewer else fewer
    groups, other_groups = -(-attention // size), -(-other // size)
    least, rest = divmod(model.num_layers, pp)
    pages = sum(-(-layers // (groups + other_groups)) for layers in [least] * (pp - rest) + [least + 1] * rest)
    pages = max(pages, -(-attention // groups), -(-other // other_groups))
    return groups * pages, other_groups * pages


def _states(engine: Engine, setup: Setup) -> int:
    """Of a sequence: its own, one to go back to from each draft token, and those kept for prefixes."""
    return 1 + setup.mtp + (engine.kept_states if setup.options.prefix_caching else 0)


@lru_cache(maxsize=4096)
def _token_bytes(model: Model, kv_dtype: str, tp: int) -> int:
    """One token in one layer on one rank; ranks beyond the key-value heads hold copies of them."""
    bits = [KV_BITS.get(side, 0.0) for side in kv_dtype.split("/")]
    if model.head_dim > LARGEST_EXACT_HEAD or model.head_dim % 32:
        bits = [float(int(one)) for one in bits]
    elements = 2 * max(1, model.num_key_value_heads // tp) * model.head_dim
    return int(elements * sum(bits) / len(bits) / 8)


@lru_cache(maxsize=4096)
def _state_bytes(model: Model, state_dtype: str, tp: int) -> int:
    """One state of one layer on one rank."""
    conv = CONV_BYTES * (model.linear_conv_kernel_dim - 1) * model.conv_dim
    return (conv + STATE_BYTES[state_dtype] * model.state_elements) // tp
