"""Requests that the simulation serves in a minute of one core: a million is what is promised.

    python tests/bench/requests_per_minute.py [requests]

Four L40S-like replicas' worth of a chat load (prompts 800 median, answers 300 median), near what it can carry, with
vLLM's blocks; then the same with too few blocks, so that sequences are preempted.
"""

import sys
import time

from qwenfit.planner.arrivals import sampled
from qwenfit.planner.batching import Limits, simulate
from qwenfit.planner.steps import StepTime
from qwenfit.planner.workload import Lengths, Workload, lognormal

STEP = StepTime(
    dense_read_s=0.0225, expert_read_s=0.0, host_read_s=0.0, expert_share=0.0, row_s=6e-5, head_row_s=5e-6,
    pair_s=4e-10, context_s=5e-8, seq_s=6e-5, overhead_s=0.0015,
    prompt_dense_read_s=0.0225, prompt_expert_read_s=0.0, prompt_overhead_s=0.0015, link_s=0.0, link_row_s=0.0,
)  # fmt: skip


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    answers = Lengths((lognormal(1.0, 300, 1200, 8192),))
    chat = Workload(Lengths((lognormal(1.0, 800, 4000, 32768),)), answers, rate_per_s=4.0)
    for name, blocks in (("enough blocks", 4000), ("too few blocks", 400)):
        began = time.process_time()
        load = sampled(chat, count, 1, 528)
        drawn = time.process_time() - began
        served = simulate(STEP, Limits(256, 2048, 528, blocks, 3), load)
        spent = time.process_time() - began
        print(
            f"{name}: {count:,} requests in {spent:.1f} s of CPU ({drawn:.1f} to draw them): "
            f"{count / spent * 60 / 1e6:.2f} million a minute; {served.steps:,} steps, "
            f"{served.preemptions:,} preemptions, busy {served.busy_s / served.end_s:.2f}"
        )


if __name__ == "__main__":
    main()
