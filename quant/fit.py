"""`--fit`: as many modules at 8 bits as a device has room for, those first where 4 bits hurt most.

    fitted = fit("Qwen/Qwen3.5-9B", Recipe(), Goal("rtx3060", 131072))
    quantize("Qwen/Qwen3.5-9B", target, fitted.recipe)          # and the plan is met to the byte

The planner is asked about drafts (`draft.py`): all modules at 4 bits, all at 8, then how far down the list of groups,
ordered by what 8 bits gain per byte (`sensitivity.py`), the answer stays yes. What counts as yes is that of the plan at
4 bits: a sure fit if that is one, else a fit at the expected figure. Engine and KV cache type stay those of that plan:
more bits for weights are not paid for with fewer for the cache.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ..kernels.runtime.configuration import read_configuration
from ..planner import Request, plan
from ..planner.plan import Advice, EnginePlan, Plan
from ..profiles.errors import BadInput, QwenfitError, Unsupported
from ..profiles.json_file import read_json_object
from .calibration import choose_sequences, read_text, read_tokenizer
from .draft import drafted
from .layout import Layout, lay_out
from .module_rules import rules
from .recipe import Recipe, Rule, first_rule
from .sensitivity import Meter, Sensitivity
from .shards import write_text
from .source import Source, open_source
from .weights import Weights

LOW_BITS, HIGH_BITS = 4, 8
SHARE_OF_TOKENS = 8
LEAST_TOKENS = 512
FURTHER_TRIES = 16


@dataclass(frozen=True, slots=True)
class Goal:
    """What the checkpoint is to fit: names as `qwen-plan` takes them. engine: None is the planner's choice."""

    device: str
    ctx_tokens: int = 32768
    seqs: int = 1
    engine: str | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """recipe: None where not even 4 bits fit; `plan` says then by how much. plan: of the checkpoint that the recipe
    makes. raised: groups at 8 bits, those that gain most first; sensitivities: all groups, in that order. advice: what
    the planner would change where it does not fit.
    """

    goal: Goal
    recipe: Recipe | None
    plan: EnginePlan
    raised: tuple[Sensitivity, ...]
    sensitivities: tuple[Sensitivity, ...]
    advice: tuple[Advice, ...] = ()

    @property
    def spare_bytes(self) -> int:
        """What stays free on the tightest device; negative where it does not fit."""
        return -self.plan.shortfall_bytes


def fit(
    source: str,
    recipe: Recipe,
    goal: Goal,
    *,
    device: str = "cpu",
    memory: str | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Fitted:
    """The recipe that fits. memory: a file that keeps the sensitivities for another call. watch: (layer, layers) done.

    `QwenfitError` in one sentence where the source, recipe or names are wrong, or no engine loads such a checkpoint.
    """
    opened = open_source(source)
    base = _base(recipe)
    low = lay_out(opened, base)
    first = _planned(low, goal)
    fixed = _fixed(goal, first)
    if not first.fits:
        return Fitted(goal, None, first, (), (), _advice(low, goal))
    needs_sure = not first.tight
    found = _sensitivities(opened, low, device, memory, watch)
    ordered = tuple(sorted(found, key=lambda group: -group.error / group.weights))

    def attempt(groups: Sequence[Sensitivity]) -> EnginePlan | None:
        made = _planned(lay_out(opened, raised(base, groups)), fixed)
        return made if made.fits and not (needs_sure and made.tight) else None

    count = _most(lambda number: attempt(ordered[:number]) is not None, len(ordered))
    chosen = list(ordered[:count])
    for group in ordered[count + 1 : count + 1 + FURTHER_TRIES]:
        # The first that did not fit may be large: smaller ones behind it still might.
        if attempt([*chosen, group]):
            chosen.append(group)
    best = attempt(chosen) or first
    return Fitted(goal, raised(base, chosen), best, tuple(chosen), ordered)


def plan_of(target: str, fitted: Fitted) -> EnginePlan:
    """The plan of a finished checkpoint for the goal that it was made for; its memory is that of `fitted.plan`."""
    path = target
    if fitted.recipe is not None and fitted.recipe.format == "gguf":
        path = os.path.join(target, f"{os.path.basename(os.path.abspath(target))}.gguf")
    return _asked(path, _fixed(fitted.goal, fitted.plan)).best


def _base(recipe: Recipe) -> Recipe:
    if recipe.bits != LOW_BITS or recipe.activation_bits:
        raise Unsupported("--fit mixes 4 and 8 bits: leave --bits at 4 and --activations out")
    if recipe.format == "awq" or recipe.method == "awq":
        raise Unsupported("AWQ files have 4 bits only: --fit takes compressed-tensors, gptq or gguf")
    if recipe.format != "gguf" and recipe.symmetric is None:
        # transformers loads mixed bits where all of them are symmetric (`compressed_tensors_file.py`).
        return replace(recipe, symmetric=True)
    return recipe


def raised(base: Recipe, groups: Sequence[Sensitivity]) -> Recipe:
    """The recipe with these groups at 8 bits; rules that it has already go first."""
    names = [name for group in groups for name in group.modules]
    more = tuple(Rule(f"^{rule}", HIGH_BITS) for rule in rules(names, beside_mtp=True))
    return replace(base, modules=(*base.modules, *more))


def _planned(layout: Layout, goal: Goal) -> EnginePlan:
    """The best plan of the checkpoint that a layout makes, of one engine where the goal names it."""
    with drafted(layout.result) as path:
        return _asked(path, goal).best


def _advice(layout: Layout, goal: Goal) -> tuple[Advice, ...]:
    with drafted(layout.result) as path:
        return _asked(path, goal).advice


def _asked(path: str, goal: Goal) -> Plan:
    asked = Request(
        model=path,
        devices=(goal.device,),
        ctx_tokens=goal.ctx_tokens,
        seqs=goal.seqs,
        engine=goal.engine,
        kv_dtype=goal.kv_dtype,
    )
    return plan(asked)


def _fixed(goal: Goal, found: EnginePlan) -> Goal:
    return replace(goal, engine=f"{found.engine}@{found.engine_version}", kv_dtype=found.kv_dtype)


def _most(holds: Callable[[int], bool], count: int) -> int:
    """The largest n in 0 ... count for which it holds; it holds at 0."""
    if holds(count):
        return count
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _sensitivities(
    source: Source, layout: Layout, device: str, memory: str | None, watch: Callable[[int, int], None] | None
) -> list[Sensitivity]:
    recipe = layout.recipe
    text = read_text(recipe.calibration)
    described = f"{source.fingerprint()} {text.sha256} {recipe.text()}"
    identity = hashlib.sha256(described.encode()).hexdigest()
    known = _remembered(memory, identity) if memory else None
    if known is not None:
        return known
    count = max(LEAST_TOKENS, recipe.tokens // SHARE_OF_TOKENS)
    configuration = read_configuration(source.folder)
    length = min(recipe.sequence_tokens, configuration.max_position_embeddings)
    tokens = choose_sequences(text, read_tokenizer(source.folder), count, length, recipe.seed)
    weights = Weights(source, layout.found, torch.device(device))
    weights.check_tokens(tokens)
    result = layout.result
    meter = Meter(weights, configuration, layout.schemes, result.scale_dtype, result.orders)
    chosen = [module for module in layout.modules if not _is_ruled(recipe, module.name)]
    found = meter.measure(tokens, chosen, watch)
    if memory:
        write_text(memory, json.dumps({"identity": identity, "groups": [asdict(group) for group in found]}))
    return found


def _is_ruled(recipe: Recipe, name: str) -> bool:
    """Whether the user's own recipe says what this module gets."""
    return first_rule(recipe.modules, name) is not None


def _remembered(path: str, identity: str) -> list[Sensitivity] | None:
    """What a call before this one measured; None where there is nothing, or of something else."""
    if not os.path.exists(path):
        return None
    try:
        data = read_json_object(path)
        if data.get("identity") != identity:
            return None
        return [
            Sensitivity(tuple(str(name) for name in group["modules"]), float(group["error"]), int(group["weights"]))
            for group in data["groups"]
        ]
    except (QwenfitError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is no record of sensitivities ({error}): delete it") from error
