"""The search: what is tried, what is refused in which words, and how plans are ranked."""

import pytest

from qwenfit.planner import Options, Request, plan
from qwenfit.planner.candidates import ENGINE_MODULES, engine_module, known_version
from qwenfit.planner.engines.versions import release
from qwenfit.planner.search import variant
from qwenfit.profiles import BadInput, UnknownName, Unsupported


def test_every_engine_of_the_contract_has_a_file_that_answers_the_six_questions():
    for name in ("vllm", "sglang", "llama.cpp", "ollama", "transformers", "mlx", "ktransformers", "native"):
        module = engine_module(name)
        assert module.ENGINE.name == name
        for verb in ("runs_on", "loads", "weight_formats", "kv_dtypes", "estimate"):
            assert callable(getattr(module, verb))


def test_plans_are_ranked_sure_fits_first_then_quality():
    answer = plan(Request(devices=("rtx4090",), ctx_tokens=32768))
    assert answer.fits
    order = [(not one.fits, one.tight) for one in answer.plans]
    assert order == sorted(order)
    sure = [round(one.divergence, 4) for one in answer.plans if one.fits and not one.tight]
    assert sure == sorted(sure)


def test_engines_that_cannot_run_on_the_device_are_skipped_with_a_reason():
    answer = plan(Request(devices=("m1-16gb",), ctx_tokens=4096))
    skipped = {one.engine: one.reason for one in answer.skipped}
    assert "vllm" in skipped and "sglang" in skipped
    assert all(skipped.values())
    assert {"mlx", "llama.cpp"} <= {one.engine for one in answer.plans}


def test_a_cache_type_of_one_engine_passes_the_others_by():
    answer = plan(Request(devices=("h100-sxm",), kv_dtype="fp8"))
    assert "vllm" in {one.engine for one in answer.plans}
    assert any(one.engine == "llama.cpp" and "fp8" in one.reason for one in answer.skipped)
    answer = plan(Request(devices=("h100-sxm",), kv_dtype="q8_0"))
    assert answer.best.engine == "llama.cpp"


def test_weights_that_nobody_publishes_are_said_to_be_made():
    made = plan(Request(devices=("rtx4090",), engine="vllm", weights="int4")).best
    assert any("is made from Qwen/Qwen3.5-9B" in text for text in made.warnings)
    published = plan(Request(model="27b", devices=("h100-sxm",), engine="vllm", weights="fp8")).best
    assert not any("is made from" in text for text in published.warnings)


def test_an_unreleased_engine_is_planned_only_when_named():
    assert "native" not in {one.engine for one in plan(Request(devices=("rtx4090",))).plans}
    assert plan(Request(devices=("rtx4090",), engine="native")).best.engine == "native"


def test_what_does_not_fit_says_why_and_is_still_an_answer():
    answer = plan(Request(model="397b-a17b", devices=("rtx3060",), ctx_tokens=262144))
    assert not answer.fits
    for one in answer.plans:
        assert one.reasons
        assert one.shortfall_bytes > 0


def test_experts_go_to_host_memory_only_as_far_as_there_is_some():
    request = Request(model="397b-a17b", devices=("rtx3090",), engine="llama.cpp", weights="q4_k_m")
    unknown = plan(request).best
    assert not unknown.fits  # 64 GiB are taken for granted, and say so
    assert any("--host-ram" in text for text in (*unknown.reasons, *unknown.warnings))
    told = plan(variant(request, host_memory_bytes=512 << 30)).best
    assert told.fits and "--n-cpu-moe" in told.command
    assert told.host.weights.mid > 150 << 30


def test_experts_stay_on_the_devices_where_that_costs_no_more_than_four_bits():
    roomy = plan(Request(model="35b-a3b", devices=("2xrtx3090",), ctx_tokens=32768))
    assert not roomy.best.allocation.offloads
    small = plan(Request(model="35b-a3b", devices=("rtx3060",), ctx_tokens=32768)).best
    assert small.fits and small.allocation.offloads and small.divergence < 0.03


def test_fixing_engine_weights_and_cache_yields_one_plan():
    answer = plan(Request(devices=("rtx3090",), engine="llama.cpp", weights="q8_0", kv_dtype="q4_0"))
    assert [(one.engine, one.weights, one.kv_dtype) for one in answer.plans] == [("llama.cpp", "q8_0", "q4_0")]


def test_vision_is_left_out_unless_asked_for_and_takes_memory():
    text = plan(Request(devices=("rtx4090",), engine="llama.cpp", weights="q4_k_m")).best
    seen = plan(Request(devices=("rtx4090",), engine="llama.cpp", weights="q4_k_m", vision=True)).best
    assert not text.vision and seen.vision
    assert seen.shortfall_bytes > text.shortfall_bytes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"devices": ()}, BadInput, "qwen-plan devices"),
        ({"ctx_tokens": 0}, BadInput, "context of 0"),
        ({"ctx_tokens": -1}, BadInput, "context of -1"),
        ({"ctx_tokens": 10**12}, BadInput, "context of"),
        ({"seqs": 0}, BadInput, "sequences"),
        ({"mtp": -1}, BadInput, "draft tokens"),
        ({"mtp": 99}, BadInput, "draft tokens"),
        ({"tp": 0}, BadInput, "tp of 0"),
        ({"state_dtype": "float8"}, UnknownName, "float32 or bfloat16"),
        ({"engine": "vlm"}, UnknownName, "vllm"),
        ({"engine": "vllm@abc"}, UnknownName, "version"),
        ({"engine": "vllm@0.1"}, UnknownName, "older"),
        ({"weights": "q4_k_mm"}, UnknownName, "q4_k_m"),
        ({"engine": "mlx"}, Unsupported, "Apple"),
        ({"engine": "vllm", "kv_dtype": "q8_0"}, Unsupported, "q8_0"),
        ({"model": "qwen3-next-80b-a3b", "vision": True}, Unsupported, "vision"),
        ({"tp": 4}, Unsupported, "4"),
    ],
)
def test_a_request_without_an_answer_is_refused_in_a_sentence(changes, error, words):
    with pytest.raises(error, match=words) as caught:
        plan(Request(**{"devices": ("rtx3090",), **changes}))
    assert "\n" not in str(caught.value)


def test_two_like_devices_are_used_together():
    one = plan(Request(model="27b", devices=("rtx3090",), engine="vllm", weights="int4", ctx_tokens=4096)).best
    two = plan(Request(model="27b", devices=("2xrtx3090",), engine="vllm", weights="int4", ctx_tokens=4096)).best
    assert (two.tp, two.pp, len(two.devices)) == (2, 1, 2)
    assert two.devices[0].memory.weights.mid < one.devices[0].memory.weights.mid


def test_layers_are_split_over_unlike_devices():
    found = plan(Request(model="27b", devices=("rtx4090", "rtx3060"), engine="llama.cpp", weights="q6_k")).best
    assert found.fits and (found.tp, found.pp) == (1, 2)
    large, small = found.devices
    assert large.memory.weights.mid > small.memory.weights.mid


def test_versions_fall_between_the_known_ones():
    vllm = engine_module("vllm").ENGINE
    assert known_version(vllm, "") == vllm.default_version
    assert known_version(vllm, "0.32") == "0.32"
    assert release("b11434") == (11434,)
    assert release("0.19.1") < release("0.20") < release("0.20.2")


def test_a_version_newer_than_any_that_was_read_says_so():
    best = plan(Request(devices=("rtx3090",), engine="vllm@99.1")).best
    assert any("99.1 is newer" in text for text in best.warnings)
    assert not any("newer" in text for text in plan(Request(devices=("rtx3090",), engine="vllm")).best.warnings)


def test_cards_that_work_together_come_before_cards_that_wait_for_each_other():
    answer = plan(Request(model="27b", devices=("8xh100-sxm",), ctx_tokens=32768))
    assert answer.best.tp > 1
    assert answer.best.divergence < 0.005


def test_options_reach_the_engine():
    small = Options(ubatch_tokens=128)
    default = plan(Request(devices=("rtx3090",), engine="llama.cpp", weights="q4_k_m")).best
    found = plan(Request(devices=("rtx3090",), engine="llama.cpp", weights="q4_k_m", options=small)).best
    assert found.devices[0].memory.activation.mid < default.devices[0].memory.activation.mid
    assert "-ub 128" in found.command


def test_engine_names_of_the_search_are_the_contracts():
    assert list(ENGINE_MODULES) == [
        "vllm",
        "sglang",
        "llama.cpp",
        "ollama",
        "mlx",
        "ktransformers",
        "transformers",
        "native",
    ]


def test_auto_is_the_engines_own_cache_type():
    assert plan(Request(devices=("rtx3090",), engine="vllm", kv_dtype="auto")).best.kv_dtype == "bf16"
    assert plan(Request(devices=("rtx3090",), engine="llama.cpp", kv_dtype="auto")).best.kv_dtype == "f16"
