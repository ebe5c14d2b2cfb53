"""One replica: a plan with the seats, blocks and batches that its engine would run it with.

Memory is planned for the longest request; the seats are as many as fit at the mean one where the engine shares a pool
(vLLM, SGLang), and at the longest where every slot has its context to itself (llama.cpp, Ollama).
"""

from collections.abc import Mapping
from typing import Any

from ..profiles.errors import Unsupported
from ..profiles.frozen import dataclass, replace
from .batching import Limits, Step
from .candidates import engine_module
from .plan import EnginePlan, Plan

POOLED = ("vllm", "sglang")
SLOTTED = ("llama.cpp", "ollama")
MAX_SEATS = {"vllm": 256, "sglang": 256, "llama.cpp": 64, "ollama": 64}
# --batch-size of llama-server (common/common.h, n_batch): what one pass of its slots takes in all.
LLAMA_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """What serves: `devices` as `--gpu` takes them, and the engine's limits. `reuse_tokens` is the grain of prefix
    reuse, 0 where a shared prefix is computed again for every request."""

    devices: str
    plan: EnginePlan
    step: Step
    limits: Limits
    reuse_tokens: int
    command: str

    @property
    def title(self) -> str:
        """What makes one replica, in words."""
        nodes = self.plan.nodes
        return f"({nodes} boxes of {self.devices})" if nodes > 1 else self.devices

    @property
    def device_count(self) -> int:
        return len(self.plan.setup.devices)


def serving_plan(answer: Plan) -> EnginePlan:
    """The best plan of an engine whose batching is known. Unsupported where there is none."""
    for candidate in answer.plans:
        if candidate.engine in POOLED + SLOTTED and candidate.fits:
            return candidate
    known = [candidate for candidate in answer.plans if candidate.engine in POOLED + SLOTTED]
    if known and known[0].reasons:
        raise Unsupported(f"the longest request does not fit: {known[0].reasons[0]}")
    raise Unsupported(f"no engine whose batching is known runs there: known are {', '.join(POOLED + SLOTTED)}")


def replica(devices: str, plan: EnginePlan, step: Step, mean_tokens: int, seats: int | None = None) -> Replica:
    """The replica that serves requests of `mean_tokens` on average and `plan.ctx_tokens` at most.

    `seats` fixes the number of sequences; otherwise it is the most that fit, up to the engine's usual one.
    """
    estimate, ctx_tokens, dp = plan.estimate, plan.ctx_tokens, plan.dp

    def at_tokens(number: int) -> int:
        """What each of them must have room for. Together they share a pool that the longest request must fit too."""
        return max(1, mean_tokens, -(-ctx_tokens * dp // number)) if plan.engine in POOLED else ctx_tokens

    if seats is None:
        seats = _most(
            lambda number: estimate.shortfall_bytes(at_tokens(number), number) <= 0, dp * MAX_SEATS[plan.engine]
        )
    detail: Mapping[str, Any] = estimate.allocate(at_tokens(seats), seats).detail
    limits, reuse = _limits(plan.engine, detail, seats, at_tokens(seats), dp, step.rows_per_seq)
    return Replica(devices, plan, step, limits, reuse, _command(plan, detail, seats))


def _command(plan: EnginePlan, detail: Mapping[str, Any], seats: int) -> str:
    """The launch line for the longest request, with the share of memory and the batch that were found for the mean."""
    if plan.engine not in POOLED:
        return plan.estimate.command(plan.ctx_tokens, seats)
    share = detail.get("gpu_memory_utilization") or detail.get("mem_fraction_static")
    batch = detail.get("max_num_batched_tokens") or detail.get("chunked_prefill_size")
    options = replace(plan.setup.options, gpu_memory_utilization=share, max_num_batched_tokens=batch)
    module = engine_module(plan.engine)
    return module.estimate(replace(plan.setup, options=options)).command(plan.ctx_tokens, seats)


def _limits(
    engine: str, detail: Mapping[str, Any], seats: int, ctx_tokens: int, dp: int, rows_per_seq: int
) -> tuple[Limits, int]:
    """The engine's own words as limits, and the grain of prefix reuse in tokens. The words are those of one of `dp`
    replicas inside, which together are taken for one pool: requests are dealt out evenly."""
    if engine == "vllm":
        block = int(detail["block_tokens"])
        state = int(detail["blocks_per_request"]) - -(-ctx_tokens // block)
        # One block is vLLM's null block; states are cached at the ends of blocks, so reuse is in whole ones.
        blocks = dp * (int(detail["num_blocks"]) - 1)
        limits = Limits(seats, dp * int(detail["max_num_batched_tokens"]), block, blocks, state)
        return limits, block if detail["mamba_cache_mode"] == "align" else 0
    if engine == "sglang":
        tokens, page = dp * int(detail["max_total_num_tokens"]), int(detail["page_size"])
        chunk = dp * int(detail["chunked_prefill_size"])
        return Limits(seats, chunk + seats * rows_per_seq, page, tokens // page), page
    # llama-server cannot roll a recurrent state back to where another request branched off: nothing is shared.
    return Limits(seats, LLAMA_BATCH_TOKENS), 0


def _most(fits: Any, ceiling: int) -> int:
    """The largest number in 1..ceiling that fits; 1 where none does (the plan for one has been found to fit)."""
    low, high = 1, ceiling + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
