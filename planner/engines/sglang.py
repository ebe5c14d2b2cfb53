"""SGLang: two pools, of recurrent state and of attention cache, in a static fraction of the device.

Where it runs, what it loads and which defaults it sets stand here. What the pools hold is `sglang_pool.py` (exact), how
the fraction is chosen and filled is `sglang_budget.py`. Activations are those of `vllm_scratch.py`: the same layers,
the same chunked kernels.

Read in sglang 0.5.23.
"""

from ...profiles.device import Device
from ...profiles.errors import BadInput, Unsupported
from ...profiles.formats import WeightFormat, weight_format
from ...profiles.model import Model
from . import vllm_scratch as scratch
from .engine import Engine, Estimate, Setup
from .replicas import over_replicas
from .sglang_budget import PREFILL_GRAPHS, SglangEstimate, Station
from .sglang_pool import KV_BYTES, cells, stage_layers
from .support import (
    capability,
    has_integers,
    is_fp4,
    kinds,
    likened,
    named_capability,
    rank_table,
    spread_warnings,
    unlike_ranks,
    warnings,
)
from .vllm_budget import stage_weights
from .vllm_scratch import MIB, MID, Constants

ENGINE = Engine(
    name="sglang",
    default_version="0.5.23",
    versions=("0.5.23",),
    source="sglang on PyPI: mem_cache/kv_cache_configurator.py, model_executor/pool_configurator.py, arg_groups",
    spans_boxes=True,
    replicates=True,
    pool="fullest",
    kept_states=4,
)

SMALLEST_CHUNK_TOKENS = 2048
MARLIN_GROUP_SIZES = (None, 32, 64, 128)  # None: a scale per row
MULTIMODAL_CACHE_BYTES = 100 * MIB  # SGLANG_VLM_CACHE_SIZE_MB
FLASHINFER_WORKSPACE_BYTES = 384 * MIB  # SGLANG_FLASHINFER_WORKSPACE_SIZE
# Below so many MiB of memory: chunk of prefill, largest decode batch in graphs, and that batch from tp 4 on
# (handle_gpu_memory_settings).
DEFAULTS = (
    (20 * 1024, 2048, 8, 8),
    (35 * 1024, 4096, 48, 160),
    (60 * 1024, 4096, 32, 160),
    (90 * 1024, 8192, 256, 512),
    (160 * 1024, 8192, 256, 512),
)
LARGEST_DEFAULTS = (16384, 512, 512)


def runs_on(device: Device, version: str) -> str | None:
    """Why SGLang cannot run on a device, None where it can."""
    if device.vendor == "nvidia":
        if capability(device) >= (7, 5):
            return None
        return f"SGLang needs compute capability 7.5; {device.title} has {named_capability(device)}"
    if device.vendor == "amd":
        if named_capability(device).startswith(("gfx942", "gfx950")):
            return None
        return f"SGLang's ROCm build is for MI300 and MI350, not for {device.title}"
    return f"SGLang is planned for NVIDIA and AMD Instinct only, not for {device.title}"


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """Why SGLang cannot load a format on a device, None where it can (get_min_capability in layers/quantization)."""
    fmt = likened(model, fmt)
    if fmt.family == "gguf":
        return "SGLang does not load GGUF files of these models; llama.cpp does"
    if fmt.family not in ("safetensors", "checkpoint"):
        return f"{fmt.name} is a format of {fmt.family.upper()}, which SGLang does not read"
    if fmt.family == "checkpoint" or fmt.name == "bf16":
        return None
    if fmt.embedding_bits < 16:
        return f"SGLang keeps embeddings in 16 bit: {fmt.name} does not load there, the same without embed does"
    if device.vendor == "nvidia" and capability(device) < (8, 0):
        return f"SGLang loads {fmt.name} from compute capability 8.0 on; {device.title} has {named_capability(device)}"
    if device.vendor == "amd" and is_fp4(fmt):
        return f"SGLang has NVFP4 kernels for NVIDIA only, not for {device.title}"
    return _integer_obstacle(model, fmt, device) if has_integers(fmt) else None


def _integer_obstacle(model: Model, fmt: WeightFormat, device: Device) -> str | None:
    """Weights of integers are multiplied by Marlin, and those of W8A8 by `int8_scaled_mm`, both built for CUDA only
    (compressed_tensors_wNa16.py, compressed_tensors_w8a8_int8.py, gptq_marlin_repack.py; plain GPTQ is gone from the
    registry of quantization/__init__.py); AWQ has a kernel in Triton. Group sizes: marlin_utils.py. Experts:
    CompressedTensorsConfig.get_moe_scheme."""
    if device.vendor == "amd" and fmt.dialect != "awq":
        return f"SGLang's kernels for {fmt.name} are for CUDA only, not for {device.title}: take bf16, fp8, or vLLM"
    if fmt.dialect != "awq" and fmt.group_size not in MARLIN_GROUP_SIZES:
        return f"SGLang has no kernel for groups of {fmt.group_size} ({fmt.name}): take groups of 32, 64 or 128"
    if fmt.name == "int8-w8a8" and model.is_moe:
        return f"SGLang has W8A8 kernels for experts on NPUs only: {fmt.name} of {model.name} does not load there"
    return None


def _draft_obstacle(model: Model, fmt: WeightFormat) -> str | None:
    """eagle_worker_v2.py (init_lm_head) gives the draft the head's `weight`, which a packed head does not have. GPTQ's
    rules are not asked for experts (gptq.py, GPTQMarlinConfig.get_quant_method): where the prediction layer is kept,
    its experts are left as they were allocated, and no draft is accepted (run: tests/quant/test_sglang_loading.py)."""
    fmt = likened(model, fmt)
    if has_integers(fmt) and fmt.lm_head_bits < 16:
        return f"SGLang drafts with the head's own weights, which {fmt.name} packs: leave out mtp, or the head"
    if model.is_moe and fmt.dialect == "gptq" and fmt.mtp_bits == 16:
        return f"SGLang takes the draft's experts for GPTQ, which {fmt.name} keeps in bf16: leave out mtp"
    return None


def weight_formats(model: Model, device: Device) -> tuple[str, ...]:
    """Formats worth trying: ours, and published ones where they exist."""
    names = ("bf16", "fp8", "int8", "int4", "gptq-int4-official", "nvfp4")
    return tuple(name for name in names if weight_format(name).is_released(model))


def kv_dtypes(device: Device, version: str) -> tuple[str, ...]:
    """Cache types to try, in SGLang's words, the default first."""
    names = ("bf16", "fp8_e4m3", "fp8_e5m2")
    return tuple(name for name in names if kv_dtype_obstacle(name, device) is None)


def kv_dtype_obstacle(kv_dtype: str, device: Device) -> str | None:
    if kv_dtype not in KV_BYTES:
        return f"no cache type {kv_dtype!r} is known for SGLang: give one of {', '.join(KV_BYTES)}"
    if KV_BYTES[kv_dtype] == 1 and device.vendor == "nvidia" and capability(device) < (8, 0):
        return f"an fp8 cache needs compute capability 8.0; {device.title} has {named_capability(device)}"
    return None


def page_tokens(device: Device) -> int:
    """Tokens of a page: 64 where trtllm_mha serves attention, on data-centre Blackwell."""
    return 64 if capability(device)[0] == 10 else 1


def own_defaults(device: Device, tp: int) -> tuple[int, int]:
    """SGLang's chunk of prefill and largest decode batch in graphs."""
    memory_mib = device.memory_bytes // MIB
    for below_mib, chunk_tokens, batch, wide_batch in DEFAULTS:
        if memory_mib < below_mib:
            return chunk_tokens, wide_batch if tp >= 4 else batch
    return LARGEST_DEFAULTS[0], LARGEST_DEFAULTS[1]


def own_fraction(device: Device, model: Model, tp: int, pp: int, vision: bool, cuda_graphs: bool = True) -> float:
    """`mem_fraction_static` as SGLang sets it for its own chunk and decode batch."""
    memory_mib = device.memory_bytes / MIB
    chunk_tokens, batch = own_defaults(device, tp)
    reserved_mib = 512 + 1.5 * max(chunk_tokens, 2048) + tp * pp * 128
    if cuda_graphs:
        reserved_mib += 2 * batch + 8 * (PREFILL_GRAPHS[chunk_tokens] if device.vendor == "nvidia" else 0)
    if memory_mib > 60 * 1024:
        reserved_mib = max(reserved_mib, 10 * 1024)
    fraction = round((memory_mib - reserved_mib) / memory_mib, 3)
    if vision and model.vision is not None:
        complexity = model.vision.hidden_size**2 / 1024**2  # it looks for a number of layers and does not find one
        fraction *= 0.95 * max(0.8, min(1.05, 1 - 0.1 * (complexity - 1)))
    return fraction


def estimate(setup: Setup) -> Estimate:
    """Raises Unsupported where the setup cannot start whatever its memory."""
    options, devices, model = setup.options, setup.devices, setup.model
    _refuse_spread(setup)
    spread = () if setup.expert_dp == setup.ep == 1 else (setup.expert_dp, setup.ep)
    wide = setup.tp * setup.expert_dp  # SGLang's tp_size: replicas that share experts lie inside it
    for device in kinds(devices):
        obstacle = kv_dtype_obstacle(setup.kv_dtype, device)
        if obstacle:
            raise Unsupported(obstacle)
    obstacle = _draft_obstacle(model, setup.weights) if setup.mtp else None
    if obstacle:
        raise Unsupported(obstacle)
    radix = options.prefix_caching
    sizes = cells(model, setup.tp, setup.pp, setup.kv_dtype, setup.state_dtype, radix, "extra_buffer", setup.mtp)
    smallest = min(kinds(devices), key=lambda device: device.memory_bytes)
    chunks = _chunks(setup, own_defaults(smallest, wide)[0] // setup.expert_dp)
    image_tokens = 0
    if setup.vision and model.vision is not None:
        image_tokens = options.image_tokens or model.vision.max_image_tokens
    constants = scratch.constants(options.calibration, "sglang", setup.version, devices)
    stations, place_of_rank = _stations(setup, constants)
    own = min(
        own_fraction(device, model, wide, setup.pp, setup.vision, options.cuda_graphs) for device in kinds(devices)
    )
    low, mid, high = scratch.sampler_row_bytes(model, constants)
    made = SglangEstimate(
        setup=setup,
        sizes=sizes,
        stations=stations,
        place_of_rank=place_of_rank,
        chunks=chunks,
        activations=tuple(
            scratch.activations(model, setup.tp, tokens, image_tokens, constants, *spread) for tokens in chunks
        ),
        row_bytes=(low * (1 + setup.mtp), mid * (1 + setup.mtp), high * (1 + setup.mtp)),
        graph_bytes_per_capture=constants.graph_bytes_per_capture,
        largest_decode_batch=own_defaults(smallest, wide)[1],
        cuda_graphs=options.cuda_graphs,
        workspace_bytes=FLASHINFER_WORKSPACE_BYTES if smallest.vendor == "nvidia" else 0,
        image_cache_bytes=MULTIMODAL_CACHE_BYTES if image_tokens else 0,
        page_tokens=max(map(page_tokens, kinds(devices))),
        own_thousandths=int(own * 1000),
        fixed_thousandths=_fixed_thousandths(options.gpu_memory_utilization),
        radix=radix,
        warnings=warnings("SGLang", devices, model, setup.weights) + spread_warnings(setup),
    )
    return over_replicas(made, setup.dp)


def _refuse_spread(setup: Setup) -> None:
    """`arg_groups/validation_hook.py`, `check_server_args`: replicas of whole models stay in one box."""
    if setup.dp > 1 and setup.expert_dp == 1 and setup.nodes > 1:
        raise Unsupported(
            f"SGLang {setup.version} keeps replicas of a dense model in one box: leave out --dp, or start one in each"
        )


def _fixed_thousandths(fraction: float | None) -> int | None:
    if fraction is None:
        return None
    if not 0 < fraction < 1:
        raise BadInput(f"mem_fraction_static of {fraction}: give a fraction between 0 and 1")
    return max(1, round(fraction * 1000))


def _chunks(setup: Setup, default: int) -> tuple[int, ...]:
    """Chunks of prefill to try, SGLang's own first."""
    asked = setup.options.max_num_batched_tokens
    if asked is not None:
        if asked < 1:
            raise BadInput(f"chunked_prefill_size of {asked}: give 1 or more")
        return (asked,)
    chunks = [default]
    while chunks[-1] > SMALLEST_CHUNK_TOKENS and setup.options.gpu_memory_utilization is None:
        chunks.append(chunks[-1] // 2)
    return tuple(chunks)


def _stations(setup: Setup, constants: Constants) -> tuple[tuple[Station, ...], tuple[int, ...]]:
    layers = stage_layers(setup.model.num_layers, setup.pp)
    weights = stage_weights(rank_table(setup), layers, setup.vision, setup.mtp > 0)
    places, place_of_rank = unlike_ranks(setup.devices, setup.tp, setup.pp)
    ranks, fp4 = len(setup.devices), is_fp4(likened(setup.model, setup.weights))
    context_of = {
        device: scratch.outside(ranks, False, fp4 and capability(device) >= (10, 0), constants)
        for device in kinds(setup.devices)
    }
    stations: list[Station] = []
    for stage, device in places:
        context = context_of[device]
        safe_fraction = device.safe_fraction or 1
        stations.append(
            Station(
                device=device,
                weights_bytes=weights[stage],
                reach_bytes=int(device.usable_bytes * safe_fraction),
                free_bytes=max(1, device.usable_bytes - int(context[MID])),
                context=context,
            )
        )
    return tuple(stations), place_of_rank
