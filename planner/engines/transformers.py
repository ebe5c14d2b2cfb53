"""Transformers: a library whose cache grows with the text, and a small server that answers one request at a time.

Read in transformers 5.23.0:
- `cache_utils.py`: `DynamicLayer` joins new keys and values to the old ones, so a cache has exactly the tokens that
  were seen; `LinearAttentionLayer` keeps `linear_conv_kernel_dim` columns (4, not 3) of convolution input in the
  model's dtype and a float32 recurrent state. `QuantizedCache` refuses models with linear attention: bf16 it is.
- `generation/utils.py`: the whole prompt goes through the model at once (`prefill_chunk_size` is unset by default);
  only the last position gets logits.
- `models/qwen3_5/modeling_qwen3_5.py`: `^mtp.*` is dropped; without the `fla` package the delta rule runs in float32.
- `quantizers/`: compressed-tensors weights turn into bf16 at the first forward pass, GPTQ and AWQ stay packed, FP8
  too from compute capability 8.9 on and is unpacked to bf16 elsewhere; a GGUF stays in blocks only where a kernel can
  be fetched for the device; finished NVFP4 checkpoints are refused.
- `cli/serve.py`, `cli/serving/model_manager.py`: the server loads the multimodal class wherever there is one, and with
  it the vision tower. It has no flag for the context, the cache or rope scaling.

Not modelled: offloading to host memory, tensor parallel plans (they need torchrun), padded batches.
"""

import os

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import WeightFormat, weight_format
from ...profiles.frozen import dataclass
from ...profiles.model import Model
from ..memory import Amount, Memory, estimated, exactly
from ..weights import WeightTable, weight_table
from .engine import Allocation, DeviceShare, Engine, Setup
from .launch import base_name, checkpoint_name, shell_line
from .llamacpp_launch import gguf_name
from .support import likened

ENGINE = Engine(
    name="transformers",
    default_version="5.23.0",
    versions=("5.23.0",),
    source="transformers 5.23.0: cache_utils.py, generation/utils.py, models/qwen3_5, quantizers, cli/serve.py",
    parallelism="layers",
    serves=False,
)

GIB = 1 << 30
TORCH_DEVICES = {"nvidia": "cuda", "amd": "cuda", "intel": "xpu", "apple": "mps", "cpu": "cpu"}


@dataclass(frozen=True, slots=True)
class Constants:
    """Bytes that follow from no line of source."""

    gpu_runtime: Amount  # driver context and library workspaces of one process
    cpu_runtime: Amount  # Python, torch and the server in the same memory
    host: Amount  # the process beside a GPU, pages of the checkpoint left out
    vision_bytes_per_hidden_unit: Amount  # of one patch
    logits_bytes_per_word: int
    allocator_overhead: float  # upper end: blocks that torch holds and cannot use
    source: str


CONSTANTS = Constants(
    gpu_runtime=estimated(300e6, 500e6, 900e6),
    cpu_runtime=estimated(500e6, 900e6, 1500e6),
    host=estimated(1000e6, 1800e6, 3000e6),
    vision_bytes_per_hidden_unit=Amount(20, 27, 40),
    logits_bytes_per_word=10,
    allocator_overhead=1.15,
    source=(
        "runtime, host, allocator: common experience with torch 2.x, not measured; vision: vLLM's profile of the same "
        "tower (31 kB per patch of 1152); logits: a bf16 row, its float32 copy and one more for sampling"
    ),
)


def runs_on(device: Device, version: str) -> str | None:
    """None: torch runs on every kind of device in the catalog."""
    return None


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """Why `from_pretrained` cannot load that format there."""
    fmt = likened(model, fmt)
    if fmt.family == "mlx":
        return "transformers does not read MLX checkpoints: use --engine mlx, or bf16"
    if fmt.family == "gguf" and model.architecture == "qwen3_next":
        return "transformers 5.23 reads GGUF files of Qwen3.5, not of Qwen3-Next: use --engine llama.cpp"
    if fmt.name == "gptq-int4-official":
        return (
            "transformers quantizes every layer of a GPTQ checkpoint, and the official GPTQ-Int4 keeps attention "
            "in bf16 (its `dynamic` rules are not read): use vLLM or SGLang"
        )
    if fmt.dialect == "modelopt":
        return "transformers 5.23 does not load finished NVFP4 checkpoints: use vLLM or SGLang, or bf16"
    if fmt.name == "fp8" and device.vendor == "amd" and not _keeps_fp8(device):
        return f"{device.title} has no FP8 units, and transformers would use FP8 kernels on it: use bf16"
    return None


def weight_formats(model: Model, device: Device) -> tuple[str, ...]:
    """bf16, and what takes less than bf16 once it is loaded."""
    return ("bf16", *(("fp8",) if _keeps_fp8(device) else ()), "int8-gptq", "int4-gptq")


def kv_dtypes(device: Device, version: str) -> tuple[str, ...]:
    return ("bf16",)


def estimate(setup: Setup) -> "TransformersEstimate":
    """Raises Unsupported for settings that transformers does not have."""
    _refuse(setup)
    model, options = setup.model, setup.options
    resident = _resident(setup.weights, model, setup.devices[0])
    table = weight_table(model, resident, 1)
    loads_vision = model.vision is not None and not _text_only_file(setup)
    low, mid = _prefill_bytes_per_token(model)
    return TransformersEstimate(
        setup=setup,
        resident=resident,
        stages=_stages(setup, table, table.vision if loads_vision else 0),
        loads_vision=loads_vision,
        chunk_tokens=options.max_num_batched_tokens or 0,
        prefill_bytes_per_token=(low, mid, int(mid * CONSTANTS.allocator_overhead)),
        chunk_bytes_per_ctx_token=_chunk_bytes_per_ctx_token(model, options.max_num_batched_tokens or 0),
        score_bytes_per_pair=_score_bytes_per_pair(model, setup.devices),
        logits_bytes_per_seq=CONSTANTS.logits_bytes_per_word * model.vocab_size,
        vision_scratch=_vision_scratch(setup),
    )


@dataclass(frozen=True, slots=True)
class Stage:
    """One device and its run of layers."""

    device: Device
    weights_bytes: int
    runtime: Amount
    layers: int
    kv_bytes_per_token: int
    state_bytes_per_seq: int

    @property
    def surplus_bytes(self) -> int:
        """What is taken before the first token, less what there is."""
        return self.weights_bytes + self.runtime.mid - self.device.usable_bytes


@dataclass(frozen=True, slots=True, eq=False)
class TransformersEstimate:
    """One `generate()` over a batch of `seqs` prompts of equal length, filled to `ctx_tokens`.

    Amounts per token and sequence are (low, mid, high). Low: with the `fla` kernels; mid: as `pip install` leaves it.
    """

    setup: Setup
    resident: WeightFormat
    stages: tuple[Stage, ...]
    loads_vision: bool
    chunk_tokens: int  # 0: the prompt is not cut
    prefill_bytes_per_token: tuple[int, int, int]
    chunk_bytes_per_ctx_token: int
    score_bytes_per_pair: tuple[int, int, int]  # of a query token and a context token; 0 where attention is fused
    logits_bytes_per_seq: int
    vision_scratch: Amount

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        short = max(
            stage.surplus_bytes + seqs * (ctx_tokens * stage.kv_bytes_per_token + stage.state_bytes_per_seq)
            for stage in self.stages
        )
        return short + self._activation(ctx_tokens, seqs, 1)

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self.allocate(ctx_tokens, seqs).is_sure

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        low, mid, high = (self._activation(ctx_tokens, seqs, bound) for bound in range(3))
        activation = Amount(low, mid, high)
        shares = tuple(
            DeviceShare(
                stage.device,
                stage.device.usable_bytes,
                Memory(
                    weights=self._weights(stage),
                    kv_cache=exactly(seqs * ctx_tokens * stage.kv_bytes_per_token),
                    recurrent_state=exactly(seqs * stage.state_bytes_per_seq),
                    activation=activation,
                    runtime=stage.runtime,
                ),
            )
            for stage in self.stages
        )
        return Allocation(
            devices=shares,
            host=Memory(runtime=CONSTANTS.host) if self._has_host else Memory(),
            reasons=self._reasons(shares) if self.shortfall_bytes(ctx_tokens, seqs) > 0 else (),
            warnings=self._warnings(ctx_tokens, seqs),
            detail={
                "cache": "DynamicCache",
                "kv_bytes_per_token": sum(stage.kv_bytes_per_token for stage in self.stages),
                "state_bytes_per_sequence": sum(stage.state_bytes_per_seq for stage in self.stages),
                "prefill_tokens_at_once": self._tokens_at_once(ctx_tokens) * seqs,
                "weights_in_memory": self.resident.name,
                "layers_per_device": [stage.layers for stage in self.stages],
                "vision_tower_loaded": self.loads_vision,
            },
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        return shell_line(
            ("transformers", "serve", self._checkpoint, "--device", self._torch_device, "--dtype", self._dtype)
        )

    def _activation(self, ctx_tokens: int, seqs: int, bound: int) -> int:
        """Prefill and image encoding do not overlap, so the larger of the two counts."""
        per_token = self.prefill_bytes_per_token[bound] + ctx_tokens * self.score_bytes_per_pair[bound]
        per_seq = self._tokens_at_once(ctx_tokens) * per_token + self.logits_bytes_per_seq
        prefill = seqs * (per_seq + ctx_tokens * self.chunk_bytes_per_ctx_token)
        scratch = self.vision_scratch
        return max(prefill, (scratch.low, scratch.mid, scratch.high)[bound])

    def _weights(self, stage: Stage) -> Amount:
        """Exact on one device; where accelerate cuts between several is followed only roughly."""
        size = stage.weights_bytes
        return Amount(size, size, size, exact=len(self.stages) == 1)

    def _reasons(self, shares: tuple[DeviceShare, ...]) -> tuple[str, ...]:
        why = "" if self.chunk_tokens else ": transformers takes the whole prompt in one pass"
        totals = [(share.device.name, share.memory.total.mid, share.usable_bytes) for share in shares]
        return tuple(
            f"{name} needs {needed / GIB:.2f} GiB and has {usable / GIB:.2f} GiB{why}"
            for name, needed, usable in totals
            if needed > usable
        )

    def _tokens_at_once(self, ctx_tokens: int) -> int:
        return min(ctx_tokens, self.chunk_tokens) if self.chunk_tokens else ctx_tokens

    def _warnings(self, ctx_tokens: int, seqs: int) -> tuple[str, ...]:
        setup, model = self.setup, self.setup.model
        warnings = [f"transformers serve has no context limit: this is the memory at {ctx_tokens:,} tokens"]
        if seqs > 1:
            warnings.append(
                f"transformers serve answers one request at a time: {seqs} sequences is one generate() call with a "
                f"batch of {seqs} prompts of equal length"
            )
        if self.chunk_tokens:
            warnings.append(
                f'"prefill_chunk_size": {self.chunk_tokens} has to stand in the checkpoint\'s generation_config.json: '
                "there is no flag for it"
            )
        if self.loads_vision and not setup.vision:
            warnings.append("transformers serve loads the vision tower in any case; AutoModelForCausalLM leaves it out")
        if self.resident is not setup.weights:
            warnings.append(_unpacked_sentence(setup.weights))
        if ctx_tokens > model.native_context_tokens:
            warnings.append(
                "transformers serve has no flag for rope scaling: put YaRN's rope_parameters into the checkpoint's "
                "config.json"
            )
        return tuple(warnings)

    @property
    def _has_host(self) -> bool:
        return any(stage.device.kind == "discrete" for stage in self.stages)

    @property
    def _torch_device(self) -> str:
        return "auto" if self.setup.pp > 1 else TORCH_DEVICES[self.setup.devices[0].vendor]

    @property
    def _dtype(self) -> str:
        device = self.setup.devices[0]
        return "float16" if device.vendor == "nvidia" and _capability(device) < 8 else "bfloat16"

    @property
    def _checkpoint(self) -> str:
        """`<repository or folder>:<file>.gguf` is how `transformers serve` takes a GGUF (`split_model_id`)."""
        model, fmt = self.setup.model, self.setup.weights
        if model.path is not None and likened(model, fmt).family == "gguf":
            folder, name = os.path.split(gguf_name(model, fmt))
            return f"{folder or '.'}:{name}"
        if fmt.family != "gguf":
            return checkpoint_name(model, fmt)
        name = base_name(model)
        return f"unsloth/{name}-GGUF:{name}-{fmt.name.removeprefix('gguf-').removesuffix('-mtp').upper()}.gguf"


def _refuse(setup: Setup) -> None:
    if setup.kv_dtype != "bf16":
        raise Unsupported(
            "transformers quantizes no cache of a model with linear attention (QuantizedCache refuses it): "
            "leave out --kv-dtype"
        )
    if setup.state_dtype != "float32":
        raise Unsupported("transformers keeps the recurrent state in float32: leave out --state-dtype")
    if setup.mtp:
        raise Unsupported("transformers drops the multi-token prediction layer: leave out --mtp")
    if setup.options.offload_experts:
        raise Unsupported("transformers has no expert offload that can be planned: use llama.cpp or ktransformers")
    if setup.vision and _text_only_file(setup):
        raise Unsupported("a GGUF file holds no vision tower for transformers: leave out --vision, or use bf16")


def _text_only_file(setup: Setup) -> bool:
    return likened(setup.model, setup.weights).family == "gguf"


def _capability(device: Device) -> float:
    """CUDA compute capability; 0 where there is none."""
    return float(device.compute_capability or 0) if device.vendor == "nvidia" else 0.0


def _keeps_fp8(device: Device) -> bool:
    """`FineGrainedFP8HfQuantizer.validate_environment`: CUDA from 8.9 on (ROCm passes), XPU."""
    if device.vendor == "nvidia":
        return _capability(device) >= 8.9
    return device.vendor == "intel" or (device.vendor == "amd" and "fp8" in device.flops_per_s)


def _resident(fmt: WeightFormat, model: Model, device: Device) -> WeightFormat:
    """The format in which the weights lie in memory once the first request has run."""
    dialect = (model.quantization or {}).get("method") if fmt.family == "checkpoint" else fmt.dialect
    unpacked = fmt.family == "gguf" or dialect in ("gguf", "compressed-tensors")
    if unpacked or (dialect == "fp8" and not _keeps_fp8(device)):
        return weight_format("bf16")
    return fmt


def _unpacked_sentence(fmt: WeightFormat) -> str:
    if fmt.family == "gguf":
        return (
            "transformers unpacks a GGUF to bf16 unless it can fetch a kernel for this device: llama.cpp runs it packed"
        )
    if fmt.name == "fp8":
        return "without FP8 kernels (compute capability 8.9) transformers unpacks FP8 weights to bf16"
    return (
        "transformers unpacks these weights to bf16 at the first request, so they take what bf16 takes; a GPTQ or AWQ "
        "export stays packed"
    )


def _prefill_bytes_per_token(model: Model) -> tuple[int, int]:
    """Bytes alive per prompt token in the widest layer, (with `fla`, without).

    Traced with CPU tensors through transformers 5.23.0's own modules: torch's delta rule holds 12 float32 vectors of
    128 per value head and its gates (6166 B), grouped_mm 4 bf16 copies of every routed row, the MLP three intermediate
    and three hidden vectors. What `fla` holds is counted from its kernels, not traced: w, u, new values, outputs and
    normalised inputs in bf16, one 128 x 128 state per 64 tokens.
    """
    hidden, channels, heads = model.hidden_size, model.conv_dim, model.linear_num_value_heads
    torch_delta_rule = 4 * hidden + 2 * channels + 6166 * heads
    fla_delta_rule = 4 * hidden + 6 * channels + 2050 * heads
    attention = 4 * hidden + 3332 * model.num_attention_heads
    mlp = 6 * (model.intermediate_size + hidden)
    experts = 0
    if model.is_moe:
        routed = model.num_experts_per_tok
        experts = 8 * routed * hidden + 8 * hidden + 2 * model.num_experts + 40 * routed
    others = max(attention, mlp, experts)
    return max(fla_delta_rule, others), max(torch_delta_rule, others)


def _chunk_bytes_per_ctx_token(model: Model, chunk_tokens: int) -> int:
    """A chunk behind a filled cache needs a mask (bool and bf16), and keys and values repeated for every query head."""
    if not chunk_tokens:
        return 0
    return 3 * chunk_tokens + 4 * model.num_attention_heads * model.head_dim


def _score_bytes_per_pair(model: Model, devices: tuple[Device, ...]) -> tuple[int, int, int]:
    """(low, mid, high) where torch has no fused prefill for 256-wide grouped heads: scores and their softmax in full.

    Metal, and CUDA before 8.0: `integrations/sdpa_attention.py` asks for `enable_gqa`, which only the flash kernel and
    the plain one take. Not measured.
    """
    unfused = any(device.vendor == "apple" or 0 < _capability(device) < 8 for device in devices)
    heads = model.num_attention_heads if unfused else 0
    return 0, 4 * heads, 8 * heads


def _vision_scratch(setup: Setup) -> Amount:
    """One image of the largest size: 4 patches per token through the tower, 1536 float32 values each at its door."""
    vision = setup.model.vision
    if not setup.vision or vision is None:
        return exactly(0)
    tokens = setup.options.image_tokens or vision.max_image_tokens
    patches = tokens * vision.spatial_merge_size**2
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    fixed = patches * values * 4 + tokens * vision.out_hidden_size * 2
    per_unit = CONSTANTS.vision_bytes_per_hidden_unit
    units = patches * vision.hidden_size
    return estimated(fixed + units * per_unit.low, fixed + units * per_unit.mid, fixed + units * per_unit.high)


def _stages(setup: Setup, table: WeightTable, vision_bytes: int) -> tuple[Stage, ...]:
    """`device_map="auto"`: whole layers in order, each device but the last up to an equal part of the weights.

    accelerate's `get_balanced_memory`: an equal part and the mean of the leaf modules on top, never more than there is.
    """
    model, devices = setup.model, setup.devices
    layers = [layer + experts for layer, experts in zip(table.layers, table.experts, strict=True)]
    first, last = table.embedding + vision_bytes, table.norm + table.lm_head
    equal_part = (first + last + sum(layers)) // len(devices) + max(layers)
    stages: list[Stage] = []
    start = 0
    for index, device in enumerate(devices):
        runtime = CONSTANTS.cpu_runtime if device.kind == "cpu" else CONSTANTS.gpu_runtime
        weights = first if index == 0 else 0
        end = start
        if index == len(devices) - 1:
            end = len(layers)
            weights += sum(layers[start:]) + last
        else:
            room = min(equal_part, device.usable_bytes - runtime.mid)
            while end < len(layers) and weights + layers[end] <= room:
                weights += layers[end]
                end += 1
        kinds = model.layer_types[start:end]
        attention = kinds.count("full_attention")
        stages.append(
            Stage(
                device,
                weights,
                runtime,
                end - start,
                attention * model.num_key_value_heads * model.head_dim * 4,
                (len(kinds) - attention)
                * (2 * model.linear_conv_kernel_dim * model.conv_dim + 4 * model.state_elements),
            )
        )
        start = end
    return tuple(stages)
