"""llama.cpp: llama-server with every layer on the devices, as build b11434 allocates.

Exact by its own arithmetic: weights of plain and K-quant types, the cache, the recurrent state, and the compute buffer as
ggml's allocator arrives at it (`llamacpp_compute.py`; an interval all the same, for backends differ in what an operation
asks for). Estimated: what the driver and its pools take, the vision tower's scratch.

`ctx_tokens` is promised to every sequence: the launch line asks for `-c ctx x seqs` in `seqs` slots of their own. In host
memory lie token_embd, the inputs (the mask among them), the logits, and later up to 32 checkpoints of the state per slot
and a prompt cache of up to 8 GiB. Experts move there layer by layer where a mixture of experts does not fit otherwise.
"""

from dataclasses import dataclass, field
from functools import lru_cache

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import WeightFormat
from ...profiles.model import Model
from ..memory import Amount, Memory, estimated, exactly
from ..weights import weight_table
from .engine import Allocation, DeviceShare, Engine, Setup
from .llamacpp_cache import (
    DEFAULT_BATCH_TOKENS,
    DEFAULT_UBATCH_TOKENS,
    FLOAT_TYPES,
    cache_types,
    layer_state_bytes,
    padded,
)
from .llamacpp_compute import Batch, Reserve, batch_tokens, host_bytes, reserve
from .llamacpp_devices import Share, largest_expert_tensor_bytes, pipelined, shares
from .llamacpp_launch import gguf_name, server_line

ENGINE = Engine(
    name="llama.cpp",
    default_version="b11434",
    versions=("b11434",),
    source="llama.cpp b11434: llama-context.cpp, llama-kv-cache.cpp, llama-memory-recurrent.cpp, ggml-alloc.c, "
    "ggml-backend.cpp, common/arg.cpp, tools/server",
    parallelism="layers",
)

GIB = 1 << 30
MIB = 1 << 20
FIT_MARGIN_BYTES = GIB  # --fit-target: what llama.cpp's own fitting would leave free
CHECKPOINTS_PER_SLOT = 32  # --ctx-checkpoints
CHECKPOINT_STEP_TOKENS = 8192  # --checkpoint-min-step
PROMPT_CACHE_MIB = 8192  # --cache-ram
COMPUTE_LOW, COMPUTE_HIGH = 0.97, 1.06  # backends ask for more than a tensor's bytes here and there
HOST_PROCESS = estimated(250 * MIB, 500 * MIB, 1200 * MIB)  # server, driver library, tokenizer


def runs_on(device: Device, version: str) -> str | None:
    """Why llama.cpp cannot run on a device, None where it can: CUDA's kernels start at compute capability 5.0."""
    if device.vendor == "nvidia" and device.compute_capability:
        if float(device.compute_capability) < 5.0:
            return f"llama.cpp's CUDA kernels need compute capability 5.0; {device.title} has {device.compute_capability}"
    return None


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """llama.cpp reads GGUF files and nothing else."""
    if fmt.family == "gguf":
        return None
    if fmt.family == "checkpoint" and (model.path or "").endswith(".gguf"):
        return None
    return f"llama.cpp loads GGUF files only, not {fmt.name}: give a GGUF type such as q4_k_m"


def weight_formats(model: Model, device: Device) -> tuple[str, ...]:
    """File types that uploaders make of nearly every model, best first."""
    return ("gguf-bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_xxs", "q2_k")


def kv_dtypes(device: Device, version: str) -> tuple[str, ...]:
    """Cache types worth trying; every other of llama.cpp's, and pairs such as q8_0/q5_0, are taken by name."""
    return ("f16", "q8_0", "q4_0")


def estimate(setup: Setup) -> "LlamaCppEstimate":
    """Raises Unsupported for settings that the engine does not have."""
    types = _refuse(setup)
    model, mtp = setup.model, bool(setup.mtp)
    found = shares(
        model, setup.weights, setup.devices, *types, mtp, setup.vision, setup.options.image_tokens
    )
    on_cpu = found[0].whole
    table = weight_table(model, setup.weights, 1)
    may_offload = model.is_moe and not on_cpu and setup.options.offload_experts is not False
    return LlamaCppEstimate(
        setup=setup,
        types=types,
        shares=found,
        ubatch=setup.options.ubatch_tokens or DEFAULT_UBATCH_TOKENS,
        embedding_bytes=0 if on_cpu else table.embedding,
        fixed_bytes=tuple(share.weights_bytes + share.backend.runtime.mid + share.vision.mid for share in found),
        seq_bytes=tuple(share.state_bytes * (1 + setup.mtp) for share in found),
        may_offload=may_offload,
        expert_copy_bytes=largest_expert_tensor_bytes(model, setup.weights) if may_offload else 0,
    )


@dataclass(frozen=True, slots=True, eq=False)
class LlamaCppEstimate:
    """Every share of the devices, with what depends on context and sequences worked out when asked for."""

    setup: Setup
    types: tuple[str, str]  # of K and V
    shares: tuple[Share, ...]
    ubatch: int
    embedding_bytes: int  # token_embd in host memory
    fixed_bytes: tuple[int, ...]
    seq_bytes: tuple[int, ...]
    may_offload: bool
    expert_copy_bytes: int  # on a device, once any experts lie in host memory
    _reserves: dict[tuple[int, int], tuple[Reserve, ...]] = field(default_factory=dict, repr=False)

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """At most 0 as soon as experts can be moved so that it fits: then nothing is missing, and nothing is left."""
        short = self._short_bytes(ctx_tokens, seqs)
        worst = max(short)
        if worst <= 0 and self.setup.options.offload_experts is not True:
            return max(worst, self._host_short_bytes(ctx_tokens, seqs, 0))
        if not self.may_offload:
            return max(worst, self._host_short_bytes(ctx_tokens, seqs, 0))
        layers, left = self._moved_layers(short)
        if left > 0:
            return left
        return max(0 if worst > 0 else worst, self._host_short_bytes(ctx_tokens, seqs, layers))

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        moved = self._layers_on_host(ctx_tokens, seqs)
        cells = padded(ctx_tokens)
        devices = tuple(
            DeviceShare(share.device, share.device.usable_bytes, self._memory(index, cells, ctx_tokens, seqs, moved))
            for index, share in enumerate(self.shares)
        )
        host = self._host(cells, ctx_tokens, seqs, moved)
        return Allocation(
            devices=devices,
            host=host,
            reasons=self._reasons(devices, ctx_tokens, seqs, moved),
            warnings=self._warnings(devices, ctx_tokens, seqs, moved),
            detail=self._detail(cells, ctx_tokens, seqs, moved),
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        moved = self._layers_on_host(ctx_tokens, seqs)
        return server_line(
            self.setup,
            self.types,
            ctx_tokens,
            seqs,
            self.ubatch,
            () if self.shares[0].whole else tuple(share.layers for share in self.shares),
            moved,
            self._cache_ram_mib(ctx_tokens, seqs, moved),
        )

    def _short_bytes(self, ctx_tokens: int, seqs: int) -> list[int]:
        """Bytes missing on each device with all experts on the devices."""
        cells = -(-ctx_tokens // 256) * 256
        tokens = ctx_tokens * seqs
        if tokens > self.ubatch:
            tokens = self.ubatch
        reserves = self._reserves.get((tokens, seqs)) or self._reserved(tokens, seqs)
        short = []
        for index, share in enumerate(self.shares):
            need = self.fixed_bytes[index] + seqs * (cells * share.cell_bytes + self.seq_bytes[index])
            short.append(need + reserves[index].buffer_bytes(cells) - share.device.usable_bytes)
        if len(reserves) > len(self.shares):
            short[-1] += reserves[-1].buffer_bytes(cells) + self._seed_bytes(tokens)
        return short

    def _reserved(self, tokens: int, seqs: int) -> tuple[Reserve, ...]:
        """Compute buffers of every device, and of the draft's context behind them."""
        setup = self.setup
        batch = self._batch(tokens, seqs)
        found = [self._reserve(batch, share) for share in self.shares]
        draft = self.shares[-1].draft
        if draft is not None:
            rows = Batch(batch.tokens, seqs, seqs, min(tokens, seqs), 0, True, batch.rotate_k, batch.rotate_v)
            found.append(reserve(setup.model, rows, draft))
        self._reserves[tokens, seqs] = tuple(found)
        return tuple(found)

    def _reserve(self, batch: Batch, share: Share) -> Reserve:
        """The buffer of one device, raised where rounding a batch to whole tokens per sequence made the batch of one
        sequence less so much larger that it would need more in all."""
        exact = reserve(self.setup.model, batch, share.place)
        per_seq = max(1, self.ubatch // batch.seqs + (self.ubatch % batch.seqs > 0))
        before = (self.ubatch - 1) // per_seq  # the most sequences with more tokens each
        if not 1 <= before < batch.seqs:
            return exact
        tokens = (per_seq + 1) * before
        if tokens <= batch.tokens:
            return exact
        growth = tokens / batch.tokens
        saved = (batch.seqs - before) * (256 * share.cell_bytes + share.state_bytes * (1 + self.setup.mtp))
        return Reserve(
            mask_bytes_per_cell=max(
                exact.mask_bytes_per_cell,
                int(growth * exact.mask_bytes_per_cell) - (batch.seqs - before) * share.cell_bytes,
            ),
            with_mask=max(exact.with_mask, int(growth * exact.with_mask) - saved),
            without_mask=max(exact.without_mask, int(growth * exact.without_mask) - saved),
            flash=max(exact.flash, int(growth * exact.flash) - saved),
            flash_bytes_per_cell=exact.flash_bytes_per_cell,
        )

    def _batch(self, tokens: int, seqs: int, cells: int = 0) -> Batch:
        mtp = self.setup.mtp
        return Batch(
            tokens=batch_tokens(tokens, tokens, seqs),
            seqs=seqs,
            streams=seqs,
            outputs=min(tokens, seqs * (1 + mtp)),
            cells=cells,
            rotate_k=self.types[0] not in FLOAT_TYPES,
            rotate_v=self.types[1] not in FLOAT_TYPES,
            drafts=mtp,
        )

    def _seed_bytes(self, tokens: int) -> int:
        """The last hidden states, kept for the draft: `h_nextn` is an output of the graph."""
        return 4 * self.setup.model.hidden_size * tokens

    def _moved_layers(self, short: list[int], margin: int = 0) -> tuple[int, int]:
        """How many of the first layers leave their experts in host memory so that every device fits, and what is then
        still missing on the tightest."""
        layers, left = 0, -GIB
        for share, missing in zip(self.shares, short, strict=True):
            missing += self.expert_copy_bytes + margin
            for index, expert_bytes in enumerate(share.experts):
                if missing <= 0 and share.first_layer + index >= layers:
                    break
                missing -= expert_bytes
                layers = max(layers, share.first_layer + index + 1)
            left = max(left, missing)
        return layers, left - margin

    def _layers_on_host(self, ctx_tokens: int, seqs: int) -> int:
        short = self._short_bytes(ctx_tokens, seqs)
        if not self.may_offload or (max(short) <= 0 and self.setup.options.offload_experts is not True):
            return 0
        layers, left = self._moved_layers(short, self._doubt_bytes(ctx_tokens, seqs))
        if left > -self._doubt_bytes(ctx_tokens, seqs):
            layers, left = self._moved_layers(short)
        return layers

    def _doubt_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """Between the expected figure and the upper end of the interval."""
        cells = padded(ctx_tokens)
        return max(
            total.high - total.mid
            for index in range(len(self.shares))
            for total in (self._memory(index, cells, ctx_tokens, seqs, 1).total,)
        )

    def _memory(self, index: int, cells: int, ctx_tokens: int, seqs: int, moved: int) -> Memory:
        share, setup = self.shares[index], self.setup
        tokens = min(ctx_tokens * seqs, self.ubatch)
        reserves = self._reserves.get((tokens, seqs)) or self._reserved(tokens, seqs)
        compute = reserves[index].buffer_bytes(cells)
        if share.draft is not None:
            compute += reserves[-1].buffer_bytes(cells) + self._seed_bytes(tokens)
        own = max(0, min(share.layers, moved - share.first_layer))
        weights = share.weights_bytes - sum(share.experts[:own])
        kv_cache = seqs * cells * share.cell_bytes
        state = seqs * share.state_bytes * (1 + setup.mtp)
        if moved:
            compute += self.expert_copy_bytes
        low, high = int(COMPUTE_LOW * compute), int(COMPUTE_HIGH * compute)
        room = share.device.usable_bytes - weights - kv_cache - state - compute
        room -= share.vision.mid + share.backend.runtime.mid
        copies = self._pipeline_bytes(index, tokens, seqs, cells, moved)
        taken = max(0, min(copies, room))  # what does not fit is not taken: the engine falls back to one batch in flight
        activation = Amount(low, compute + taken, max(high, compute + taken)) + share.vision
        weights_amount, state_amount = exactly(weights), exactly(state)
        if share.whole:
            output = 4 * setup.model.vocab_size * seqs * (2 if setup.mtp else 1)
            activation = activation + exactly(output)
            room -= output
            weights_amount = _with_page_cache(weights, share.repacked_bytes, room)
        return Memory(
            weights=weights_amount,
            kv_cache=exactly(kv_cache),
            recurrent_state=state_amount,
            activation=activation,
            runtime=share.backend.runtime,
        )

    def _pipeline_bytes(self, index: int, tokens: int, seqs: int, cells: int, moved: int) -> int:
        """What a pipeline over several devices takes beyond one batch in flight (`GGML_SCHED_MAX_COPIES`)."""
        if len(self.shares) == 1 or moved or not all(share.backend.pipelines for share in self.shares):
            return 0
        place, batch = self.shares[index].place, self._batch(tokens, seqs)
        with_copies = reserve(self.setup.model, batch, pipelined(place)).buffer_bytes(cells)
        return max(0, with_copies - reserve(self.setup.model, batch, place).buffer_bytes(cells))

    def _host(self, cells: int, ctx_tokens: int, seqs: int, moved: int) -> Memory:
        if self.shares[0].whole:
            return Memory()
        setup, model = self.setup, self.setup.model
        tokens = min(ctx_tokens * seqs, self.ubatch)
        copies = 4 if len(self.shares) > 1 and not moved else 1
        rows = seqs * (2 if setup.mtp else 1)
        inputs = host_bytes(model, self._batch(tokens, seqs, cells)) + 4 * model.vocab_size * rows
        if setup.mtp:
            inputs += 4 * model.hidden_size * (DEFAULT_BATCH_TOKENS + seqs)
        checkpoints = self._checkpoint_bytes(ctx_tokens, seqs)
        return Memory(
            weights=exactly(self.embedding_bytes + self._moved_bytes(moved)),
            recurrent_state=estimated(0, checkpoints, checkpoints),
            activation=estimated(inputs, inputs, copies * inputs),
            runtime=HOST_PROCESS,
        )

    def _moved_bytes(self, moved: int) -> int:
        return sum(sum(share.experts[: max(0, moved - share.first_layer)]) for share in self.shares)

    def _checkpoint_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """Copies of the state in host memory, which llama-server makes while prompts are read."""
        layers = self.setup.model.linear_attention_layers
        count = min(CHECKPOINTS_PER_SLOT, ctx_tokens // CHECKPOINT_STEP_TOKENS + 1)
        return seqs * count * layers * layer_state_bytes(self.setup.model)

    def _host_short_bytes(self, ctx_tokens: int, seqs: int, moved: int) -> int:
        """Missing in host memory where its size is known, or where host and device share one memory."""
        limit = self.setup.options.host_memory_bytes
        if limit is None or self.shares[0].whole:
            return -(1 << 62)
        return self._host(padded(ctx_tokens), ctx_tokens, seqs, moved).total.mid - limit

    def _cache_ram_mib(self, ctx_tokens: int, seqs: int, moved: int) -> int | None:
        """The prompt cache where memory is known to be short of its 8 GiB; None leaves llama-server's default."""
        share, limit = self.shares[0], self.setup.options.host_memory_bytes
        if share.whole:
            total = self._memory(0, padded(ctx_tokens), ctx_tokens, seqs, 0).total
            left = share.device.usable_bytes - total.mid - self._checkpoint_bytes(ctx_tokens, seqs)
        elif share.device.kind == "unified":
            left = share.device.memory_bytes - self._memory(0, padded(ctx_tokens), ctx_tokens, seqs, moved).total.high
            left -= self._host(padded(ctx_tokens), ctx_tokens, seqs, moved).total.high
        elif limit is not None:
            left = limit - self._host(padded(ctx_tokens), ctx_tokens, seqs, moved).total.mid
        else:
            return None
        return None if left >= PROMPT_CACHE_MIB * MIB else max(0, left // MIB)

    def _reasons(
        self, devices: tuple[DeviceShare, ...], ctx_tokens: int, seqs: int, moved: int
    ) -> tuple[str, ...]:
        reasons = [
            f"{share.device.name} needs {share.memory.total.mid / GIB:.2f} GiB, and {share.usable_bytes / GIB:.2f} GiB "
            "can be used"
            for share in devices
            if share.free_bytes < 0
        ]
        missing = self._host_short_bytes(ctx_tokens, seqs, moved)
        if missing > 0:
            reasons.append(f"host memory is {missing / GIB:.2f} GiB short")
        return tuple(reasons)

    def _warnings(
        self, devices: tuple[DeviceShare, ...], ctx_tokens: int, seqs: int, moved: int
    ) -> tuple[str, ...]:
        setup, model = self.setup, self.setup.model
        found: list[str] = []
        least = min(share.free_bytes for share in devices)
        if 0 <= least < FIT_MARGIN_BYTES and not self.shares[0].whole:
            found.append(
                f"{least / GIB:.2f} GiB stay free: llama.cpp's own fitting keeps 1 GiB and would shrink the context, so the "
                "line turns it off; close what else uses the device"
            )
        if moved:
            found.append(
                f"experts of {moved} of {model.num_layers} layers are in host memory "
                f"({self._moved_bytes(moved) / GIB:.1f} GiB): much slower than all on the device"
            )
        quantized = [name for name in self.types if name not in FLOAT_TYPES]
        scratch = sum(share.place.f16_cache for share in self.shares)
        if quantized and scratch and self.shares[0].backend.f16_cache == "quantized":
            found.append(
                f"with a {quantized[0]} cache, prefill makes room for one layer's K and V in f16: part of the saving goes there"
            )
        share = self.shares[0]
        if share.repacked_bytes:
            found.append(
                f"the CPU backend keeps a rearranged copy of {share.repacked_bytes / GIB:.1f} GiB; the file's own pages may "
                "be dropped again"
            )
        if not share.whole:
            checkpoints = self._checkpoint_bytes(ctx_tokens, seqs) / GIB
            found.append(
                f"host memory also fills with up to {checkpoints:.1f} GiB of state checkpoints (--ctx-checkpoints) and a "
                "prompt cache of up to 8 GiB (--cache-ram)"
            )
        if model.has_vision and not setup.vision and setup.weights.family == "gguf" and False:
            found.append("")
        return tuple(found)

    def _detail(self, cells: int, ctx_tokens: int, seqs: int, moved: int) -> dict[str, object]:
        setup = self.setup
        tokens = min(ctx_tokens * seqs, self.ubatch)
        reserves = self._reserves[tokens, seqs]
        return {
            "file": gguf_name(setup.model, setup.weights, bool(setup.mtp)),
            "n_ctx": cells * seqs,
            "n_ctx_seq": cells,
            "n_seq_max": seqs,
            "n_ubatch": self.ubatch,
            "cache_type_k": self.types[0],
            "cache_type_v": self.types[1],
            "backends": [share.backend.name for share in self.shares],
            "layers": [share.layers for share in self.shares],
            "n_cpu_moe": moved,
            "compute_buffer_bytes": [reserves[index].buffer_bytes(cells) for index in range(len(self.shares))],
            "draft_compute_buffer_bytes": reserves[-1].buffer_bytes(cells) if setup.mtp else 0,
        }


@lru_cache(maxsize=4096)
def _known_types(kv_dtype: str) -> tuple[str, str]:
    return cache_types(kv_dtype)


def _refuse(setup: Setup) -> tuple[str, str]:
    """K and V types of a setup that llama.cpp takes."""
    if setup.state_dtype != "float32":
        raise Unsupported("llama.cpp keeps the recurrent state in float32: leave out --state-dtype")
    if setup.tp > 1:
        raise Unsupported("llama.cpp is planned with whole layers per device: leave out --tp")
    if any(device.kind == "cpu" for device in setup.devices) and len(setup.devices) > 1:
        raise Unsupported("llama.cpp with a CPU box beside other devices is not planned: name the accelerators only")
    return _known_types(setup.kv_dtype)


def _with_page_cache(weights: int, repacked: int, room: int) -> Amount:
    """Anonymous copies, and as much of the mapped file as there is room for: its pages are dropped under pressure."""
    return Amount(weights, weights + max(0, min(repacked, room)), weights + max(0, min(repacked, room)), not repacked)
