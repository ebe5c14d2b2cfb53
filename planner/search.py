"""Which engines, formats and cache types are tried for a request, and how the ones that fit are ranked.

Rank: what surely fits, then what fits at the expected figure, then what does not, nearest first. Among those that fit,
quality first (expected divergence from bf16), then engines that serve, then headroom. Speed takes its place between
quality and headroom once there is a model of it.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from types import ModuleType

from ..profiles.device import Device, devices_of
from ..profiles.errors import BadInput, UnknownName, Unsupported
from ..profiles.formats import WeightFormat, weight_format
from ..profiles.model import Model, model
from ..profiles.names import did_you_mean, quote
from .engines.engine import Engine, Estimate, Setup
from .plan import MAX_CTX_TOKENS, EnginePlan, Plan, Skipped
from .quality import STATE_DIVERGENCE, divergence
from .request import Options, Request

ENGINE_MODULES = {
    "vllm": "vllm",
    "sglang": "sglang",
    "llama.cpp": "llamacpp",
    "ollama": "ollama",
    "mlx": "mlx",
    "ktransformers": "ktransformers",
    "transformers": "transformers",
    "native": "native",
}

# Host memory where nobody said how much there is: a desktop's 64 GiB, or twice the devices' where those are large.
ASSUMED_HOST_BYTES = 64 << 30

MAX_ASKED_CTX_TOKENS = 10_000_000
MAX_ASKED_SEQS = 1_000_000


def plan(request: Request) -> Plan:
    """Every engine's best plan for a request, ranked.

    Raises UnknownName, BadInput or Unsupported where there is no answer; "does not fit" is an answer.
    """
    _check(request)
    asked_model = model(request.model)
    devices = tuple(device for spec in request.devices for device in devices_of(spec))
    if not devices:
        raise BadInput("no device: give at least one, such as rtx3060; `qwen-plan devices` lists them")
    _check_ranks(request, len(devices))
    plans: list[EnginePlan] = []
    skipped: list[Skipped] = []
    for module, version in _engines(request):
        name = module.ENGINE.name
        try:
            plans.append(_best_of(module, version, request, asked_model, devices))
        except Unsupported as reason:
            skipped.append(Skipped(name, str(reason)))
    if not plans:
        raise Unsupported(_nothing_runs(skipped))
    plans.sort(key=_rank)
    return Plan(request, asked_model, devices, tuple(plans), tuple(skipped))


def _check(request: Request) -> None:
    if not 1 <= request.ctx_tokens <= MAX_ASKED_CTX_TOKENS:
        raise BadInput(f"context of {request.ctx_tokens} tokens: give 1 to {MAX_ASKED_CTX_TOKENS:,}")
    if not 1 <= request.seqs <= MAX_ASKED_SEQS:
        raise BadInput(f"{request.seqs} sequences: give 1 to {MAX_ASKED_SEQS:,}")
    if not 0 <= request.mtp <= 16:
        raise BadInput(f"{request.mtp} draft tokens: give 0 to 16")
    if request.state_dtype is not None and request.state_dtype not in STATE_DIVERGENCE:
        raise UnknownName(f"no state type {quote(request.state_dtype)}: give float32 or bfloat16")
    for name, value in (("tp", request.tp), ("pp", request.pp)):
        if value is not None and not 1 <= value <= 1024:
            raise BadInput(f"{name} of {value}: give 1 to 1024")


def _check_ranks(request: Request, devices: int) -> None:
    ranks = (request.tp or 1) * (request.pp or 1)
    if ranks > devices:
        raise Unsupported(
            f"tp {request.tp or 1} x pp {request.pp or 1} needs {ranks} devices, and {devices} were given"
        )


@lru_cache
def engine_module(name: str) -> ModuleType:
    """The engine's file. Imported when first asked for: a call pays for the engines that it considers."""
    if name not in ENGINE_MODULES:
        near = did_you_mean(name, ENGINE_MODULES)
        raise UnknownName(f"no engine {quote(name)}: {near}there are {', '.join(ENGINE_MODULES)}")
    return import_module(f".engines.{ENGINE_MODULES[name]}", __package__)


def _engines(request: Request) -> Iterator[tuple[ModuleType, str]]:
    if request.engine is not None:
        name, _, version = request.engine.partition("@")
        module = engine_module(name)
        yield module, known_version(module.ENGINE, version)
        return
    for name in ENGINE_MODULES:
        module = engine_module(name)
        if module.ENGINE.released:
            yield module, module.ENGINE.default_version


@lru_cache
def known_version(engine: Engine, version: str) -> str:
    """The version asked for if its rules are known, the newest known one at or below it otherwise."""
    if not version:
        return engine.default_version
    asked = version_key(version)
    if not asked:
        raise UnknownName(f"{quote(version)} is no version of {engine.name}: write it like {engine.default_version}")
    if asked < version_key(engine.versions[0])[: len(asked)]:
        raise UnknownName(
            f"{engine.name} {version} is older than the oldest whose rules are known ({engine.versions[0]})"
        )
    return version


def version_key(version: str) -> tuple[int, ...]:
    """Numbers of a version such as 0.32.0, v0.5.23 or b11434; empty where there are none."""
    numbers: list[int] = []
    for part in version.lstrip("vb").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits[:9]))
    return tuple(numbers)


def _best_of(
    module: ModuleType, version: str, request: Request, asked_model: Model, devices: tuple[Device, ...]
) -> EnginePlan:
    """The engine's best plan: the first sure fit in order of quality, else a tight one, else the nearest miss."""
    for device in dict.fromkeys(devices):
        reason = module.runs_on(device, version)
        if reason:
            raise Unsupported(reason)
    candidates, refusal = _candidates(module, version, request, asked_model, devices)
    placements = list(_placements(module.ENGINE, request, asked_model, len(devices)))
    tight: EnginePlan | None = None
    nearest: EnginePlan | None = None
    for weights, kv_dtype in candidates:
        for tp, pp in placements:
            try:
                candidate = _engine_plan(module, version, request, asked_model, devices, weights, kv_dtype, tp, pp)
            except Unsupported as reason:
                refusal = refusal or str(reason)
                continue
            if candidate.fits and not candidate.tight:
                return candidate
            if candidate.fits:
                tight = tight or candidate
            elif nearest is None or candidate.shortfall_bytes < nearest.shortfall_bytes:
                nearest = candidate
    found = tight or nearest
    if found is None:
        raise Unsupported(refusal or f"{module.ENGINE.name} has no way to run {asked_model.name} there")
    return found


def _candidates(
    module: ModuleType, version: str, request: Request, asked_model: Model, devices: tuple[Device, ...]
) -> tuple[list[tuple[WeightFormat, str]], str | None]:
    """Pairs of weight format and cache type that the engine takes, best quality first, and the first refusal heard."""
    refusal: str | None = None
    weights: list[WeightFormat] = []
    for name in _weight_names(module, request, asked_model, devices[0]):
        fmt = weight_format(name)
        reason = next(filter(None, (module.loads(asked_model, fmt, device, version) for device in devices)), None)
        if reason:
            refusal = refusal or reason
        else:
            weights.append(fmt)
    kv_dtypes = (request.kv_dtype,) if request.kv_dtype else module.kv_dtypes(devices[0], version)
    state_dtype = request.state_dtype or "float32"
    pairs = [(fmt, kv_dtype) for fmt in weights for kv_dtype in kv_dtypes]
    pairs.sort(key=lambda pair: divergence(pair[0].divergence, pair[1], state_dtype))
    return pairs, refusal


def _weight_names(module: ModuleType, request: Request, asked_model: Model, device: Device) -> tuple[str, ...]:
    if request.weights:
        return (_own_name(module, request.weights, asked_model, device),)
    if asked_model.stored:
        return (asked_model.stored,)
    return module.weight_formats(asked_model, device)


def _own_name(module: ModuleType, name: str, asked_model: Model, device: Device) -> str:
    """ "bf16" means unquantized whatever the file is called: an engine that reads GGUF has its own name for it."""
    if name.strip().lower() != "bf16":
        return name
    own = (known for known in module.weight_formats(asked_model, device) if known.endswith("-bf16"))
    return next(own, name)


def _placements(engine: Engine, request: Request, asked_model: Model, devices: int) -> Iterator[tuple[int, int]]:
    """Ways to lay the model over that many devices, as (tp, pp), the preferred one first."""
    tp, pp = request.tp, request.pp
    if engine.parallelism != "tensor" and tp not in (None, 1):
        raise Unsupported(f"{engine.name} has no tensor parallelism: leave out --tp")
    if engine.parallelism == "layers":
        yield 1, pp or devices
    elif engine.parallelism == "single":
        yield 1, 1
    elif tp or pp:
        tp = tp or max(1, devices // (pp or 1))
        yield tp, pp or max(1, devices // tp)
    else:
        for ranks in range(devices, 0, -1):
            if devices % ranks == 0 and asked_model.num_attention_heads % ranks == 0:
                yield ranks, devices // ranks


def _engine_plan(
    module: ModuleType,
    version: str,
    request: Request,
    asked_model: Model,
    devices: tuple[Device, ...],
    weights: WeightFormat,
    kv_dtype: str,
    tp: int,
    pp: int,
) -> EnginePlan:
    options, assumed = request.options, None
    if options.host_memory_bytes is None and devices[0].kind == "discrete":
        assumed = max(ASSUMED_HOST_BYTES, 2 * sum(device.memory_bytes for device in devices))
        options = replace(options, host_memory_bytes=assumed)
    setup, estimate = _prepared(
        module,
        asked_model,
        weights,
        devices[: tp * pp],
        version,
        kv_dtype,
        request.state_dtype or "float32",
        tp,
        pp,
        request.mtp,
        bool(request.vision),
        options,
    )
    notes = _notes(asked_model, request.ctx_tokens)
    return EnginePlan(module.ENGINE.name, setup, estimate, request.ctx_tokens, request.seqs, notes, assumed)


@lru_cache(maxsize=65536)
def _prepared(
    module: ModuleType,
    asked_model: Model,
    weights: WeightFormat,
    devices: tuple[Device, ...],
    version: str,
    kv_dtype: str,
    state_dtype: str,
    tp: int,
    pp: int,
    mtp: int,
    vision: bool,
    options: Options,
) -> tuple[Setup, Estimate]:
    """Context and sequences come last in every engine, so everything before them is worked out once."""
    if vision and asked_model.vision is None:
        raise Unsupported(f"{asked_model.name} has no vision tower: leave out --vision")
    if mtp and not asked_model.mtp_num_hidden_layers:
        raise Unsupported(f"{asked_model.name} has no multi-token prediction layer: leave out --mtp")
    setup = Setup(asked_model, weights, devices, version, kv_dtype, state_dtype, tp, pp, mtp, vision, options)
    return setup, module.estimate(setup)


def _notes(asked_model: Model, ctx_tokens: int) -> tuple[str, ...]:
    native = asked_model.max_position_embeddings
    if ctx_tokens <= native:
        return ()
    factor = 4 if ctx_tokens > 2 * native else 2
    scaling = (
        f"{ctx_tokens:,} tokens need YaRN rope scaling (factor {factor} over {native:,} native tokens); "
        "static YaRN applies at every length and costs quality on short prompts"
    )
    if ctx_tokens <= MAX_CTX_TOKENS:
        return (scaling,)
    return (scaling, f"beyond {MAX_CTX_TOKENS:,} tokens the model has no published rope scaling: quality is unknown")


def _rank(candidate: EnginePlan) -> tuple[object, ...]:
    if not candidate.fits:
        return (2, candidate.shortfall_bytes)
    serves = engine_module(candidate.engine).ENGINE.serves
    return (int(candidate.tight), round(candidate.divergence, 4), not serves, candidate.shortfall_bytes)


def _nothing_runs(skipped: list[Skipped]) -> str:
    if len(skipped) == 1:
        return skipped[0].reason
    return "no engine takes this: " + "; ".join(f"{item.engine}: {item.reason}" for item in skipped)


def variant(request: Request, **changes: object) -> Request:
    """The request with some fields changed; names of `Options` reach into it."""
    options = {name: changes.pop(name) for name in list(changes) if name in Options.__slots__}
    if options:
        changes["options"] = replace(request.options, **options)
    return replace(request, **changes)
