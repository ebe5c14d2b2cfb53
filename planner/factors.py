"""What devices reach of their rates under an engine: factors fitted on published runs (profiles/speed_factors.json).

A factor is a sum of logarithms along a chain from the general to the particular: all runs, the backend (CUDA, ROCm,
Vulkan, Metal, CPU), the engine on it, the format there, the device's architecture, the device. Each term is shrunk
towards nothing as far as the runs behind it are few, so a device that nobody measured gets what its architecture, its
engine or all of them share. `tests/bench/fit_speed.py` writes the file; nothing here is set by hand.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import exp

from ..profiles.device import Device
from ..profiles.formats import WeightFormat
from ..profiles.frozen import dataclass
from ..profiles.speed_data import fitted

BACKENDS = {"nvidia": "cuda", "amd": "rocm", "intel": "vulkan", "apple": "metal", "cpu": "cpu"}
# What stands in for an engine of which little was published: Ollama runs llama.cpp's backends, ik_llama.cpp is a fork
# of it, SGLang launches captured graphs of fused kernels as vLLM does, KTransformers has ggml's formats on the host.
RELATIVES = {"ollama": "llama.cpp", "ik_llama.cpp": "llama.cpp", "sglang": "vllm", "ktransformers": "llama.cpp"}
# Kernels of this project: what they reach says nothing of other engines on the same backend, nor the other way round.
OWN = {"native/cpu"}
# Tokens of a prompt per pass: llama.cpp -ub 512, vLLM's max_num_batched_tokens 2048 (a server's default for one user),
# mlx-lm --prefill-step-size 2048, the native runtime's own (planner/engines/native.py).
CHUNK_TOKENS = {"llama.cpp": 512, "ollama": 512, "ik_llama.cpp": 512, "native/cpu": 512}
DEFAULT_CHUNK_TOKENS = 2048
# Host memory behind a discrete device, where nobody said: two channels of DDR5-5600 (profiles/cpu.yaml, desktop-ddr5).
HOST_BYTES_PER_S = 89.6e9


@dataclass(frozen=True, slots=True)
class Factors:
    """Shares of the device's rates, and times that no rate explains."""

    read: float  # of the memory bandwidth, for weights and state
    kv: float  # of the memory bandwidth, for the cache
    dense: float  # of the peak, for matrices of a prompt
    expert: float  # of the peak, for routed experts of a prompt
    pair: float  # of the peak, for attention of a prompt
    layer_s: float  # per layer and pass: launches, norms, whatever does not grow
    pass_s: float  # per layer and pass with prompt rows, beside that
    link_s: float  # per all-reduce
    wire: float  # of the link's bandwidth
    acceptance: float  # of the first draft token
    decay: float  # of a draft token's acceptance against the one before it, given that that was taken
    unpack: float  # of the float32 rate, for turning one weight into a product while decoding
    draft_s: float  # per draft step, beside reading its weights
    host_bytes_per_s: float  # at which experts in host memory are read
    prompt_read: float  # `read`, `unpack` and `layer_s` of a pass with prompt rows
    prompt_unpack: float
    prompt_layer_s: float


KINDS = (
    *("read", "kv", "unpack", "layer", "dense", "expert", "pair", "pass"),
    *("link", "wire", "acceptance", "decay", "draft", "host"),
)
# Of which a pass with prompt rows takes what all runs share: what a place does to prompts lies in the other kinds.
# Pages held out were met better so than with what decoding teaches of a place, or with kinds of prompts' own.
SHARED_BY_PROMPTS = ("read", "unpack", "layer")


def factors_of(
    table: Mapping[str, Mapping[str, float]], keys: tuple[str, ...], host_bytes_per_s: float | None = None
) -> Factors:
    """Sums along a chain of the logarithms in a table by kind: of seconds for what ends in _s, of the odds for
    `acceptance` and `decay`."""
    logs = {kind: total(table[kind], keys) for kind in KINDS}
    prompts = {kind: total(table[kind], keys[:1]) for kind in SHARED_BY_PROMPTS}
    for some in (logs, prompts):
        some["read"] = min(some["read"], 0.0)  # terms add up; nothing reads more than the bandwidth
    return Factors(
        read=exp(logs["read"]),
        kv=exp(logs["kv"]),
        dense=exp(logs["dense"]),
        expert=exp(logs["expert"]),
        pair=exp(logs["pair"]),
        layer_s=exp(logs["layer"]),
        pass_s=exp(logs["pass"]),
        link_s=exp(logs["link"]),
        wire=exp(logs["wire"]),
        acceptance=1 / (1 + exp(-logs["acceptance"])),
        decay=1 / (1 + exp(-logs["decay"])),
        unpack=exp(logs["unpack"]),
        draft_s=exp(logs["draft"]),
        host_bytes_per_s=exp(logs["host"]) * (host_bytes_per_s or HOST_BYTES_PER_S),
        prompt_read=exp(prompts["read"]),
        prompt_unpack=exp(prompts["unpack"]),
        prompt_layer_s=exp(prompts["layer"]),
    )


def backend_of(engine: str, device: Device) -> str:
    """The programming interface that an engine uses on a device: the vendor's own."""
    return BACKENDS.get(device.vendor, "vulkan")


def chunk_tokens(engine: str, backend: str) -> int:
    """Tokens of a prompt that one pass takes by default."""
    return CHUNK_TOKENS.get(f"{engine}/{backend}") or CHUNK_TOKENS.get(engine, DEFAULT_CHUNK_TOKENS)


def is_ggml(engine: str) -> bool:
    """Whether several devices work together as in llama.cpp without NCCL, as it is released.

    Tensor parallel, two have an all-reduce of their own (ggml-cuda, GGML_CUDA_ALLREDUCE=internal) that sends 16-bit
    rows; more go through the butterfly of the meta backend. github.com/jdkruzr/qwen36-27b-5060ti-bench measured both:
    prefill is 64 % faster by the former on two cards, and four cards are slower than two.
    """
    return RELATIVES.get(engine, engine) == "llama.cpp"


def link_of(devices: tuple[Device, ...]) -> str:
    """How devices reach each other: `nvlink` (and AMD's fabric), or `pcie` through the host."""
    named = [device.interconnect or "" for device in devices]
    return "nvlink" if all(name.startswith(("nvlink", "infinity")) for name in named) else "pcie"


def chain(engine: str, backend: str, device: Device, weights: WeightFormat, is_moe: bool, link: str) -> tuple[str, ...]:
    """Keys from the general to the particular, the first of which alone has a middle that is not nothing. `+` a kind of
    model, `~` a format, `|` an architecture or a device."""
    relative = RELATIVES.get(engine, engine)
    group = f"{relative}/{backend}"
    kind = "+moe" if is_moe else "+dense"
    shared = ["", kind, f"={link}", backend, f"{backend}~{bits_of(weights)}", relative]
    keys = [group] if group in OWN else [*shared, group]
    keys += [f"{group}{kind}", f"{group}~{bits_of(weights)}", f"{group}|{device.architecture}"]
    if family_of(device) != device.architecture:
        keys.append(f"{group}|{family_of(device)}")
    if engine != relative:
        keys.append(f"{engine}/{backend}")
    return tuple(keys)


def bits_of(weights: WeightFormat) -> str:
    """Formats that one kind of kernel reads: bf16, fp8, fp4, 8-bit, 4-bit (with 5 and 6), below."""
    name = weights.name
    if weights.bits >= 16:
        return "16"
    if name.startswith(("fp8", "nvfp4", "mxfp4")):
        return "fp8" if name.startswith("fp8") else "fp4"
    return "8" if weights.bits >= 8 else "4" if weights.bits >= 4 else "low"


def family_of(device: Device) -> str:
    """The device without its memory size: sisters that differ in nothing else share a measurement."""
    stem, dash, size = device.name.rpartition("-")
    return stem if dash and size.endswith("gb") else device.name


def known(engine: str, device: Device) -> str:
    """How much of this the fit has seen: `place` (the engine on this device), `engine` (on another), `nothing`."""
    group = f"{RELATIVES.get(engine, engine)}/{backend_of(engine, device)}"
    seen = fitted()["seen"]
    if f"{group}|{family_of(device)}" in seen:
        return "place"
    return "engine" if group in seen else "nothing"


@lru_cache(maxsize=4096)
def factors(
    engine: str, device: Device, weights: WeightFormat, is_moe: bool, link: str, host_bytes_per_s: float | None = None
) -> Factors:
    """The fitted factors of an engine on a device."""
    keys = chain(engine, backend_of(engine, device), device, weights, is_moe, link)
    return factors_of(fitted()["logs"], keys, host_bytes_per_s)


def total(terms: Mapping[str, float], keys: tuple[str, ...]) -> float:
    return sum([terms.get(key, 0.0) for key in keys])
