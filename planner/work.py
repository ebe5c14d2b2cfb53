"""What one forward pass reads, computes and sends, in bytes, FLOPs and counts of the real tensors: no seconds yet.

A pass over `rows` tokens reads every layer's dense weights once, of the routed experts those that some row is routed
to, the KV cache of each decoding sequence, and each sequence's recurrent state, which it writes back. lm_head (248,320
words) is read whole, and multiplied only for rows whose next token is asked for. All figures are those of the slowest
tensor-parallel rank of one stage, summed over the stages of a layer split, which work one after the other.
"""

from functools import lru_cache
from math import log2
from typing import Any

from ..profiles.device import Device
from ..profiles.formats import WeightFormat
from ..profiles.frozen import dataclass
from ..profiles.model import Model
from .weights import WeightTable, weight_table

# Bits of one cached element, scales included: GGML's blocks (18 bytes per 32 elements for q4_0), a float32 scale per
# token and head of 256 for the per-token-head types of vLLM and the native runtime, MLX's bf16 scale and bias per 64.
KV_BITS = {
    "f32": 32.0,
    "bf16": 16.0,
    "f16": 16.0,
    "auto": 16.0,
    "bfloat16": 16.0,
    "q8_0": 8.5,
    "fp8": 8.0,
    "fp8_e4m3": 8.0,
    "fp8_e5m2": 8.0,
    "int8": 8.125,
    "int8_per_token_head": 8.125,
    "8bit": 8.5,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
    "4bit": 4.5,
    "nvfp4": 4.5,
    "int4": 4.125,
    "int4_per_token_head": 4.125,
}
STATE_BYTES = {"float32": 4, "bfloat16": 2}
CONV_BYTES = 2  # columns of convolution input; llama.cpp keeps four bytes, a hundredth of the state either way


@dataclass(frozen=True, slots=True)
class Work:
    """One setup's work per pass. FLOPs count a multiply and an add as two."""

    layers: int  # text layers
    is_moe: bool
    dense_bytes: float  # layers without routed experts
    head_bytes: float  # lm_head, or the embedding where it is tied
    expert_bytes: float  # all routed experts on devices
    host_expert_bytes: float  # all routed experts in host memory
    expert_share: float  # of the routed experts that one row reads
    kv_bytes_per_token: float  # read per decoding sequence and token of its context
    state_bytes_per_seq: float  # read, and written once per row: a rejected draft goes back to the state before it
    dense_flops_per_row: float
    expert_flops_per_row: float
    head_flops_per_row: float
    flops_per_pair: float  # of a query token and a token that it attends to, all full-attention layers
    all_reduces: int  # per pass; each phase of a butterfly is one
    link_bytes_per_row: float  # over one rank's link
    draft_tokens: int  # 0: no multi-token prediction
    draft_bytes: float  # read per draft step: the prediction layer (of its experts the routed ones) and lm_head
    bandwidth_bytes_per_s: float  # of one rank; over stages their harmonic mean
    peak_flops_per_s: float
    vector_flops_per_s: float  # float32 outside matrix units
    link_bytes_per_s: float  # between devices, one direction; 0: one device
    prompt_stages: int = 1  # that work on micro-batches of one prompt at the same time
    expert_dp: int = 1  # replicas that share the routed experts
    expert_ranks: int = 1  # over which whole experts are dealt out
    experts_on_rank: int = 0  # of those, on one
    vision_layers: int = 0  # of the tower; 0: none
    vision_bytes: float = 0.0  # read once per image
    vision_flops_per_token: float = 0.0  # of the text, which stands for several patches
    vision_flops_per_pair: float = 0.0  # of two tokens of an image: every patch attends to every other


def work(
    model: Model,
    weights: WeightFormat,
    devices: tuple[Device, ...],
    kv_dtype: str,
    state_dtype: str = "float32",
    tp: int = 1,
    mtp: int = 0,
    host_share: float = 0.0,
    file_bytes: float | None = None,
    dp: int = 1,
    ep: int = 1,
    ggml: bool = False,
) -> Work:
    """Work per pass of `model` over `devices`, which come in stages of `tp` ranks.

    `host_share`: the fraction of the routed experts in host memory. `file_bytes`: what a file of that format really
    weighs, where that is known; everything is scaled to it. Raises Unsupported where `tp` does not divide the model.
    `ggml`: an engine of its devices. All-reduces over more than two ranks exchange whole float32 rows, log2(tp) times,
    and do not pass parts of 16-bit rows around a ring (`factors.is_ggml`); micro-batches of a prompt follow one another
    through the stages (llama.cpp `llama-context.cpp`, pipeline parallelism: every layer on a device, no tensor
    elsewhere). The devices are those of one replica; `dp` of them share experts that lie over `ep` ranks
    (`weight_table`).
    """
    table = weight_table(model, weights, tp) if dp == ep == 1 else weight_table(model, weights, tp, dp, ep)
    scale = file_bytes / _file_bytes(model, weights) if file_bytes else 1.0
    flops = _flops(model)
    head_bytes = table.lm_head or table.embedding
    expert_bytes = scale * sum(table.experts)
    share = model.num_experts_per_tok / model.num_experts if model.is_moe else 0.0
    tower = _tower(model, table.vision, tp)
    bandwidth, peak, vector = _pooled(devices, tp)
    kv_heads = max(1, model.num_key_value_heads // tp)
    element_bits = sum(KV_BITS.get(side, 16.0) for side in kv_dtype.split("/")) / len(kv_dtype.split("/"))
    phases = log2(tp) if ggml and tp > 2 else 1.0
    sent_bytes = 4 * phases if phases > 1 else 2 * 2 * (tp - 1) / tp
    state = STATE_BYTES[state_dtype] * model.state_elements
    state += CONV_BYTES * (model.linear_conv_kernel_dim - 1) * model.conv_dim
    return Work(
        layers=model.num_layers,
        is_moe=model.is_moe,
        dense_bytes=scale * (sum(table.layers) + table.norm),
        head_bytes=scale * head_bytes,
        expert_bytes=expert_bytes * (1 - host_share),
        host_expert_bytes=expert_bytes * host_share,
        expert_share=share,
        kv_bytes_per_token=model.full_attention_layers * kv_heads * 2 * model.head_dim * element_bits / 8,
        state_bytes_per_seq=(2 + mtp) * model.linear_attention_layers * state / tp,
        dense_flops_per_row=flops.dense / tp,
        expert_flops_per_row=flops.experts / tp,
        head_flops_per_row=flops.head / tp,
        flops_per_pair=model.full_attention_layers * 4 * model.num_attention_heads * model.head_dim / tp,
        all_reduces=round(2 * model.num_layers * phases) if tp > 1 else 0,
        prompt_stages=len(devices) // tp if ggml and not host_share else 1,
        link_bytes_per_row=2 * model.num_layers * model.hidden_size * sent_bytes,
        draft_tokens=mtp,
        draft_bytes=_draft_bytes(table, share, head_bytes) if mtp else 0.0,
        bandwidth_bytes_per_s=bandwidth,
        peak_flops_per_s=peak,
        vector_flops_per_s=vector,
        link_bytes_per_s=min(_link(device) for device in devices) if tp * dp > 1 else 0.0,
        expert_dp=dp,
        expert_ranks=ep,
        experts_on_rank=-(-model.num_experts // ep) if ep > 1 else 0,
        **tower,
    )


@dataclass(frozen=True, slots=True)
class _Flops:
    dense: float
    experts: float
    head: float


@lru_cache(maxsize=64)
def _flops(model: Model) -> _Flops:
    """Per token of the text: two per weight, and eight per element of the recurrent state (decay, the delta rule's
    product, its update and the read-out)."""
    dense, experts = 8.0 * model.linear_attention_layers * model.state_elements, 0.0
    for tensor in model.unquantized:
        if tensor.part != "text" or len(tensor.shape) < 2 or tensor.role in ("embedding", "lm_head"):
            continue
        elements = 2.0 * tensor.elements * tensor.count
        if tensor.role.startswith("experts."):
            experts += elements * model.num_experts_per_tok / model.num_experts
        else:
            dense += elements
    return _Flops(dense, experts, 2.0 * model.vocab_size * model.hidden_size)


def _tower(model: Model, vision_bytes: int, tp: int) -> dict[str, Any]:
    """The vision tower's part of `Work`: two FLOPs per weight and patch, of the merger per token, and four per pair of
    patches and element of attention. A tower whose heads `tp` does not divide lies on every rank whole."""
    if model.vision is None or not vision_bytes:
        return {}
    vision, patches = model.vision, model.vision.spatial_merge_size**2
    flops = 0.0
    for tensor in model.unquantized:
        if tensor.part == "vision" and len(tensor.shape) > 1 and tensor.role != "vision.pos_embed":
            times = 1 if tensor.role.startswith("vision.merger") else patches
            flops += 2.0 * tensor.elements * tensor.count * times
    ranks = tp if vision.num_heads % tp == 0 else 1
    return {
        "vision_layers": vision.depth,
        "vision_bytes": float(vision_bytes),
        "vision_flops_per_token": flops / ranks,
        "vision_flops_per_pair": 4.0 * vision.depth * vision.hidden_size * patches**2 / ranks,
    }


@lru_cache(maxsize=1024)
def _file_bytes(model: Model, weights: WeightFormat) -> float:
    table = weight_table(model, weights, 1)
    return float(table.text + (table.mtp + table.mtp_experts if weights.name.endswith("-mtp") else 0))


def _draft_bytes(table: WeightTable, share: float, head_bytes: int) -> float:
    return table.mtp + share * table.mtp_experts + head_bytes


@lru_cache(maxsize=4096)
def _pooled(devices: tuple[Device, ...], tp: int) -> tuple[float, float, float]:
    """Bandwidth and peaks of what works at a time: the slowest rank of each stage, stages in turn.

    A stage takes layers as its memory allows (llama.cpp `llama-model.cpp`, splits by free memory): it counts by that.
    """
    stages = [devices[start : start + tp] for start in range(0, len(devices), tp)]
    sizes = [min(device.usable_bytes for device in stage) for stage in stages]
    read_s = compute_s = vector_s = 0.0
    for stage, size in zip(stages, sizes, strict=True):
        part = size / sum(sizes)
        read_s += part / min(device.memory_bandwidth_bytes_per_s for device in stage)
        compute_s += part / min(peak_flops_per_s(device) for device in stage)
        vector_s += part / min(device.flops_per_s.get("fp32") or peak_flops_per_s(device) for device in stage)
    return 1 / read_s, 1 / compute_s, 1 / vector_s


def peak_flops_per_s(device: Device) -> float:
    """Dense matrix rate with 16-bit inputs, or float32's where the device has nothing faster."""
    rates = device.flops_per_s
    found = rates.get("fp16") or rates.get("bf16") or rates.get("fp32")
    return float(found) if found else device.memory_bandwidth_bytes_per_s * 20.0


def _link(device: Device) -> float:
    """One direction between devices."""
    return (device.interconnect_bytes_per_s or 2 * (device.host_link_bytes_per_s or 16_000_000_000)) / 2
