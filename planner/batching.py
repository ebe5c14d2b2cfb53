"""Continuous batching, simulated event by event with the engine's own limits.

The rules are those of vLLM 0.32 (v1/core/sched/scheduler.py `schedule`, first come first served): in each step every
running sequence decodes, and what is left of the token budget goes to prompts in order of arrival, in chunks.
A waiting request is admitted while there are seats and blocks for its whole prompt; a sequence that needs a block when
none is free preempts the one admitted last, which gives up its blocks and is computed again from the start, at the head
of the queue. SGLang is the same with blocks of one token; llama-server has no blocks: a slot has its context to itself.

With draft tokens every pass of a sequence takes `rows_per_seq` rows of the budget and of its blocks, and advances it by
`tokens_per_seq`, the mean of the speed model: an answer of n tokens after its first takes the smallest number of passes
that yields n. Nothing is drawn: what a text's own acceptance changes is in the speed model's interval. The vision tower
runs once per image, in the step that begins the prompt (vLLM `_execute_mm_encoder`), so that everybody waits for it.

Between events (an arrival that can be admitted, an answer that ends, blocks that run out) nothing but lengths changes:
step time is linear in the total context, so any number of steps is summed in closed form. Where the step's bound
changes on the way the stretch is halved until it is linear.
"""

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import ceil, inf, sqrt
from typing import Protocol

from ..profiles.frozen import dataclass
from .workload import Load

LINEAR = 1e-7  # relative: how far the middle of a stretch may lie from its straight line


class Step(Protocol):
    """What `steps.StepTime` answers, in seconds, and what a decoding sequence takes and gains in a pass."""

    @property
    def rows_per_seq(self) -> int: ...

    @property
    def tokens_per_seq(self) -> float: ...

    def step_s(
        self, prefill_tokens: int, prefill_pairs: int, decode_seqs: int, decode_context_tokens: float, /
    ) -> float: ...

    def image_s(self, image_tokens: int, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine batches: seats, tokens per step, and blocks (None: every seat has its own memory)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_tokens: int = 1
    num_blocks: int | None = None
    blocks_per_seq: int = 0  # beside the context's own: recurrent state

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens) + self.blocks_per_seq


@dataclass(frozen=True, slots=True)
class Served:
    """What became of each request, column by column, in order of arrival. Seconds; -1: refused, it can never fit."""

    arrival_s: list[float]
    admitted_s: list[float]
    first_token_s: list[float]
    finish_s: list[float]
    output_tokens: list[int]
    preemptions: int
    end_s: float  # when the last answer ended
    busy_s: float  # in steps
    tower_s: float  # of that: images in the vision tower
    running_s: float  # seats in use, integrated over time
    seatless_s: float  # with somebody waiting and every seat taken
    decode_tokens: int
    prefill_tokens: int
    peak_blocks: int
    peak_waiting: int
    steps: int


def simulate(step: Step, limits: Limits, load: Load) -> Served:
    """Serve a load until the last answer ends."""
    return _Engine(step, limits, load).run()


class _Engine:
    """One replica. Sequence i, once it decodes, holds `advance * steps + base[i]` tokens of context: with every step
    `advance` more."""

    def __init__(self, step: Step, limits: Limits, load: Load) -> None:
        count = len(load.new_tokens)
        self.step_s: Callable[[int, int, int, float], float] = step.step_s
        self.limits, self.load = limits, load
        self.rows, self.advance = step.rows_per_seq, step.tokens_per_seq if step.tokens_per_seq != 1 else 1
        self.images = _tower_s(step, load)
        self.arrival, self.admitted = [0.0] * count, [0.0] * count
        self.first, self.finish = [-1.0] * count, [-1.0] * count
        self.base: list[float] = [0] * count
        self.ends_at = [0] * count  # the step after which it has its last token; 0: it does not decode
        self.generated = [0] * count  # tokens that survive a preemption: they are computed again with the prompt
        self.now = self.busy = self.tower = self.running_area = self.seatless = 0.0
        self.steps = self.engine_steps = self.prefill_tokens = self.preemptions = 0
        self.arrived = self.peak_waiting = self.peak_blocks = 0
        self.waiting: deque[int] = deque()
        self.prefilling: deque[list[int]] = deque()  # [request, tokens left, tokens there]
        self.ending: list[tuple[int, int]] = []  # heap of (step, request); stale where ends_at says otherwise
        self.order: list[int] = []  # running, as admitted; ended ones are dropped when they are met
        self.decoding = 0  # sequences
        self.context: float = 0  # the sum of their contexts
        self.whole = 0  # sum of base // block over decoding sequences
        self.residues = [0] * limits.block_tokens  # how many of them have base % block
        self.held = 0  # blocks of prompts being computed
        if load.times_s is None:
            self.due = list(load.think_s or [])[: load.users]
            heapify(self.due)
        else:
            self.due = []
        self.next_s = self._next_arrival()

    def run(self) -> Served:
        while True:
            if self.next_s <= self.now:
                self._arrive()
            if not self.decoding and not self.prefilling and not self.waiting:
                if self.next_s == inf:
                    break
                self.now = self.next_s
                continue
            if self.waiting:
                self._admit()
            if self.prefilling:
                self._mixed_step()
            else:
                self._decode_steps()
        outputs = self.load.output_tokens
        decoded = sum(tokens for tokens, finished in zip(outputs, self.finish, strict=True) if finished >= 0)
        return Served(
            self.arrival, self.admitted, self.first, self.finish, outputs, self.preemptions, self.now, self.busy,
            self.tower, self.running_area, self.seatless, decoded, self.prefill_tokens, self.peak_blocks,
            self.peak_waiting, self.engine_steps,
        )  # fmt: skip

    def _next_arrival(self) -> float:
        if self.arrived >= len(self.arrival):
            return inf
        if self.load.times_s is not None:
            return self.load.times_s[self.arrived]
        return self.due[0] if self.due else inf

    def _arrive(self) -> None:
        limits, load = self.limits, self.load
        while self.next_s <= self.now:
            request = self.arrived
            self.arrived += 1
            self.arrival[request] = self.next_s
            if load.times_s is None:
                heappop(self.due)
            if limits.num_blocks is not None:
                total = load.new_tokens[request] + load.cached_tokens[request] + load.output_tokens[request]
                if limits.blocks(total + self.rows - 1) > limits.num_blocks:
                    self._leave(request, refused=True)
                    self.next_s = self._next_arrival()
                    continue
            self.waiting.append(request)
            self.next_s = self._next_arrival()
        if len(self.waiting) > self.peak_waiting:
            self.peak_waiting = len(self.waiting)

    def _admit(self) -> None:
        """First come, first served, while there are seats, blocks and tokens left in this step's budget."""
        limits, load = self.limits, self.load
        budget = limits.max_num_batched_tokens - self.decoding * self.rows - sum(entry[1] for entry in self.prefilling)
        while self.waiting and budget > 0 and self.decoding + len(self.prefilling) < limits.max_num_seqs:
            request = self.waiting[0]
            new = load.new_tokens[request] + self.generated[request]
            there = load.cached_tokens[request]
            if limits.num_blocks is not None:
                need = limits.blocks(new + there + self.rows)
                if need > self._free(1) and (self.decoding or self.prefilling):
                    return
                self.held += need
            self.waiting.popleft()
            self.prefilling.append([request, new, there])
            self.order.append(request)
            if not self.generated[request]:
                self.admitted[request] = self.now
            budget -= new

    def _blocks(self, ahead: int) -> int:
        """Blocks that the last of `ahead` more steps needs, if nothing starts or ends."""
        block = self.limits.block_tokens
        turns, offset = divmod(int(self.advance * (self.steps + ahead - 1)) + self.rows, block)
        beyond = sum(self.residues[block - offset + 1 :]) - (0 if offset else self.residues[0])
        return self.whole + self.decoding * (turns + 1 + self.limits.blocks_per_seq) + beyond + self.held

    def _most(self, ahead: int) -> int:
        """At least `_blocks`, at a fraction of its price."""
        turns = (int(self.advance * (self.steps + ahead - 1)) + self.rows) // self.limits.block_tokens
        return self.whole + self.decoding * (turns + 2 + self.limits.blocks_per_seq) + self.held

    def _free(self, ahead: int) -> int:
        return (self.limits.num_blocks or 0) - self._blocks(ahead)

    def _mixed_step(self) -> None:
        """One step: chunks of prompts, and one token of every sequence that decodes."""
        limits = self.limits
        if limits.num_blocks is not None:
            while self._most(1) > limits.num_blocks and self._free(1) < 0:
                self._preempt()
            if not self.prefilling:
                return
        budget = max(1, limits.max_num_batched_tokens - self.decoding * self.rows)
        tokens = pairs = done = 0
        images, tower_s = self.images, 0.0
        for entry in self.prefilling:
            chunk = min(entry[1], budget - tokens)
            if chunk <= 0:
                break
            pairs += chunk * (entry[2] + (chunk + 1) // 2)
            entry[1] -= chunk
            entry[2] += chunk
            tokens += chunk
            done += not entry[1]
            if images:
                tower_s += images.pop(entry[0], 0.0)
        spent = self.step_s(tokens, pairs, self.decoding, self.context)
        self.prefill_tokens += tokens
        self.tower += tower_s
        self._pass(spent + tower_s, 1)
        for _ in range(done):
            request, _, there = self.prefilling.popleft()
            self._first_token(request, there)
        if limits.num_blocks is not None:
            self._note_peak()

    def _first_token(self, request: int, there: int) -> None:
        """The prompt is there; the step that completed it gave the first token."""
        limits = self.limits
        if self.first[request] < 0:
            self.first[request] = self.now
        if limits.num_blocks is not None:
            self.held -= limits.blocks(there + self.rows)
        left = self.load.output_tokens[request] - self.generated[request] - 1
        if left <= 0:
            self._leave(request)
            return
        base = there + 1 - self.advance * self.steps
        self.base[request] = base
        last = self.steps + (left if self.advance == 1 else ceil(left / self.advance - 1e-9))
        self.ends_at[request] = last
        heappush(self.ending, (last, request))
        self.decoding += 1
        self.context += there + 1
        whole, rest = divmod(ceil(base), limits.block_tokens)
        self.whole += whole
        self.residues[rest] += 1

    def _decode_steps(self) -> None:
        """As many steps as nothing but lengths changes in."""
        if not self.decoding:
            return
        limits, advance = self.limits, self.decoding * self.advance
        while self.ends_at[self.ending[0][1]] != self.ending[0][0]:
            heappop(self.ending)
        count = self.ending[0][0] - self.steps
        if limits.num_blocks is not None and self._most(count) > limits.num_blocks:
            count = self._steps_within_blocks(count)
            if not count:
                self._preempt()
                return
        start, width = self.context, self.decoding
        first = self.step_s(0, 0, width, start)
        last = first if count == 1 else self.step_s(0, 0, width, start + advance * (count - 1))
        while count > 2:
            middle = self.step_s(0, 0, width, start + advance * ((count - 1) // 2))
            line = first + (last - first) * ((count - 1) // 2) / (count - 1)
            if abs(line - middle) <= LINEAR * middle:
                break
            count //= 2
            last = self.step_s(0, 0, width, start + advance * (count - 1))
        slope = (last - first) / (count - 1) if count > 1 else 0.0
        open_seat = not self.waiting and width < limits.max_num_seqs
        if open_seat and self.now + count * (first + last) / 2 > self.next_s:
            count = min(count, _steps_until(self.next_s - self.now, first, slope))
        self._pass(count * first + slope * count * (count - 1) / 2, count)
        if limits.num_blocks is not None:
            self._note_peak()

    def _steps_within_blocks(self, count: int) -> int:
        """The most steps, up to `count`, after which all still have their blocks."""
        blocks = self.limits.num_blocks or 0
        if self._blocks(count) <= blocks:
            return count
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            if self._blocks(middle) <= blocks:
                low = middle
            else:
                high = middle
        return low

    def _pass(self, spent_s: float, steps: int) -> None:
        """Time goes by: every decoding sequence has `steps` tokens more, and those that are complete leave."""
        self.now += spent_s
        self.busy += spent_s
        running = self.decoding + len(self.prefilling)
        self.running_area += spent_s * running
        if self.waiting and running >= self.limits.max_num_seqs:
            self.seatless += spent_s
        self.steps += steps
        self.engine_steps += steps
        self.context += self.decoding * self.advance * steps
        ending = self.ending
        while ending and ending[0][0] <= self.steps:
            step, request = heappop(ending)
            if self.ends_at[request] == step:
                self._stop_decoding(request)
                self._leave(request)

    def _stop_decoding(self, request: int) -> None:
        base = self.base[request]
        self.ends_at[request] = 0
        self.decoding -= 1
        self.context -= self.advance * self.steps + base
        whole, rest = divmod(ceil(base), self.limits.block_tokens)
        self.whole -= whole
        self.residues[rest] -= 1

    def _leave(self, request: int, refused: bool = False) -> None:
        if not refused:
            self.finish[request] = self.now
        load = self.load
        if load.times_s is None and load.think_s is not None:  # its user thinks, and asks again
            following = load.users + request
            if following < len(load.think_s):
                heappush(self.due, self.now + load.think_s[following])
                self.next_s = self._next_arrival()

    def _preempt(self) -> None:
        """The sequence admitted last gives its blocks back and waits at the head of the queue."""
        request = self.order.pop()
        while not self.ends_at[request] and all(entry[0] != request for entry in self.prefilling):
            request = self.order.pop()
        if self.ends_at[request]:
            load = self.load
            there = int(self.advance * self.steps + self.base[request] + 1e-6)
            self.generated[request] = there - load.new_tokens[request] - load.cached_tokens[request]
            self._stop_decoding(request)
        else:
            entry = next(entry for entry in self.prefilling if entry[0] == request)
            self.prefilling.remove(entry)
            self.held -= self.limits.blocks(entry[1] + entry[2] + self.rows)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _note_peak(self) -> None:
        """To within a block per sequence: counting exactly after every stretch would take most of the time."""
        if self._most(0) - self.decoding > self.peak_blocks:
            self.peak_blocks = max(self.peak_blocks, self._blocks(0))


def _tower_s(step: Step, load: Load) -> dict[int, float]:
    """Seconds of the vision tower for each request that brings images."""
    if load.images is None:
        return {}
    known = {sizes: sum(map(step.image_s, sizes)) for sizes in set(load.images)}
    return {request: known[sizes] for request, sizes in enumerate(load.images) if sizes}


def _steps_until(gap_s: float, first_s: float, slope_s: float) -> int:
    """The fewest steps, of which each takes `slope_s` longer than the one before, that take `gap_s` or more."""
    if gap_s <= first_s:
        return 1
    if slope_s <= first_s * 1e-12:
        count = gap_s / first_s
    else:
        linear = first_s - slope_s / 2
        count = (sqrt(linear * linear + 2 * slope_s * gap_s) - linear) / slope_s
    whole = int(count)
    return whole if whole * first_s + slope_s * whole * (whole - 1) / 2 >= gap_s else whole + 1
