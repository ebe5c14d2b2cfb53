"""What is tried on some devices: engines and their versions, formats, cache types and layouts over the devices.

Everything here leaves out the context and the number of sequences, so one preparation serves every question about them.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ..profiles.device import Device
from ..profiles.errors import UnknownName, Unsupported
from ..profiles.formats import WeightFormat, weight_format
from ..profiles.model import Model
from ..profiles.names import did_you_mean, quote
from .engines.engine import Engine, Estimate, Setup
from .engines.support import kinds
from .engines.versions import release
from .floor import Floor, floor
from .quality import divergence
from .request import Options

if TYPE_CHECKING:
    from .placement import Spread

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


@lru_cache
def engine_module(name: str) -> ModuleType:
    """The engine's file. Imported when first asked for: a call pays for the engines that it considers."""
    if name not in ENGINE_MODULES:
        near = did_you_mean(name, ENGINE_MODULES)
        raise UnknownName(f"no engine {quote(name)}: {near}there are {', '.join(ENGINE_MODULES)}")
    return import_module(f".engines.{ENGINE_MODULES[name]}", __package__)


@lru_cache
def known_version(engine: Engine, version: str) -> str:
    """The version asked for, the engine's default for an empty one. Raises UnknownName for what is no version, or is
    older than any whose rules were read."""
    if not version:
        return engine.default_version
    asked = release(version)
    if not asked:
        raise UnknownName(f"{quote(version)} is no version of {engine.name}: write it like {engine.default_version}")
    if asked < release(engine.versions[0])[: len(asked)]:
        raise UnknownName(
            f"{engine.name} {version} is older than the oldest whose rules are known ({engine.versions[0]})"
        )
    return version


class Candidates:
    """Setups of one engine, best quality first. Each is worked out when it is first asked for, and kept."""

    def __init__(self, engine: Engine, prepare: Callable[[Setup], Estimate], setups: list[Setup], refusal: str | None):
        self.engine, self.setups = engine, setups
        self._prepare, self._refusal = prepare, refusal
        self._made: dict[int, Estimate | None] = {}
        self._refused: dict[int, str] = {}
        self._floors: dict[int, Floor | None] = {}

    @property
    def refusal(self) -> str | None:
        """Why something is not offered: the first reason, of those that were heard."""
        return self._refusal or (self._refused[min(self._refused)] if self._refused else None)

    def estimate(self, place: int) -> Estimate | None:
        """None where the engine refuses the setup."""
        if place not in self._made:
            try:
                self._made[place] = self._prepare(self.setups[place])
            except (UnknownName, Unsupported) as reason:  # a cache type may be another engine's word
                self._made[place], self._refused[place] = None, str(reason)
        return self._made[place]

    def floor(self, place: int) -> Floor | None:
        if place not in self._floors:
            self._floors[place] = floor(self.engine, self.setups[place])
        return self._floors[place]


@lru_cache(maxsize=512)  # a sweep asks for one setup at many contexts; more would only feed the garbage collector
def candidates(
    module: ModuleType,
    version: str,
    model: Model,
    devices: tuple[Device, ...],
    weights: str | None,
    kv_dtype: str | None,
    state_dtype: str,
    mtp: int,
    vision: bool,
    tp: int | None,
    pp: int | None,
    options: Options,
    spread: "Spread | None" = None,
) -> Candidates:
    """What an engine offers for a model on devices; None stands for whatever the engine takes. With a `spread` the
    devices are those of one box of several, or carry replicas.

    Raises UnknownName for a weight format that does not exist.
    """
    refusal = _refusal(module.ENGINE, model, mtp, vision, tp, pp)
    if spread is not None:
        from .placement import refusal as spread_refusal

        refusal = refusal or spread_refusal(module.ENGINE, model, spread)
    refusal = refusal or _first(module.runs_on(device, version) for device in kinds(devices))
    if refusal:
        return Candidates(module.ENGINE, module.estimate, [], refusal)
    formats: list[WeightFormat] = []
    for name in _weight_names(module, weights, model, devices[0]):
        fmt = weight_format(name)
        reason = _first(module.loads(model, fmt, device, version) for device in kinds(devices))
        if reason is None:
            formats.append(fmt)
        refusal = refusal or reason
    kv_dtypes = module.kv_dtypes(devices[0], version)
    if kv_dtype is not None:
        kv_dtypes = kv_dtypes[:1] if kv_dtype == "auto" else (kv_dtype,)
    pairs = [(fmt, own) for fmt in formats for own in kv_dtypes]
    pairs.sort(key=lambda pair: divergence(pair[0].divergence, pair[1], state_dtype))
    if spread is not None:
        setups, why = _spread_setups(
            module, version, model, devices, pairs, state_dtype, mtp, vision, tp, pp, options, spread
        )
        return Candidates(module.ENGINE, module.estimate, setups, refusal or why)
    places = list(_placements(module.ENGINE, model, len(devices), tp, pp))
    setups = [
        Setup(model, fmt, devices[: ranks * stages], version, own, state_dtype, ranks, stages, mtp, vision, options)
        for fmt, own in pairs
        for ranks, stages in places
    ]
    return Candidates(module.ENGINE, module.estimate, setups, refusal)


def _spread_setups(
    module: ModuleType, version: str, model: Model, box: tuple[Device, ...], pairs: list[tuple[WeightFormat, str]],
    state_dtype: str, mtp: int, vision: bool, tp: int | None, pp: int | None, options: Options, spread: "Spread",
) -> tuple[list[Setup], str | None]:  # fmt: skip
    """Setups over several boxes or replicas, and the first reason why a format is not among them."""
    from .placement import block_obstacle, expert_ranks, placements

    setups: list[Setup] = []
    refusal: str | None = None
    places = placements(module.ENGINE, model, len(box), spread, tp, pp)
    for fmt, kv_dtype in pairs:
        for place in places:
            obstacle = block_obstacle(model, fmt, place)
            if obstacle is not None:
                refusal = refusal or obstacle
                continue
            ranks = expert_ranks(model, fmt, place, spread.ep)
            if ranks is None:
                refusal = refusal or (
                    f"ep of {spread.ep}: whole experts lie on all tp x dp ranks of a stage, such as "
                    f"{place.tp * place.dp}; 1 cuts each of them"
                )
                continue
            setups.append(
                Setup(
                    model, fmt, box[: place.box_ranks] * spread.nodes, version, kv_dtype, state_dtype,
                    place.tp, place.pp, mtp, vision, options, place.dp, ranks, spread.nodes, spread.interconnect,
                )
            )  # fmt: skip
    return setups, refusal


def _refusal(engine: Engine, model: Model, mtp: int, vision: bool, tp: int | None, pp: int | None) -> str | None:
    if vision and model.vision is None:
        return f"{model.name} has no vision tower: leave out --vision"
    if mtp and not model.mtp_num_hidden_layers:
        return f"{model.name} has no multi-token prediction layer: leave out --mtp"
    if engine.parallelism != "tensor" and tp not in (None, 1):
        return f"{engine.name} has no tensor parallelism: leave out --tp"
    if engine.parallelism == "tensor" and (pp or 1) > model.num_layers:
        return (
            f"{model.name} has {model.num_layers} layers, and {pp} pipeline stages need one each: give a smaller --pp"
        )
    return None


def _first(reasons: Iterator[str | None]) -> str | None:
    return next(filter(None, reasons), None)


def _weight_names(module: ModuleType, weights: str | None, model: Model, device: Device) -> tuple[str, ...]:
    if weights is None:
        return (model.stored,) if model.stored else module.weight_formats(model, device)
    if weights.strip().lower() == "bf16":  # unquantized, whatever the file is called: GGUF has its own name for it
        own = (known for known in module.weight_formats(model, device) if known.endswith("-bf16"))
        return (next(own, "bf16"),)
    return (weights,)


def _placements(
    engine: Engine, model: Model, devices: int, tp: int | None, pp: int | None
) -> Iterator[tuple[int, int]]:
    """Ways to lay the model over that many devices, as (tp, pp), the preferred one first."""
    if engine.parallelism == "layers":
        yield 1, pp or devices
    elif engine.parallelism == "single":
        yield 1, 1
    elif tp or pp:
        tp = tp or max(1, devices // (pp or 1))
        yield tp, pp or max(1, devices // tp)
    else:
        for ranks in range(devices, 0, -1):
            if devices % ranks or model.num_attention_heads % ranks:
                continue
            if devices // ranks <= model.num_layers:
                yield ranks, devices // ranks
