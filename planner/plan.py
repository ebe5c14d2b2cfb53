"""The answer: plans for one request, best first, each with its memory, its limits and its launch line."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from ..profiles.device import Device
from ..profiles.frozen import dataclass
from ..profiles.model import Model
from .documents import device_json, digest, options_json
from .engines.engine import Allocation, DeviceShare, Estimate, Setup
from .floor import Floor
from .memory import Amount, Memory
from .quality import divergence
from .quantizing import quantizing_line
from .request import Prices, Request

if TYPE_CHECKING:
    from .energy import Energy
    from .speed import Speed

MAX_CTX_TOKENS = 1_010_000  # Qwen's own recipe: YaRN factor 4 over 262,144 native tokens
MAX_SEQS = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest context at the asked number of sequences, and the most sequences at the asked context."""

    max_ctx_tokens: int
    max_seqs: int


@dataclass(frozen=True, slots=True)
class Advice:
    """One change, whether the plan fits with it, and what it does to the tightest device."""

    change: str
    fits: bool
    effect: str
    saves_bytes: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """An engine that was not considered, and why."""

    engine: str
    reason: str


@dataclass(frozen=True, eq=False)
class EnginePlan:
    """One engine, one weight format, one cache type: what it takes and how to start it."""

    engine: str
    setup: Setup
    estimate: Estimate
    ctx_tokens: int
    seqs: int
    notes: tuple[str, ...] = ()  # warnings that no engine needs to know about: rope scaling and the like
    assumed_host_bytes: int | None = None  # host memory that was taken for granted
    prices: Prices = Prices()
    floor: Floor | None = None  # of the setup; None: not known

    @property
    def engine_version(self) -> str:
        return self.setup.version

    @property
    def weights(self) -> str:
        return self.setup.weights.name

    @property
    def kv_dtype(self) -> str:
        return self.setup.kv_dtype

    @property
    def state_dtype(self) -> str:
        return self.setup.state_dtype

    @property
    def tp(self) -> int:
        return self.setup.tp

    @property
    def pp(self) -> int:
        return self.setup.pp

    @property
    def dp(self) -> int:
        return self.setup.dp

    @property
    def ep(self) -> int:
        return self.setup.ep

    @property
    def nodes(self) -> int:
        return self.setup.nodes

    @property
    def mtp(self) -> int:
        return self.setup.mtp

    @property
    def vision(self) -> bool:
        return self.setup.vision

    @cached_property
    def shortfall_bytes(self) -> int:
        return self.estimate.shortfall_bytes(self.ctx_tokens, self.seqs)

    @cached_property
    def allocation(self) -> Allocation:
        return self.estimate.allocate(self.ctx_tokens, self.seqs)

    @property
    def fits(self) -> bool:
        return self.shortfall_bytes <= 0

    @cached_property
    def tight(self) -> bool:
        """It fits at the expected figure, and not at the upper end of the interval."""
        return self.fits and not self.estimate.is_sure(self.ctx_tokens, self.seqs)

    @property
    def reasons(self) -> tuple[str, ...]:
        return self.allocation.reasons

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        return self.notes + self._weights_note() + self._host_note() + self.allocation.warnings

    def _weights_note(self) -> tuple[str, ...]:
        """Our own integer formats are made, not downloaded."""
        weights, model = self.setup.weights, self.setup.model
        if not weights.name.startswith("int") or model.stored == weights.name:
            return ()
        made = f"{weights.name} is made from {model.repo}, not downloaded"
        line = None if self.engine == "ktransformers" else quantizing_line(model, weights)
        return (f"{made}: `{line}` makes it" if line else f"{made}: the line expects the result in a folder",)

    def _host_note(self) -> tuple[str, ...]:
        assumed = self.assumed_host_bytes
        if assumed is None or self.host.weights.mid <= assumed // 4:
            return ()
        gib = assumed >> 30
        return (f"host memory was not given: {gib} GiB are taken to be free; --host-ram says how much there is",)

    @property
    def devices(self) -> tuple[DeviceShare, ...]:
        return self.allocation.devices

    @property
    def host(self) -> Memory:
        return self.allocation.host

    @property
    def detail(self) -> dict[str, object]:
        return dict(self.allocation.detail)

    @cached_property
    def divergence(self) -> float:
        """Expected KL divergence from the bf16 model, for ranking."""
        return divergence(self.setup.weights.divergence, self.setup.kv_dtype, self.setup.state_dtype)

    @cached_property
    def speed(self) -> "Speed | None":
        """As if the plan had the memory, whether or not it fits. Worked out only where somebody asks; None where a
        device's bandwidth is not known."""
        from .speed import is_known, speed

        return speed(self) if is_known(self) else None

    @cached_property
    def energy(self) -> "Energy | None":
        """None where nobody says what the devices draw, or how fast they are."""
        from .energy import energy

        return energy(self, self.speed, self.prices) if self.speed else None

    @cached_property
    def limits(self) -> Limits:
        def fits(ctx_tokens: int, seqs: int) -> bool:
            if self.floor and self.floor.missing_bytes(ctx_tokens, seqs) > 0:
                return False
            return self.estimate.shortfall_bytes(ctx_tokens, seqs) <= 0

        return Limits(
            _largest(lambda ctx_tokens: fits(ctx_tokens, self.seqs), max(MAX_CTX_TOKENS, self.ctx_tokens)),
            _largest(lambda seqs: fits(self.ctx_tokens, seqs), max(MAX_SEQS, self.seqs)),
        )

    @cached_property
    def command(self) -> str:
        return self.estimate.command(self.ctx_tokens, self.seqs)

    def to_json(self) -> dict[str, object]:
        return {
            "engine": self.engine,
            "engine_version": self.engine_version,
            "weights": self.weights,
            "kv_dtype": self.kv_dtype,
            "state_dtype": self.state_dtype,
            "tp": self.tp,
            "pp": self.pp,
            "dp": self.dp,
            "ep": self.ep,
            "nodes": self.nodes,
            "mtp": self.mtp,
            "vision": self.vision,
            "fits": self.fits,
            "tight": self.tight,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "devices": _shares_json(self.devices),
            "host": {"memory": _memory_json(self.host), "interval": _interval_json(self.host)},
            "limits": {"max_ctx_tokens": self.limits.max_ctx_tokens, "max_seqs": self.limits.max_seqs},
            "speed": self.speed.to_json() if self.speed else None,
            "energy": self.energy.to_json() if self.energy else None,
            "quality": {"divergence": self.divergence, "basis": "estimated"},
            "options": options_json(self.setup.options),
            "detail": self.detail,
            "command": self.command,
        }


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is known about one request."""

    request: Request
    model: Model
    devices: tuple[Device, ...]
    plans: tuple[EnginePlan, ...]  # best first: sure fits, tight fits, then what does not fit, nearest first
    skipped: tuple[Skipped, ...]
    advisor: "Advisor | None" = None

    @property
    def best(self) -> EnginePlan:
        return self.plans[0]

    @property
    def fits(self) -> bool:
        return self.best.fits

    @cached_property
    def advice(self) -> tuple[Advice, ...]:
        """What to change where the best plan does not fit, or only just does."""
        return self.advisor(self) if self.advisor else ()

    def to_json(self) -> dict[str, object]:
        """The document of `--json`. `sha256` is of all the rest, so that a file says whether somebody changed it."""
        document = self._document()
        return {**document, "sha256": digest(document)}

    def _document(self) -> dict[str, object]:
        return {
            "schema": 1,
            "request": _request_json(self),
            "fits": self.fits,
            "plans": [plan.to_json() for plan in self.plans],
            "advice": [
                {
                    "change": advice.change,
                    "fits": advice.fits,
                    "effect": advice.effect,
                    "saves_bytes": advice.saves_bytes,
                }
                for advice in self.advice
            ],
            "skipped": [{"engine": skipped.engine, "reason": skipped.reason} for skipped in self.skipped],
            "profiles": [device_json(device) for device in dict.fromkeys(self.devices)],
        }


Advisor = Callable[[Plan], tuple[Advice, ...]]


def _largest(fits: Callable[[int], bool], ceiling: int) -> int:
    """The largest n in 0..ceiling for which `fits(n)`; `fits` never turns true again once false."""
    if not fits(1):
        return 0
    if fits(ceiling):
        return ceiling
    low, high = 1, ceiling
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _memory_json(memory: Memory) -> dict[str, int]:
    parts = {f"{name}_bytes": amount.mid for name, amount in memory.parts.items()}
    return {**parts, "total_bytes": sum(parts.values())}


def _interval_json(memory: Memory) -> dict[str, object]:
    parts = {f"{name}_bytes": _amount_json(amount) for name, amount in memory.parts.items()}
    return {**parts, "total_bytes": _amount_json(memory.total)}


def _amount_json(amount: Amount) -> dict[str, object]:
    basis = "exact" if amount.exact else "estimated"
    return {"low": amount.low, "mid": amount.mid, "high": amount.high, "basis": basis}


def _shares_json(shares: tuple[DeviceShare, ...]) -> list[dict[str, object]]:
    """Devices that hold the same are told as one object: of many, most do."""
    told: dict[DeviceShare, dict[str, object]] = {}
    found: list[dict[str, object]] = []
    for place, share in enumerate(shares):
        like = shares[place - 1]
        if place and share.device is like.device and share.memory is like.memory:
            found.append(found[-1])
        else:
            found.append(told.get(share) or told.setdefault(share, _share_json(share)))
    return found


def _share_json(share: DeviceShare) -> dict[str, object]:
    return {
        "name": share.device.name,
        "capacity_bytes": share.device.memory_bytes,
        "usable_bytes": share.usable_bytes,
        "free_bytes": share.free_bytes,
        "memory": _memory_json(share.memory),
        "interval": _interval_json(share.memory),
    }


def _request_json(plan: Plan) -> dict[str, object]:
    request, best = plan.request, plan.best
    options = request.options
    return {
        "model": plan.model.name,
        "model_path": plan.model.path,
        "devices": [device.name for device in plan.devices],
        "ctx_tokens": request.ctx_tokens,
        "seqs": request.seqs,
        "engine": request.engine,
        "weights": request.weights,
        "kv_dtype": request.kv_dtype,
        "state_dtype": request.state_dtype or best.state_dtype,
        "mtp": request.mtp,
        "vision": best.vision,
        "tp": request.tp,
        "pp": request.pp,
        "nodes": request.nodes,
        "dp": request.dp,
        "ep": request.ep,
        "interconnect": best.setup.interconnect.name if best.setup.interconnect else None,
        "options": {
            **{name: getattr(options, name) for name in options.__slots__ if name != "calibration"},
            **({"calibration": options.calibration.name} if options.calibration else {}),
        },
        "prices": {name: getattr(request.prices, name) for name in request.prices.__slots__},
    }
