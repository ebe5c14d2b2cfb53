"""Seconds of one forward pass of an engine over a batch: the seam between the speed model and the simulation.

    seconds = weights read + rows multiplied + attention + cache and state read + overheads

Weights are read once per pass whatever the batch, so a pass is bound by memory while it has few rows and by arithmetic
from some number of rows on. The two are added and not the larger of both taken: prompts that were held out were met
better so, for what is quantized is unpacked before it is multiplied. Routed experts are read as far as some row needs
them: of E experts, k per row, a pass over n rows reads E x (1 - (1 - k/E)^n), as many distinct ones as independent rows
are expected to need.
"""

from ..profiles.frozen import dataclass, replace
from .factors import Factors
from .work import Work

CONSTITUENTS = ("weight reads", "host memory", "compute", "attention", "kv reads", "state", "overhead", "link", "draft")


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one forward pass of an engine over a batch; the middle estimate, low/high by `scaled`."""

    dense_read_s: float  # per pass: layers without routed experts, and lm_head
    expert_read_s: float  # all routed experts on devices, once
    host_read_s: float  # all routed experts in host memory, once
    expert_share: float  # of the routed experts that one row reads
    row_s: float  # arithmetic per row: layers and routed experts
    head_row_s: float  # arithmetic per row whose next token is asked for
    pair_s: float  # arithmetic per pair of a new prompt token and a token that it attends to
    context_s: float  # cache read per token of context of a decoding sequence
    seq_s: float  # state read and written per decoding sequence
    overhead_s: float  # per pass: launches and the engine's own work
    prompt_s: float  # per pass with prompt rows, beside that: what no captured graph saves
    link_s: float  # per pass: latency of the all-reduces
    link_row_s: float  # per row: their bytes
    draft_s: float = 0.0  # per pass with decoding sequences: all draft steps together
    rows_per_seq: int = 1  # rows of a decoding sequence: itself and its draft tokens
    tokens_per_seq: float = 1.0  # tokens that a decoding sequence advances by in a pass

    def step_s(self, prefill_tokens: int, prefill_pairs: int, decode_seqs: int, decode_context_tokens: int) -> float:
        """Seconds of a pass.

        prefill_tokens: new prompt tokens, over all sequences. prefill_pairs: sum over prompts of new tokens x mean
        tokens that each attends to. decode_seqs: sequences that decode. decode_context_tokens: the sum of their
        context lengths.
        """
        rows = prefill_tokens + decode_seqs * self.rows_per_seq
        distinct = 1.0 - (1.0 - self.expert_share) ** rows
        return (
            self.dense_read_s
            + distinct * (self.expert_read_s + self.host_read_s)
            + rows * self.row_s
            + decode_seqs * self.rows_per_seq * self.head_row_s
            + prefill_pairs * self.pair_s
            + decode_context_tokens * self.context_s
            + decode_seqs * self.seq_s
            + (self.overhead_s + self.prompt_s if prefill_tokens else self.overhead_s)
            + self.link_s
            + rows * self.link_row_s
            + (self.draft_s if decode_seqs else 0.0)
        )

    def constituents(
        self, prefill_tokens: int, prefill_pairs: int, decode_seqs: int, decode_context_tokens: int
    ) -> dict[str, float]:
        """The summands of `step_s` by name, `CONSTITUENTS`."""
        rows = prefill_tokens + decode_seqs * self.rows_per_seq
        distinct = 1.0 - (1.0 - self.expert_share) ** rows
        return {
            "weight reads": self.dense_read_s + distinct * self.expert_read_s,
            "host memory": distinct * self.host_read_s,
            "compute": rows * self.row_s + decode_seqs * self.rows_per_seq * self.head_row_s,
            "attention": prefill_pairs * self.pair_s,
            "kv reads": decode_context_tokens * self.context_s,
            "state": decode_seqs * self.seq_s,
            "overhead": self.overhead_s + self.prompt_s if prefill_tokens else self.overhead_s,
            "link": self.link_s + rows * self.link_row_s,
            "draft": self.draft_s if decode_seqs else 0.0,
        }

    def decode_tokens_per_s(self, seqs: int, context_tokens: int) -> float:
        """Tokens per second of all sequences together, each at `context_tokens`."""
        return seqs * self.tokens_per_seq / self.step_s(0, 0, seqs, seqs * context_tokens)

    def whole_prompt_s(self, prompt_tokens: int, chunk_tokens: int, depth_tokens: int = 0) -> float:
        """Seconds of a prompt alone, in passes of at most `chunk_tokens`, behind `depth_tokens` that are cached."""
        whole, rest = divmod(prompt_tokens, chunk_tokens)
        pairs = prompt_tokens * depth_tokens + prompt_tokens * (prompt_tokens + 1) // 2
        seconds = whole * self.step_s(chunk_tokens, 0, 0, 0) + pairs * self.pair_s
        return seconds + (self.step_s(rest, 0, 0, 0) if rest else 0.0)

    def scaled(self, decode: float, prefill: float | None = None) -> "StepTime":
        """Every summand times `decode`; those of prompt rows and pairs alone times `prefill` where it is given."""
        prefill = decode if prefill is None else prefill
        times = {name: getattr(self, name) * decode for name in _SECONDS}
        return replace(self, **{**times, "row_s": self.row_s * prefill, "pair_s": self.pair_s * prefill})


_SECONDS = (
    "dense_read_s",
    "expert_read_s",
    "host_read_s",
    "head_row_s",
    "context_s",
    "seq_s",
    "overhead_s",
    "prompt_s",
    "link_s",
    "link_row_s",
    "draft_s",
)


def _advance(drafts: int, acceptance: float, decay: float) -> float:
    """Tokens per pass: the one that the pass yields, and each draft token with the odds that it and all before it are
    taken, which fall from one to the next."""
    tokens, taken = 1.0, 1.0
    for place in range(drafts):
        taken *= acceptance * decay**place
        tokens += taken
    return tokens


def _together(read_s: float, unpack_s: float) -> float:
    """Reading weights and turning them into products overlap, and neither quite hides the other: their 4-norm."""
    return (read_s**4 + unpack_s**4) ** 0.25


def step_time(work: Work, factors: Factors) -> StepTime:
    """Work over what the devices reach of their rates."""
    read = work.bandwidth_bytes_per_s * factors.read
    peak = work.peak_flops_per_s
    drafts = work.draft_tokens
    draft_s = drafts * (work.draft_bytes / read + factors.draft_s) if drafts else 0.0
    vector = work.vector_flops_per_s * factors.unpack
    dense_s = (work.dense_bytes + work.head_bytes) / read, (work.dense_flops_per_row + work.head_flops_per_row) / vector
    on_device = work.expert_bytes / ((work.expert_bytes + work.host_expert_bytes) or 1.0)
    expert_flops = work.expert_flops_per_row / (work.expert_share or 1.0) * on_device
    return StepTime(
        dense_read_s=_together(*dense_s),
        expert_read_s=_together(work.expert_bytes / read, expert_flops / vector),
        host_read_s=work.host_expert_bytes / factors.host_bytes_per_s,
        expert_share=work.expert_share,
        row_s=(work.dense_flops_per_row / factors.dense + work.expert_flops_per_row / factors.expert) / peak,
        head_row_s=work.head_flops_per_row / (peak * factors.dense),
        pair_s=work.flops_per_pair / (peak * factors.pair),
        context_s=work.kv_bytes_per_token / (work.bandwidth_bytes_per_s * factors.kv),
        seq_s=work.state_bytes_per_seq / read,
        overhead_s=work.layers * factors.layer_s,
        prompt_s=work.layers * factors.pass_s,
        link_s=work.all_reduces * factors.link_s,
        link_row_s=work.link_bytes_per_row / (work.link_bytes_per_s * factors.wire) if work.all_reduces else 0.0,
        draft_s=draft_s,
        rows_per_seq=1 + drafts,
        tokens_per_seq=_advance(drafts, factors.acceptance, factors.decay),
    )
