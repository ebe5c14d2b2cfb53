"""Advice: only where it is needed, each change with an effect that is really there."""

from qwenfit.planner import Request, plan
from qwenfit.planner.search import variant


def tight_request():
    return Request(devices=("rtx3060",), ctx_tokens=262144, engine="llama.cpp", weights="q4_k_m", kv_dtype="f16")


def test_no_advice_where_there_is_room():
    assert plan(Request(devices=("h100-sxm",), ctx_tokens=32768)).advice == ()


def test_a_smaller_cache_is_proposed_and_does_what_it_says():
    answer = plan(tight_request())
    proposed = next(one for one in answer.advice if one.change == "KV cache in q8_0")
    assert proposed.fits
    changed = plan(variant(tight_request(), kv_dtype="q8_0")).best
    assert proposed.saves_bytes == answer.best.shortfall_bytes - changed.shortfall_bytes
    assert changed.fits


def test_the_smallest_device_that_would_do_is_larger_and_does_fit():
    answer = plan(tight_request())
    larger = next(one for one in answer.advice if one.change.startswith("on "))
    name = larger.change[larger.change.rindex("(") + 1 : -1]
    assert larger.fits
    assert plan(variant(tight_request(), devices=(name,))).fits


def test_less_context_is_proposed_with_the_largest_that_fits():
    answer = plan(tight_request())
    limit = answer.best.limits.max_ctx_tokens
    assert any(one.change == f"a context of {limit:,} tokens" for one in answer.advice)


def test_changes_that_make_it_fit_come_before_those_that_do_not():
    changes = [one.fits for one in plan(tight_request()).advice]
    assert changes == sorted(changes, reverse=True)


def test_head_and_embeddings_at_8_bit_are_proposed_for_our_own_formats():
    request = Request(devices=("rtx3060-8gb",), ctx_tokens=16384, engine="vllm", weights="int4")
    assert any("head8" in one.change for one in plan(request).advice)


def test_text_only_is_proposed_where_the_vision_tower_is_what_is_too_much():
    asked = Request(model="27b", devices=("rtx3090",), engine="llama.cpp", weights="q5_k_m", kv_dtype="f16")
    longest = plan(asked).best.limits.max_ctx_tokens  # without the tower
    answer = plan(variant(asked, ctx_tokens=longest, vision=True))
    assert not answer.fits
    assert any(one.fits and one.change.startswith("text only") for one in answer.advice)
