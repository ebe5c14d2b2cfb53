"""What the kernels of vLLM and SGLang can do on a device, as far as it is the same for both."""

from functools import lru_cache

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import WeightFormat, weight_format
from ...profiles.model import Model
from ..weights import WeightTable, weight_table
from .engine import Setup


def capability(device: Device) -> tuple[int, int]:
    """CUDA compute capability as numbers, (0, 0) for what has none."""
    major, _, minor = named_capability(device).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def named_capability(device: Device) -> str:
    """8.6, gfx1100, or none."""
    return device.compute_capability or "none"


@lru_cache(maxsize=4096)
def likened(model: Model, fmt: WeightFormat) -> WeightFormat:
    """The named format whose loader a checkpoint read from disk needs: any GGUF is a GGUF, any NVFP4 needs FP4.

    The format itself where it has a name already, or where nobody knows what the checkpoint's method is like.
    """
    quantization = model.quantization if fmt.family == "checkpoint" else None
    if not quantization:
        return fmt
    from ...profiles.quantization_config import stored_format

    like = {"gguf": "gguf-bf16", "mlx": "mlx-4bit"}.get(str(quantization.get("method")))
    if quantization.get("type") == "float" and quantization.get("bits") == 4:
        like = "nvfp4"
    try:
        return weight_format(stored_format(quantization, model.source) or fmt.name)
    except Unsupported:
        return weight_format(like) if like else fmt


def has_integers(fmt: WeightFormat) -> bool:
    """Whether it is ours, or another one of integers for vLLM's and SGLang's loaders: compressed-tensors, GPTQ, AWQ."""
    return fmt.family == "safetensors" and fmt.dialect in ("compressed-tensors", "gptq", "awq")


def is_fp4(fmt: WeightFormat) -> bool:
    return fmt.name.startswith("nvfp4")


@lru_cache(maxsize=4096)
def kinds(devices: tuple[Device, ...]) -> tuple[Device, ...]:
    """One of each, in order."""
    return tuple(dict.fromkeys(devices))


@lru_cache(maxsize=4096)
def unlike_ranks(
    devices: tuple[Device, ...], tp: int, pp: int
) -> tuple[tuple[tuple[int, Device], ...], tuple[int, ...]]:
    """Stages and devices on which ranks hold different things, and for every rank its place among them."""
    places: dict[tuple[int, Device], int] = {}
    of_rank = [places.setdefault((rank // tp % pp, device), len(places)) for rank, device in enumerate(devices)]
    return tuple(places), tuple(of_rank)


def rank_table(setup: Setup) -> WeightTable:
    """Weights as they fall on one rank."""
    if setup.expert_dp == setup.ep == 1:  # the same key as everybody's
        return weight_table(setup.model, setup.weights, setup.tp)
    return weight_table(setup.model, setup.weights, setup.tp, setup.expert_dp, setup.ep)


@lru_cache(maxsize=4096)
def warnings(engine: str, devices: tuple[Device, ...], model: Model, fmt: WeightFormat) -> tuple[str, ...]:
    """What works, and not as one may expect."""
    found: list[str] = []
    kind = likened(model, fmt)
    if len(set(devices)) > 1:
        found.append("unlike devices: the smallest decides the cache of all, and the slowest the speed of all")
    for device in kinds(devices):
        if device.vendor == "intel":
            found.append(f"{engine} on Intel GPUs: what it takes beside weights and cache was not checked on hardware")
        if device.vendor != "nvidia":
            continue
        if capability(device) < (8, 0):
            found.append(f"{device.title} has no bf16: {engine} computes in float16 there")
        if kind.name == "fp8" and capability(device) < (8, 9):
            found.append(f"{device.title} has no fp8 arithmetic: weights only (Marlin), at bf16's compute speed")
        if is_fp4(kind) and capability(device) < (10, 0):
            found.append(f"{device.title} has no fp4 arithmetic: weights only (Marlin)")
    if not fmt.is_released(model):
        found.append(f"nobody published {model.name} as {fmt.name}: its size is what the publisher's rule would give")
    return tuple(found)


def spread_warnings(setup: Setup) -> tuple[str, ...]:
    """What to know of a plan over several boxes or with dealt-out experts."""
    found: list[str] = []
    link = setup.interconnect
    if link is not None:
        if link.assumed:
            found.append(f"what lies between the boxes was not given: {link.title} is taken; --interconnect says it")
        if setup.tp_nodes > 1:
            slow = "" if link.takes_tensor_parallelism else ", and this link is slow for it"
            found.append(
                f"tensor parallelism over {setup.tp_nodes} boxes: every layer waits twice for the link between "
                f"them{slow}"
            )
        elif setup.expert_dp > 1:
            found.append("replicas share the experts over the link between boxes: every layer waits twice for it")
    if setup.ep > 1:
        found.append("experts are taken to be asked for evenly; the box with the most wanted ones sets the pace")
    if setup.expert_dp > 1:
        found.append("replicas that share experts run in step: an idle one still takes part in every pass")
    return tuple(found)
