"""What vLLM takes beside weights and cache: activations, captured graphs, and what lies outside its budget.

None of this can be computed exactly. Every constant is an interval with its source in `CONSTANTS`, one frozen value of
which a calibration (`../calibration.py`) makes another. Shapes come from vLLM 0.32: `v1/worker/gpu_model_runner.py`
(`profile_run`, `_dummy_sampler_run`), `config/vllm.py` (`_set_cudagraph_sizes`), and the kernels that it carries
(`third_party/flash_linear_attention/ops/chunk.py`).

Two things are easily missed. The profile run skips the Gated DeltaNet kernels (`_warmup_prefill_kernels` runs 64 tokens
of them), so what they need in a real prefill beyond the profiled peak comes on top of the budget. And the snapshot that
the budget is measured from is taken after the driver context and the communicator exist, so those come on top as well.

Letters: E hidden, V vocabulary, NK, NV, DK, DV as in `profiles/model.py`; T tokens of a batch.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

from ...profiles.device import Device
from ...profiles.frozen import dataclass, replace
from ...profiles.model import Model

if TYPE_CHECKING:
    from ..calibration import Calibration

MIB = 1 << 20
GIB = 1 << 30
FLASHINFER_WORKSPACE_BYTES = 394 * MIB  # VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE: allocated with the cache, not before
CHUNK_TOKENS = 64  # FLA_CHUNK_SIZE

Bounds = tuple[float, float, float]
"""Lowest, expected and highest value."""
NONE: Bounds = (0.0, 0.0, 0.0)
LOW, MID, HIGH = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class Constants:
    """Bytes, unless they scale something. Each with its source beside it in `CONSTANTS`."""

    context: Bounds  # driver context of one process, outside the budget
    communicator: Bounds  # NCCL or RCCL per rank where there is more than one, outside the budget
    late: Bounds  # autotuning, fragmentation and modules loaded after the profile, outside the budget
    late_fp4: Bounds  # the same where Blackwell's FP4 kernels are tuned
    workspace: Bounds  # persistent buffers of the runner, in the budget
    layers: Bounds  # scales the activation peak of the layers
    delta: Bounds  # scales the Gated DeltaNet workspace
    encoder: Bounds  # scales the activation peak of the vision tower
    sampler_bytes_per_logit: Bounds  # per sampled row and entry of the vocabulary
    graph_bytes_per_capture: Bounds
    cpu_process: Bounds  # Python, torch and compiled kernels in host memory, on the CPU backend


CONSTANTS = Constants(
    # common experience is 0.3 to 0.6 GB; what an RTX 3090 holds at boot over its budget (club-3090 docs/CLIFFS.md)
    context=(0.25 * GIB, 0.35 * GIB, 0.6 * GIB),
    # 0.2 to 0.3 GB at TP 2 (club-3090 docs/KV_MATH.md)
    communicator=(0.08 * GIB, 0.2 * GIB, 0.6 * GIB),
    # Qwen3.6-27B on one RTX 3090: 0.1 to 0.25 GiB at boot (club-3090 docs/CLIFFS.md, May 2026)
    late=(0.05 * GIB, 0.15 * GIB, 0.7 * GIB),
    # NVFP4 on RTX 5090: 1.0 to 2.9 GB over the budget in all (club-3090 issues 619, 838, 849, 858)
    late_fp4=(0.4 * GIB, 1.0 * GIB, 2.2 * GIB),
    # what weights, encoder and cache leave unexplained in the boot logs of the same four runs
    workspace=(0.1 * GIB, 0.2 * GIB, 0.4 * GIB),
    # shapes of the compiled layer; the allocator rounds up
    layers=(0.9, 1.0, 1.25),
    # shapes in chunk_gated_delta_rule_fwd: 477 MiB at T = 4128 on 27B; about 500 were seen (club-3090 docs/CLIFFS.md)
    delta=(0.85, 1.0, 1.15),
    # shapes of a vision block; cache sizes logged with vision on one and on two RTX 5090
    encoder=(0.6, 1.0, 1.3),
    # bf16 and fp32 logits, probabilities and noise; sorting adds 16 bytes
    sampler_bytes_per_logit=(14, 18, 30),
    # logged: 1.62 GiB for 86, 0.36 GiB for 16, 0.09 GiB for 5 captures
    graph_bytes_per_capture=(12 * MIB, 20 * MIB, 32 * MIB),
    # estimate
    cpu_process=(1.0 * GIB, 1.6 * GIB, 2.5 * GIB),
)


# What a log can say of each part, and the constants behind it. A real prefill's part (`delta`) is in no log.
CALIBRATED = {
    "graph": ("graph_bytes_per_capture",),
    "activation": ("workspace", "layers", "encoder", "sampler_bytes_per_logit"),
    "runtime": ("context", "communicator", "late", "late_fp4", "cpu_process"),
}


@lru_cache(maxsize=256)
def constants(calibration: "Calibration | None", engine: str, version: str, devices: tuple[Device, ...]) -> Constants:
    """`CONSTANTS`, or what receipts made of them for an engine, a version and devices."""
    if calibration is None:
        return CONSTANTS
    changes: dict[str, Bounds] = {}
    for part, names in CALIBRATED.items():
        factor = calibration.factor(engine, version, devices, part)
        if factor is not None:
            changes |= {name: factor.scaled(getattr(CONSTANTS, name)) for name in names}
    return replace(CONSTANTS, **changes)


@dataclass(frozen=True, slots=True)
class Activations:
    """One rank's activations for one batch size, without the sampler, whose rows depend on the sequences."""

    peak: Bounds  # the larger of layers and encoder: they do not overlap
    held: Bounds  # encoded images, embedded inputs, workspaces: there all the time
    unprofiled: Bounds  # what a real prefill needs beyond the profiled peak, outside the budget


def layer_token_bytes(model: Model, tp: int, dp: int = 1, ep: int = 1) -> int:
    """Activation peak of one layer per token: the feed-forward block with its residual, in bf16. Where `dp` replicas
    share the experts, each rank sees the tokens of all of them (vLLM's default, `allgather_reducescatter`)."""
    residual = 2 * model.hidden_size
    if not model.is_moe:
        return 2 * 3 * (model.intermediate_size // tp) + 3 * residual
    routed = model.num_experts_per_tok
    inner = model.moe_intermediate_size // (1 if ep > 1 else tp * dp)
    # the fused experts share one buffer between the first product and the last, and keep one for the activation
    experts = 2 * routed * (max(2 * inner, model.hidden_size) + inner)
    shared = 2 * 3 * (model.shared_expert_intermediate_size // tp)
    if dp > 1:  # the shared expert is whole, and works on the rank's own share of the tokens
        shared = 2 * 3 * model.shared_expert_intermediate_size // tp
        return dp * (experts + residual) + shared + 2 * model.num_experts + 4 * residual
    return experts + shared + 2 * model.num_experts + 4 * residual


def delta_token_bytes(model: Model, tp: int) -> int:
    """What is alive per token at the end of a Gated DeltaNet layer's chunked prefill, the residual included, in bf16:
    projections q, k, v, z; convolved q, k, v and their normalised copies; core output; per chunk of 64 the inverse
    [64, 64], w, u, new values and output [64, DV], and one state [DK, DV]; gates in fp32."""
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    values = model.linear_num_value_heads * model.linear_value_head_dim
    projected = 2 * (2 * keys + 2 * values) + 2 * values
    convolved = 2 * 2 * (2 * keys + values)
    chunked = (
        2 * CHUNK_TOKENS * model.linear_num_value_heads + 2 * 4 * values + 2 * model.state_elements // CHUNK_TOKENS
    )
    gates = 2 * 4 * model.linear_num_value_heads
    return (projected + convolved + chunked + gates) // tp + 2 * 2 * model.hidden_size


def encoder_bytes(model: Model, image_tokens: int, tp: int) -> int:
    """Activation peak of the vision tower for one image: pixels and residual on every rank, the rest split."""
    vision = model.vision
    if vision is None:
        return 0
    patches = image_tokens * vision.spatial_merge_size**2
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    whole = 2 * 2 * pixels + 2 * 4 * vision.hidden_size
    split = 2 * 2 * vision.intermediate_size // tp
    return patches * (whole + split)


@lru_cache(maxsize=4096)
def activations(
    model: Model,
    tp: int,
    batch_tokens: int,
    image_tokens: int,
    constants: Constants = CONSTANTS,
    dp: int = 1,
    ep: int = 1,
) -> Activations:
    """`image_tokens` is the largest image that is encoded, 0 where the vision tower is not loaded. `dp` replicas share
    experts that lie over `ep` ranks."""
    layers = layer_token_bytes(model, tp, dp, ep) * batch_tokens
    encoder = encoder_bytes(model, image_tokens, tp)
    images = 2 * image_tokens * model.vision.out_hidden_size if model.vision else 0
    inputs = 2 * batch_tokens * model.hidden_size
    low, mid, high = (max(a * layers, b * encoder) for a, b in zip(constants.layers, constants.encoder, strict=True))
    held_low, held_mid, held_high = (images + inputs + extra for extra in constants.workspace)
    delta = delta_token_bytes(model, tp) * batch_tokens
    beyond_low, beyond_mid, beyond_high = (max(0.0, scale * delta - mid) for scale in constants.delta)
    return Activations((low, mid, high), (held_low, held_mid, held_high), (beyond_low, beyond_mid, beyond_high))


def sampler_row_bytes(model: Model, constants: Constants = CONSTANTS) -> Bounds:
    """One sampled row: the whole vocabulary, on every rank."""
    low, mid, high = constants.sampler_bytes_per_logit
    return low * model.vocab_size, mid * model.vocab_size, high * model.vocab_size


def captures(seqs: int, mtp: int, largest: int) -> int:
    """Graphs captured: piecewise ones up to twice the largest decode batch, full ones up to that batch."""
    decode_tokens = seqs * (1 + mtp)
    return _capture_sizes(min(2 * decode_tokens, largest)) + _capture_sizes(min(decode_tokens, largest))


def _capture_sizes(tokens: int) -> int:
    """How many of 1, 2, 4, every 8th up to 248, and every 16th from 256 on are no larger than `tokens`."""
    small = (tokens >= 1) + (tokens >= 2) + (tokens >= 4)
    return small + min(tokens, 255) // 8 + max(0, (tokens - 240) // 16)


def largest_capture(device: Device) -> int:
    return 1024 if (device.compute_capability or "").startswith("10.") else 512


def outside(ranks: int, flashinfer: bool, fp4: bool, constants: Constants = CONSTANTS) -> Bounds:
    """Beyond the budget whatever is served: driver, communicator, attention workspace, what follows the profile."""
    late = constants.late_fp4 if fp4 else constants.late
    shared = constants.communicator if ranks > 1 else NONE
    workspace = FLASHINFER_WORKSPACE_BYTES if flashinfer else 0
    low, mid, high = zip(constants.context, shared, late, strict=True)
    expected = sum(mid) + workspace
    # they have nothing to do with one another, so that not all of them are at their ends at once
    below = sum((m - lo) ** 2 for m, lo in zip(mid, low, strict=True)) ** 0.5
    above = sum((hi - m) ** 2 for m, hi in zip(mid, high, strict=True)) ** 0.5
    return expected - below, expected, expected + above
