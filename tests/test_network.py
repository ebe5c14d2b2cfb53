"""What boxes, stages and replicas do to the seconds of a pass.

The four DGX Sparks were measured by others; everything else follows from definitions.
"""

import math
from typing import Any

import pytest

from qwenfit.planner import Request, plan
from qwenfit.planner.plan import EnginePlan
from qwenfit.planner.speed import step_time
from qwenfit.profiles.frozen import replace
from qwenfit.profiles.interconnect import interconnect

LARGE = "qwen3.5-397b-a17b"


def best(box: str, nodes: int = 1, **told: Any) -> EnginePlan:
    asked = {"model": LARGE, "devices": (box,), "nodes": nodes, "ctx_tokens": 16384, "engine": "vllm", **told}
    return plan(Request(**asked)).best


@pytest.mark.parametrize(
    ("seqs", "low", "high"),
    # INT4 over four GB10 with tp 4 and 100 Gb/s RoCE, vLLM 0.16: all sequences together
    # https://forums.developer.nvidia.com/t/qwen3-5-397b-a17b-int4-autoround-4-x-db10-node-updated-results-37-94-tok-s/362368
    [(1, 35.6, 37.1), (2, 59.0, 63.0), (4, 74.0, 90.0)],
)
def test_four_sparks_decode_as_somebody_measured(seqs: int, low: float, high: float) -> None:
    found = best(
        "dgx-spark", 4, tp=4, weights="gptq-int4-official", kv_dtype="fp8", seqs=seqs, interconnect="roce-100"
    ).speed
    assert found is not None
    rate = found.start.decode_tokens_per_s
    assert rate.low <= low and high <= rate.high
    assert rate.mid == pytest.approx((low + high) / 2, rel=0.35)
    assert "not measured" in found.basis


def test_intervals_over_boxes_are_a_factor_of_two() -> None:
    found = best("8xa100-80gb", 2).speed
    assert found is not None
    rate = found.start.decode_tokens_per_s
    assert rate.high / rate.mid >= 2 - 1e-9 and rate.mid / rate.low >= 2 - 1e-9


def test_one_sequence_pays_for_every_stage_and_many_fill_them() -> None:
    one, four, many = (best("dgx-spark", 4, tp=1, pp=4, weights="gptq-int4-official", seqs=n) for n in (1, 4, 64))
    step = step_time(one)
    assert step.stages == step.ways == 4
    alone = step.decode_tokens_per_s(1, 16384)
    assert step.decode_tokens_per_s(4, 4 * 16384 // 4) == pytest.approx(4 * alone)  # one in each stage
    assert step_time(many).decode_tokens_per_s(64, 16384) > 4 * alone
    assert step_time(four) == replace(step_time(four), stages=4)


def test_a_prompt_of_one_chunk_has_nothing_to_pipeline() -> None:
    step = step_time(best("8xa100-80gb", 2))
    plain = replace(step, ways=1, stages=1)
    assert step.whole_prompt_s(2048, 2048) == pytest.approx(plain.whole_prompt_s(2048, 2048))
    ratio = step.whole_prompt_s(64 * 2048, 2048) / plain.whole_prompt_s(64 * 2048, 2048)
    assert 0.5 < ratio < 0.56  # two stages, and one chunk's worth of bubbles


def test_a_slower_link_is_never_faster() -> None:
    for told in ({"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2}):
        rates = []
        for link in ("ethernet-1", "ethernet-10", "roce-100", "cx7-200", "8xib-ndr"):
            found = best("dgx-spark", 4, interconnect=link, weights="gptq-int4-official", **told).speed
            assert found is not None
            rates.append((found.start.decode_tokens_per_s.mid, -found.start.ttft_s.mid))
        assert rates == sorted(rates), told


def test_an_all_reduce_over_boxes_costs_its_hops_and_its_bytes() -> None:
    """60 layers with two each; 4,096 bf16 values a row; of k boxes each sends and receives 2 (k - 1) / k of them."""
    found = best("8xa100-80gb", 2, tp=16, interconnect="8xib-hdr")
    inside = best("16xa100-80gb", tp=16)
    link, over, within = interconnect("8xib-hdr"), step_time(found), step_time(inside)
    assert over.link_s - within.link_s == pytest.approx(120 * 2 * math.log2(2) * link.latency_s)
    row = 120 * 4096 * 2 * 2 * 0.5 / (link.bytes_per_s * 0.7)
    assert over.link_row_s - within.link_row_s == pytest.approx(row)


def test_replicas_of_a_dense_model_are_as_many_times_as_fast() -> None:
    one, eight = best("h100-sxm", model="9b", seqs=4), best("8xh100-sxm", model="9b", dp=8, seqs=32)
    single, all_of_them = step_time(one), step_time(eight)
    assert all_of_them.decode_tokens_per_s(32, 2048) == pytest.approx(8 * single.decode_tokens_per_s(4, 2048))
    assert all_of_them.decode_tokens_per_s(1, 2048) == pytest.approx(single.decode_tokens_per_s(1, 2048))


def test_dealt_out_experts_wait_for_the_busiest_rank() -> None:
    """One token asks for 10 of 512 experts; over eight ranks that is 1.25 each, and more on the busiest."""
    cut, whole = (step_time(best("8xh100-sxm", ep=ep, tp=8, weights="fp8")) for ep in (1, 8))
    share = 10 / 512
    mean = share * 64
    busiest = (mean + (2 * mean * (1 - share) * math.log(8)) ** 0.5) / 64
    spent = {name: step.constituents(0, 0, 1, 0)["weight reads"] for name, step in (("cut", cut), ("whole", whole))}
    assert spent["cut"] == pytest.approx(cut.dense_read_s + share * cut.expert_read_s)
    assert spent["whole"] == pytest.approx(whole.dense_read_s + busiest * whole.expert_read_s)
    assert busiest > 2 * share
    # with enough rows all experts are read, however they lie
    rows = [step.constituents(65536, 0, 0, 0)["weight reads"] for step in (cut, whole)]
    assert rows[0] == pytest.approx(rows[1], rel=0.01)


def test_stages_that_work_at_the_same_time_draw_at_the_same_time() -> None:
    one, many = best("8xa100-80gb", 2).energy, best("8xa100-80gb", 2, seqs=8).energy
    assert one and many and 1.5 < many.watts.mid / one.watts.mid < 2.5
