"""An engine's best plan over several boxes, or with replicas: what `search.py` is for one box."""

from collections.abc import Iterable
from types import ModuleType

from ..profiles.device import Device
from ..profiles.errors import BadInput, Unsupported
from ..profiles.frozen import replace
from ..profiles.interconnect import assumed_interconnect, interconnect
from ..profiles.model import Model
from .placement import Placement, Spread, block_obstacle, expert_ranks
from .plan import EnginePlan
from .prospects import Prospect
from .request import Request
from .search import context_notes, on_devices, plans_of, rank, version_notes, worth_ranking
from .speed import decode_tokens_per_s

WORTH_TELLING = 1.3  # times as fast
MAX_NODES = 128


def spread_of(request: Request, box: tuple[Device, ...]) -> Spread:
    """What was asked of boxes and replicas, checked."""
    if not 1 <= request.nodes <= MAX_NODES:
        raise BadInput(f"{request.nodes} nodes: give 1 to {MAX_NODES}")
    if request.nodes == 1 and request.interconnect is not None:
        raise BadInput("--interconnect says what lies between boxes: give --nodes too")
    link = interconnect(request.interconnect) if request.interconnect else assumed_interconnect(box)
    return Spread(request.nodes, request.dp, request.ep, link if request.nodes > 1 else None)


def best_spread(
    module: ModuleType,
    version: str,
    request: Request,
    asked_model: Model,
    box: tuple[Device, ...],
    spread: Spread,
) -> EnginePlan:
    """The engine's best plan over several boxes or replicas. Experts stay on the devices. Tensor parallelism over boxes
    is looked at where nothing else fits and nobody asked for sizes."""
    notes = context_notes(asked_model, request.ctx_tokens) + version_notes(module.ENGINE, version)
    ways = [spread]
    if spread.nodes > 1 and request.tp is None and module.ENGINE.parallelism == "tensor":
        ways.append(replace(spread, across=True))
    found: list[EnginePlan] = []
    refusal: str | None = None
    for way in ways:
        options = on_devices(request.options)
        offered, made = plans_of(module, version, request, asked_model, box, options, notes, spread=way)
        found += _best_placed(made)
        refusal = refusal or offered.refusal
        if found and found[0].fits:
            break
    if not found:
        raise Unsupported(refusal or f"{module.ENGINE.name} has no way to run {asked_model.name} there")
    best = min(found, key=rank) if len(found) > 1 else found[0]
    return replace(best, notes=notes + _wider_note(module, best)) if request.tp is None else best


def _wider_note(module: ModuleType, best: EnginePlan) -> tuple[str, ...]:
    """What tensor parallelism over the boxes would bring to a plan that goes through them in turn."""
    setup, link = best.setup, best.setup.interconnect
    if not best.fits or setup.dp > 1 or setup.tp == 1 == setup.pp or setup.pp % setup.nodes or link is None:
        return ()
    if setup.tp_nodes > 1 or not link.takes_tensor_parallelism or not module.ENGINE.replicates:
        return ()
    place = Placement(setup.tp * setup.nodes, setup.pp // setup.nodes, 1, setup.box_ranks)
    experts = expert_ranks(setup.model, setup.weights, place, None)
    if experts is None or block_obstacle(setup.model, setup.weights, place):
        return ()
    wide = replace(setup, tp=place.tp, pp=place.pp, ep=experts)
    try:
        other = EnginePlan(best.engine, wide, module.estimate(wide), best.ctx_tokens, best.seqs, (), None, best.prices)
        now, then = decode_tokens_per_s(best), decode_tokens_per_s(other)
    except Unsupported:
        return ()
    if not other.fits or then < WORTH_TELLING * now:
        return ()
    return (
        f"tensor parallelism over the boxes (--tp {wide.tp}) would decode ~{then:.0f} instead of ~{now:.0f} tokens/s "
        f"at this context, if {link.name} keeps up: pipeline stages are the default, for they ask less of it",
    )


def _best_placed(offered: Iterable[Prospect]) -> list[EnginePlan]:
    """As `worth_ranking`, but of one format the first sure placement for each number of replicas, and of those the
    fastest."""
    sure: dict[int, EnginePlan] = {}
    others: list[Prospect] = []
    for one in offered:
        first = next(iter(sure.values()), None)
        if first and (one.setup.weights, one.setup.kv_dtype) != (first.setup.weights, first.kv_dtype):
            break
        found = one.plan if one.least_missing_bytes <= 0 else None
        if found and found.fits and not found.tight:
            sure.setdefault(found.dp, found)
        else:
            others.append(one)
    return [min(sure.values(), key=rank)] if sure else worth_ranking(others)
