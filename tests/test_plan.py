"""The shape of the answer, and what holds for every plan: parts sum to the total, more never takes less."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner import Request, plan
from qwenfit.planner.search import variant
from qwenfit.planner.steps import CONSTITUENTS
from qwenfit.profiles import QwenfitError, device, devices

PARTS = ("weights", "kv_cache", "recurrent_state", "activation", "graph", "runtime")

engines = st.sampled_from(["vllm", "sglang", "llama.cpp", "ollama", "transformers", "native"])
contexts = st.integers(1, 1_010_000)
sequences = st.integers(1, 64)
models = st.sampled_from(["0.8b", "4b", "9b", "27b", "35b-a3b", "qwen3.6-27b", "122b-a10b"])
cards = st.sampled_from(["rtx3060", "rtx3090", "rtx4090", "t4", "l40s", "a100-80gb", "h100-sxm", "2xrtx3090"])


def everywhere(allocation):
    return sum(share.memory.total.mid for share in allocation.devices) + allocation.host.total.mid


def answer_or_none(request):
    try:
        return plan(request).best
    except QwenfitError:
        return None


def test_the_json_has_the_contracts_keys_and_whole_numbers():
    answer = plan(Request(devices=("rtx3060",), ctx_tokens=262144))
    document = json.loads(json.dumps(answer.to_json()))
    assert document["schema"] == 1
    assert document["fits"] is True
    assert document["request"]["model"] == "qwen3.5-9b"
    assert document["request"]["devices"] == ["rtx3060"]
    assert document["request"]["ctx_tokens"] == 262144
    for one in document["plans"]:
        assert {"engine", "engine_version", "weights", "kv_dtype", "state_dtype", "tp", "pp", "mtp", "vision"} <= set(
            one
        )
        assert {
            "fits",
            "reasons",
            "warnings",
            "devices",
            "host",
            "limits",
            "speed",
            "energy",
            "detail",
            "command",
        } <= set(one)
        for rate in ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s"):
            interval = one["speed"][rate]
            assert set(interval) == {"low", "mid", "high"}
            assert 0 < interval["low"] < interval["mid"] < interval["high"]
        assert one["speed"]["bound_by"] in CONSTITUENTS
        assert one["energy"]["joules_per_token"] > 0 and one["energy"]["usd_per_million_tokens"] > 0
        for share in [*one["devices"], one["host"]]:
            memory = share["memory"]
            assert set(memory) == {f"{part}_bytes" for part in PARTS} | {"total_bytes"}
            assert all(type(value) is int and value >= 0 for value in memory.values())
            assert memory["total_bytes"] == sum(memory[f"{part}_bytes"] for part in PARTS)
        for share in one["devices"]:
            assert share["free_bytes"] == share["usable_bytes"] - share["memory"]["total_bytes"]
            for part in PARTS:
                interval = share["interval"][f"{part}_bytes"]
                assert interval["low"] <= interval["mid"] <= interval["high"]
                if interval["basis"] == "exact":
                    assert interval["low"] == interval["high"]
        assert type(one["limits"]["max_ctx_tokens"]) is int and type(one["limits"]["max_seqs"]) is int


@settings(max_examples=150, deadline=None)
@given(engines, models, cards, contexts, contexts, sequences, sequences)
def test_more_context_or_more_sequences_never_takes_less(engine, model, card, a, b, c, d):
    few = answer_or_none(Request(model=model, devices=(card,), engine=engine, ctx_tokens=min(a, b), seqs=min(c, d)))
    if few is None:
        return
    many_tokens, many_seqs = max(a, b), max(c, d)
    estimate = few.estimate
    less, more = estimate.allocate(min(a, b), min(c, d)), estimate.allocate(many_tokens, many_seqs)
    assert estimate.shortfall_bytes(min(a, b), min(c, d)) <= estimate.shortfall_bytes(many_tokens, many_seqs)
    # routed experts may move from a device to the host as the cache grows: together they never shrink
    assert everywhere(less) <= everywhere(more)


@settings(max_examples=100, deadline=None)
@given(engines, models, cards, contexts, sequences)
def test_fitting_agrees_with_the_parts(engine, model, card, ctx_tokens, seqs):
    found = answer_or_none(Request(model=model, devices=(card,), engine=engine, ctx_tokens=ctx_tokens, seqs=seqs))
    if found is None:
        return
    assert found.fits == found.allocation.fits == (not found.reasons)
    within = all(share.memory.total.mid <= share.usable_bytes for share in found.devices)
    assert found.fits == within or (within and found.reasons)
    if found.fits:
        assert found.estimate.is_sure(ctx_tokens, seqs) == found.allocation.is_sure


@settings(max_examples=60, deadline=None)
@given(engines, models, contexts, sequences, st.data())
def test_a_larger_device_never_stops_fitting(engine, model, ctx_tokens, seqs, data):
    cards = [one for one in devices() if one.vendor == "nvidia" and one.kind == "discrete"]
    small, large = sorted(
        data.draw(st.lists(st.sampled_from(cards), min_size=2, max_size=2)), key=lambda d: d.usable_bytes
    )
    if small.compute_capability != large.compute_capability:
        return
    request = Request(model=model, engine=engine, ctx_tokens=ctx_tokens, seqs=seqs, weights=None, devices=(small.name,))
    on_small = answer_or_none(request)
    if on_small is None or not on_small.fits:
        return
    pinned = variant(request, weights=on_small.weights, kv_dtype=on_small.kv_dtype, devices=(large.name,))
    assert plan(pinned).best.fits


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "transformers", "native", "mlx"])
def test_limits_are_the_last_that_fit(engine):
    card = "m4-max-64gb" if engine == "mlx" else "rtx4090"
    found = plan(Request(devices=(card,), engine=engine, ctx_tokens=16384)).best
    limits = found.limits
    fits = found.estimate.shortfall_bytes
    assert fits(limits.max_ctx_tokens, 1) <= 0 and fits(16384, limits.max_seqs) <= 0
    if limits.max_ctx_tokens < 1_010_000:
        assert fits(limits.max_ctx_tokens + 1, 1) > 0
    if limits.max_seqs < 4096:
        assert fits(16384, limits.max_seqs + 1) > 0


def test_more_bits_never_take_less():
    sizes = [
        plan(Request(devices=("h100-sxm",), engine="llama.cpp", weights=name)).best.devices[0].memory.total.mid
        for name in ("q2_k", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "bf16")
    ]
    assert sizes == sorted(sizes)
    weights = [
        plan(Request(devices=("h100-sxm",), engine="vllm", weights=name)).best.devices[0].memory.weights.mid
        for name in ("int4", "int4-g32", "int8", "bf16")
    ]
    assert weights == sorted(weights)


def test_a_device_object_and_its_name_mean_the_same():
    assert device("rtx3060") is plan(Request(devices=("rtx3060",))).devices[0]
