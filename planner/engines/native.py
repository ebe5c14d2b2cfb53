"""qwenfit's own runtime, which loads a quantized Qwen3.5 and generates: all of it is allocated before the first token.

This file is the contract that `kernels/runtime/memory.py` keeps, to the byte (tests/kernels/runtime/test_memory.py).
What lies on the device:

Weights, in the runtime layout. int4: codes uint16 [N, K/4]; int8: codes int8 [N, K]; a scale bf16 [K/G, N], and a zero
point bf16 [K/G, N] only where asymmetric; N padded to 16. What the checkpoint does not quantize keeps its dtype
(embedding and lm_head bf16, A_log and the gated norm as stored). The vision tower is never loaded, the layer of
multi-token prediction only with draft tokens.

KV cache, per full-attention layer (and one for the prediction layer): keys and values [seqs, KV, ctx, D], ctx padded
to 64.
    bf16: 2 bytes per element
    int8: per token and head D codes and one float32 scale, so (D + 4) bytes for keys and as many for values
Recurrent state, per Gated DeltaNet layer: [slots, NV, DV, DK] float32 or bfloat16, and [slots, C, 3] bf16 columns of
    convolution input; slots = seqs * (1 + draft tokens), for a rejected draft goes back to the state before it.
Scratch, one arena for a chunk of T prompt tokens: the residual stream and its norm, and the widest of
    the delta rule in four kernels: convolution in and out, z, gates; A [T, NV, 64] f32; w, u, new values [T, NV, DV]
        bf16; one state per 64 tokens [T/64, NV, DV, DK] bf16; outputs
    attention: queries with their gates, keys, values, output (scores stay on chip)
    the MLP: gate, up, product; experts: routed rows in, gate, up, product, out
Decode: partial sums of 16 splits [seqs, 1 + draft, H, 16, D + 2] f32; logits in bf16 and float32.
Unpacked weights: the largest quantized matrix in bf16 (GPU: large chunks go through the vendor's matmul).
On a CPU the arena is heap, with holes, and attention adds tiles of 2,048 keys and values and of their scores to 64
queries, float32.
"""

from functools import lru_cache

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import Piece, WeightFormat, pieces
from ...profiles.frozen import dataclass
from ...profiles.model import Model
from ..memory import Amount, Memory, estimated, exactly
from .engine import Allocation, DeviceShare, Engine, Setup
from .launch import checkpoint_name, shell_line

ENGINE = Engine(
    name="native",
    default_version="0.1",
    versions=("0.1",),
    source="qwenfit: planner/engines/native.py is the contract of its own runtime",
    parallelism="single",
    serves=False,
    released=False,
    loads_as_stored=False,
)

GIB = 1 << 30
ROW_PAD = 16
KV_PAD_TOKENS = 64
DELTA_CHUNK_TOKENS = 64
DECODE_SPLITS = 16
CPU_QUERY_ROWS, CPU_KEY_TOKENS = 64, 2048
SCALE_BYTES = 2
KV_SCALE_BYTES = 4
STATE_BYTES = {"float32": 4, "bfloat16": 2}
ROCM_TARGETS = ("gfx942", "gfx950", "gfx1100", "gfx1201")
DIALECTS = (None, "compressed-tensors", "gptq", "awq")


@dataclass(frozen=True, slots=True)
class Constants:
    """What the runtime cannot plan to the byte, and its default chunk."""

    gpu_runtime: Amount  # driver context, compiled kernels, matmul workspace
    cpu_runtime: Amount  # Python and torch in the same memory
    gpu_scratch: tuple[float, float]  # low and high, as shares of what is planned
    cpu_scratch: tuple[float, float]
    cpu_heap_share: float  # of the arena, holes included
    cpu_heap_bytes: int
    gpu_chunk_tokens: int
    cpu_chunk_tokens: int
    source: str


CONSTANTS = Constants(
    gpu_runtime=estimated(300e6, 450e6, 800e6),
    cpu_runtime=estimated(245e6, 254e6, 600e6),
    gpu_scratch=(0.9, 1.15),
    cpu_scratch=(0.7, 1.5),
    cpu_heap_share=1.25,
    cpu_heap_bytes=18_000_000,
    gpu_chunk_tokens=2048,
    cpu_chunk_tokens=512,
    source="CPU: `python -m qwenfit.kernels.run --depth` on 18 runs of 0.8B, 4B and 9B in int4 and int8, torch "
    "2.13.0+cpu, 22 November 2026: runtime 253 MB in all of them; the CUDA build of torch maps more, not measured. "
    "GPU: design values of qwenfit 0.1; contexts are common experience with torch 2.x and Triton 3.x, not measured",
)


def runs_on(device: Device, version: str) -> str | None:
    """Where the kernels compile to: CUDA from Turing on, four ROCm targets, CPUs."""
    capability = device.compute_capability
    if device.vendor == "nvidia" and capability and float(capability) < 7.5:
        return f"{device.title} has compute capability {capability}: the native runtime starts at 7.5 (Turing)"
    if device.vendor == "amd" and capability not in ROCM_TARGETS:
        return f"{device.title}: the native runtime is compiled for {', '.join(ROCM_TARGETS)}, not {capability}"
    if device.vendor in ("apple", "intel"):
        return f"the native runtime has no kernels for {device.title}: use MLX or llama.cpp"
    return None


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """It repacks integers from compressed-tensors, GPTQ and AWQ, and takes bf16."""
    dialect = (model.quantization or {}).get("method") if fmt.family == "checkpoint" else fmt.dialect
    if fmt.family in ("safetensors", "checkpoint") and dialect in DIALECTS:
        return None
    return f"the native runtime takes bf16, int8 and int4, not {fmt.name}"


def weight_formats(model: Model, device: Device) -> tuple[str, ...]:
    return ("bf16", "int8", "int4")


def kv_dtypes(device: Device, version: str) -> tuple[str, ...]:
    return ("bf16", "int8")


def estimate(setup: Setup) -> "NativeEstimate":
    """Raises Unsupported for settings that the runtime does not have."""
    _refuse(setup)
    model, device = setup.model, setup.devices[0]
    on_cpu = device.kind == "cpu"
    default_chunk = CONSTANTS.cpu_chunk_tokens if on_cpu else CONSTANTS.gpu_chunk_tokens
    chunk = setup.options.max_num_batched_tokens or default_chunk
    element = 2 * model.head_dim if setup.kv_dtype == "bf16" else model.head_dim + KV_SCALE_BYTES
    state = STATE_BYTES[setup.state_dtype] * model.state_elements
    state += 2 * (model.linear_conv_kernel_dim - 1) * model.conv_dim
    draft = 1 + setup.mtp
    attention_layers = model.full_attention_layers + (1 if setup.mtp else 0)
    decode_bytes = draft * model.num_attention_heads * DECODE_SPLITS * (model.head_dim + 2) * 4
    return NativeEstimate(
        setup=setup,
        weights_bytes=weights_bytes(model, setup.weights, with_mtp=setup.mtp > 0),
        runtime=_calibrated(setup, "runtime", CONSTANTS.cpu_runtime if on_cpu else CONSTANTS.gpu_runtime),
        scratch=_scratch(setup),
        chunk_tokens=chunk,
        kv_bytes_per_token=attention_layers * model.num_key_value_heads * 2 * element,
        state_bytes_per_seq=draft * model.linear_attention_layers * state,
        arena_bytes=_cpu_arena(model, chunk) if on_cpu else _gpu_arena(model, chunk, setup.weights),
        scratch_bytes_per_seq=draft * model.vocab_size * 6 + decode_bytes,
    )


@dataclass(frozen=True, slots=True, eq=False)
class NativeEstimate:
    """What `python -m qwenfit.kernels.run` allocates at start for `seqs` sequences of `ctx_tokens`."""

    setup: Setup
    weights_bytes: int
    runtime: Amount
    scratch: tuple[float, float, float]  # low, middle and high of what scratch takes, as shares of its formula
    chunk_tokens: int
    kv_bytes_per_token: int
    state_bytes_per_seq: int
    arena_bytes: int
    scratch_bytes_per_seq: int

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        per_seq = _padded(ctx_tokens) * self.kv_bytes_per_token + self.state_bytes_per_seq
        fixed = self.weights_bytes + self._activation(seqs).mid + self.runtime.mid
        return fixed + seqs * per_seq - self.setup.devices[0].usable_bytes

    def _activation(self, seqs: int) -> Amount:
        planned = self.arena_bytes + seqs * self.scratch_bytes_per_seq
        low, middle, high = self.scratch
        return estimated(planned * low, planned * middle, planned * high)

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self.allocate(ctx_tokens, seqs).is_sure

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        device = self.setup.devices[0]
        memory = Memory(
            weights=exactly(self.weights_bytes),
            kv_cache=exactly(seqs * _padded(ctx_tokens) * self.kv_bytes_per_token),
            recurrent_state=exactly(seqs * self.state_bytes_per_seq),
            activation=self._activation(seqs),
            runtime=self.runtime,
        )
        share = DeviceShare(device, device.usable_bytes, memory)
        short = self.shortfall_bytes(ctx_tokens, seqs)
        needs, has = (device.usable_bytes + short) / GIB, device.usable_bytes / GIB
        return Allocation(
            devices=(share,),
            reasons=(f"{device.name} needs {needs:.2f} GiB and has {has:.2f} GiB",) if short > 0 else (),
            warnings=self._warnings(ctx_tokens),
            detail={
                "kv_bytes_per_token": self.kv_bytes_per_token,
                "kv_tokens_per_sequence": _padded(ctx_tokens),
                "state_bytes_per_sequence": self.state_bytes_per_seq,
                "state_slots": seqs * (1 + self.setup.mtp),
                "prefill_chunk_tokens": self.chunk_tokens,
                "arena_bytes": self.arena_bytes,
            },
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        setup = self.setup
        words: list[object] = ["python", "-m", "qwenfit.kernels.run", checkpoint_name(setup.model, setup.weights)]
        words += ["--ctx", ctx_tokens, "--seqs", seqs, "--kv-dtype", setup.kv_dtype, "--state-dtype", setup.state_dtype]
        words += ["--prefill-chunk", self.chunk_tokens]
        if setup.mtp:
            words += ["--mtp", setup.mtp]
        return shell_line([*words, "--device", "cpu" if setup.devices[0].kind == "cpu" else "cuda"])

    def _warnings(self, ctx_tokens: int) -> tuple[str, ...]:
        device, warnings = self.setup.devices[0], []
        if device.compute_capability == "7.5":
            warnings.append(
                "no tensor cores for these kernels on Turing: prefill unpacks weights for the vendor's matmul"
            )
        if ctx_tokens > self.setup.model.native_context_tokens:
            warnings.append("the native runtime reads rope scaling from config.json: put YaRN's rope_parameters there")
        return tuple(warnings)


@lru_cache(maxsize=4096)
def weights_bytes(model: Model, fmt: WeightFormat, with_mtp: bool = False) -> int:
    """Bytes of the text model (and of the prediction layer) in the runtime layout."""
    parts = ("text", "mtp") if with_mtp else ("text",)
    symmetric = _is_symmetric(fmt, model)
    own = [piece for piece in pieces(model, fmt) if piece.part in parts]
    if fmt.family != "checkpoint":
        return sum(runtime_bytes(piece, symmetric) for piece in own)
    scales: dict[str, set[tuple[int, ...]]] = {}
    for piece in own:
        if len(piece.shape) > 1 and piece.storage.bits == 16:
            scales.setdefault(piece.role, set()).add(piece.shape)
    return sum(_loaded_bytes(piece, scales.get(piece.role, set()), symmetric) for piece in own)


def _loaded_bytes(piece: Piece, scales: set[tuple[int, ...]], symmetric: bool) -> int:
    """Bytes in the runtime layout of tensors as a quantized checkpoint stores them. Codes and scales take as much as in
    the file. Zero points stand there packed into 32-bit words, 4 or 8 to one, and become bf16 like their scales, or
    nothing where they say no more than "symmetric"; indices and shapes are not kept."""
    if piece.tensor.dtype not in ("I32", "I64"):
        return piece.bytes
    if len(piece.shape) < 2:
        return 0
    rows, columns = piece.shape[-2:]
    for packed in (4, 8):
        for shape in ((rows * packed, columns), (rows, columns * packed)):
            if shape in scales:
                zeros = 0 if symmetric else SCALE_BYTES * shape[0] * shape[1]
                return zeros * max(1, len(piece.layers)) * piece.per_layer
    return piece.bytes


def runtime_bytes(piece: Piece, symmetric: bool) -> int:
    """Bytes of tensors [..., N, K] in the runtime layout: integers with scales per group, or as stored."""
    if not _is_integer(piece):
        return piece.bytes
    storage = piece.storage
    *matrices, rows, columns = piece.shape
    rows = -(-rows // ROW_PAD) * ROW_PAD
    groups = -(-columns // storage.group_columns)
    total = rows * columns * storage.bits // 8 + rows * groups * SCALE_BYTES * (1 if symmetric else 2)
    for count in matrices:
        total *= count
    return total * max(1, len(piece.layers)) * piece.per_layer


def arena_bytes_per_token(model: Model) -> int:
    """Bytes of the prefill arena per token of a chunk, bf16 unless said otherwise."""
    heads, hidden = model.linear_num_value_heads, model.hidden_size
    values = heads * model.linear_value_head_dim
    states = 2 * model.state_elements // DELTA_CHUNK_TOKENS
    delta_rule = 2 * (2 * model.conv_dim + 5 * values) + heads * (8 + 4 * DELTA_CHUNK_TOKENS) + states
    width = model.num_attention_heads * model.head_dim
    attention = 2 * (3 * width + 2 * model.num_key_value_heads * model.head_dim)
    mlp = 6 * model.intermediate_size
    if model.is_moe:
        routed = model.num_experts_per_tok * (2 * hidden + 3 * model.moe_intermediate_size)
        mlp = 2 * (routed + 3 * model.shared_expert_intermediate_size) + 4 * model.num_experts
    return 4 * hidden + max(delta_rule, attention, mlp)


def _cpu_arena(model: Model, chunk_tokens: int) -> int:
    arena = int(CONSTANTS.cpu_heap_share * (chunk_tokens * arena_bytes_per_token(model))) + CONSTANTS.cpu_heap_bytes
    tile = 8 * model.num_key_value_heads * model.head_dim + 4 * CPU_QUERY_ROWS * model.num_attention_heads
    return arena + CPU_KEY_TOKENS * tile


def _gpu_arena(model: Model, chunk_tokens: int, fmt: WeightFormat) -> int:
    return chunk_tokens * arena_bytes_per_token(model) + largest_dequantized(model, fmt)


def _calibrated(setup: Setup, part: str, amount: Amount) -> Amount:
    """The same with what receipts say of it: weights, caches and states are exact as they are."""
    calibration = setup.options.calibration
    factor = calibration.factor("native", setup.version, setup.devices, part) if calibration else None
    return estimated(*factor.scaled((amount.low, amount.mid, amount.high))) if factor else amount


def _scratch(setup: Setup) -> tuple[float, float, float]:
    low, high = CONSTANTS.cpu_scratch if setup.devices[0].kind == "cpu" else CONSTANTS.gpu_scratch
    calibration = setup.options.calibration
    factor = calibration.factor("native", setup.version, setup.devices, "activation") if calibration else None
    return factor.scaled((low, 1.0, high)) if factor else (low, 1.0, high)


def _refuse(setup: Setup) -> None:
    if setup.kv_dtype not in ("bf16", "int8"):
        raise Unsupported(f"the native runtime has no {setup.kv_dtype} cache: give bf16 or int8")
    if setup.vision:
        raise Unsupported("the native runtime is text only: leave out --vision, or use vLLM")
    if setup.options.offload_experts:
        raise Unsupported("the native runtime keeps experts on the device: use llama.cpp or ktransformers")


def _is_integer(piece: Piece) -> bool:
    return len(piece.shape) > 1 and piece.storage.group_columns > 0 and piece.storage.bits in (4, 8)


def _is_symmetric(fmt: WeightFormat, model: Model) -> bool:
    if fmt.family == "checkpoint":
        return bool((model.quantization or {}).get("symmetric", True))
    return fmt.symmetric


@lru_cache(maxsize=4096)
def largest_dequantized(model: Model, fmt: WeightFormat) -> int:
    """bf16 bytes of the largest matrix of a layer that is stored as integers; experts are unpacked one by one."""
    matrices = (
        2 * piece.shape[-2] * piece.shape[-1]
        for piece in pieces(model, fmt)
        if piece.part == "text" and piece.layers and _is_integer(piece)
    )
    return max(matrices, default=0)


def _padded(ctx_tokens: int) -> int:
    return -(-ctx_tokens // KV_PAD_TOKENS) * KV_PAD_TOKENS
