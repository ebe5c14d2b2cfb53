"""Seconds of one forward pass of an engine over a batch: the seam between the speed model and the simulation.

    seconds = weights read + rows multiplied + attention + cache and state read + overheads

Weights are read once per pass whatever the batch, so a pass is bound by memory while it has few rows and by arithmetic
from some number of rows on. The two are added and not the larger of both taken: prompts that were held out were met
better so, for what is quantized is unpacked before it is multiplied. Routed experts are read as far as some row needs
them: of E experts, k per row, a pass over n rows reads E x (1 - (1 - k/E)^n), as many distinct ones as independent rows
are expected to need.

Replicas and pipelined stages work at the same time: each takes its part of a batch, and a pass over the part is a pass
over the batch. Where whole experts are dealt out over ranks, the rank with the most wanted ones sets the pace.
"""

from math import log

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
    prompt_dense_read_s: float  # the same three of a pass with prompt rows, the last with what no captured graph saves
    prompt_expert_read_s: float
    prompt_overhead_s: float
    link_s: float  # per pass: latency of the all-reduces
    link_row_s: float  # per row: their bytes
    draft_s: float = 0.0  # per pass with decoding sequences: all draft steps together
    rows_per_seq: int = 1  # rows of a decoding sequence: itself and its draft tokens
    tokens_per_seq: float = 1.0  # tokens that a decoding sequence advances by in a pass
    ways: int = 1  # parts of a batch that are worked on at the same time: replicas x stages that are pipelined
    stages: int = 1  # of those, pipelined stages
    expert_dp: int = 1  # replicas that share the routed experts
    expert_ranks: int = 1  # over which whole experts are dealt out
    experts_on_rank: int = 0
    prompt_stages: int = 1  # that work on micro-batches of one prompt at the same time; decoding has one at a time
    image_pass_s: float = 0.0  # per image: the vision tower's weights and launches
    image_token_s: float = 0.0  # its arithmetic, per token of the image
    image_pair_s: float = 0.0  # and per pair of two of them

    def step_s(self, prefill_tokens: int, prefill_pairs: int, decode_seqs: int, decode_context_tokens: float) -> float:
        """Seconds of a pass.

        prefill_tokens: new prompt tokens, over all sequences. prefill_pairs: sum over prompts of new tokens x mean
        tokens that each attends to. decode_seqs: sequences that decode. decode_context_tokens: the sum of their
        context lengths.
        """
        if self.ways > 1:
            parted = self._part(prefill_tokens, prefill_pairs, decode_seqs, decode_context_tokens)
            return self._pass_s(*parted)
        return self._pass_s(prefill_tokens, prefill_pairs, decode_seqs, decode_context_tokens)

    def _part(
        self, prefill_tokens: int, prefill_pairs: int, decode_seqs: int, decode_context_tokens: float
    ) -> tuple[float, float, float, float]:
        """What one of the ways gets of a batch. A sequence is not divided."""
        ways = self.ways
        seqs = max(1.0, decode_seqs / ways) if decode_seqs else 0.0
        context = decode_context_tokens * seqs / decode_seqs if decode_seqs else 0.0
        return prefill_tokens / ways, prefill_pairs / ways, seqs, context

    def _distinct(self, rows: float) -> float:
        """The share of the routed experts that a pass over so many rows reads; where whole experts are dealt out, of
        those on the busiest rank (the expected largest of as many equal shares: mean + sqrt(2 variance ln ranks))."""
        distinct = 1.0 - (1.0 - self.expert_share) ** (rows * self.expert_dp)
        if self.expert_ranks == 1:
            return distinct
        mean = distinct * self.experts_on_rank
        return min(1.0, (mean + (2 * mean * (1 - distinct) * log(self.expert_ranks)) ** 0.5) / self.experts_on_rank)

    def _pass_s(
        self, prefill_tokens: float, prefill_pairs: float, decode_seqs: float, decode_context_tokens: float
    ) -> float:
        rows = prefill_tokens + decode_seqs * self.rows_per_seq
        if self.expert_dp == self.expert_ranks == 1:
            distinct = 1.0 - (1.0 - self.expert_share) ** rows
        else:
            distinct = self._distinct(rows)
        weights_s = self.dense_read_s + distinct * self.expert_read_s + self.overhead_s
        if prefill_tokens:
            of_prompts = self.prompt_dense_read_s + distinct * self.prompt_expert_read_s + self.prompt_overhead_s
            weights_s = max(weights_s, of_prompts) if decode_seqs else of_prompts
        return (
            weights_s
            + distinct * self.host_read_s
            + rows * self.row_s
            + decode_seqs * self.rows_per_seq * self.head_row_s
            + prefill_pairs * self.pair_s
            + decode_context_tokens * self.context_s
            + decode_seqs * self.seq_s
            + self.link_s
            + rows * self.link_row_s
            + (self.draft_s if decode_seqs else 0.0)
        )

    def constituents(
        self, prefill_tokens: int, prefill_pairs: int, decode_seqs: int, decode_context_tokens: int
    ) -> dict[str, float]:
        """The summands of `step_s` by name, `CONSTITUENTS`."""
        tokens, pairs, seqs, context = float(prefill_tokens), float(prefill_pairs), float(decode_seqs), 0.0
        context += decode_context_tokens
        if self.ways > 1:
            tokens, pairs, seqs, context = self._part(prefill_tokens, prefill_pairs, decode_seqs, decode_context_tokens)
        rows = tokens + seqs * self.rows_per_seq
        distinct = self._distinct(rows)
        weights_s = self.dense_read_s + distinct * self.expert_read_s, self.overhead_s
        if prefill_tokens:
            of_prompts = self.prompt_dense_read_s + distinct * self.prompt_expert_read_s, self.prompt_overhead_s
            weights_s = max(weights_s, of_prompts, key=sum) if decode_seqs else of_prompts
        return {
            "weight reads": weights_s[0],
            "host memory": distinct * self.host_read_s,
            "compute": rows * self.row_s + seqs * self.rows_per_seq * self.head_row_s,
            "attention": pairs * self.pair_s,
            "kv reads": context * self.context_s,
            "state": seqs * self.seq_s,
            "overhead": weights_s[1],
            "link": self.link_s + rows * self.link_row_s,
            "draft": self.draft_s if decode_seqs else 0.0,
        }

    def decode_tokens_per_s(self, seqs: int, context_tokens: int) -> float:
        """Tokens per second of all sequences together, each at `context_tokens`."""
        return seqs * self.tokens_per_seq / self.step_s(0, 0, seqs, seqs * context_tokens)

    def whole_prompt_s(self, prompt_tokens: int, chunk_tokens: int, depth_tokens: int = 0) -> float:
        """Seconds of a prompt alone, in passes of at most `chunk_tokens`, behind `depth_tokens` that are cached.

        One replica reads it. Its passes follow one another through pipelined stages: as the last is under way the first
        stages have nothing to do, and before the first reaches them the last ones.
        """
        whole, rest = divmod(prompt_tokens, chunk_tokens)
        pairs = prompt_tokens * depth_tokens + prompt_tokens * (prompt_tokens + 1) // 2
        chunk_s = self._pass_s(chunk_tokens, 0, 0, 0) if whole else 0.0
        rest_s = self._pass_s(rest, 0, 0, 0) if rest else 0.0
        seconds = whole * chunk_s + rest_s + pairs * self.pair_s
        stages = max(self.stages, self.prompt_stages)
        if stages == 1 or whole + bool(rest) == 1:
            return seconds
        last_s = (rest_s or chunk_s) + min(rest or chunk_tokens, prompt_tokens) * prompt_tokens * self.pair_s
        return seconds / stages + last_s * (stages - 1) / stages

    def image_s(self, image_tokens: int) -> float:
        """Seconds of one image in the vision tower: added up as a prompt's are, and beside its tokens' prefill. That it
        reaches the share of the peak that a text prompt does is taken for granted: nobody published a tower's time."""
        return self.image_pass_s + image_tokens * (self.image_token_s + image_tokens * self.image_pair_s)

    def scaled(self, decode: float, prefill: float | None = None) -> "StepTime":
        """Every summand times `decode`; those of prompt rows, pairs and images times `prefill` where it is given."""
        prefill = decode if prefill is None else prefill
        times = {name: getattr(self, name) * decode for name in _SECONDS}
        times |= {name: getattr(self, name) * prefill for name in _PROMPT_SECONDS}
        return replace(self, **times)


_SECONDS = (
    "dense_read_s",
    "expert_read_s",
    "host_read_s",
    "head_row_s",
    "context_s",
    "seq_s",
    "overhead_s",
    "prompt_dense_read_s",
    "prompt_expert_read_s",
    "prompt_overhead_s",
    "link_s",
    "link_row_s",
    "draft_s",
)
_PROMPT_SECONDS = ("row_s", "pair_s", "image_pass_s", "image_token_s", "image_pair_s")


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


def _weights_s(work: Work, read: float, unpack: float) -> tuple[float, float]:
    """Seconds to read the weights of layers and head, and all routed experts on devices."""
    bandwidth, vector = work.bandwidth_bytes_per_s * read, work.vector_flops_per_s * unpack
    dense_flops = work.dense_flops_per_row + work.head_flops_per_row
    on_device = work.expert_bytes / ((work.expert_bytes + work.host_expert_bytes) or 1.0)
    expert_flops = work.expert_flops_per_row / (work.expert_share or 1.0) * on_device / work.expert_dp
    dense_s = _together((work.dense_bytes + work.head_bytes) / bandwidth, dense_flops / vector)
    return dense_s, _together(work.expert_bytes / bandwidth, expert_flops / vector)


def step_time(work: Work, factors: Factors) -> StepTime:
    """Work over what the devices reach of their rates."""
    bandwidth, peak = work.bandwidth_bytes_per_s, work.peak_flops_per_s
    read = bandwidth * factors.read
    drafts = work.draft_tokens
    draft_s = drafts * (work.draft_bytes / read + factors.draft_s) if drafts else 0.0
    dense_read_s, expert_read_s = _weights_s(work, factors.read, factors.unpack)
    prompt_dense_read_s, prompt_expert_read_s = _weights_s(work, factors.prompt_read, factors.prompt_unpack)
    return StepTime(
        dense_read_s=dense_read_s,
        expert_read_s=expert_read_s,
        host_read_s=work.host_expert_bytes / factors.host_bytes_per_s,
        expert_share=work.expert_share,
        row_s=(work.dense_flops_per_row / factors.dense + work.expert_flops_per_row / factors.expert) / peak,
        head_row_s=work.head_flops_per_row / (peak * factors.dense),
        pair_s=work.flops_per_pair / (peak * factors.pair),
        context_s=work.kv_bytes_per_token / (bandwidth * factors.kv),
        seq_s=work.state_bytes_per_seq / read,
        overhead_s=work.layers * factors.layer_s,
        prompt_dense_read_s=prompt_dense_read_s,
        prompt_expert_read_s=prompt_expert_read_s,
        prompt_overhead_s=work.layers * (factors.prompt_layer_s + factors.pass_s),
        link_s=work.all_reduces * factors.link_s,
        link_row_s=work.link_bytes_per_row / (work.link_bytes_per_s * factors.wire) if work.all_reduces else 0.0,
        draft_s=draft_s,
        rows_per_seq=1 + drafts,
        tokens_per_seq=_advance(drafts, factors.acceptance, factors.decay),
        expert_dp=work.expert_dp,
        expert_ranks=work.expert_ranks,
        experts_on_rank=work.experts_on_rank,
        prompt_stages=work.prompt_stages,
        image_pass_s=work.vision_bytes / (bandwidth * factors.prompt_read)
        + work.vision_layers * (factors.prompt_layer_s + factors.pass_s),
        image_token_s=work.vision_flops_per_token / (peak * factors.dense),
        image_pair_s=work.vision_flops_per_pair / (peak * factors.pair),
    )
