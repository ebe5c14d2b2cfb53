"""llama.cpp: llama-server with every layer on the devices, as build b11434 allocates.

Exact by its own arithmetic: weights, the cache, the recurrent state, and the compute buffer as ggml's allocator arrives
at it (`llamacpp_compute.py`; told as an interval, for backends differ in what an operation asks for). Estimated: what
the driver and its pools take, the vision tower's scratch.

`ctx_tokens` is promised to every sequence: the launch line asks for it, rounded up to 256, times `seqs`, in as many
slots of their own. In host memory lie token_embd, the inputs (the mask among them), the logits, and later checkpoints
of the state and a prompt cache (`llamacpp_host.py`). Experts move there layer by layer where a mixture of experts does
not fit otherwise.
"""

from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import WeightFormat, weight_format
from ...profiles.frozen import dataclass, field, replace
from ...profiles.model import Model
from ..memory import Amount, Memory, estimated, exactly
from ..weights import weight_table
from .engine import Allocation, DeviceShare, Engine, Setup
from .llamacpp_batch import Batches
from .llamacpp_cache import DEFAULT_UBATCH_TOKENS, FLOAT_TYPES, cache_types
from .llamacpp_compute import flash_scratch_bytes
from .llamacpp_devices import Layout, layout, without_experts
from .llamacpp_host import PROMPT_CACHE_MIB, Host
from .llamacpp_launch import gguf_name, is_gguf, rpc_line, server_line
from .llamacpp_question import COMPUTE_HIGH, Question
from .support import spread_warnings

ENGINE = Engine(
    name="llama.cpp",
    default_version="b11434",
    versions=("b11434",),
    source="llama.cpp b11434: llama-context.cpp, llama-kv-cache.cpp, llama-memory-recurrent.cpp, ggml-alloc.c, "
    "ggml-backend.cpp, common/arg.cpp, tools/server",
    parallelism="layers",
    offloads=True,
    copies_cache=True,
    spans_boxes=True,
)

GIB = 1 << 30
MIB = 1 << 20
FIT_MARGIN_BYTES = GIB  # --fit-target: what llama.cpp's own fitting would leave free
COMPUTE_LOW = 0.97
SPARE = 2 - COMPUTE_HIGH

# tools/rpc/README.md
RPC_WARNING = ("ggml-rpc-server checks nobody: bind it to a network that only these boxes are on",)


def runs_on(device: Device, version: str) -> str | None:
    """Why llama.cpp cannot run on a device, None where it can: CUDA's kernels start at compute capability 5.0."""
    capability = device.compute_capability if device.vendor == "nvidia" else None
    if capability and float(capability) < 5.0:
        return f"llama.cpp's CUDA kernels need compute capability 5.0; {device.title} has {capability}"
    return None


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """llama.cpp reads GGUF files and nothing else; bf16 means the GGUF of that type."""
    if fmt.family == "gguf" or fmt.name == "bf16":
        return None
    if fmt.family == "checkpoint" and is_gguf(model):
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
    if setup.weights.name == "bf16":
        setup = replace(setup, weights=weight_format("gguf-bf16"))
    options, on_cpu = setup.options, setup.devices[0].vendor == "cpu"
    table = weight_table(setup.model, setup.weights, 1)
    whole = layout(setup, types, 0)
    rotates = types[0] not in FLOAT_TYPES, types[1] not in FLOAT_TYPES
    return LlamaCppEstimate(
        setup=setup,
        types=types,
        batches=Batches(setup.model, whole.shares, options.ubatch_tokens or DEFAULT_UBATCH_TOKENS, rotates, setup.mtp),
        on_cpu=on_cpu,
        unified=setup.devices[0].kind == "unified",
        may_move=setup.model.is_moe and not on_cpu and options.offload_experts is not False,
        host_limit_bytes=None if on_cpu else options.host_memory_bytes,
        margin_bytes=margin_bytes,
        layout=whole,
        host=Host(
            setup.model,
            0 if on_cpu else table.embedding,
            tuple(accumulate(table.experts, initial=0)),
            bool(setup.mtp),
            len(setup.devices),
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class LlamaCppEstimate:
    """Every share of the devices, with what depends on context and sequences worked out when asked for."""

    setup: Setup
    types: tuple[str, str]  # of K and V
    batches: Batches
    on_cpu: bool
    unified: bool
    may_move: bool  # experts, to host memory
    host_limit_bytes: int | None
    margin_bytes: int
    layout: Layout  # with all experts on the devices
    host: Host
    _layouts: dict[int, Layout] = field(default_factory=dict, repr=False)
    _last: dict[tuple[int, int], Question] = field(default_factory=dict, repr=False)
    _choices: dict[tuple[int, int], Layout] = field(default_factory=dict, repr=False)

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """0 where it fits once experts have moved: nothing is missing then, and nothing is called left."""
        question = self._question(ctx_tokens, seqs)
        short = self._worst_bytes(self.layout, question)
        if not self.may_move or (short <= 0 and self.setup.options.offload_experts is None):
            return short
        bare = self._layout_of(self.setup.model.num_layers)
        if question.missing_bytes(bare)[0] <= 0:
            free_host = not self.unified and self.host_limit_bytes is None
            if free_host or self._worst_bytes(self._chosen(question), question) <= 0:
                return min(0, short)
        return self._worst_bytes(bare, question)

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        question = self._question(ctx_tokens, seqs)
        if self.on_cpu:
            memory = self._memory(self.layout, 0, question)
            return memory.total.high <= self.layout.shares[0].device.usable_bytes - self.margin_bytes
        return question.missing_bytes(self._chosen(question), doubted=True)[0] <= 0

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        question = self._question(ctx_tokens, seqs)
        chosen = self._chosen(question)
        devices = tuple(
            DeviceShare(
                share.device, share.device.usable_bytes - self.margin_bytes, self._memory(chosen, index, question)
            )
            for index, share in enumerate(chosen.shares)
        )
        free = min(device.usable_bytes - _mid_bytes(device.memory) for device in devices)
        return Allocation(
            devices=devices,
            host=Memory() if self.on_cpu else self._host_memory(chosen, question),
            reasons=self._reasons(chosen, devices, question),
            warnings=self._warnings(chosen, free, question),
            detail=self._detail(chosen, question),
            offloads=chosen.moved > 0,
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        question = self._question(ctx_tokens, seqs)
        chosen = self._chosen(question)
        return server_line(
            self.setup,
            self.types,
            ctx_tokens,
            seqs,
            self.batches.ubatch,
            () if self.on_cpu else tuple(share.layers for share in chosen.shares),
            chosen.moved,
            self._cache_ram_mib(chosen, question),
        )

    def _question(self, ctx_tokens: int, seqs: int) -> Question:
        """The last one is kept, for it is asked for several times."""
        found = self._last.get((ctx_tokens, seqs))
        if found is None:
            found = Question(self.batches, self.host, self.margin_bytes, ctx_tokens, seqs)
            self._last.clear()
            self._last[ctx_tokens, seqs] = found
        return found

    def _layout_of(self, moved: int) -> Layout:
        if not moved:
            return self.layout
        found = self._layouts.get(moved)
        if found is None:
            if len(self.layout.shares) == 1:
                found = without_experts(self.setup, self.layout, moved, self.host.moved_sums[moved])
            else:
                found = layout(self.setup, self.types, moved)
            self._layouts[moved] = found
        return found

    def _chosen(self, question: Question) -> Layout:
        """The layout for this question; the last one is kept."""
        if not self.may_move:
            return self.layout
        asked = question.ctx_tokens, question.seqs
        found = self._choices.get(asked)
        if found is None:
            found = self._choose(question)
            self._choices.clear()
            self._choices[asked] = found
        return found

    def _choose(self, question: Question) -> Layout:
        """As few layers without their experts as fit: surely if that can be, else at the expected figure."""
        fits = self._worst_bytes(self.layout, question) <= 0
        if fits and self.setup.options.offload_experts is None:
            return self.layout
        most = self.setup.model.num_layers
        for doubted in (True, False):
            short = question.missing_bytes(self._layout_of(most), doubted)[0]
            if short > 0:
                continue
            found = self._layout_of(self._fewest(-short, question, doubted))
            if not doubted or self._worst_bytes(found, question) <= 0:
                return found
        return self._layout_of(most)

    def _fewest(self, spare_bytes: int, question: Question, doubted: bool) -> int:
        """Layers whose experts have to move, where `spare_bytes` stay free once all have."""
        sums = self.host.moved_sums
        if len(self.layout.shares) == 1:  # what comes back to the one device is what it takes more
            fewest = bisect_left(sums, sums[-1] - spare_bytes)
            none = not fewest or question.missing_bytes(self.layout, doubted)[0] <= 0
            return 0 if none else fewest
        low, high = -1, len(sums) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if question.missing_bytes(self._layout_of(middle), doubted)[0] > 0:
                low = middle
            else:
                high = middle
        return high

    def _worst_bytes(self, layout: Layout, question: Question) -> int:
        """Bytes missing on the tightest device, or in host memory where it is known or shared with the device."""
        worst, total = question.missing_bytes(layout)
        if self.on_cpu:
            seqs = question.seqs
            return worst + self.host.logits_bytes(seqs) + self.host.checkpoint_bytes(question.ctx_tokens, seqs)
        if self.unified or self.host_limit_bytes is not None:
            host = question.host_bytes(self.batches, layout.moved)
            if self.host_limit_bytes is not None:
                worst = max(worst, host - self.host_limit_bytes)
            if self.unified:
                worst = max(worst, total + host - sum(share.device.memory_bytes for share in layout.shares))
        return worst

    def _host_memory(self, layout: Layout, question: Question) -> Memory:
        batch = self.batches.batch(question.tokens, question.seqs, question.cells)
        return self.host.memory(batch, layout.moved, question.ctx_tokens)

    def _memory(self, layout: Layout, index: int, question: Question) -> Memory:
        share, seqs = layout.shares[index], question.seqs
        compute = question.compute_bytes[index] + share.expert_copy_bytes
        kv_cache, state = seqs * question.cells * share.cell_bytes, seqs * layout.seq_bytes[index]
        high = int(COMPUTE_HIGH * compute) + 1
        activation = Amount(
            int(COMPUTE_LOW * compute) + share.vision.low, compute + share.vision.mid, high + share.vision.high
        )
        need = share.weights_bytes + kv_cache + state + activation.mid + share.backend.runtime.mid
        if self.on_cpu:
            logits, checkpoints = self.host.logits_bytes(seqs), self.host.checkpoint_bytes(question.ctx_tokens, seqs)
            pages = min(share.repacked_bytes, self._spare_bytes(layout, index, need + logits + checkpoints))
            weights = share.weights_bytes + pages
            return Memory(
                weights=Amount(share.weights_bytes, weights, weights, not share.repacked_bytes),
                kv_cache=exactly(kv_cache),
                recurrent_state=estimated(state, state + checkpoints, state + checkpoints),
                activation=activation + exactly(logits),
                runtime=share.backend.runtime,
            )
        copies = self._pipeline_bytes(layout, index, question)
        if copies:  # what has no room is not taken: one batch is in flight then
            copies = min(copies, self._spare_bytes(layout, index, need))
            activation = Amount(activation.low, activation.mid + copies, activation.high + copies)
        return Memory(
            weights=exactly(share.weights_bytes),
            kv_cache=exactly(kv_cache),
            recurrent_state=exactly(state),
            activation=activation,
            runtime=share.backend.runtime,
        )

    def _spare_bytes(self, layout: Layout, index: int, need: int) -> int:
        """Room for what is taken where there is room, and given up where there is none: less than is free by what is
        uncertain, so that a device counts as full with it and not as overfull."""
        usable = layout.shares[index].device.usable_bytes - self.margin_bytes
        return max(0, int(SPARE * usable) - layout.doubt_bytes[index] - need)

    def _pipeline_bytes(self, layout: Layout, index: int, question: Question) -> int:
        if layout.moved or not layout.pipelines:
            return 0
        return self.batches.pipeline_bytes(layout.shares[index], question.tokens, question.seqs, question.cells)

    def _cache_ram_mib(self, layout: Layout, question: Question) -> int | None:
        """The prompt cache where memory is known to be short of its 8 GiB; None leaves llama-server's default."""
        device = layout.shares[0].device
        if self.on_cpu:
            left = device.usable_bytes - self._memory(layout, 0, question).total.high
        elif self.unified:
            left = device.memory_bytes - self._memory(layout, 0, question).total.high
            left -= self._host_memory(layout, question).total.high
        elif self.host_limit_bytes is not None:
            left = self.host_limit_bytes - question.host_bytes(self.batches, layout.moved)
        else:
            return None
        return None if left >= PROMPT_CACHE_MIB * MIB else max(0, left // MIB)

    def _reasons(self, layout: Layout, devices: tuple[DeviceShare, ...], question: Question) -> tuple[str, ...]:
        worst = self._worst_bytes(layout, question)
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

    def _warnings(self, layout: Layout, free: int, question: Question) -> tuple[str, ...]:
        model, share = self.setup.model, layout.shares[0]
        found: list[str] = []
        if 0 <= free < FIT_MARGIN_BYTES and not self.on_cpu:
            found.append(
                f"{free / GIB:.2f} GiB stay free: llama.cpp's own --fit keeps 1 GiB and would shrink the context, so "
                "the line turns it off"
            )
        if layout.moved:
            found.append(
                f"experts of {layout.moved} of {model.num_layers} layers lie in host memory "
                f"({self.host.moved_bytes(layout.moved) / GIB:.1f} GiB), which is much slower"
            )
        if share.place.f16_cache and share.backend.f16_cache == "quantized":
            scratch = flash_scratch_bytes(model, question.cells, question.seqs) / GIB
            found.append(f"flash attention makes room for one layer's cache in f16: {scratch:.2f} GiB")
        if share.repacked_bytes:
            found.append(
                f"{share.repacked_bytes / GIB:.1f} GiB of weights are kept twice, rearranged and in the page cache "
                "(--no-repack: once, and slower)"
            )
        if not self.on_cpu:
            checkpoints = self.host.checkpoint_bytes(question.ctx_tokens, question.seqs) / GIB
            found.append(
                f"host memory fills with up to {checkpoints:.1f} GiB of state checkpoints (--ctx-checkpoints) and a "
                "prompt cache (--cache-ram, 8 GiB unless said)"
            )
        return spread_warnings(self.setup) + RPC_WARNING + tuple(found) if self.setup.nodes > 1 else tuple(found)

    def _detail(self, layout: Layout, question: Question) -> dict[str, object]:
        setup, cells, seqs = self.setup, question.cells, question.seqs
        reserves = self.batches.reserves(question.tokens, seqs)
        detail: dict[str, object] = {
            "file": gguf_name(setup.model, setup.weights, bool(setup.mtp)),
            "n_ctx": cells * seqs,
            "n_ctx_seq": cells,
            "n_seq_max": seqs,
            "n_ubatch": self.batches.ubatch,
            "cache_type_k": self.types[0],
            "cache_type_v": self.types[1],
            "backends": [share.backend.name for share in layout.shares],
            "layers": [share.layers for share in layout.shares],
            "n_cpu_moe": layout.moved,
            "compute_buffer_bytes": [reserves[index].buffer_bytes(cells) for index in range(len(layout.shares))],
            "draft_compute_buffer_bytes": reserves[-1].buffer_bytes(cells) if setup.mtp else 0,
        }
        if setup.nodes > 1:
            others = [rpc_line(node) for node in range(1, setup.nodes)]
            detail["node_commands"] = [self.command(question.ctx_tokens, seqs), *others]
        return detail


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
