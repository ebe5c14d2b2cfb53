"""Every engine's best plan for a request, and how they are ranked.

Rank: what surely fits, then what fits at the expected figure, then what does not, nearest first. Among those that fit,
quality first (expected divergence from bf16, to a hundredth), then engines that serve, then how fast they decode at
the context and the number of sequences asked for (in steps of a fifth, for speed is no better known), then the rest of
the quality, then headroom. Experts in host memory only come before what is coarser than four bits, however fast, and
so do several boxes of llama.cpp.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import log
from types import ModuleType
from typing import TYPE_CHECKING

from ..profiles.box import devices_of
from ..profiles.device import Device
from ..profiles.errors import BadInput, UnknownName, Unsupported
from ..profiles.frozen import replace
from ..profiles.model import Model
from ..profiles.model_catalog import model
from ..profiles.names import quote
from .candidates import ENGINE_MODULES, Candidates, candidates, engine_module, known_version
from .engines.engine import Engine
from .engines.versions import release
from .plan import MAX_CTX_TOKENS, Advisor, EnginePlan, Plan, Skipped
from .prospects import Prospect, nearest_miss, prospects
from .quality import STATE_DIVERGENCE
from .request import Options, Request
from .speed import decode_tokens_per_s

if TYPE_CHECKING:
    from .placement import Spread

# Free host memory where nobody said how much there is: what a desktop of 32 GiB has left, or one and a half times the
# devices' own where those are large.
ASSUMED_HOST_BYTES = 24 << 30

FOUR_BIT_DIVERGENCE = 0.03  # the best four-bit recipes lie well below it, the best three-bit ones above

SPEED_STEP = 0.2  # of the logarithm of tokens per second

MAX_ASKED_CTX_TOKENS = 10_000_000
MAX_ASKED_SEQS = 1_000_000
MAX_PARALLEL = 1024


def search(request: Request, advisor: Advisor | None = None, devices: tuple[Device, ...] = ()) -> Plan:
    """Every engine's best plan for a request, ranked. `advisor` is asked for advice when the plan is. `devices` stand
    for those of the box that the request names, where their figures are at hand.

    Raises UnknownName, BadInput or Unsupported where there is no answer; "does not fit" is an answer.
    """
    _check(request)
    asked_model = model(request.model)
    box = devices or tuple(device for spec in request.devices for device in devices_of(spec))
    if not devices:
        request = _with_this_host(request, box)
    if not box:
        raise BadInput("no device: give at least one, such as rtx3060; `qwen-plan devices` lists them")
    devices, spread = box, None
    ones = (None, 1)
    if request.nodes != 1 or request.dp not in ones or request.ep not in ones or request.interconnect is not None:
        from .boxes import spread_of

        devices, spread = box * request.nodes, spread_of(request, box)
    _check_ranks(request, len(devices))
    plans: list[EnginePlan] = []
    skipped: list[Skipped] = []
    for module, version in _engines(request):
        name = module.ENGINE.name
        try:
            plans.append(_best_of(module, version, request, asked_model, box, spread))
        except Unsupported as reason:
            skipped.append(Skipped(name, str(reason)))
    if not plans:
        raise Unsupported(_nothing_runs(skipped))
    if len(plans) > 1:
        plans.sort(key=rank)
    return Plan(request, asked_model, devices, tuple(plans), tuple(skipped), advisor)


def _check(request: Request) -> None:
    if not 1 <= request.ctx_tokens <= MAX_ASKED_CTX_TOKENS:
        raise BadInput(f"context of {request.ctx_tokens} tokens: give 1 to {MAX_ASKED_CTX_TOKENS:,}")
    if not 1 <= request.seqs <= MAX_ASKED_SEQS:
        raise BadInput(f"{request.seqs} sequences: give 1 to {MAX_ASKED_SEQS:,}")
    if not 0 <= request.mtp <= 16:
        raise BadInput(f"{request.mtp} draft tokens: give 0 to 16")
    if request.state_dtype is not None and request.state_dtype not in STATE_DIVERGENCE:
        raise UnknownName(f"no state type {quote(request.state_dtype)}: give float32 or bfloat16")
    for name, value in (("tp", request.tp), ("pp", request.pp), ("dp", request.dp), ("ep", request.ep)):
        if value is not None and not 1 <= value <= MAX_PARALLEL:
            raise BadInput(f"{name} of {value}: give 1 to {MAX_PARALLEL:,}")


def _check_ranks(request: Request, devices: int) -> None:
    ranks = (request.tp or 1) * (request.pp or 1) * (request.dp or 1)
    if ranks > devices:
        replicas = f" x dp {request.dp}" if request.dp else ""
        raise Unsupported(
            f"tp {request.tp or 1} x pp {request.pp or 1}{replicas} needs {ranks} devices, and {devices} were given"
        )


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


def _best_of(
    module: ModuleType,
    version: str,
    request: Request,
    asked_model: Model,
    devices: tuple[Device, ...],
    spread: "Spread | None" = None,
) -> EnginePlan:
    """The engine's best plan. Experts stay on the devices where that leaves four-bit quality or better."""
    if spread is not None:
        from .boxes import best_spread

        return best_spread(module, version, request, asked_model, devices, spread)
    options = request.options
    assumed = None
    ways = [options]
    if module.ENGINE.offloads and asked_model.is_moe:
        if options.host_memory_bytes is None:
            assumed = assumed_host_bytes(devices)
            ways = [_with_host(options, assumed) if assumed else options]
        if options.offload_experts is None:
            ways.insert(0, on_devices(options))
    notes = context_notes(asked_model, request.ctx_tokens) + version_notes(module.ENGINE, version)
    found: list[EnginePlan] = []
    refusal: str | None = None
    for way in ways:
        offered, made = plans_of(module, version, request, asked_model, devices, way, notes, assumed)
        found += worth_ranking(made)
        refusal = refusal or offered.refusal
        if way is not ways[-1] and found and _is_good(found[0]):
            break
    if not found:
        raise Unsupported(refusal or f"{module.ENGINE.name} has no way to run {asked_model.name} there")
    return min(found, key=rank) if len(found) > 1 else found[0]


def plans_of(
    module: ModuleType,
    version: str,
    request: Request,
    asked_model: Model,
    devices: tuple[Device, ...],
    options: Options,
    notes: tuple[str, ...],
    assumed: int | None = None,
    spread: "Spread | None" = None,
) -> tuple[Candidates, Iterator[Prospect]]:
    """What an engine offers for the request in one way, and what may become plans of that, in order of quality."""
    offered = candidates(
        module,
        version,
        asked_model,
        devices,
        request.weights,
        request.kv_dtype,
        request.state_dtype or "float32",
        request.mtp,
        bool(request.vision),
        request.tp,
        request.pp,
        options,
        spread,
    )
    return offered, prospects(offered, request, notes, assumed)


def _is_good(candidate: EnginePlan) -> bool:
    """A sure fit at four-bit quality or better."""
    return candidate.fits and candidate.divergence <= FOUR_BIT_DIVERGENCE and not candidate.tight


def worth_ranking(offered: Iterable[Prospect]) -> list[EnginePlan]:
    """Of plans in order of quality: the first sure fit, else the first tight one, else the nearest miss."""
    tight: EnginePlan | None = None
    misses: list[Prospect] = []
    for one in offered:
        if one.least_missing_bytes > 0:
            misses.append(one)
            continue
        found = one.plan
        if found is None:
            continue
        if not found.fits:
            misses.append(one)
        elif found.tight:
            tight = tight or found
        else:
            return [found]
    best = tight or nearest_miss(misses)
    return [best] if best else []


@lru_cache(maxsize=4096)
def on_devices(options: Options) -> Options:
    return replace(options, offload_experts=False)


@lru_cache(maxsize=4096)
def assumed_host_bytes(devices: tuple[Device, ...]) -> int | None:
    """Free host memory that is taken for granted beside devices with memory of their own."""
    if devices[0].kind != "discrete":
        return None
    return max(ASSUMED_HOST_BYTES, 3 * sum(device.memory_bytes for device in devices) // 2)


def _with_this_host(request: Request, devices: tuple[Device, ...]) -> Request:
    """With `auto` the host is this machine, whose free memory is no guess."""
    known = request.options.host_memory_bytes is not None
    if known or request.devices != ("auto",) or not devices or devices[0].kind != "discrete":
        return request
    from ..profiles.this_machine import free_host_bytes

    free_bytes = free_host_bytes()
    return replace(request, options=_with_host(request.options, free_bytes)) if free_bytes else request


@lru_cache(maxsize=4096)
def _with_host(options: Options, host_memory_bytes: int) -> Options:
    return replace(options, host_memory_bytes=host_memory_bytes)


@lru_cache
def version_notes(engine: Engine, version: str) -> tuple[str, ...]:
    newest = engine.versions[-1]
    if release(version) <= release(newest):
        return ()
    return (f"{engine.name} {version} is newer than the newest whose rules were read: those of {newest} are used",)


@lru_cache
def context_notes(asked_model: Model, ctx_tokens: int) -> tuple[str, ...]:
    factor = asked_model.yarn_factor(ctx_tokens)
    if factor is None:
        return ()
    native = asked_model.native_context_tokens
    scaling = (
        f"{ctx_tokens:,} tokens need YaRN rope scaling (factor {factor:g}; {native:,} tokens are native); "
        "static YaRN applies at every length and costs quality on short prompts"
    )
    if ctx_tokens <= MAX_CTX_TOKENS:
        return (scaling,)
    return (scaling, f"beyond {MAX_CTX_TOKENS:,} tokens the model has no published rope scaling: quality is unknown")


def rank(candidate: EnginePlan) -> tuple[float, ...]:
    if not candidate.fits:
        return (2, candidate.shortfall_bytes)
    coarse = candidate.divergence > FOUR_BIT_DIVERGENCE
    engine = engine_module(candidate.engine).ENGINE
    # llama.cpp's own guide calls its RPC backend, which several boxes take, a proof of concept
    place = 2 * coarse + (candidate.allocation.offloads or (candidate.nodes > 1 and engine.parallelism == "layers"))
    serves = engine.serves
    class_of_quality, exact_quality = round(candidate.divergence, 2), round(candidate.divergence, 4)
    return (
        candidate.tight,
        place,
        class_of_quality,
        not serves,
        -round(log(decode_tokens_per_s(candidate)) / SPEED_STEP),
        exact_quality,
        candidate.shortfall_bytes,
    )


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
