"""Ways to lay a model over several boxes, or over replicas in one: tensor, pipeline, data and expert parallel sizes.

Tensor parallelism stays inside a box and pipeline stages go from box to box, as both engines' guides have it; tensor
parallelism over boxes is for who asks for it, and for what fits in no other way. Every box takes the same number of
ranks (vLLM 0.32 `engine/arg_utils.py`: --nnodes must divide the world; SGLang 0.5.23 `arg_groups/validation_hook.py`).
Whole experts are dealt out over the ranks of all replicas in a stage (vLLM `fused_moe/config.py`,
`FusedMoEParallelConfig.make`: tp x dp), or each is cut over them.
"""

from collections.abc import Iterator

from ..profiles.errors import Unsupported
from ..profiles.formats import WeightFormat
from ..profiles.frozen import dataclass
from ..profiles.interconnect import Interconnect
from ..profiles.model import Model
from .engines.engine import Engine

FP8_BLOCK = 128  # rows and columns that share a scale in Qwen's FP8 releases (config.json, weight_block_size)


@dataclass(frozen=True, slots=True)
class Spread:
    """What was asked of boxes and replicas. `across`: the ways that are offered unasked, with tensor parallelism over
    boxes, and those alone."""

    nodes: int
    dp: int | None
    ep: int | None
    interconnect: Interconnect | None
    across: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Parallel sizes, and how many devices of a box they take."""

    tp: int
    pp: int
    dp: int
    box_ranks: int


def refusal(engine: Engine, model: Model, spread: Spread) -> str | None:
    """Why an engine cannot be spread like that at all, None where it can."""
    if spread.nodes > 1 and not engine.spans_boxes:
        return f"{engine.name} runs in one box: leave out --nodes, or take vllm, sglang or llama.cpp"
    if (spread.dp or 1) > 1 and not engine.replicates:
        return f"{engine.name} has no data parallelism of its own: leave out --dp and start it several times"
    if (spread.ep or 1) > 1 and not model.is_moe:
        return f"{model.name} has no experts to deal out: leave out --ep"
    if (spread.ep or 1) > 1 and engine.parallelism != "tensor":
        return f"{engine.name} has no expert parallelism: leave out --ep"
    return None


def placements(
    engine: Engine, model: Model, box: int, spread: Spread, tp: int | None, pp: int | None
) -> list[Placement]:
    """Ways over `spread.nodes` boxes of `box` devices, the preferred one first. Unsupported where none is left of what
    was asked for; what is offered unasked may be nothing."""
    if engine.parallelism == "single":
        return [Placement(1, 1, 1, 1)]
    if engine.parallelism == "layers":
        stages = pp or box * spread.nodes
        if stages % spread.nodes:
            raise Unsupported(_nowhere(model, box, spread, tp, pp))
        return [Placement(1, stages, 1, stages // spread.nodes)]
    found = []
    for dp in _replicas(engine, model, spread):
        for ranks, stages in _sizes(model, box, spread.nodes, dp, tp, pp):
            place = _placed(box, spread, ranks, stages, dp, asked=tp is not None)
            if place is not None:
                found.append(place)
    if not found and not spread.across:
        raise Unsupported(_nowhere(model, box, spread, tp, pp))
    return found


def _replicas(engine: Engine, model: Model, spread: Spread) -> tuple[int, ...]:
    """One replica over all boxes; of a dense model also one in each, which needs no link between them."""
    if spread.dp is not None:
        return (spread.dp,)
    return (1, spread.nodes) if spread.nodes > 1 and not model.is_moe and engine.name == "vllm" else (1,)


def _sizes(model: Model, box: int, nodes: int, dp: int, tp: int | None, pp: int | None) -> Iterator[tuple[int, int]]:
    """(tp, pp) of one replica."""
    ranks = box * nodes // dp
    if tp or pp:
        tp = tp or _widest(model, min(box, ranks // (pp or 1)))
        yield tp, pp or max(1, ranks // tp)
        return
    for width in range(min(ranks, box * nodes), 0, -1):
        if ranks % width == 0 and model.num_attention_heads % width == 0 and ranks // width <= model.num_layers:
            yield width, ranks // width


def _widest(model: Model, most: int) -> int:
    return next((width for width in range(most, 0, -1) if model.num_attention_heads % width == 0), 1)


def _placed(box: int, spread: Spread, tp: int, pp: int, dp: int, asked: bool) -> Placement | None:
    """None where boxes would get unlike numbers of ranks, or a tensor-parallel group would straddle them."""
    world = tp * pp * dp
    if world > box * spread.nodes or world % spread.nodes:
        return None
    ranks = world // spread.nodes
    if ranks > box:
        return None
    if tp <= ranks:
        if spread.across:
            return None
        return Placement(tp, pp, dp, ranks) if ranks % tp == 0 else None
    link = spread.interconnect
    offered = asked or (spread.across and link is not None and link.takes_tensor_parallelism)
    return Placement(tp, pp, dp, ranks) if offered and tp % ranks == 0 else None


def _nowhere(model: Model, box: int, spread: Spread, tp: int | None, pp: int | None) -> str:
    wanted = ", ".join(f"{name} {size}" for name, size in (("tp", tp), ("pp", pp), ("dp", spread.dp)) if size)
    boxes = f"{spread.nodes} boxes of {box}" if spread.nodes > 1 else f"a box of {box}"
    return (
        f"{model.name} cannot be laid over {boxes} devices{' with ' + wanted if wanted else ''}: every box takes as "
        "many ranks as the others, and a tensor-parallel group lies in one box or fills several"
    )


def expert_ranks(model: Model, fmt: WeightFormat, place: Placement, ep: int | None) -> int | None:
    """Ranks that whole experts are dealt out to, 1 where each expert is cut; None where `ep` asks for another number:
    they lie on all tp x dp ranks of a stage, or on none."""
    ranks = place.tp * place.dp if model.is_moe else 1
    if ep is not None:
        return ep if ep in (1, ranks) else None
    if not model.is_moe:
        return 1
    if place.dp > 1 or _cuts_blocks(model.moe_intermediate_size, fmt, ranks):
        return ranks
    return 1


def block_obstacle(model: Model, fmt: WeightFormat, place: Placement) -> str | None:
    """Why FP8 in blocks cannot be cut so far: a linear layer's shard must hold whole blocks (vLLM 0.32
    `fp8_utils.py`, `validate_fp8_block_shape`). With replicas the shared expert lies whole on every rank."""
    if not model.is_moe or place.dp > 1 or not _cuts_blocks(model.shared_expert_intermediate_size, fmt, place.tp):
        return None
    return (
        f"the shared expert of {model.name} has {model.shared_expert_intermediate_size} rows, which FP8 in blocks of "
        f"{FP8_BLOCK} cannot cut over {place.tp} tensor-parallel ranks"
    )


def _cuts_blocks(width: int, fmt: WeightFormat, ranks: int) -> bool:
    return fmt.name == "fp8" and width % (FP8_BLOCK * ranks) != 0
