"""What a run sets aside before its first token: KV cache, recurrent state, and how much scratch a chunk may take.

The formulas are those of `planner/engines/native.py`, which may not be imported here; a test holds the two together.

    KV cache        per full-attention layer (and the prediction layer, with drafts): keys and values
                    [seqs, KV, ctx', D], ctx' = ctx rounded up to 64; int8 with a float32 scale per token and head
    state           per linear-attention layer: [slots, NV, DV, DK] float32 or bfloat16 and the last W - 1 columns of
                    convolution input [slots, C, W - 1]; slots = seqs (1 + drafts)
    scratch         a chunk of T tokens takes and frees at most `arena_bytes`. On a GPU that much is taken from the
                    driver at the start and left to torch's allocator; on a CPU the heap keeps it (`heap.py`), with
                    holes, and attention adds tiles of keys, values and scores in float32 (`cpu/attention.py`)

Slots. Sequence b owns slots b (1 + drafts) ... b (1 + drafts) + drafts, and `Buffers.current[b]` says which of them
holds its state. A step of S tokens reads that one and leaves the state after its token s in slot
(current + 1 + s) mod (1 + drafts) of the sequence, so a step with rejected drafts goes back by choosing a slot: nothing
is copied. The slot that was read is the last to be overwritten (s = drafts), after it was read.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layout.kv_cache import PAD_TOKENS, KVCache, allocate_kv_cache
from .configuration import Configuration

DELTA_CHUNK_TOKENS = 64
DECODE_SPLITS = 16
KV_DTYPES = ("bf16", "int8")
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 2048
CPU_QUERY_ROWS, CPU_KEY_TOKENS = 64, 2048  # as in cpu/attention.py
# Holes of a heap that is never given back: 4 layers of 0.8B, 4B and 9B at chunks of 128 and 512 tokens, measured.
CPU_HEAP_SHARE, CPU_HEAP_BYTES = 1.25, 18_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is asked for. kv_dtype bf16 stands for the dtype that the model computes in."""

    ctx_tokens: int
    seqs: int = 1
    kv_dtype: str = "bf16"
    state_dtype: str = "float32"
    prefill_chunk_tokens: int = CPU_CHUNK_TOKENS
    drafts: int = 0

    def __post_init__(self) -> None:
        for name in ("ctx_tokens", "seqs", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"the native runtime has no {self.kv_dtype} cache: give {' or '.join(KV_DTYPES)}")
        if self.state_dtype not in STATE_DTYPES:
            raise ValueError(f"the recurrent state is no {self.state_dtype}: give {' or '.join(STATE_DTYPES)}")
        if not 0 <= self.drafts <= 7:
            raise ValueError(f"{self.drafts} draft tokens: give 0 to 7, for a step takes at most 8 tokens")

    @property
    def padded_tokens(self) -> int:
        return -(-self.ctx_tokens // PAD_TOKENS) * PAD_TOKENS

    @property
    def slots_per_sequence(self) -> int:
        return 1 + self.drafts


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """Allocated once; addresses never change, so a compiled program or a CUDA graph may keep them.

    caches: one per full-attention layer in order, and the prediction layer's last where there are drafts.
    states: one per linear-attention layer, [slots, NV, DV, DK]; conv_states: [slots, C, W - 1].
    current: per sequence the number of its slot (0 ... drafts) that holds its state, on the host.
    programs: what a compiled decode step keeps for these addresses, by its own key (`operations.Operations.decode`).
    """

    settings: Settings
    caches: tuple[KVCache, ...]
    states: tuple[Tensor, ...]
    conv_states: tuple[Tensor, ...]
    current: list[int]
    programs: dict[object, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        cached = [t for c in self.caches for t in (c.keys, c.values, c.key_scales, c.value_scales) if t is not None]
        return (*cached, *self.states, *self.conv_states)

    @property
    def kv_bytes(self) -> int:
        return sum(cache.bytes for cache in self.caches)

    @property
    def state_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.states, *self.conv_states))

    def source_slot(self, sequence: int) -> int:
        """The slot to read the state of `sequence` from."""
        return sequence * self.settings.slots_per_sequence + self.current[sequence]

    def target_slots(self, sequence: int, tokens: int) -> list[int]:
        """The slots that the state goes to after each of the next `tokens` tokens."""
        slots = self.settings.slots_per_sequence
        return [sequence * slots + (self.current[sequence] + 1 + token) % slots for token in range(tokens)]

    def advance(self, sequence: int, tokens: int) -> None:
        """The first `tokens` tokens of a step were right: their last slot is the state from now on."""
        self.current[sequence] = (self.current[sequence] + tokens) % self.settings.slots_per_sequence

    def reset(self, sequence: int) -> None:
        """A new prompt: the sequence's state is zero. Its cache needs nothing, since lengths say what counts."""
        slot = self.source_slot(sequence)
        for state in (*self.states, *self.conv_states):
            state[slot].zero_()


def allocate(
    configuration: Configuration, settings: Settings, dtype: torch.dtype, device: torch.device | str
) -> Buffers:
    """All of a run's buffers, `dtype` being what the model computes in; state and cache start as zeros."""
    slots = settings.seqs * settings.slots_per_sequence
    attention_layers = configuration.full_attention_layers + (1 if settings.drafts else 0)
    state_shape = (
        slots,
        configuration.linear_num_value_heads,
        configuration.linear_value_head_dim,
        configuration.linear_key_head_dim,
    )
    conv_shape = (slots, configuration.conv_dim, configuration.linear_conv_kernel_dim - 1)
    state_dtype = STATE_DTYPES[settings.state_dtype]
    linear_layers = range(configuration.linear_attention_layers)
    buffers = Buffers(
        settings=settings,
        caches=tuple(
            allocate_kv_cache(
                settings.seqs,
                configuration.num_key_value_heads,
                settings.ctx_tokens,
                configuration.head_dim,
                torch.int8 if settings.kv_dtype == "int8" else dtype,
                device,
            )
            for _ in range(attention_layers)
        ),
        states=tuple(torch.zeros(state_shape, dtype=state_dtype, device=device) for _ in linear_layers),
        conv_states=tuple(torch.zeros(conv_shape, dtype=dtype, device=device) for _ in linear_layers),
        current=[0] * settings.seqs,
    )
    for tensor in buffers.tensors:
        tensor.zero_()  # a CPU's fresh zeros have no memory behind them yet: a run that will not fit fails here
    return buffers


def reserve_scratch(scratch_bytes: int, device: torch.device) -> None:
    """On a GPU: take the scratch from the driver now, as one block that torch's allocator then cuts up.

    So a run that will not fit fails here. On a CPU the heap keeps what it was given once (`heap.py`).
    """
    if device.type == "cuda":
        torch.empty(scratch_bytes, dtype=torch.uint8, device=device)


def kv_bytes(configuration: Configuration, settings: Settings) -> int:
    """Bytes of all caches where the model computes in 16 bits."""
    per_head = 2 * configuration.head_dim if settings.kv_dtype == "bf16" else configuration.head_dim + 4
    layers = configuration.full_attention_layers + (1 if settings.drafts else 0)
    return settings.seqs * settings.padded_tokens * layers * configuration.num_key_value_heads * 2 * per_head


def state_bytes(configuration: Configuration, settings: Settings) -> int:
    """Bytes of recurrent and convolution state where the model computes in 16 bits."""
    slot = STATE_DTYPES[settings.state_dtype].itemsize * configuration.state_elements
    slot += 2 * (configuration.linear_conv_kernel_dim - 1) * configuration.conv_dim
    return settings.seqs * settings.slots_per_sequence * configuration.linear_attention_layers * slot


def arena_bytes(configuration: Configuration, chunk_tokens: int) -> int:
    """Most bytes that a prefill chunk holds at once beside weights, cache and state, in 16 bits unless said otherwise.

    The residual stream and its norm, and the widest of: the delta rule in four kernels (convolution in and out, z,
    gates, A [T, NV, 64] f32, w, u and new values, one state per 64 tokens, outputs); attention (queries with their
    gates, keys, values, output); the MLP (gate, up, product; of experts the routed rows in, gate, up, product, out).
    """
    heads, values = configuration.linear_num_value_heads, configuration.value_dim
    states = 2 * configuration.state_elements // DELTA_CHUNK_TOKENS
    delta_rule = 2 * (2 * configuration.conv_dim + 5 * values) + heads * (8 + 4 * DELTA_CHUNK_TOKENS) + states
    width = configuration.num_attention_heads * configuration.head_dim
    attention = 2 * (3 * width + 2 * configuration.num_key_value_heads * configuration.head_dim)
    mlp = 6 * configuration.intermediate_size
    if configuration.is_moe:
        routed = 2 * configuration.hidden_size + 3 * configuration.moe_intermediate_size
        shared = 3 * configuration.shared_expert_intermediate_size
        mlp = 2 * (configuration.num_experts_per_tok * routed + shared) + 4 * configuration.num_experts
    return chunk_tokens * (4 * configuration.hidden_size + max(delta_rule, attention, mlp))


def scratch_bytes(configuration: Configuration, settings: Settings, on_cpu: bool) -> int:
    """What a run is expected to hold at most beside weights, cache and state: a chunk's arena, decode, and on a CPU
    what goes with the heap."""
    arena = arena_bytes(configuration, settings.prefill_chunk_tokens)
    if on_cpu:
        keys = 8 * configuration.num_key_value_heads * configuration.head_dim
        scores = 4 * CPU_QUERY_ROWS * configuration.num_attention_heads
        arena = int(CPU_HEAP_SHARE * arena) + CPU_KEY_TOKENS * (keys + scores) + CPU_HEAP_BYTES
    return arena + decode_bytes(configuration, settings)


def decode_bytes(configuration: Configuration, settings: Settings) -> int:
    """Partial sums of the splits of decode attention in float32, logits in 16 bits and in float32."""
    rows = settings.seqs * settings.slots_per_sequence
    partial = configuration.num_attention_heads * DECODE_SPLITS * (configuration.head_dim + 2) * 4
    return rows * (6 * configuration.vocab_size + partial)
