"""What replicas, pipeline stages and the link between boxes do to the seconds of a pass.

- Stages that lie in several boxes hand on the hidden state and the residual of every row (vLLM 0.32
  `gpu_model_runner.py`, `IntermediateTensors`; SGLang's `PPProxyTensors` hold the same). One sequence passes through
  them in turn; several are dealt out over the stages and pass at the same time (vLLM `max_concurrent_batches`).
- A tensor-parallel group over boxes adds the all-reduces of two half layers to every layer: NCCL's tree model of them
  is twice the logarithm of the boxes in hops (NVIDIA/nccl `src/graph/tuning.cc`), and every box sends and receives
  2 (k - 1) / k of the rows of k boxes.
- Replicas that share experts gather the rows of all before the experts and scatter the results behind them (vLLM's
  default `allgather_reducescatter`, SGLang's attention data parallelism), instead of the all-reduce behind the experts.

Nothing here is fitted: no published run told it apart. `HOP_S` and `LINK_SHARE` are estimates, and the intervals of
plans over boxes are as wide as a factor of two (`speed.widths`).
"""

from math import log2
from typing import TYPE_CHECKING

from ..profiles.frozen import replace
from .factors import Factors
from .steps import StepTime
from .work import Work

if TYPE_CHECKING:
    from .engines.engine import Setup

HOP_S = 2e-4  # handing a pass on to the next box: the engine's own messages beside the link's latency
LINK_SHARE = 0.7  # of a link's line rate that collectives reach
PIPELINED = ("vllm", "sglang")  # engines whose stages work on several batches at a time while decoding
BF16_BYTES = 2


def spread_step(step: StepTime, work: Work, factors: Factors, engine: str, setup: "Setup") -> StepTime:
    """The step of one replica in one box, as it is with the setup's replicas and boxes."""
    link = setup.interconnect
    row_bytes = setup.model.hidden_size * BF16_BYTES
    stages = setup.pp if setup.nodes > 1 and engine in PIPELINED else 1
    latency_s = row_s = 0.0
    link_s, link_row_s = step.link_s, step.link_row_s
    if link is not None:
        rate = link.bytes_per_s * LINK_SHARE
        if setup.tp_nodes > 1:
            if setup.box_ranks == 1:
                link_row_s = 0.0  # nothing is reduced inside a box
            latency_s += work.all_reduces * 2 * log2(setup.tp_nodes) * link.latency_s
            row_s += 2 * work.layers * row_bytes * 2 * (setup.tp_nodes - 1) / setup.tp_nodes / rate
        hops = setup.replica_nodes // setup.tp_nodes - 1
        if hops > 0:
            latency_s += (hops + 1) * (HOP_S + link.latency_s)  # and the sampled token back to the first
            row_s += hops * 2 * row_bytes / rate
    if setup.expert_dp > 1:
        ranks = setup.tp * setup.dp
        if work.all_reduces:
            link_s, link_row_s = link_s / 2, link_row_s / 2
        gathered = 2 * work.layers * setup.dp * row_bytes
        link_s += 2 * work.layers * factors.link_s
        link_row_s += gathered * (ranks - 1) / ranks / (work.link_bytes_per_s * factors.wire)
        boxes = setup.nodes // (setup.replica_nodes // setup.tp_nodes)  # that the ranks of one stage lie in
        if link is not None and boxes > 1:
            latency_s += 2 * work.layers * log2(boxes) * link.latency_s
            row_s += gathered * (boxes - 1) / boxes / (link.bytes_per_s * LINK_SHARE)
    return replace(
        step,
        link_s=link_s + latency_s,
        link_row_s=link_row_s + row_s,
        ways=setup.dp * stages,
        stages=stages,
    )
