"""The six questions that sixteen published planners were asked, and the answers that they should have given.

The expected figures are sums of published parts: 9B at 4 bit is 5.2 GiB in llama.cpp, its cache 32 KiB a token in 8 of
32 layers, its recurrent state 50 MiB a sequence, 27B at 4 bit 15.2 to 16.3 GiB with 64 KiB a token.
"""

import pytest

from qwenfit.planner import Request, plan

GIB = 1 << 30


def best(**request):
    return plan(Request(**request)).best


def total_gib(found):
    return found.devices[0].memory.total.mid / GIB


def test_9b_at_4_bit_and_262144_tokens_does_not_fit_12_gb_with_a_16_bit_cache():
    found = best(devices=("rtx3060",), ctx_tokens=262144, engine="llama.cpp", weights="q4_k_m", kv_dtype="f16")
    assert not found.fits
    assert 12.9 < total_gib(found) < 14.1
    assert found.devices[0].memory.kv_cache.mid == 8 * GIB


def test_9b_at_4_bit_and_262144_tokens_fits_12_gb_with_a_q8_0_cache():
    found = best(devices=("rtx3060",), ctx_tokens=262144, engine="llama.cpp", weights="q4_k_m", kv_dtype="q8_0")
    assert found.fits
    # 10.2 by the parts above; b11434 reserves 1 GiB more, room for one layer of the quantized cache in f16
    assert 9.3 < total_gib(found) < 11.0
    assert found.devices[0].memory.kv_cache.mid == 4.25 * GIB


def test_the_default_question_gets_a_yes_with_a_way_to_do_it():
    answer = plan(Request(devices=("rtx3060",), ctx_tokens=262144))
    assert answer.fits
    assert answer.best.kv_dtype != "f16"
    assert answer.best.command


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_9b_in_bf16_fits_a_4090_at_32768_tokens(engine):
    found = best(devices=("rtx4090",), ctx_tokens=32768, engine=engine, weights="bf16")
    assert found.fits
    memory = found.devices[0].memory
    assert 14.5 < memory.weights.mid / GIB < 18.0  # llama.cpp leaves the embedding in host memory
    assert memory.kv_cache.mid >= 32768 * 32768


def test_9b_serves_a_million_tokens_on_an_a100_with_rope_scaling():
    found = best(devices=("a100-80gb",), ctx_tokens=1_010_000, engine="vllm", weights="bf16")
    assert found.fits
    assert any("YaRN" in warning for warning in found.warnings)
    assert '"factor": 4' in found.command.replace('":4', '": 4')
    assert found.devices[0].memory.kv_cache.mid / GIB >= 30.8


def test_27b_fits_a_3090_at_32768_tokens_in_4_bit_only():
    found = best(model="27b", devices=("rtx3090",), ctx_tokens=32768, engine="llama.cpp", weights="q4_k_m")
    assert found.fits
    assert 16.5 < total_gib(found) < 19.0
    assert not best(model="27b", devices=("rtx3090",), ctx_tokens=32768, engine="llama.cpp", weights="q8_0").fits
    assert not best(model="27b", devices=("rtx3090",), ctx_tokens=32768, engine="vllm", weights="bf16").fits


def test_9b_fits_a_16_gb_m1_in_4_bit_and_not_in_bf16():
    assert best(devices=("m1-16gb",), ctx_tokens=8192, engine="mlx", weights="mlx-4bit").fits
    assert best(devices=("m1-16gb",), ctx_tokens=8192, engine="llama.cpp", weights="q4_k_m").fits
    assert not best(devices=("m1-16gb",), ctx_tokens=8192, engine="mlx", weights="bf16").fits


def test_the_longest_context_on_12_gb_with_a_q8_0_cache_is_beyond_the_native_one():
    found = best(devices=("rtx3060",), ctx_tokens=32768, engine="llama.cpp", weights="q4_k_m", kv_dtype="q8_0")
    assert 300_000 < found.limits.max_ctx_tokens < 420_000
