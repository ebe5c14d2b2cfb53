"""vLLM's budget: which utilization and prefill batch serve a request, and what the devices then hold.

    requested = ceil(device total x gpu_memory_utilization)
    cache     = requested - weights - activation peak - graphs
    device    = requested + what the budget does not know of

(`v1/worker/gpu_worker.py`, `v1/worker/utils.py`). Before 0.20 captured graphs came on top of the budget; a plan keeps
their room inside it all the same, so its cache is that much smaller than the one such a version prints.

The preferred choice is the version's default utilization and the device's default batch. Where the cache is then too
small the utilization rises, then the batch falls, and in such an order that the memory taken never falls: more context,
more sequences or heavier weights only ever move on along the list.
"""

from functools import cached_property, lru_cache
from itertools import accumulate
from math import ceil
from operator import add

from ...profiles.device import Device
from ...profiles.frozen import dataclass
from ..memory import Amount, Memory, exactly
from ..weights import WeightTable
from . import vllm_scratch as scratch
from .budget_steps import Choice, choices, last_choice
from .engine import Allocation, DeviceShare, Setup
from .launch import shell_line
from .vllm_launch import launch_words, node_words
from .vllm_pool import Layout
from .vllm_scratch import GIB, HIGH, LOW, MID, Activations, Bounds


@dataclass(frozen=True, slots=True, eq=False)
class Station:
    """Ranks that are alike: one kind of device in one pipeline stage."""

    device: Device
    weights_bytes: int
    block_bytes: int
    total_bytes: int  # what the utilization is a fraction of
    reach_bytes: int  # what may be taken in all
    outside: Bounds  # `vllm_scratch.outside`

    def requested_bytes(self, thousandths: int) -> int:
        return ceil(self.total_bytes * thousandths / 1000)


@dataclass(frozen=True, eq=False)
class VllmEstimate:
    """One setup on GPUs."""

    setup: Setup
    layout: Layout
    stations: tuple[Station, ...]
    place_of_rank: tuple[int, ...]  # station of each device of the setup
    batches: tuple[int, ...]  # prefill batches to choose from, the preferred one first
    activations: tuple[Activations, ...]  # one per batch
    row_bytes: Bounds  # the sampler's, per sequence
    graph_bytes_per_capture: Bounds
    largest_capture: int  # tokens; 0: no graphs
    default_thousandths: int  # of the device, the version's default
    fixed_thousandths: int | None  # what the asker wants
    prefix_caching: bool
    warnings: tuple[str, ...]

    def _graph_bytes(self, seqs: int, bound: int) -> float:
        if not self.largest_capture:
            return 0.0
        captures = scratch.captures(seqs, self.setup.mtp, self.largest_capture)
        return captures * self.graph_bytes_per_capture[bound]

    def _active_bytes(self, batch: int, seqs: int, bound: int) -> float:
        """Peak of encoder, layers and sampler, which come one after another, and what is held throughout."""
        active = self.activations[batch]
        return max(active.peak[bound], seqs * self.row_bytes[bound]) + active.held[bound]

    def _inside_bytes(self, batch: int, seqs: int, bound: int) -> int:
        return int(self._active_bytes(batch, seqs, bound)) + int(self._graph_bytes(seqs, bound))

    def profiled(self, ctx_tokens: int, seqs: int) -> Amount:
        """Activations that vLLM's own profile run sees: what the budget holds beside weights, graphs and cache."""
        choice, _, _ = self._chosen(ctx_tokens, seqs)
        return _amount(tuple(self._active_bytes(choice.batch, seqs, bound) for bound in (LOW, MID, HIGH)))

    def _outside_bytes(self, station: Station, batch: int, bound: int) -> int:
        return int(station.outside[bound]) + int(self.activations[batch].unprofiled[bound])

    def _blocks_needed(self, ctx_tokens: int, seqs: int) -> int:
        """Every sequence at full length, and the null block that is never handed out."""
        return seqs * self.layout.blocks_per_request(ctx_tokens) + 1

    def _num_blocks(self, choice: Choice, seqs: int, bound: int) -> int:
        """Blocks that every station can hold: vLLM gives all ranks the smallest number."""
        inside = self._inside_bytes(choice.batch, seqs, bound)
        return min(
            (station.requested_bytes(choice.thousandths) - station.weights_bytes - inside) // station.block_bytes
            for station in self.stations
        )

    @cached_property
    def _choices(self) -> tuple[Choice, ...]:
        return choices(
            len(self.batches),
            self.default_thousandths,
            self.fixed_thousandths,
            lambda batch: self._highest_thousandths(batch, MID),
            lambda batch: self._highest_thousandths(batch, HIGH),
            self._totals,
        )

    @cached_property
    def _last_choice(self) -> Choice:
        """The same as the last of `_choices`, which alone decides what is missing."""
        last = len(self.batches) - 1
        return last_choice(
            last, self.fixed_thousandths, self._highest_thousandths(last, MID), self._highest_thousandths(last, HIGH)
        )

    @cached_property
    def _kinds(self) -> tuple[Station, ...]:
        """A station for each kind of device, where stages do not matter."""
        return tuple({station.device: station for station in self.stations}.values())

    def _highest_thousandths(self, batch: int, bound: int) -> int:
        """The highest utilization that leaves every device room for what lies outside the budget."""
        room = min(
            [
                (station.reach_bytes - self._outside_bytes(station, batch, bound)) / station.total_bytes
                for station in self._kinds
            ]
        )
        return max(10, min(990, int(room * 1000)))

    def _totals(self, batch: int, thousandths: int) -> tuple[int, ...]:
        return tuple(
            [station.requested_bytes(thousandths) + self._outside_bytes(station, batch, MID) for station in self._kinds]
        )

    @cached_property
    def _margins(self) -> tuple[tuple[int, int], ...]:
        """Per station, weights less its largest budget, and the bytes of a block."""
        highest = self._last_choice.thousandths
        budgets = {station.device: station.requested_bytes(highest) for station in self._kinds}
        return tuple(
            [(station.weights_bytes - budgets[station.device], station.block_bytes) for station in self.stations]
        )

    @cached_property
    def _overdrawn_bytes(self) -> int:
        """What is missing outside the largest budget: above 0 where it was fixed too high, or on a tiny device."""
        last = self._last_choice
        totals = self._totals(last.batch, last.thousandths)
        return max([total - station.reach_bytes for total, station in zip(totals, self._kinds, strict=True)])

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        missing = max(self._missing(ctx_tokens, seqs))
        return max(missing, 0) + self._overdrawn_bytes if self._overdrawn_bytes > 0 else missing

    def _missing(self, ctx_tokens: int, seqs: int) -> list[int]:
        """Per station, at the smallest batch and the largest budget."""
        inside = self._inside_bytes(-1, seqs, MID)
        blocks = self._blocks_needed(ctx_tokens, seqs)
        return [inside + base + blocks * block_bytes for base, block_bytes in self._margins]

    def _chosen(self, ctx_tokens: int, seqs: int) -> tuple[Choice, bool, bool]:
        """The first choice that serves the request at the upper end of all estimates; else, from the last such choice
        on, the first that does at the expected figures; else the last. And whether it serves, and whether surely."""
        blocks = self._blocks_needed(ctx_tokens, seqs)
        last_safe = 0
        for place, choice in enumerate(self._choices):
            if choice.safe:
                last_safe = place
                if self._num_blocks(choice, seqs, HIGH) >= blocks:
                    return choice, True, True
        if self._overdrawn_bytes <= 0:
            for choice in self._choices[last_safe:]:
                if self._num_blocks(choice, seqs, MID) >= blocks:
                    return choice, True, False
        return self._last_choice, False, False

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self._chosen(ctx_tokens, seqs)[2]

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        choice, fits, sure = self._chosen(ctx_tokens, seqs)
        reasons: tuple[str, ...] = ()
        if fits:
            blocks = self._num_blocks(choice, seqs, MID)
            needed = None if sure else self._blocks_needed(ctx_tokens, seqs)
            memories = [self._filled(station, choice, seqs, blocks, needed) for station in self.stations]
        else:
            blocks = self._blocks_needed(ctx_tokens, seqs)
            missing = self._missing(ctx_tokens, seqs)
            shortfall = self.shortfall_bytes(ctx_tokens, seqs)
            memories = [
                self._wanted(station, seqs, blocks, shortfall if lacks == max(missing) else None)
                for station, lacks in zip(self.stations, missing, strict=True)
            ]
            tightest = missing.index(max(missing))
            reasons = (
                self._reason(self.stations[tightest], memories[tightest], ctx_tokens, seqs, shortfall, max(missing)),
            )
        shares = tuple(
            DeviceShare(device, self.stations[place].reach_bytes, memories[place])
            for device, place in zip(self.setup.devices, self.place_of_rank, strict=True)
        )
        detail = self._detail(choice, ctx_tokens, seqs, blocks, fits)
        return Allocation(shares, reasons=reasons, warnings=self.warnings, detail=detail)

    def _filled(self, station: Station, choice: Choice, seqs: int, blocks: int, needed: int | None) -> Memory:
        """What a running server holds. The cache takes all that the budget leaves, so that only what lies outside the
        budget is uncertain in the total, and below it the activations that nothing has needed yet.

        `needed` blocks are given where it is not sure that they are there: at the upper end of the estimates the total
        of a station that lacks them then lies beyond the device.
        """
        active = int(self._active_bytes(choice.batch, seqs, MID))
        graphs = int(self._graph_bytes(seqs, MID))
        pool = blocks * station.block_bytes
        budget = station.requested_bytes(choice.thousandths) - station.weights_bytes
        unused = budget - active - graphs - pool
        unprofiled = self.activations[choice.batch].unprofiled
        outside = _amount(station.outside)
        mid = active + min(unused, station.block_bytes) + int(unprofiled[MID])
        high = mid + int(unprofiled[HIGH]) - int(unprofiled[MID])
        if needed and budget - self._inside_bytes(choice.batch, seqs, HIGH) < needed * station.block_bytes:
            high = max(high, station.reach_bytes + 1 - station.weights_bytes - pool - graphs - outside.high)
        state = min(pool, seqs * self.layout.state_blocks * station.block_bytes)
        return Memory(
            weights=exactly(station.weights_bytes),
            kv_cache=Amount(pool - state, pool - state, pool - state),
            recurrent_state=exactly(state),
            activation=Amount(int(self._active_bytes(choice.batch, seqs, LOW)), mid, high),
            graph=Amount(int(self._graph_bytes(seqs, LOW)), graphs, graphs),
            runtime=outside,
        )

    def _wanted(self, station: Station, seqs: int, blocks: int, shortfall: int | None) -> Memory:
        """What it would take, at the smallest batch. On the tightest device the total is what is usable and `shortfall`
        more: the utilization goes in steps, and what a step leaves is of no use."""
        unprofiled = self.activations[-1].unprofiled
        low, mid, high = (int(self._active_bytes(-1, seqs, bound) + unprofiled[bound]) for bound in (LOW, MID, HIGH))
        graph = _amount(tuple(self._graph_bytes(seqs, bound) for bound in (LOW, MID, HIGH)))
        runtime = _amount(station.outside)
        if shortfall is not None:
            taken = station.weights_bytes + blocks * station.block_bytes + mid + graph.mid + runtime.mid
            step = max(0, station.reach_bytes + shortfall - taken)
            mid, high = mid + step, high + step
        state = seqs * self.layout.state_blocks * station.block_bytes
        return Memory(
            weights=exactly(station.weights_bytes),
            kv_cache=exactly(blocks * station.block_bytes - state),
            recurrent_state=exactly(state),
            activation=Amount(low, mid, high),
            graph=graph,
            runtime=runtime,
        )

    def _reason(
        self, station: Station, memory: Memory, ctx_tokens: int, seqs: int, shortfall: int, missing: int
    ) -> str:
        if missing <= 0:
            return (
                f"a utilization of {self._last_choice.thousandths / 1000} leaves {shortfall / GIB:.2f} GiB too little "
                f"on {station.device.title} for the driver and for prefill scratch, which lie outside it"
            )
        sequences = "one sequence" if seqs == 1 else f"{seqs:,} sequences"
        cache = memory.kv_cache.mid + memory.recurrent_state.mid
        scratch_bytes = memory.activation.mid + memory.graph.mid
        return (
            f"{shortfall / GIB:.2f} GiB short on {station.device.title}: of {station.reach_bytes / GIB:.2f} GiB, "
            f"weights take {memory.weights.mid / GIB:.2f}, "
            f"the cache for {sequences} of {ctx_tokens:,} tokens {cache / GIB:.2f}, "
            f"activations and graphs {scratch_bytes / GIB:.2f}, driver and workspaces {memory.runtime.mid / GIB:.2f}"
        )

    def _detail(self, choice: Choice, ctx_tokens: int, seqs: int, blocks: int, fits: bool) -> dict[str, object]:
        block_bytes = self.stations[0].block_bytes
        per_request = self.layout.blocks_per_request(ctx_tokens)
        detail: dict[str, object] = {
            "gpu_memory_utilization": choice.thousandths / 1000,
            "requested_bytes": self.stations[0].requested_bytes(choice.thousandths),
            "max_num_batched_tokens": self.batches[choice.batch],
            "max_num_seqs": seqs,
            "mamba_cache_mode": "align" if self.prefix_caching else "none",
            "block_tokens": self.layout.block_tokens,
            "bytes_per_block": block_bytes,
            "blocks_per_request": per_request,
            "bytes_needed": per_request * block_bytes,
            "min_pool_bytes": (per_request + self.layout.null_blocks) * block_bytes,
            "num_blocks": blocks,
        }
        if self.setup.dp > 1:
            detail["data_parallel_size"] = self.setup.dp  # the figures here are those of one replica
        if self.setup.nodes > 1:
            detail["node_commands"] = self._node_commands(choice, ctx_tokens, seqs)
        if fits:
            detail["kv_cache_tokens"] = int(blocks / per_request * ctx_tokens)
            detail["max_concurrency"] = round(blocks / per_request, 2)
        return detail

    def command(self, ctx_tokens: int, seqs: int) -> str:
        choice, _, _ = self._chosen(ctx_tokens, seqs)
        return self._line(choice, ctx_tokens, seqs, 0)

    def _line(self, choice: Choice, ctx_tokens: int, seqs: int, node: int) -> str:
        words = launch_words(self.setup, ctx_tokens, seqs, self.batches[choice.batch], self.prefix_caching)
        words += ["--gpu-memory-utilization", choice.thousandths / 1000]
        return shell_line([*words, *node_words(self.setup, node)] if self.setup.nodes > 1 else words)

    def _node_commands(self, choice: Choice, ctx_tokens: int, seqs: int) -> list[str]:
        return [self._line(choice, ctx_tokens, seqs, node) for node in range(self.setup.nodes)]


@lru_cache(maxsize=1024)
def stage_weights(table: WeightTable, stages: tuple[range, ...], vision: bool, drafts: bool) -> tuple[int, ...]:
    """Bytes on one rank of each stage, which are given as their layers: embedding and vision tower on the first;
    lm_head, norm and drafts on the last. Where these are two, an embedding that is tied to the lm_head or read by
    drafts lies on both."""
    sums = list(accumulate(map(add, table.layers, table.experts), initial=0))
    found = [sums[layers.stop] - sums[layers.start] for layers in stages]
    found[0] += table.embedding + (table.vision if vision else 0)
    found[-1] += table.lm_head + table.norm + (table.mtp + table.mtp_experts if drafts else 0)
    if len(stages) > 1 and (drafts or not table.lm_head):
        found[-1] += table.embedding
    return tuple(found)


def _amount(bounds: tuple[float, ...]) -> Amount:
    low, mid, high = bounds
    return Amount(int(low), int(mid), int(high))
