"""Rates of plans: bytes and FLOPs against counts of the real tensors, intervals, what bounds them, drafts, ranking.

How far the rates are from what people measured is tests/test_accuracy.py's.
"""

import itertools
import json
from math import exp, log
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from qwenfit.planner import Request, plan
from qwenfit.planner.factors import KINDS, chain, factors, known
from qwenfit.planner.speed import drafts, step_time
from qwenfit.planner.steps import CONSTITUENTS
from qwenfit.planner.work import work
from qwenfit.profiles import device, model, weight_format
from qwenfit.profiles.errors import Unsupported
from qwenfit.profiles.speed_data import fitted, left_out, runs

BF16 = weight_format("bf16")


def best(**asked: Any) -> Any:
    return plan(Request(**asked)).best


def work_of(name, devices=("rtx3090",), weights=BF16, **more):
    return work(model(name), weights, tuple(map(device, devices)), "bf16", **more)


@pytest.mark.parametrize(
    ("name", "read_parameters"),
    [
        ("qwen3.5-0.8b", 752_393_024),
        ("qwen3.5-9b", 7_936_684_544),
        ("qwen3.5-27b", 25_624_600_064),
        ("qwen3.5-35b-a3b", 2_946_429_568),
        ("qwen3.5-397b-a17b", 16_331_922_176),
    ],
)
def test_a_token_reads_the_active_parameters_and_no_embedding_table(name, read_parameters):
    """Counts of the published tensor lists, all but the embedding table where lm_head has its own; two bytes each."""
    amount = work_of(name)
    read_bytes = amount.dense_bytes + amount.head_bytes + amount.expert_share * amount.expert_bytes
    assert read_bytes == pytest.approx(2 * read_parameters, rel=2e-4)


def test_the_head_is_read_for_248320_words():
    assert work_of("qwen3.5-9b").head_bytes == 248_320 * 4096 * 2
    assert work_of("qwen3.5-0.8b").head_bytes == 248_320 * 1024 * 2  # tied: the embedding


def test_cache_and_state_per_sequence():
    """9B: 32,768 bytes of bf16 cache per token; 50,331,648 of state and 1,179,648 of columns, both ways."""
    amount = work_of("qwen3.5-9b")
    assert amount.kv_bytes_per_token == 32_768
    assert amount.state_bytes_per_seq == 2 * (50_331_648 + 1_179_648)
    quantized = work(model("qwen3.5-9b"), BF16, (device("rtx3090"),), "q8_0")
    assert quantized.kv_bytes_per_token == 32_768 * 8.5 / 16


def test_ranks_share_and_wait():
    one, two = work_of("qwen3.5-27b"), work_of("qwen3.5-27b", ("rtx3090", "rtx3090"), tp=2)
    assert two.dense_bytes == pytest.approx(one.dense_bytes / 2, rel=0.01)
    assert (one.all_reduces, two.all_reduces) == (0, 2 * 64)


def test_stages_take_turns():
    """Two equal devices with whole layers each read no faster than one."""
    one, two = work_of("qwen3.5-27b"), work_of("qwen3.5-27b", ("rtx3090", "rtx3090"))
    assert two.bandwidth_bytes_per_s == pytest.approx(one.bandwidth_bytes_per_s)
    mixed = work_of("qwen3.5-27b", ("rtx3090", "rtx3060"))
    assert one.bandwidth_bytes_per_s > mixed.bandwidth_bytes_per_s > 360e9


@settings(max_examples=40, deadline=None)
@given(some.integers(1024, 262_144), some.sampled_from([1, 2, 8, 64]))
def test_longer_contexts_are_never_faster(ctx_tokens, seqs):
    step = step_time(best(devices=("a100-80gb",), ctx_tokens=4096))
    assert step.decode_tokens_per_s(seqs, ctx_tokens) >= step.decode_tokens_per_s(seqs, ctx_tokens + 1024)
    assert step.whole_prompt_s(ctx_tokens, 2048) < step.whole_prompt_s(ctx_tokens + 1024, 2048)


def test_intervals_are_ordered_and_bounded_by_something():
    for one in plan(Request(devices=("rtx4090",), model="qwen3.5-35b-a3b")).plans:
        assert one.speed is not None
        for rates in (one.speed.start, one.speed.full):
            for interval in (rates.decode_tokens_per_s, rates.prefill_tokens_per_s, rates.ttft_s):
                assert 0 < interval.low < interval.mid < interval.high
            assert rates.bound_by in CONSTITUENTS
        json.dumps(one.speed.to_json(), allow_nan=False)


def test_decode_never_beats_the_bandwidth():
    """The middle reads no more bytes a second than the vendor's figure allows."""
    for name in ("rtx3060", "rtx4090", "m4-pro-24gb", "strix-halo-128gb", "dgx-spark"):
        one = best(devices=(name,), ctx_tokens=4096)
        amount = work(one.setup.model, one.setup.weights, one.setup.devices, "bf16")
        rate = one.speed.start.decode_tokens_per_s.mid
        assert rate * (amount.dense_bytes + amount.head_bytes) < 1.05 * device(name).memory_bandwidth_bytes_per_s


def test_what_bounds_a_plan():
    assert best(devices=("rtx3060",), ctx_tokens=4096).speed.start.bound_by == "weight reads"
    small = best(devices=("h100-sxm",), model="qwen3.5-0.8b", ctx_tokens=4096, engine="llama.cpp")
    assert small.speed.start.bound_by == "overhead"
    offloaded = best(devices=("rtx3060",), model="qwen3.5-35b-a3b", ctx_tokens=8192, engine="llama.cpp", weights="q6_k")
    assert offloaded.allocation.offloads
    assert offloaded.speed.start.bound_by == "host memory"
    assert "host memory" in offloaded.speed.basis


def test_no_data_is_said_and_widens():
    measured = best(devices=("dgx-spark",), engine="llama.cpp", ctx_tokens=4096).speed
    elsewhere = best(devices=("rtx3060",), engine="llama.cpp", ctx_tokens=4096).speed
    many = best(devices=("dgx-spark",), engine="llama.cpp", ctx_tokens=4096, seqs=8).speed

    def width(speed):
        return log(speed.start.decode_tokens_per_s.high / speed.start.decode_tokens_per_s.low)

    assert width(measured) < width(elsewhere) and width(measured) < width(many)
    assert "was measured on dgx-spark" in measured.basis
    assert "not on rtx3060" in elsewhere.basis
    assert "several sequences" in many.basis


def test_the_nearest_case_is_a_published_run():
    """27B Q4_K_M on a DGX Spark: four people's runs of just that are in the data."""
    case = best(
        devices=("dgx-spark",), model="qwen3.5-27b", engine="llama.cpp", weights="q4_k_m", ctx_tokens=4096
    ).speed.nearest
    assert (case.device, case.model, case.weights) == ("dgx-spark", "qwen3.5-27b", "q4_k_m")
    published = {row["id"]: row for row in runs()}
    assert published[case.id]["decode_tokens_per_s"] == case.decode_tokens_per_s
    assert published[case.id]["source"] == case.source


def test_drafts_pay_alone_and_not_in_a_large_batch():
    """27B on two 3090s is the case that people run with drafts: 1.7 to 2.3 times as fast (jdkruzr, July 2026)."""
    found = best(devices=("2xrtx3090",), model="qwen3.6-27b", mtp=3, engine="llama.cpp", ctx_tokens=8192).speed.drafts
    assert 1.2 < found.gain < 2.6
    assert 1 < found.tokens_per_pass < 4
    assert found.pays_up_to_seqs >= 1


def test_engines_of_one_quality_are_ranked_by_speed():
    """Among plans of the same class of quality that serve, a fifth faster comes first."""
    found = [one for one in plan(Request(devices=("rtx4090",), weights="bf16", ctx_tokens=8192, model="2b")).plans]
    serving = [one for one in found if one.fits and not one.tight and one.engine in ("vllm", "sglang", "llama.cpp")]
    rates = [step_time(one).decode_tokens_per_s(1, 8192) for one in serving]
    assert all(later <= earlier * exp(0.2) for earlier, later in itertools.pairwise(rates))


def test_every_fitted_term_has_a_kind_and_every_plan_its_factors():
    assert set(fitted()["logs"]) == set(KINDS)
    for name in ("rtx3060", "raspberry-pi-5-16gb", "arc-b580", "m1-8gb", "mi355x"):
        found = factors("llama.cpp", device(name), BF16, False, "pcie")
        assert 0 < found.read < 1.5 and 0 < found.acceptance < 1
        keys = chain("llama.cpp", "cuda", device(name), BF16, False, "pcie")
        assert keys[0] == "" and len(set(keys)) == len(keys)
        assert known("llama.cpp", device(name)) in ("place", "engine", "nothing")


def test_a_prompts_pass_reads_as_all_runs_share_it_and_decoding_as_its_place_does() -> None:
    """The rule of `SHARED_BY_PROMPTS`; the fit scores exactly that (tests/test_accuracy.py)."""
    table, link = fitted()["logs"], "pcie"
    keys = chain("llama.cpp", "cuda", device("rtx3090"), BF16, False, link)
    found = factors("llama.cpp", device("rtx3090"), BF16, False, link)
    assert log(found.prompt_read) == pytest.approx(min(0.0, table["read"][""]))
    assert log(found.read) == pytest.approx(min(0.0, sum(table["read"].get(key, 0.0) for key in keys)))
    assert found.prompt_unpack == pytest.approx(exp(table["unpack"][""]))
    assert found.prompt_layer_s == pytest.approx(exp(table["layer"][""]))
    assert found.dense == pytest.approx(exp(sum(table["dense"].get(key, 0.0) for key in keys)))


def test_kernels_of_this_project_share_nothing_with_other_engines() -> None:
    """On a CPU; on a GPU nothing was measured of them, so they take what engines there share."""
    processor, card = device("graviton4-12ch-384gb"), device("rtx3090")
    alone = chain("native", "cpu", processor, BF16, False, "pcie")
    assert alone[0] == "native/cpu" and all(key.startswith("native/cpu") for key in alone)
    assert not set(alone) & set(chain("llama.cpp", "cpu", processor, BF16, False, "pcie"))
    assert chain("native", "cuda", card, BF16, False, "pcie")[:4] == ("", "+dense", "=pcie", "cuda")


def test_every_run_has_its_source_and_every_row_left_out_its_reason():
    ids = [row["id"] for row in (*runs(), *left_out())]
    assert len(set(ids)) == len(ids) > 300
    assert all(row["source"] and row["publisher"] for row in runs())
    assert all(row["why"] for row in left_out())


def test_a_machine_that_nobody_measured_has_a_plan_and_no_speed() -> None:
    """`--gpu auto` knows the memory of a CPU and not how fast it reads it."""
    unknown = best(devices=("auto",), model="qwen3.5-0.8b", ctx_tokens=4096)
    if unknown.setup.devices[0].memory_bandwidth_bytes_per_s:
        pytest.skip("this machine's bandwidth is known")
    assert unknown.speed is None and unknown.energy is None and unknown.to_json()["speed"] is None
    with pytest.raises(Unsupported, match="memory_bandwidth_bytes_per_s"):
        step_time(unknown)


def test_drafts_pay_from_and_up_to_where_their_gain_crosses_one():
    """What a draft step costs is shared by a batch: where weights are small it may not pay alone, and does in one."""
    best = plan(Request(devices=("l40s",), engine="vllm", weights="int4", mtp=2, ctx_tokens=8192)).best
    plain = plan(Request(devices=("l40s",), engine="vllm", weights="int4", ctx_tokens=8192)).best
    found = drafts(best)

    def gain(seqs):
        rates = [step_time(one).decode_tokens_per_s(seqs, 2048) for one in (best, plain)]
        return rates[0] / rates[1]

    assert 0 < found.pays_from_seqs <= found.pays_up_to_seqs
    assert gain(found.pays_from_seqs) > 1 and gain(found.pays_up_to_seqs) > 1
    assert found.pays_from_seqs == 1 or gain(found.pays_from_seqs - 1) <= 1
    assert found.pays_up_to_seqs == 1024 or gain(found.pays_up_to_seqs + 1) <= 1
