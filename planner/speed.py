"""How fast a plan decodes and reads prompts: intervals, what bounds them, and the nearest case that somebody measured.

The middle comes from `work.py` (bytes and FLOPs of the real tensors), `factors.py` (fitted shares of the device's
rates) and `steps.py` (seconds of a pass). The interval is as wide as the model's errors were on publishers that it had
not seen, in the same situation: an engine and a device that were measured, an engine on a new device, or neither; with
draft tokens, with experts in host memory, with several sequences. 80 % of what was held out lay inside
(docs/accuracy.md).
"""

from functools import lru_cache
from math import exp, log
from typing import TYPE_CHECKING

from ..profiles.errors import Unsupported
from ..profiles.frozen import dataclass, replace
from ..profiles.speed_data import fitted
from .factors import RELATIVES, backend_of, chunk_tokens, factors, is_ggml, known, link_of
from .nearest import Case, nearest_case
from .steps import StepTime
from .steps import step_time as combined
from .work import work

if TYPE_CHECKING:
    from .engines.engine import Setup
    from .plan import EnginePlan

DRAFT_SEQS = tuple(1 << power for power in range(11))  # at which the gain of drafts is looked for
BOXES_WIDTH = log(2)  # half width over several boxes: what the link and the stages cost was never fitted
PROMPT_TOKENS = 2048  # of the prompt whose figures are told first: what benchmarks use, and a chat begins with


@dataclass(frozen=True, slots=True)
class Interval:
    """80 % of what was held out lay between `low` and `high`."""

    low: float
    mid: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"low": rounded(self.low), "mid": rounded(self.mid), "high": rounded(self.high)}


@dataclass(frozen=True, slots=True)
class Rates:
    """At one length of prompt: every sequence decodes behind it, and one prompt is read alone."""

    context_tokens: int
    decode_tokens_per_s: Interval  # of all sequences together
    prefill_tokens_per_s: Interval
    ttft_s: Interval
    bound_by: str  # the largest constituent of a decode pass

    def to_json(self) -> dict[str, object]:
        return {
            "decode_tokens_per_s": self.decode_tokens_per_s.to_json(),
            "prefill_tokens_per_s": self.prefill_tokens_per_s.to_json(),
            "ttft_s": self.ttft_s.to_json(),
            "bound_by": self.bound_by,
            "context_tokens": self.context_tokens,
        }


@dataclass(frozen=True, slots=True)
class Drafts:
    """What multi-token prediction brings."""

    tokens_per_pass: float  # that a sequence advances by
    gain: float  # decode rate over that without drafts, at the number of sequences asked for
    pays_up_to_seqs: int  # 0: with no number; 1024: as far as was looked
    pays_from_seqs: int  # 1 where they pay alone

    def to_json(self) -> dict[str, object]:
        return {
            "tokens_per_pass": rounded(self.tokens_per_pass),
            "gain": rounded(self.gain),
            "pays_up_to_seqs": self.pays_up_to_seqs,
            "pays_from_seqs": self.pays_from_seqs,
        }


@dataclass(frozen=True, slots=True)
class Speed:
    """The answer for one plan."""

    start: Rates  # behind a prompt of PROMPT_TOKENS, or of the whole context where that is shorter
    full: Rates  # with the context full
    seqs: int
    basis: str  # one sentence: what the interval rests on
    nearest: Case | None
    drafts: Drafts | None = None

    def to_json(self) -> dict[str, object]:
        return {
            **self.start.to_json(),
            "full_context": self.full.to_json(),
            "seqs": self.seqs,
            "basis": self.basis,
            "nearest": self.nearest.to_json() if self.nearest else None,
            "drafts": self.drafts.to_json() if self.drafts else None,
        }


def is_known(plan: "EnginePlan") -> bool:
    """Whether the bandwidth of every device is: that of the machine itself is not, before somebody measured it."""
    return all(device.memory_bandwidth_bytes_per_s > 0 for device in plan.setup.devices)


def step_time(plan: "EnginePlan") -> StepTime:
    """Seconds of a pass of this plan's engine, the middle estimate; `widths` says how far it may be off.

    `Unsupported` where a device's bandwidth is not known.
    """
    if not is_known(plan):
        name = next(device.name for device in plan.setup.devices if not device.memory_bandwidth_bytes_per_s)
        raise Unsupported(
            f"how fast {name} reads its memory is not known: `qwen-plan probe --measure --output here.yaml` "
            "measures this machine for --gpu here.yaml; or give a device file with memory_bandwidth_bytes_per_s"
        )
    return _step_time(plan.engine, plan.setup, host_share(plan))


def speed(plan: "EnginePlan") -> Speed:
    """Rates of a plan, whether or not it fits: as if it had the memory."""
    return Speed(
        start=_rates(plan, min(PROMPT_TOKENS, plan.ctx_tokens)),
        full=_rates(plan, plan.ctx_tokens),
        seqs=plan.seqs,
        basis=basis(plan),
        nearest=nearest_case(plan.engine, plan.setup, host_share(plan) > 0),
        drafts=drafts(plan) if plan.mtp else None,
    )


def drafts(plan: "EnginePlan", context_tokens: int = PROMPT_TOKENS) -> Drafts:
    """Verification reads what the drafts' experts need and multiplies more rows, so a batch that is bound by arithmetic
    gains nothing: the number of sequences up to which it does, each at `context_tokens`."""
    context_tokens = min(context_tokens, plan.ctx_tokens)
    step, plain = step_time(plan), _step_time(plan.engine, replace(plan.setup, mtp=0), host_share(plan))

    def gain(seqs: int) -> float:
        return step.decode_tokens_per_s(seqs, context_tokens) / plain.decode_tokens_per_s(seqs, context_tokens)

    pays = [seqs for seqs in DRAFT_SEQS if gain(seqs) > 1]
    if not pays:
        return Drafts(step.tokens_per_seq, gain(plan.seqs), 0, 0)
    first, last = pays[0], pays[-1]
    if first > 1:  # what a draft step costs however many decode is shared by more
        first = next(seqs for seqs in range(first // 2, first + 1) if gain(seqs) > 1)
    if last < DRAFT_SEQS[-1]:
        last = next(seqs for seqs in range(2 * last, last - 1, -1) if gain(seqs) > 1)
    return Drafts(step.tokens_per_seq, gain(plan.seqs), last, first)


def decode_tokens_per_s(plan: "EnginePlan") -> float:
    """The middle at the context and number of sequences that were asked for: what ranks plans; 1 where nobody knows."""
    if not is_known(plan):
        return 1.0
    return step_time(plan).decode_tokens_per_s(plan.seqs, plan.ctx_tokens)


def host_share(plan: "EnginePlan") -> float:
    """The share of the routed experts in host memory."""
    if not plan.allocation.offloads:
        return 0.0
    moved = plan.allocation.detail.get("n_cpu_moe")
    return moved / plan.setup.model.num_layers if isinstance(moved, int) else 1.0


@lru_cache(maxsize=1024)
def _step_time(engine: str, setup: "Setup", moved_share: float) -> StepTime:
    devices = setup.devices
    found = factors(engine, devices[0], setup.weights, setup.model.is_moe, link_of(devices))
    amount = work(
        setup.model,
        setup.weights,
        devices[: setup.tp * setup.pp],
        setup.kv_dtype,
        setup.state_dtype,
        setup.tp,
        setup.mtp,
        moved_share,
        dp=setup.expert_dp,
        ep=setup.ep,
        ggml=is_ggml(engine),
    )
    step = combined(amount, found)
    if setup.nodes == setup.dp == 1:
        return step
    from .network import spread_step

    return spread_step(step, amount, found, engine, setup)


def _rates(plan: "EnginePlan", context_tokens: int) -> Rates:
    step, chunk = step_time(plan), _chunk_tokens(plan)
    decode = step.decode_tokens_per_s(plan.seqs, context_tokens)
    ttft_s = step.whole_prompt_s(context_tokens, chunk)
    decode_width, prefill_width = widths(plan)
    parts = step.constituents(0, 0, plan.seqs, plan.seqs * context_tokens)
    return Rates(
        context_tokens=context_tokens,
        decode_tokens_per_s=_interval(decode, decode_width),
        prefill_tokens_per_s=_interval(context_tokens / ttft_s, prefill_width),
        ttft_s=_interval(ttft_s, prefill_width),
        bound_by=max(parts, key=lambda name: parts[name]),
    )


def _chunk_tokens(plan: "EnginePlan") -> int:
    options = plan.setup.options
    asked = options.ubatch_tokens if plan.engine in ("llama.cpp", "ollama") else options.max_num_batched_tokens
    return asked or chunk_tokens(plan.engine, backend_of(plan.engine, plan.setup.devices[0]))


def widths(plan: "EnginePlan") -> tuple[float, float]:
    """Half widths of the intervals of decode and prefill, as logarithms."""
    table = fitted()["widths"]
    how = known(plan.engine, plan.setup.devices[0])
    decode, prefill = table["mtp" if plan.mtp else "decode"][how], table["prefill"][how]
    if plan.allocation.offloads:
        decode, prefill = max(decode, table["offload"]), max(prefill, table["offload"])
    if plan.seqs > 1:
        decode = max(decode, table["batch"])
    if plan.nodes > 1 or plan.dp > 1 or plan.ep > 1:
        decode, prefill = max(decode, BOXES_WIDTH), max(prefill, BOXES_WIDTH)
    return decode, prefill


def basis(plan: "EnginePlan") -> str:
    """What the interval rests on, and what makes it wide."""
    how, device = known(plan.engine, plan.setup.devices[0]), plan.setup.devices[0].name
    relative = RELATIVES.get(plan.engine)
    who = f"{relative}, whose figures {plan.engine} takes," if relative else plan.engine
    words = {
        "place": f"{who} was measured on {device}",
        "engine": f"{who} was measured on other devices, not on {device}",
        "nothing": f"no published run of {plan.engine} on this kind of device, which makes the interval wide",
    }[how]
    if plan.seqs > 1:
        words += "; several sequences at once were hardly measured, which widens it"
    if plan.nodes > 1:
        words += f"; what the link between {plan.nodes} boxes costs is modelled and was not measured"
    elif plan.dp > 1 or plan.ep > 1:
        words += "; what replicas or dealt-out experts cost is modelled and was not measured"
    if plan.allocation.offloads:
        words += "; experts in host memory, whose bandwidth is taken to be that of two channels of DDR5"
    if plan.mtp:
        words += "; how many draft tokens are taken depends on the text (code 1.3 times as fast as prose)"
    return words


def _interval(mid: float, width: float) -> Interval:
    return Interval(mid * exp(-width), mid, mid * exp(width))


def rounded(value: float) -> float:
    """To four digits: more would claim too much."""
    return float(f"{value:.4g}")
