"""What is asked: a model, devices, a context and a number of sequences, and whatever the asker wants fixed."""

from typing import TYPE_CHECKING

from ..profiles.frozen import dataclass, field

if TYPE_CHECKING:
    from .calibration import Calibration


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of the engines that change memory. None: the engine's default, or the planner's choice."""

    gpu_memory_utilization: float | None = None  # vLLM; SGLang calls it mem_fraction_static
    max_num_batched_tokens: int | None = None  # vLLM; SGLang: chunked_prefill_size
    ubatch_tokens: int | None = None  # llama.cpp -ub
    prefix_caching: bool = True
    cuda_graphs: bool = True
    image_tokens: int | None = None  # largest image, in tokens; None: the model's own limit
    offload_experts: bool | None = None  # routed experts in host memory; None: only where nothing else fits
    host_memory_bytes: int | None = None  # None: not known; search.py says what is then taken for granted
    calibration: "Calibration | None" = None  # of estimated constants, from receipts; None: as they are built in


@dataclass(frozen=True, slots=True)
class Prices:
    """What energy, devices and an API cost the asker. None: as profiles/prices.json has it published, or unknown."""

    usd_per_kwh: float | None = None
    device_usd: float | None = None  # of all devices together; None: energy alone is counted
    years: float | None = None  # over which the devices are paid off, working all the time
    api_usd_per_million: float | None = None  # output tokens
    job_tokens: int | None = None  # output tokens of a job
    device_watts: float | None = None  # of all devices together while they decode; None: from their board power


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the planner. Names are the command's; `docs` and CONTRACT give their spelling."""

    model: str = "qwen3.5-9b"
    devices: tuple[str, ...] = ()
    ctx_tokens: int = 32768
    seqs: int = 1
    engine: str | None = None  # "vllm", "vllm@0.31"
    weights: str | None = None
    kv_dtype: str | None = None
    state_dtype: str | None = None
    mtp: int = 0
    vision: bool | None = None  # None: as the engine loads the model by default
    tp: int | None = None
    pp: int | None = None
    nodes: int = 1  # boxes like that of `devices`, which are those of one box
    dp: int | None = None  # data-parallel replicas
    ep: int | None = None  # ranks over which whole experts are dealt out; 1: each expert is cut instead
    interconnect: str | None = None  # between boxes: a name or a rate; None: what such boxes are sold with
    options: Options = field(default_factory=Options)
    prices: Prices = field(default_factory=Prices)
