"""Replicas of real plans: their limits are the engine's own words, and their launch line says what was simulated."""

import pytest

from qwenfit.planner import Request, plan
from qwenfit.planner.replica import LLAMA_BATCH_TOKENS, replica, serving_plan
from qwenfit.planner.speed import step_time
from qwenfit.profiles.errors import Unsupported


def test_vllm_shares_a_pool_of_blocks() -> None:
    """9B in bf16: blocks of 528 tokens, six states per sequence with prefix caching (tests/test_vllm.py),
    and one block that is nobody's. The longest request fits the pool."""
    found = serving_plan(
        plan(Request(devices=("l40s",), ctx_tokens=65536, engine="vllm", weights="bf16", kv_dtype="bf16"))
    )
    one = replica("l40s", found, step_time(found), 6000)
    detail = found.estimate.allocate(6000, one.limits.max_num_seqs).detail
    assert one.limits.block_tokens == one.reuse_tokens == 528 and one.limits.blocks_per_seq == 6
    assert one.limits.num_blocks == detail["num_blocks"] - 1  # type: ignore[operator]
    assert one.limits.num_blocks and one.limits.blocks(65536) <= one.limits.num_blocks
    assert found.estimate.shortfall_bytes(6000, one.limits.max_num_seqs) <= 0
    assert found.estimate.shortfall_bytes(6000, one.limits.max_num_seqs + 1) > 0
    for words in (
        f"--max-num-seqs {one.limits.max_num_seqs}",
        "--max-model-len 65536",
        f"--gpu-memory-utilization {detail['gpu_memory_utilization']}",
    ):
        assert words in one.command


def test_sglang_shares_a_pool_of_tokens() -> None:
    found = serving_plan(plan(Request(devices=("l40s",), ctx_tokens=65536, engine="sglang")))
    one = replica("l40s", found, step_time(found), 6000)
    assert one.limits.block_tokens == one.reuse_tokens == 1 and one.limits.num_blocks and one.limits.num_blocks >= 65536


def test_llama_cpp_gives_every_slot_its_context() -> None:
    found = serving_plan(plan(Request(devices=("rtx3060",), ctx_tokens=32768, engine="llama.cpp", weights="q8_0")))
    one = replica("rtx3060", found, step_time(found), 500)
    assert one.limits.num_blocks is None and one.reuse_tokens == 0
    assert one.limits.max_num_batched_tokens == LLAMA_BATCH_TOKENS
    assert found.estimate.shortfall_bytes(32768, one.limits.max_num_seqs) <= 0
    assert found.estimate.shortfall_bytes(32768, one.limits.max_num_seqs + 1) > 0
    assert f"-c {32768 * one.limits.max_num_seqs}" in one.command
    assert replica("rtx3060", found, step_time(found), 500, seats=1).limits.max_num_seqs == 1


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(devices=("rtx3060",), ctx_tokens=262144, model="27b", engine="vllm", weights="bf16"), "does not fit"),
        (Request(devices=("m1-16gb",), engine="mlx"), "batching is known"),
    ],
)
def test_what_cannot_serve_is_told(request_: Request, says: str) -> None:
    with pytest.raises(Unsupported, match=says):
        serving_plan(plan(request_))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_replicas_inside_are_one_pool_with_as_many_seats(engine: str) -> None:
    """Eight whole models on eight GPUs serve what eight boxes with one each do."""
    one, eight = (
        plan(Request("9b", (box,), 32768, engine=engine, weights="bf16", kv_dtype="bf16", dp=dp)).best
        for box, dp in (("h100-sxm", None), ("8xh100-sxm", 8))
    )
    single = replica("h100-sxm", one, step_time(one), 4000)
    whole = replica("8xh100-sxm", eight, step_time(eight), 4000)
    assert whole.device_count == 8 and whole.limits.max_num_seqs == 8 * single.limits.max_num_seqs
    assert whole.limits.max_num_batched_tokens == pytest.approx(
        8 * (single.limits.max_num_batched_tokens or 0), rel=0.05
    )
    assert whole.limits.num_blocks == pytest.approx(8 * (single.limits.num_blocks or 0), rel=0.05)
    assert whole.step.step_s(0, 0, 64, 64 * 4000) == pytest.approx(single.step.step_s(0, 0, 8, 8 * 4000))
