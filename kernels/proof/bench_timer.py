"""Time on a GPU, honestly: CUDA graphs, cold caches, medians, and what the device itself reached in the same run.

A kernel is timed as a graph of many calls, so that neither Python nor the driver's launch is part of it. Call i works
on copy i of its data, round and round, and the copies together are more than twice the L2 cache: weights, cache and
state come from memory, as they do in a model. (Where 256 copies would not be that much, there is nothing to keep out of
L2 that a model would not have there, and `cold` says no.) The graph is replayed some twenty times; the figures are the
median of a call and the quartiles. What waits for the device inside (`.tolist()`) cannot be captured: it is launched
call by call, and `graph` says no.

Ceilings, by the same events: a copy of a gibibyte (read and written) and a large matmul of the vendor's library.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MOST_COPIES = 256
REPLAYS = 20
GRAPH_S = 0.004
MOST_CALLS = 400
MATMUL_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median and quartiles over the replays; calls: in a graph."""

    median_s: float
    low_s: float
    high_s: float
    calls: int
    cold: bool
    graph: bool


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device reached in this run."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float

    def roofline_s(self, bytes: int, flops: int) -> float:
        """Seconds that the traffic and the arithmetic take at these speeds, whichever is longer."""
        return max(bytes / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)


def copies_for(bytes: int, cache_bytes: int) -> int:
    """Copies of `bytes` that fill twice the cache: from 1 to MOST_COPIES."""
    return max(1, min(MOST_COPIES, -(-2 * cache_bytes // max(1, bytes))))


def time_calls(run: Callable[[int], Any], copies: int, bytes: int, cache_bytes: int) -> Timing:
    """`run(i)` works on copy i. It was called before, so that it is compiled."""
    for copy in range(copies):
        run(copy)
    few = min(copies, 8)
    once_s = _events_s(lambda: [run(copy) for copy in range(few)]) / few
    calls = max(copies, min(MOST_CALLS, round(GRAPH_S / max(once_s, 1e-7))))
    graph = _captured(run, copies, calls)
    if graph is None:
        times = [_events_s(lambda: [run(i % copies) for i in range(calls)]) / calls for _ in range(REPLAYS)]
    else:
        graph.replay()
        times = [_events_s(graph.replay) / calls for _ in range(REPLAYS)]
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high, calls, copies * bytes > 2 * cache_bytes, graph is not None)


def _captured(run: Callable[[int], Any], copies: int, calls: int) -> Any:
    """The graph of so many calls; None where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(calls):
                run(i % copies)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _events_s(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_ceilings(dtype: torch.dtype, memory_bytes: int) -> Ceilings:
    """Copy of up to 1 GiB (an eighth of a small device's memory) and matmul of 8192, medians of 20."""
    count = min(1 << 30, memory_bytes // 8)
    copy_s = _copy_s(count)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device="cuda") for _ in range(2))
    out = a @ b
    matmul_s = statistics.median(_events_s(lambda: torch.matmul(a, b, out=out)) for _ in range(REPLAYS))
    return Ceilings(2 * count / copy_s, 2 * MATMUL_SIZE**3 / matmul_s)


def _copy_s(size_bytes: int) -> float:
    source, target = (torch.empty(size_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    target.copy_(source)
    return statistics.median(_events_s(lambda: target.copy_(source)) for _ in range(REPLAYS))
