"""SGLang's static fraction: how much of a device it is, which chunk of prefill goes with it, and what is then held.

    static = free before loading x mem_fraction_static
    pools  = static - weights - 100 MiB for encoded images where the vision tower is loaded
    device = driver context and communicator + static + activations + graphs

(`mem_cache/kv_cache_configurator.py`, `_profile_available_bytes`). A plan sets `--max-mamba-cache-size` to what the
sequences need: by default SGLang gives 47 % of the pools to recurrent state, even for one long request. It starts from
SGLang's own fraction, raises it where the request needs that and the activations leave the room, and then takes smaller
chunks; the memory taken never falls along the way.
"""

from bisect import bisect_left
from functools import cached_property

from ...profiles.device import Device
from ...profiles.frozen import dataclass
from ..memory import Amount, Memory, exactly
from . import vllm_scratch as scratch
from .budget_steps import Choice, choices, last_choice
from .engine import Allocation, DeviceShare, Setup
from .sglang_launch import launch_line
from .sglang_pool import Cells
from .vllm_scratch import GIB, HIGH, LOW, MIB, MID, Activations, Bounds

PREFILL_GRAPHS = {2048: 42, 4096: 50, 8192: 58, 16384: 74}  # generate_prefill_cuda_graph_batch_sizes
PREFILL_GRAPH_BYTES = 8 * MIB
DECODE_BATCHES = (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 512, 16), *range(512, 513, 32))


@dataclass(frozen=True, slots=True, eq=False)
class Station:
    """Ranks that are alike: one kind of device in one pipeline stage."""

    device: Device
    weights_bytes: int
    reach_bytes: int  # what may be taken in all
    free_bytes: int  # before loading
    context: Bounds


@dataclass(frozen=True, eq=False)
class SglangEstimate:
    setup: Setup
    sizes: Cells
    stations: tuple[Station, ...]
    place_of_rank: tuple[int, ...]
    chunks: tuple[int, ...]  # chunks of prefill to choose from, the preferred one first
    activations: tuple[Activations, ...]  # one per chunk
    row_bytes: Bounds
    graph_bytes_per_capture: Bounds
    largest_decode_batch: int
    cuda_graphs: bool
    workspace_bytes: int
    image_cache_bytes: int
    page_tokens: int
    own_thousandths: int
    fixed_thousandths: int | None
    radix: bool
    warnings: tuple[str, ...]

    def _slots(self, seqs: int) -> int:
        return seqs * self.sizes.slots_per_request

    def _state_bytes(self, seqs: int) -> int:
        return self.sizes.state_pool_bytes(self._slots(seqs), seqs)

    def _needed_tokens(self, ctx_tokens: int, seqs: int) -> int:
        """Every sequence at full length in whole pages, and a page that is never handed out."""
        return (seqs * -(-ctx_tokens // self.page_tokens) + 1) * self.page_tokens

    def _graph_bytes(self, seqs: int, chunk: int, bound: int) -> float:
        if not self.cuda_graphs:
            return 0.0
        batch = min(seqs, self.largest_decode_batch)
        captures = bisect_left(DECODE_BATCHES, batch) + 1
        size = self.graph_bytes_per_capture
        prefill = PREFILL_GRAPH_BYTES * PREFILL_GRAPHS.get(self.chunks[chunk], 50)
        return captures * size[bound] + prefill * size[MID] / scratch.CONSTANTS.graph_bytes_per_capture[MID]

    def _active_bytes(self, seqs: int, chunk: int, bound: int) -> float:
        """Peak of encoder, layers and sampler, which come one after another, and what is held throughout."""
        active = self.activations[chunk]
        peak = max(active.peak[bound] + active.unprofiled[bound], seqs * self.row_bytes[bound])
        return peak + active.held[bound] + self.workspace_bytes

    def _outside_bytes(self, chunk: int, bound: int) -> tuple[int, ...]:
        """Per kind of device, room that is kept whatever the sequences: for the largest decode batch that SGLang
        captures by default."""
        active = self._active_bytes(self.largest_decode_batch, chunk, bound)
        graphs = self._graph_bytes(self.largest_decode_batch, chunk, bound)
        return tuple([int(station.context[bound] + active + graphs) for station in self._kinds])

    @cached_property
    def _choices(self) -> tuple[Choice, ...]:
        return choices(
            len(self.chunks),
            self.own_thousandths,
            self.fixed_thousandths,
            lambda chunk: self._highest_thousandths(chunk, MID),
            lambda chunk: self._highest_thousandths(chunk, HIGH),
            self._totals,
        )

    @cached_property
    def _last_choice(self) -> Choice:
        """The same as the last of `_choices`, which alone decides what is missing."""
        last = len(self.chunks) - 1
        return last_choice(
            last, self.fixed_thousandths, self._highest_thousandths(last, MID), self._highest_thousandths(last, HIGH)
        )

    @cached_property
    def _kinds(self) -> tuple[Station, ...]:
        """A station for each kind of device, where stages do not matter."""
        return tuple({station.device: station for station in self.stations}.values())

    def _highest_thousandths(self, chunk: int, bound: int) -> int:
        room = min(
            [
                (station.reach_bytes - outside) / station.free_bytes
                for station, outside in zip(self._kinds, self._outside_bytes(chunk, bound), strict=True)
            ]
        )
        return max(10, min(990, int(room * 1000)))

    def _totals(self, chunk: int, thousandths: int) -> tuple[int, ...]:
        """What is taken for one sequence; more of them add graphs and rows to every choice alike."""
        active, graphs = self._active_bytes(1, chunk, MID), int(self._graph_bytes(1, chunk, MID))
        return tuple(
            [
                station.free_bytes * thousandths // 1000 + int(station.context[MID] + active) + graphs
                for station in self._kinds
            ]
        )

    @cached_property
    def _margins(self) -> tuple[int, ...]:
        """Per station, what is left of the largest static part after weights and image cache, below 0."""
        highest = self._last_choice.thousandths
        return tuple(
            [
                station.weights_bytes + self.image_cache_bytes - station.free_bytes * highest // 1000
                for station in self.stations
            ]
        )

    @cached_property
    def _overdrawn_bytes(self) -> int:
        last = self._last_choice
        return max(
            [
                station.free_bytes * last.thousandths // 1000 + outside - station.reach_bytes
                for station, outside in zip(self._kinds, self._outside_bytes(last.batch, MID), strict=True)
            ]
        )

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        needed = self._state_bytes(seqs) + self._needed_tokens(ctx_tokens, seqs) * self.sizes.cell_bytes
        missing = needed + max(self._margins)
        return max(missing, 0) + self._overdrawn_bytes if self._overdrawn_bytes > 0 else missing

    def _pool_bytes(self, choice: Choice) -> int:
        return min(
            station.free_bytes * choice.thousandths // 1000 - station.weights_bytes - self.image_cache_bytes
            for station in self.stations
        )

    def _chosen(self, ctx_tokens: int, seqs: int) -> tuple[Choice, bool, bool]:
        """The first choice that serves, of those that leave room for the upper end of the estimates; else the first of
        the others; else the last. And whether it serves, and whether surely."""
        needed = self._state_bytes(seqs) + self._needed_tokens(ctx_tokens, seqs) * self.sizes.cell_bytes
        last_safe = 0
        for place, choice in enumerate(self._choices):
            if choice.safe:
                last_safe = place
                if self._pool_bytes(choice) >= needed:
                    return choice, True, True
        if self._overdrawn_bytes <= 0:
            for choice in self._choices[last_safe:]:
                if self._pool_bytes(choice) >= needed:
                    return choice, True, False
        return self._last_choice, False, False

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self._chosen(ctx_tokens, seqs)[2]

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        choice, fits, sure = self._chosen(ctx_tokens, seqs)
        state = self._state_bytes(seqs)
        needed = state + self._needed_tokens(ctx_tokens, seqs) * self.sizes.cell_bytes
        pool = self._pool_bytes(choice) if fits else needed
        shortfall = 0 if fits else self.shortfall_bytes(ctx_tokens, seqs)
        memories = []
        for station, margin in zip(self.stations, self._margins, strict=True):
            tightest = not fits and margin == max(self._margins)
            memories.append(self._memory(station, choice, seqs, pool, fits, sure, shortfall if tightest else None))
        shares = tuple(
            DeviceShare(device, self.stations[place].reach_bytes, memories[place])
            for device, place in zip(self.setup.devices, self.place_of_rank, strict=True)
        )
        reasons: tuple[str, ...] = ()
        if not fits:
            tightest = self._margins.index(max(self._margins))
            reasons = (self._reason(self.stations[tightest], memories[tightest], ctx_tokens, seqs, shortfall),)
        tokens = (pool - state) // self.sizes.cell_bytes // self.page_tokens * self.page_tokens
        detail: dict[str, object] = {
            "mem_fraction_static": choice.thousandths / 1000,
            "chunked_prefill_size": self.chunks[choice.batch],
            "max_mamba_cache_size": self._slots(seqs),
            "state_slots_per_request": self.sizes.slots_per_request,
            "state_bytes_per_request": self.sizes.state_bytes,
            "max_running_requests": seqs,
            "cell_bytes": self.sizes.cell_bytes,
            "max_total_num_tokens": tokens,
            "page_size": self.page_tokens,
        }
        if self.setup.dp > 1:
            detail["attn_dp_size" if self.setup.expert_dp > 1 else "dp_size"] = self.setup.dp  # figures of one replica
        if self.setup.nodes > 1:
            nodes = range(self.setup.nodes)
            detail["node_commands"] = [self._line(choice, ctx_tokens, seqs, node) for node in nodes]
        return Allocation(shares, reasons=reasons, warnings=self.warnings, detail=detail)

    def _memory(
        self,
        station: Station,
        choice: Choice,
        seqs: int,
        pool: int,
        fits: bool,
        sure: bool,
        shortfall: int | None,
    ) -> Memory:
        low, mid, high = (
            int(self._active_bytes(min(seqs, self.largest_decode_batch), choice.batch, bound)) + self.image_cache_bytes
            for bound in (LOW, MID, HIGH)
        )
        graph = _amount(tuple(self._graph_bytes(seqs, choice.batch, bound) for bound in (LOW, MID, HIGH)))
        runtime = _amount(station.context)
        state = self._state_bytes(seqs)
        if fits and not sure:
            taken = station.weights_bytes + pool + graph.high + runtime.high
            high = max(high, station.reach_bytes + 1 - taken)
        if shortfall is not None:  # the fraction goes in steps: total less what is usable is what is missing
            taken = station.weights_bytes + pool + mid + graph.mid + runtime.mid
            step = max(0, station.reach_bytes + shortfall - taken)
            mid, high = mid + step, high + step
        kv = pool - state
        return Memory(
            weights=exactly(station.weights_bytes),
            kv_cache=Amount(kv, kv, kv, not fits),
            recurrent_state=exactly(state),
            activation=Amount(low, mid, high),
            graph=graph,
            runtime=runtime,
        )

    def _reason(self, station: Station, memory: Memory, ctx_tokens: int, seqs: int, shortfall: int) -> str:
        if shortfall == self._overdrawn_bytes:
            return (
                f"a static fraction of {self._last_choice.thousandths / 1000} leaves {shortfall / GIB:.2f} GiB "
                f"too little on {station.device.title} for activations and graphs"
            )
        sequences = "one sequence" if seqs == 1 else f"{seqs:,} sequences"
        return (
            f"{shortfall / GIB:.2f} GiB short on {station.device.title}: of {station.reach_bytes / GIB:.2f} GiB, "
            f"weights take {memory.weights.mid / GIB:.2f}, "
            f"the cache for {sequences} of {ctx_tokens:,} tokens {memory.kv_cache.mid / GIB:.2f}, "
            f"{self._slots(seqs)} state slots {memory.recurrent_state.mid / GIB:.2f}, "
            f"activations and graphs {(memory.activation.mid + memory.graph.mid) / GIB:.2f}"
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        choice, _, _ = self._chosen(ctx_tokens, seqs)
        return self._line(choice, ctx_tokens, seqs, 0)

    def _line(self, choice: Choice, ctx_tokens: int, seqs: int, node: int) -> str:
        chunk_tokens, slots = self.chunks[choice.batch], self._slots(seqs)
        fraction = choice.thousandths / 1000
        return launch_line(self.setup, ctx_tokens, seqs, fraction, slots, chunk_tokens, self.radix, node)


def _amount(bounds: tuple[float, ...]) -> Amount:
    low, mid, high = bounds
    return Amount(int(low), int(mid), int(high))
