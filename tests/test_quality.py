"""The order in which caches are tried: what is known to cost less comes first."""

import pytest

from qwenfit.planner.quality import KV_DIVERGENCE, divergence, kv_divergence


def test_sixteen_bits_cost_nothing_and_fewer_bits_never_cost_less():
    assert kv_divergence("f16") == kv_divergence("bf16") == kv_divergence("auto") == 0
    assert 0 < kv_divergence("q8_0") < kv_divergence("q5_1") < kv_divergence("q5_0") < kv_divergence("q4_0")
    assert kv_divergence("q8_0") < kv_divergence("fp8") < kv_divergence("fp8_e5m2") < kv_divergence("nvfp4")


def test_a_pair_lies_between_its_two_types():
    assert kv_divergence("q8_0/q4_0") == pytest.approx((KV_DIVERGENCE["q8_0"] + KV_DIVERGENCE["q4_0"]) / 2)


def test_an_unmeasured_type_ranks_behind_every_measured_one():
    assert kv_divergence("turbo3") > max(KV_DIVERGENCE.values())


def test_weights_cache_and_state_add_up():
    assert divergence(0.01, "q8_0", "float32") == pytest.approx(0.0116)
    assert divergence(0.01, "f16", "bfloat16") > divergence(0.01, "f16", "float32")
