"""KTransformers: SGLang on the GPU with the routed experts of a mixture-of-experts model in host memory.

Read in sglang-kt 0.7.2 (kvcache-ai's fork of SGLang, older than the SGLang of `sglang.py`) and kt-kernel 0.7.2:
- `layers/moe/kt_ep_wrapper.py`: a GPU holds `--kt-num-gpu-experts` routed experts per layer; planned here with none, so
  what is left is what every token passes through. Rank 0 holds one staging buffer [chunk, E] bf16.
- kt-kernel `operators/amx/moe_base.hpp`: host memory for every expert of every layer, also for those on the GPU, in the
  method's own layout (`la/amx_buffers.hpp`, `la/amx_raw_buffers.hpp`, `avx2/gptq_int4-moe.hpp`), once per machine.
- `model_executor/model_runner_kv_cache_mixin.py`: pools fill `--mem-fraction-static`, at most `--max-total-tokens`
  tokens and `--max-mamba-cache-size` states; a request takes 3 state slots with the radix cache (strategy `no_buffer`,
  the fork's default), 1 without. `mem_cache/memory_pool.py`: one slot and one page more than asked.
- `models/qwen3_5.py`: the vision tower is always built; `--language-only` is for split encoders.

The launch line fixes both pools, so nothing is left to the engine's own sizing. Not modelled: experts on the GPU and
layer-wise prefill, multi-token prediction, pipeline parallel.
"""

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import WeightFormat, weight_format
from ...profiles.frozen import dataclass
from ...profiles.model import Model
from ..memory import Amount, Memory, estimated, exactly
from ..weights import WeightTable, weight_table
from .engine import Allocation, DeviceShare, Engine, Setup
from .launch import checkpoint_name, compact_json, rope_overrides, shell_line

ENGINE = Engine(
    name="ktransformers",
    default_version="0.7.2",
    versions=("0.7.2",),
    source="sglang-kt 0.7.2: server_args.py, model_runner_kv_cache_mixin.py, kt_ep_wrapper.py; kt-kernel 0.7.2",
    offloads=True,
)

GIB = 1 << 30
RADIX_SLOTS = 3  # MAMBA_CACHE_SIZE_MAX_RUNNING_REQUESTS_RATIO
EXTRA_CONTEXT_TOKENS = 4  # of the request-to-token table
CHUNK_TOKENS = ((35, 2048), (60, 4096), (160, 8192))  # below so many GiB: --chunked-prefill-size
LARGEST_CHUNK_TOKENS = 16384
KV_BYTES = {"bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
STATE_BYTES = {"float32": 4, "bfloat16": 2}
M_STEP = 32  # rows to which kt-kernel pads every expert's batch
CPU_THREADS = 16
NO_SHORTAGE = -(1 << 62)


@dataclass(frozen=True, slots=True)
class Method:
    """A `--kt-method`, what the GPU then holds, and how many bytes an expert matrix [n, k] takes in host memory."""

    name: str
    gpu_format: str | None  # None: the format itself
    folder: str | None  # suffix of a converted weight folder; None: the checkpoint itself
    needs: str  # of the host's CPU


METHODS = {
    "bf16": Method("BF16", None, None, "AVX2 (AVX512-BF16 is faster)"),
    "checkpoint": Method("BF16", None, None, "AVX2 (AVX512-BF16 is faster)"),
    "fp8": Method("FP8", None, None, "AVX2 (AVX512-VBMI is faster)"),
    "gptq-int4-official": Method("GPTQ_INT4", None, None, "AVX2 (AVX-VNNI is faster)"),
    "int8": Method("AMXINT8", "bf16", "AMXINT8", "AVX512 (AMX is faster)"),
    "int4": Method("AMXINT4", "bf16", "AMXINT4", "AVX512 (AMX is faster)"),
}
LLAMAFILE = Method("LLAMAFILE", "bf16", "GGUF", "AVX2")


@dataclass(frozen=True, slots=True)
class Constants:
    """Bytes that follow from no line of source."""

    runtime: Amount  # CUDA context
    nccl: Amount  # per rank, where there are several
    graph: Amount  # decode graphs up to the running requests
    workspace: Amount  # attention and matmul workspaces
    prefill_percent: Amount  # of the activations that are counted below
    host: Amount  # scheduler, tokenizer and detokenizer processes
    source: str


CONSTANTS = Constants(
    runtime=estimated(400e6, 600e6, 1000e6),
    nccl=estimated(100e6, 300e6, 1000e6),
    graph=estimated(100e6, 250e6, 600e6),
    workspace=estimated(200e6, 400e6, 700e6),
    prefill_percent=Amount(80, 100, 150),
    host=estimated(3e9, 5e9, 9e9),
    source="common experience with SGLang on one to four GPUs; not measured",
)


def runs_on(device: Device, version: str) -> str | None:
    """kt-kernel and sglang-kt come as Linux x86-64 wheels for CUDA."""
    if device.vendor != "nvidia":
        return "KTransformers 0.7.2 needs an NVIDIA GPU beside an x86-64 host: use llama.cpp here"
    if device.kind != "discrete":
        return f"{device.title} has one memory for both and an ARM host: KTransformers has nothing to offload to"
    if not device.compute_capability or float(device.compute_capability) < 8.0:
        return f"{device.title} has compute capability {device.compute_capability}: KTransformers starts at 8.0"
    return None


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """Only mixtures of experts have something to move; the format decides `--kt-method`."""
    if not model.is_moe:
        return f"{model.name} has no routed experts: KTransformers would only be an older SGLang, use SGLang"
    if fmt.name == "checkpoint" and model.quantization:
        return (
            "KTransformers picks its method by format: name it (bf16, fp8, gptq-int4-official, int8, int4, a GGUF type)"
        )
    if fmt.family != "gguf" and fmt.name not in METHODS:
        return f"KTransformers 0.7.2 has no expert kernel for {fmt.name}: use bf16, fp8, int8, int4 or a GGUF type"
    if fmt.name == "fp8" and float(device.compute_capability or 0) < 8.9:
        return f"{device.title} has no FP8 units for what stays on the GPU: use bf16, int8 or int4"
    return None


def weight_formats(model: Model, device: Device) -> tuple[str, ...]:
    """Official releases and the converted folders; a GGUF has to be asked for."""
    return ("bf16", "fp8", "int8", "gptq-int4-official", "int4")


def kv_dtypes(device: Device, version: str) -> tuple[str, ...]:
    """Triton reads e4m3 from compute capability 8.9 on, e5m2 before."""
    newer = float(device.compute_capability or 0) >= 8.9
    return ("bf16", "fp8_e4m3" if newer else "fp8_e5m2")


def estimate(setup: Setup) -> "KTransformersEstimate":
    """Raises Unsupported for settings that the engine does not have or whose rules are not known here."""
    _refuse(setup)
    model, tp = setup.model, setup.tp
    method = _method(setup.weights)
    gpu_format = weight_format(method.gpu_format) if method.gpu_format else setup.weights
    table = weight_table(model, gpu_format, tp)
    chunk = setup.options.max_num_batched_tokens or _default_chunk(setup.devices)
    heads = max(1, model.num_key_value_heads // tp)
    state = (
        2 * (model.linear_conv_kernel_dim - 1) * model.conv_dim + STATE_BYTES[setup.state_dtype] * model.state_elements
    )
    host = Memory(
        weights=_expert_bytes(model, setup.weights, method),
        activation=estimated(*(bound * _host_pool_bytes(model, chunk) for bound in (0.9, 1, 1.2))),
        runtime=CONSTANTS.host,
    )
    host_limit = setup.options.host_memory_bytes
    return KTransformersEstimate(
        setup=setup,
        method=method,
        chunk_tokens=chunk,
        weights_bytes=_gpu_weight_bytes(model, table),
        cell_bytes=2 * model.full_attention_layers * heads * model.head_dim * KV_BYTES[setup.kv_dtype],
        slot_bytes=model.linear_attention_layers * state // tp,
        slots_per_seq=RADIX_SLOTS if setup.options.prefix_caching else 1,
        activation=_activation(setup, chunk),
        graph=CONSTANTS.graph if setup.options.cuda_graphs else exactly(0),
        runtime=CONSTANTS.runtime + CONSTANTS.nccl if tp > 1 else CONSTANTS.runtime,
        least_usable_bytes=min(device.usable_bytes for device in setup.devices),
        host=host,
        host_short_bytes=host.total.mid - host_limit if host_limit is not None else NO_SHORTAGE,
        expert_bytes_on_gpu=sum(table.experts) // model.num_experts,
    )


@dataclass(frozen=True, slots=True, eq=False)
class KTransformersEstimate:
    """One rank of `tp` equal ones, with pools of exactly the asked size, and the host beside them."""

    setup: Setup
    method: Method
    chunk_tokens: int
    weights_bytes: int
    cell_bytes: int  # one token in all attention layers
    slot_bytes: int  # one state in all Gated DeltaNet layers
    slots_per_seq: int
    activation: Amount
    graph: Amount
    runtime: Amount
    least_usable_bytes: int
    host: Memory
    host_short_bytes: int  # NO_SHORTAGE where the host is not known
    expert_bytes_on_gpu: int  # one more expert in every layer

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        fixed = self.weights_bytes + self.activation.mid + self.graph.mid + self.runtime.mid
        pools = (seqs * ctx_tokens + 1) * self.cell_bytes + (seqs * self.slots_per_seq + 1) * self.slot_bytes
        table = seqs * (ctx_tokens + EXTRA_CONTEXT_TOKENS) * 4
        return max(fixed + pools + table - self.least_usable_bytes, self.host_short_bytes)

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self.allocate(ctx_tokens, seqs).is_sure

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        memory = self._memory(ctx_tokens, seqs)
        total = memory.total
        free = self.least_usable_bytes - total.high
        spare_experts = max(0, min(self.setup.model.num_experts, free // self.expert_bytes_on_gpu))
        return Allocation(
            devices=tuple(DeviceShare(device, device.usable_bytes, memory) for device in self.setup.devices),
            host=self.host,
            reasons=self._reasons(total.mid),
            warnings=self._warnings(spare_experts),
            detail={
                "kt_method": self.method.name,
                "cell_bytes": self.cell_bytes,
                "max_total_tokens": seqs * ctx_tokens,
                "state_bytes_per_request": self.slot_bytes,
                "max_mamba_cache_size": seqs * self.slots_per_seq,
                "chunked_prefill_size": self.chunk_tokens,
                "mem_fraction_static": self._mem_fraction,
                "gpu_experts": 0,
                "gpu_experts_that_would_fit": spare_experts,
            },
            offloads=True,
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        setup, checkpoint = self.setup, self._checkpoint
        folder = f"{checkpoint}-{self.method.folder}" if self.method.folder else checkpoint
        words: list[object] = ["python", "-m", "sglang.launch_server", "--model-path", checkpoint]
        words += ["--kt-method", self.method.name, "--kt-weight-path", folder, "--kt-num-gpu-experts", 0]
        words += ["--kt-cpuinfer", CPU_THREADS, "--kt-threadpool-count", 1, "--disable-shared-experts-fusion"]
        words += ["--tensor-parallel-size", setup.tp, "--attention-backend", "triton"]
        words += [
            "--context-length",
            ctx_tokens,
            "--max-running-requests",
            seqs,
            "--max-total-tokens",
            seqs * ctx_tokens,
        ]
        words += ["--max-mamba-cache-size", seqs * self.slots_per_seq, "--mamba-scheduler-strategy", "no_buffer"]
        words += ["--mamba-ssm-dtype", setup.state_dtype, "--kv-cache-dtype", setup.kv_dtype]
        words += ["--mem-fraction-static", self._mem_fraction]
        words += ["--chunked-prefill-size", self.chunk_tokens]
        words += ["--cuda-graph-max-bs", seqs] if setup.options.cuda_graphs else ["--disable-cuda-graph"]
        if not setup.options.prefix_caching:
            words.append("--disable-radix-cache")
        overrides = rope_overrides(setup.model, ctx_tokens)
        if overrides is None:
            return shell_line(words)
        words += ["--json-model-override-args", compact_json(overrides)]
        return "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 " + shell_line(words)

    def _memory(self, ctx_tokens: int, seqs: int) -> Memory:
        table = seqs * (ctx_tokens + EXTRA_CONTEXT_TOKENS) * 4
        return Memory(
            weights=exactly(self.weights_bytes),
            kv_cache=exactly((seqs * ctx_tokens + 1) * self.cell_bytes + table),
            recurrent_state=exactly((seqs * self.slots_per_seq + 1) * self.slot_bytes),
            activation=self.activation,
            graph=self.graph,
            runtime=self.runtime,
        )

    @property
    def _mem_fraction(self) -> float:
        """Share of the free memory for weights and pools, rounded up: what is left is for activations and graphs."""
        reach = self.least_usable_bytes - self.runtime.mid
        apart = self.activation.mid + self.graph.mid
        return max(0.1, -((apart - reach) * 10_000 // reach) / 10_000) if reach > apart else 0.1

    def _reasons(self, needed_bytes: int) -> tuple[str, ...]:
        reasons = [
            f"{device.name} needs {needed_bytes / GIB:.2f} GiB and has {device.usable_bytes / GIB:.2f} GiB"
            for device in self.setup.devices
            if needed_bytes > device.usable_bytes
        ]
        if self.host_short_bytes > 0:
            needs = self.host.total.mid
            reasons.append(
                f"the host needs {needs / GIB:.1f} GiB for the experts as {self.method.name} and has "
                f"{(needs - self.host_short_bytes) / GIB:.1f} GiB"
            )
        return tuple(reasons)

    def _warnings(self, spare_experts: int) -> tuple[str, ...]:
        setup = self.setup
        warnings = [
            "set --kt-cpuinfer to the physical cores of the host and --kt-threadpool-count to its NUMA nodes",
            f"--kt-weight-path is a local folder; {self.method.name} needs a CPU with {self.method.needs}",
        ]
        if setup.options.host_memory_bytes is None:
            warnings.append(
                f"takes {self.host.total.mid / GIB:.0f} GiB of host memory, and how much there is is not known"
            )
        if spare_experts:
            experts = setup.model.num_experts
            warnings.append(
                f"--kt-num-gpu-experts {spare_experts} (of {experts} per layer) would still fit, and is faster"
            )
        if setup.model.has_vision and not setup.vision:
            warnings.append("sglang-kt loads the vision tower in any case")
        return tuple(warnings)

    @property
    def _checkpoint(self) -> str:
        """A local folder: kt-kernel reads the experts itself, and downloads nothing."""
        model, fmt = self.setup.model, self.setup.weights
        name = checkpoint_name(model, fmt if self.method.gpu_format is None else weight_format("bf16"))
        return name if model.path or name.startswith("./") else f"./{name.rsplit('/', 1)[-1]}"


def _refuse(setup: Setup) -> None:
    if setup.kv_dtype not in KV_BYTES:
        raise Unsupported(f"KTransformers has no {setup.kv_dtype} cache: give {', '.join(KV_BYTES)}")
    if setup.pp > 1:
        raise Unsupported("KTransformers is planned with tensor parallel only: leave out --pp")
    if setup.mtp:
        raise Unsupported("multi-token prediction with KTransformers has no known rule: leave out --mtp, or use SGLang")
    if setup.options.offload_experts is False:
        raise Unsupported("KTransformers keeps routed experts in host memory: use SGLang to keep them on the GPU")
    if setup.model.num_attention_heads % setup.tp or setup.model.linear_num_key_heads % setup.tp:
        raise Unsupported(f"{setup.model.name} cannot be cut into {setup.tp} parts: give a tp that divides its heads")


def _method(fmt: WeightFormat) -> Method:
    return LLAMAFILE if fmt.family == "gguf" else METHODS[fmt.name]


def _default_chunk(devices: tuple[Device, ...]) -> int:
    """`_handle_gpu_memory_settings`: by the memory of the smallest GPU."""
    least = min(device.usable_bytes for device in devices) / GIB
    return next((tokens for limit, tokens in CHUNK_TOKENS if least < limit), LARGEST_CHUNK_TOKENS)


def _gpu_weight_bytes(model: Model, table: WeightTable) -> int:
    """Everything but the routed experts and the prediction layer, on one rank."""
    return table.text - sum(table.experts) + table.vision


def _expert_bytes(model: Model, fmt: WeightFormat, method: Method) -> Amount:
    """Host bytes of all routed experts: gate and up [I, E], down [E, I], each on its own 64-byte boundary.

    GPTQ_INT4 stays packed on AVX2 and is unpacked to a byte per weight on CPUs with AVX-VNNI (the newer ones).
    """
    if method is LLAMAFILE:
        return exactly(sum(weight_table(model, fmt, 1).experts))
    inner, hidden = model.moe_intermediate_size, model.hidden_size
    layers = sum(1 for experts in weight_table(model, weight_format("bf16"), 1).experts if experts)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    bounds = ("packed", "GPTQ_VNNI") if method.name == "GPTQ_INT4" else (method.name, method.name)
    low, mid = (layers * model.num_experts * sum(_buffer_bytes(n, k, layout) for n, k in shapes) for layout in bounds)
    return Amount(low, mid, mid, exact=low == mid)


def _buffer_bytes(n: int, k: int, layout: str) -> int:
    """`BufferB::required_size(n, k)` of kt-kernel, rounded up to the 64 bytes of its allocation."""
    if layout == "BF16":
        size = 2 * n * k
    elif layout == "FP8":
        size = n * k + 4 * -(-n // 128) * -(-k // 128)
    elif layout == "AMXINT8":
        size = n * k + 4 * n
    elif layout == "AMXINT4":
        size = n * k // 2 + 4 * n
    elif layout == "GPTQ_VNNI":
        size = n * k + 6 * n * (k // 128)
    else:
        size = n * k // 2 + 4 * n * (k // 128)
    return -(-size // 64) * 64


def _host_pool_bytes(model: Model, chunk_tokens: int) -> int:
    """`AMX_MOE_BASE`: one pool for all layers, a row per routed token and padding per expert; bf16 in, float32 out."""
    rows = chunk_tokens * model.num_experts_per_tok + model.num_experts * M_STEP
    hidden, inner = model.hidden_size, model.moe_intermediate_size
    return rows * (2 * hidden + 2 * inner + 4 * hidden + 8 * inner + 5 * 64)


def _activation(setup: Setup, chunk_tokens: int) -> Amount:
    """Prefill of one chunk on one rank, sampler rows left out: projections, delta rule, staging for the experts."""
    model, tp = setup.model, setup.tp
    values = model.linear_num_value_heads * model.linear_value_head_dim
    states = 2 * model.state_elements // 64
    delta_rule = (2 * (3 * model.conv_dim + 7 * values) + states) // tp
    experts = 8 * model.hidden_size + 4 * model.num_experts + 6 * model.shared_expert_intermediate_size // tp
    per_token = 8 * model.hidden_size + max(delta_rule, experts)
    counted = chunk_tokens * (per_token + 2 * model.hidden_size)
    slack, workspace = CONSTANTS.prefill_percent, CONSTANTS.workspace
    low, mid, high = (counted * percent // 100 for percent in (slack.low, slack.mid, slack.high))
    activation = Amount(low, mid, high) + workspace
    vision = _vision_scratch(setup)
    return Amount(max(activation.low, vision), max(activation.mid, vision), max(activation.high, int(1.5 * vision)))


def _vision_scratch(setup: Setup) -> int:
    """One image of the largest size through the tower: 27 bytes per patch and hidden unit (vLLM's profile of it)."""
    vision = setup.model.vision
    if not setup.vision or vision is None:
        return 0
    tokens = setup.options.image_tokens or vision.max_image_tokens
    return tokens * vision.spatial_merge_size**2 * 27 * vision.hidden_size
