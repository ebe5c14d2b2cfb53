"""llama.cpp: llama-server with every layer on the devices, as build b11434 allocates.

Exact by its own arithmetic: weights of plain and K-quant types, the cache, the recurrent state, and the compute buffer as
ggml's allocator arrives at it (`llamacpp_compute.py`; an interval all the same, for backends differ in what an operation
asks for). Estimated: what the driver and its pools take, the vision tower's scratch.

`ctx_tokens` is promised to every sequence: the launch line asks for `-c ctx x seqs` in `seqs` slots of their own. In host
memory lie token_embd, the inputs (the mask among them), the logits, and later up to 32 checkpoints of the state per slot
and a prompt cache of up to 8 GiB. Experts move there layer by layer where a mixture of experts does not fit otherwise.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import WeightFormat, weight_format
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
from .llamacpp_compute import (
    PIPELINE_COPIES,
    Batch,
    Place,
    Reserve,
    batch_tokens,
    flash_scratch_bytes,
    host_bytes,
    reserve,
)
from .llamacpp_devices import Share, pipelined, shares
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
            return (
                f"llama.cpp's CUDA kernels need compute capability 5.0; {device.title} has {device.compute_capability}"
            )
    return None


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """llama.cpp reads GGUF files and nothing else; bf16 means the GGUF of that type."""
    if fmt.family == "gguf" or fmt.name == "bf16":
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


def estimate(setup: Setup, margin_bytes: int = 0) -> "LlamaCppEstimate":
    """Raises Unsupported for settings that the engine does not have. `margin_bytes` stay free on every device."""
    types = _refuse(setup)
    options = setup.options
    if setup.weights.name == "bf16":
        setup = replace(setup, weights=weight_format("gguf-bf16"))
    whole = setup.devices[0].vendor == "cpu"
    table = weight_table(setup.model, setup.weights, 1)
    return LlamaCppEstimate(
        setup=setup,
        types=types,
        ubatch=options.ubatch_tokens or DEFAULT_UBATCH_TOKENS,
        on_cpu=whole,
        unified=setup.devices[0].kind == "unified",
        may_move=setup.model.is_moe and not whole and options.offload_experts is not False,
        embedding_bytes=0 if whole else table.embedding,
        host_limit_bytes=options.host_memory_bytes,
        margin_bytes=margin_bytes,
        layout=_layout(setup, types, 0),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Shares of the devices, and what they take whatever the context, for one number of layers without experts."""

    moved: int  # of the first layers, whose routed experts are in host memory
    shares: tuple[Share, ...]
    fixed_bytes: tuple[int, ...]
    seq_bytes: tuple[int, ...]
    doubt_bytes: tuple[int, ...]  # of what is fixed: from the expected figure to the upper end


def _layout(setup: Setup, types: tuple[str, str], moved: int) -> Layout:
    options = setup.options
    found = shares(
        setup.model, setup.weights, setup.devices, *types, bool(setup.mtp), setup.vision, options.image_tokens, moved
    )
    return Layout(
        moved=moved,
        shares=found,
        fixed_bytes=tuple(
            share.weights_bytes + share.expert_copy_bytes + share.backend.runtime.mid + share.vision.mid
            for share in found
        ),
        seq_bytes=tuple(share.state_bytes * (1 + setup.mtp) for share in found),
        doubt_bytes=tuple(
            share.backend.runtime.high - share.backend.runtime.mid + share.vision.high - share.vision.mid
            for share in found
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class LlamaCppEstimate:
    """Every share of the devices, with what depends on context and sequences worked out when asked for."""

    setup: Setup
    types: tuple[str, str]  # of K and V
    ubatch: int
    on_cpu: bool
    unified: bool
    may_move: bool  # experts, to host memory
    embedding_bytes: int  # token_embd in host memory
    host_limit_bytes: int | None
    margin_bytes: int
    layout: Layout  # with all experts on the devices
    _layouts: dict[int, Layout] = field(default_factory=dict, repr=False)
    _reserves: dict[tuple[int, int], tuple[Reserve, ...]] = field(default_factory=dict, repr=False)

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """0 where it fits once experts have moved: nothing is missing then, and nothing is called left."""
        short = self._worst_bytes(self.layout, ctx_tokens, seqs)
        if not self.may_move or (short <= 0 and self.setup.options.offload_experts is None):
            return short
        most = self._worst_bytes(self._layout_of(self.setup.model.num_layers), ctx_tokens, seqs)
        return most if most > 0 else min(0, short)

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        layout = self._chosen(ctx_tokens, seqs)
        cells = padded(ctx_tokens)
        memories = [self._memory(layout, index, cells, ctx_tokens, seqs) for index in range(len(layout.shares))]
        devices = tuple(
            DeviceShare(share.device, share.device.usable_bytes - self.margin_bytes, memory)
            for share, memory in zip(layout.shares, memories, strict=True)
        )
        least = min(device.usable_bytes - _mid_bytes(device.memory) for device in devices)
        return Allocation(
            devices=devices,
            host=self._host(layout, cells, ctx_tokens, seqs),
            reasons=self._reasons(layout, devices, ctx_tokens, seqs),
            warnings=self._warnings(layout, least, ctx_tokens, seqs),
            detail=self._detail(layout, cells, ctx_tokens, seqs),
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        layout = self._chosen(ctx_tokens, seqs)
        return server_line(
            self.setup,
            self.types,
            ctx_tokens,
            seqs,
            self.ubatch,
            () if self.on_cpu else tuple(share.layers for share in layout.shares),
            layout.moved,
            self._cache_ram_mib(layout, ctx_tokens, seqs),
        )

    def _layout_of(self, moved: int) -> Layout:
        if not moved:
            return self.layout
        if moved not in self._layouts:
            self._layouts[moved] = _layout(self.setup, self.types, moved)
        return self._layouts[moved]

    def _chosen(self, ctx_tokens: int, seqs: int) -> Layout:
        """As few layers without their experts as fit: surely if that can be, else at the expected figure."""
        fits = self._worst_bytes(self.layout, ctx_tokens, seqs) <= 0
        if not self.may_move or (fits and self.setup.options.offload_experts is None):
            return self.layout
        most = self.setup.model.num_layers
        for doubted in (True, False):
            if self._worst_bytes(self._layout_of(most), ctx_tokens, seqs, doubted) > 0:
                continue
            low, high = -1, most
            while high - low > 1:
                middle = (low + high) // 2
                if self._worst_bytes(self._layout_of(middle), ctx_tokens, seqs, doubted) > 0:
                    low = middle
                else:
                    high = middle
            return self._layout_of(high)
        return self._layout_of(most)

    def _worst_bytes(self, layout: Layout, ctx_tokens: int, seqs: int, doubted: bool = False) -> int:
        """Bytes missing on the tightest device, or in host memory where that is known."""
        cells = -(-ctx_tokens // 256) * 256
        tokens = ctx_tokens * seqs
        if tokens > self.ubatch:
            tokens = self.ubatch
        reserves = self._reserves.get((tokens, seqs)) or self._reserved(tokens, seqs)
        worst = -(1 << 62)
        last = len(layout.shares) - 1
        total = 0
        for index, share in enumerate(layout.shares):
            compute = reserves[index].buffer_bytes(cells)
            if index == last and len(reserves) > len(layout.shares):
                compute += reserves[-1].buffer_bytes(cells) + self._seed_bytes(tokens)
            need = layout.fixed_bytes[index] + seqs * (cells * share.cell_bytes + layout.seq_bytes[index]) + compute
            if doubted:
                need += layout.doubt_bytes[index] + int((COMPUTE_HIGH - 1) * (compute + share.expert_copy_bytes)) + 1
            total += need
            short = need + self.margin_bytes - share.device.usable_bytes
            if short > worst:
                worst = short
        if self.on_cpu:
            return worst + self._logits_bytes(seqs) + self._checkpoint_bytes(ctx_tokens, seqs)
        if self.unified:
            memory = sum(share.device.memory_bytes for share in layout.shares)
            worst = max(worst, total + self._host_bytes(layout, cells, ctx_tokens, seqs) - memory)
        if self.host_limit_bytes is not None:
            worst = max(worst, self._host_bytes(layout, cells, ctx_tokens, seqs) - self.host_limit_bytes)
        return worst

    def _reserved(self, tokens: int, seqs: int) -> tuple[Reserve, ...]:
        """Compute buffers of every device, and of the draft's context behind them. Experts that moved change none."""
        batch = self._batch(tokens, seqs)
        found = [self._reserve(batch, share) for share in self.layout.shares]
        draft = self.layout.shares[-1].draft
        if draft is not None:
            found.append(reserve(self.setup.model, self._draft_batch(batch), draft))
        self._reserves[tokens, seqs] = tuple(found)
        return self._reserves[tokens, seqs]

    def _reserve(self, batch: Batch, share: Share) -> Reserve:
        """The buffer of one device; raised where fewer sequences would need more in all, because their batch is rounded
        up to more tokens (512 tokens for 255 sequences are 765, for 256 they are 512)."""
        exact = reserve(self.setup.model, batch, share.place)
        per_seq = -(-self.ubatch // batch.seqs)
        fewer = (self.ubatch - 1) // per_seq  # the most sequences that get a token more each
        tokens = (per_seq + 1) * fewer
        if fewer >= batch.seqs or tokens <= batch.tokens:
            return exact
        growth, more = tokens / batch.tokens, batch.seqs - fewer
        saved = more * (256 * share.cell_bytes + share.state_bytes * (1 + self.setup.mtp))
        mask = int(growth * exact.mask_bytes_per_cell) - more * share.cell_bytes
        return Reserve(
            mask_bytes_per_cell=max(exact.mask_bytes_per_cell, mask),
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

    def _draft_batch(self, batch: Batch) -> Batch:
        outputs = min(batch.tokens, batch.seqs)
        return Batch(batch.tokens, batch.seqs, batch.seqs, outputs, 0, True, batch.rotate_k, batch.rotate_v)

    def _seed_bytes(self, tokens: int) -> int:
        """The last hidden states, kept for the draft: `h_nextn` is an output of the graph."""
        return 4 * self.setup.model.hidden_size * tokens

    def _logits_bytes(self, seqs: int) -> int:
        return 4 * self.setup.model.vocab_size * seqs * (2 if self.setup.mtp else 1)

    def _memory(self, layout: Layout, index: int, cells: int, ctx_tokens: int, seqs: int) -> Memory:
        share = layout.shares[index]
        tokens = min(ctx_tokens * seqs, self.ubatch)
        reserves = self._reserves.get((tokens, seqs)) or self._reserved(tokens, seqs)
        compute = reserves[index].buffer_bytes(cells) + share.expert_copy_bytes
        if share.draft is not None:
            compute += reserves[-1].buffer_bytes(cells) + self._seed_bytes(tokens)
        kv_cache, state = seqs * cells * share.cell_bytes, seqs * layout.seq_bytes[index]
        high = int(COMPUTE_HIGH * compute) + 1
        activation = Amount(
            int(COMPUTE_LOW * compute) + share.vision.low, compute + share.vision.mid, high + share.vision.high
        )
        room = share.device.usable_bytes - self.margin_bytes - share.weights_bytes - kv_cache - state
        room -= activation.high + share.backend.runtime.high
        if self.on_cpu:
            logits, checkpoints = self._logits_bytes(seqs), self._checkpoint_bytes(ctx_tokens, seqs)
            activation = activation + exactly(logits)
            pages = max(0, min(share.repacked_bytes, room - logits - checkpoints))
            weights = share.weights_bytes + pages
            return Memory(
                weights=Amount(share.weights_bytes, weights, weights, not share.repacked_bytes),
                kv_cache=exactly(kv_cache),
                recurrent_state=estimated(state, state + checkpoints, state + checkpoints),
                activation=activation,
                runtime=share.backend.runtime,
            )
        copies = self._pipeline_bytes(layout, index, tokens, seqs, cells)
        if copies:
            copies = max(0, min(copies, room))  # what has no room is not taken: one batch is in flight then
            activation = Amount(activation.low, activation.mid + copies, activation.high + copies)
        return Memory(
            weights=exactly(share.weights_bytes),
            kv_cache=exactly(kv_cache),
            recurrent_state=exactly(state),
            activation=activation,
            runtime=share.backend.runtime,
        )

    def _pipeline_bytes(self, layout: Layout, index: int, tokens: int, seqs: int, cells: int) -> int:
        """What a pipeline over several devices takes beyond one batch in flight (`GGML_SCHED_MAX_COPIES`)."""
        if len(layout.shares) == 1 or layout.moved or not all(share.backend.pipelines for share in layout.shares):
            return 0
        share, batch = layout.shares[index], self._batch(tokens, seqs)
        found = self._copies_bytes(batch, share.place, cells)
        return (
            found if share.draft is None else found + self._copies_bytes(self._draft_batch(batch), share.draft, cells)
        )

    def _copies_bytes(self, batch: Batch, place: Place, cells: int) -> int:
        with_copies = reserve(self.setup.model, batch, pipelined(place)).buffer_bytes(cells)
        return max(0, with_copies - reserve(self.setup.model, batch, place).buffer_bytes(cells))

    def _host(self, layout: Layout, cells: int, ctx_tokens: int, seqs: int) -> Memory:
        if self.on_cpu:
            return Memory()
        inputs = self._input_bytes(layout, cells, ctx_tokens, seqs)
        checkpoints = self._checkpoint_bytes(ctx_tokens, seqs)
        copies = PIPELINE_COPIES if len(layout.shares) > 1 and not layout.moved else 1
        return Memory(
            weights=exactly(self.embedding_bytes + self._moved_bytes(layout)),
            recurrent_state=estimated(0, checkpoints, checkpoints),
            activation=estimated(inputs, inputs, copies * inputs),
            runtime=HOST_PROCESS,
        )

    def _host_bytes(self, layout: Layout, cells: int, ctx_tokens: int, seqs: int) -> int:
        """The expected figure of `_host`."""
        found = self.embedding_bytes + self._moved_bytes(layout) + HOST_PROCESS.mid
        return found + self._checkpoint_bytes(ctx_tokens, seqs) + self._input_bytes(layout, cells, ctx_tokens, seqs)

    def _input_bytes(self, layout: Layout, cells: int, ctx_tokens: int, seqs: int) -> int:
        """Inputs of the graph, token rows, logits; with a draft the last hidden states of a whole batch."""
        model, tokens = self.setup.model, min(ctx_tokens * seqs, self.ubatch)
        found = host_bytes(model, self._batch(tokens, seqs, cells)) + self._logits_bytes(seqs)
        if layout.moved:  # what the experts' layers compute on the CPU
            found += 6 * model.num_experts_per_tok * model.hidden_size * tokens
        return found + (4 * model.hidden_size * (DEFAULT_BATCH_TOKENS + seqs) if self.setup.mtp else 0)

    def _moved_bytes(self, layout: Layout) -> int:
        table = weight_table(self.setup.model, self.setup.weights, 1)
        return sum(table.experts[: layout.moved])

    def _checkpoint_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """Copies of the state in host memory, which llama-server makes while it reads prompts."""
        count = ctx_tokens // CHECKPOINT_STEP_TOKENS + 1
        if count > CHECKPOINTS_PER_SLOT:
            count = CHECKPOINTS_PER_SLOT
        model = self.setup.model
        return seqs * count * model.linear_attention_layers * layer_state_bytes(model)

    def _cache_ram_mib(self, layout: Layout, ctx_tokens: int, seqs: int) -> int | None:
        """The prompt cache where memory is known to be short of its 8 GiB; None leaves llama-server's default."""
        device, cells = layout.shares[0].device, padded(ctx_tokens)
        if self.on_cpu:
            left = device.usable_bytes - self._memory(layout, 0, cells, ctx_tokens, seqs).total.high
        elif self.unified:
            left = device.memory_bytes - self._memory(layout, 0, cells, ctx_tokens, seqs).total.high
            left -= self._host(layout, cells, ctx_tokens, seqs).total.high
        elif self.host_limit_bytes is not None:
            left = self.host_limit_bytes - self._host_bytes(layout, cells, ctx_tokens, seqs)
        else:
            return None
        return None if left >= PROMPT_CACHE_MIB * MIB else max(0, left // MIB)

    def _reasons(self, layout: Layout, devices: tuple[DeviceShare, ...], ctx_tokens: int, seqs: int) -> tuple[str, ...]:
        worst = self._worst_bytes(layout, ctx_tokens, seqs)
        if worst <= 0:
            return ()
        reasons = [
            f"{share.device.name} needs {share.memory.total.mid / GIB:.2f} GiB, and {share.usable_bytes / GIB:.2f} GiB "
            "can be used"
            for share in devices
            if share.free_bytes < 0
        ]
        if not reasons:
            shared = "the memory that host and device share" if self.unified else "host memory"
            reasons.append(f"{shared} is {worst / GIB:.2f} GiB short")
        return tuple(reasons)

    def _warnings(self, layout: Layout, least: int, ctx_tokens: int, seqs: int) -> tuple[str, ...]:
        model, share = self.setup.model, layout.shares[0]
        found: list[str] = []
        if 0 <= least < FIT_MARGIN_BYTES and not self.on_cpu:
            found.append(
                f"{least / GIB:.2f} GiB stay free: llama.cpp's own --fit keeps 1 GiB and would shrink the context, so the "
                "line turns it off"
            )
        if layout.moved:
            found.append(
                f"experts of {layout.moved} of {model.num_layers} layers lie in host memory "
                f"({self._moved_bytes(layout) / GIB:.1f} GiB), which is much slower"
            )
        if share.place.f16_cache and share.backend.f16_cache == "quantized":
            scratch = flash_scratch_bytes(model, padded(ctx_tokens), seqs) / GIB
            found.append(
                f"flash attention makes room for one layer's cache in f16 ({scratch:.2f} GiB) while it reads prompts"
            )
        if share.repacked_bytes:
            found.append(
                f"{share.repacked_bytes / GIB:.1f} GiB of weights are kept twice, rearranged and in the page cache "
                "(--no-repack: once, and slower)"
            )
        if not self.on_cpu:
            checkpoints = self._checkpoint_bytes(ctx_tokens, seqs) / GIB
            found.append(
                f"host memory fills with up to {checkpoints:.1f} GiB of state checkpoints (--ctx-checkpoints) and a prompt "
                "cache (--cache-ram, 8 GiB unless said)"
            )
        return tuple(found)

    def _detail(self, layout: Layout, cells: int, ctx_tokens: int, seqs: int) -> dict[str, object]:
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
            "backends": [share.backend.name for share in layout.shares],
            "layers": [share.layers for share in layout.shares],
            "n_cpu_moe": layout.moved,
            "compute_buffer_bytes": [reserves[index].buffer_bytes(cells) for index in range(len(layout.shares))],
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


def _mid_bytes(memory: Memory) -> int:
    fixed = memory.weights.mid + memory.kv_cache.mid + memory.recurrent_state.mid
    return fixed + memory.activation.mid + memory.graph.mid + memory.runtime.mid
