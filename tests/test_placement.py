"""How a model is laid over boxes and replicas, and what the engines would refuse.

Rules: vLLM 0.32 `config/parallel.py`, `distributed/utils.py` (`get_pp_indices`), `fused_moe/config.py`; SGLang 0.5.23
`arg_groups/`. The three cases of the 397B are the ones that its users ask about.
"""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from qwenfit.planner import Request, plan
from qwenfit.planner.engines import vllm
from qwenfit.planner.plan import EnginePlan, Plan
from qwenfit.planner.plan_file import read_plan
from qwenfit.planner.weights import weight_table
from qwenfit.profiles import model, weight_format
from qwenfit.profiles.errors import BadInput, QwenfitError, Unsupported

GIB = 1 << 30
LARGE = "qwen3.5-397b-a17b"


def answer(box: str, nodes: int = 1, **told: Any) -> Plan:
    return plan(Request(**{"model": LARGE, "devices": (box,), "nodes": nodes, "ctx_tokens": 262144, **told}))


def best(box: str, nodes: int = 1, **told: Any) -> EnginePlan:
    return answer(box, nodes, **told).best


def sizes(found: EnginePlan) -> tuple[int, int, int, int]:
    return found.tp, found.pp, found.dp, found.ep


def test_one_box_of_h100_takes_the_397b_as_before() -> None:
    found = best("8xh100-sxm", engine="vllm")
    assert found.fits and sizes(found) == (8, 1, 1, 1) and found.nodes == 1
    assert "--nnodes" not in found.command and "node_commands" not in found.detail


def test_two_boxes_of_a100_take_the_397b_unquantized_in_two_stages() -> None:
    found = best("8xa100-80gb", 2, engine="vllm")
    assert found.fits and found.weights == "bf16" and sizes(found) == (8, 2, 1, 1)
    # half of 396.80e9 - 2 x 1.0171e9 parameters of the layers, and one of embedding and lm_head, over eight
    layers = (396_802_360_000 - 456_010_000 - 2 * 1_017_120_000) * 2 / 16
    outside = 1_017_120_000 * 2 / 8
    assert found.devices[0].memory.weights.mid == pytest.approx(layers + outside, rel=0.01)


@pytest.mark.parametrize(("box", "nodes"), [("32xrtx3060", 1), ("32xrtx3060", 4)])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_stage_has_a_layer(engine: str, box: str, nodes: int) -> None:
    """The 0.8B has 24 layers and 8 heads: tp 1 over 32 devices, or 2 over 128, would be more stages than layers. What
    does not fit goes through all placements."""
    found = best(box, nodes, model="qwen3.5-0.8b", engine=engine, ctx_tokens=1_000_000, seqs=4096)
    assert not found.fits and found.pp <= 24


@pytest.mark.parametrize("nodes", [1, 2])
def test_more_stages_than_layers_are_refused_in_a_sentence(nodes: int) -> None:
    with pytest.raises(Unsupported, match="has 24 layers, and 32 pipeline stages need one each"):
        best("32xrtx3060", nodes, model="qwen3.5-0.8b", engine="vllm", pp=32)


def test_four_sparks_take_the_397b_a_stage_each() -> None:
    found = best("dgx-spark", 4, engine="vllm")
    assert found.fits and sizes(found) == (1, 4, 1, 1)
    first, middle, *_, last = (share.memory.weights.mid for share in found.devices)
    assert first - middle == pytest.approx(1_017_120_000 * 2, rel=0.02)  # the embedding
    assert last - middle == pytest.approx(1_017_120_000 * 2, rel=0.02)  # the lm_head
    assert any("--tp 4" in warning for warning in found.warnings)


def test_four_sparks_with_tensor_parallelism_hold_what_somebody_ran() -> None:
    """FP8 over four GB10 with tp 4, an fp8 cache and 262,144 tokens (https://blog.muts.link/qwen-3.5-397b/)."""
    found = best("dgx-spark", 4, tp=4, weights="fp8", kv_dtype="fp8", engine="vllm")
    assert found.fits and sizes(found) == (4, 1, 1, 1)
    assert any("tensor parallelism over 4 boxes" in warning for warning in found.warnings)


def test_boxes_together_hold_what_devices_together_do() -> None:
    """A stage per box or a wider group: the same weights but for what lies on every rank or on one stage."""
    wide = best("16xa100-80gb", engine="vllm", weights="bf16", tp=8, pp=2)
    over = best("8xa100-80gb", 2, engine="vllm", weights="bf16", tp=8, pp=2)
    assert over.shortfall_bytes == wide.shortfall_bytes and over.limits == wide.limits
    assert [share.memory for share in over.devices] == [share.memory for share in wide.devices]


def test_whole_experts_weigh_what_cut_ones_do() -> None:
    """512 experts over 16 ranks: 32 each, the same bytes in bf16 either way."""
    large, fmt = model(LARGE), weight_format("bf16")
    cut, whole = weight_table(large, fmt, 8, 2), weight_table(large, fmt, 8, 2, 16)
    assert whole.experts == cut.experts == tuple(size // 2 for size in weight_table(large, fmt, 8).experts)
    alone = weight_table(large, fmt, 1)
    assert sum(weight_table(large, fmt, 1, 1, 1).experts) == sum(alone.experts)
    assert weight_table(large, fmt, 1, 3, 3).experts[0] == -(-alone.experts[0] * 171 // 512)  # 171, 171 and 170


def test_replicas_share_the_experts_and_nothing_else() -> None:
    found = best("8xa100-80gb", 2, engine="vllm", dp=2)
    assert found.fits and sizes(found) == (8, 1, 2, 16)
    table = weight_table(model(LARGE), weight_format("bf16"), 8, 2, 16)
    assert found.devices[0].memory.weights.mid == table.text
    # but the shared expert (60 layers of three times 4,096 x 1,024), whole on every rank instead of an eighth of it
    beside = sum(table.layers) - sum(weight_table(model(LARGE), weight_format("bf16"), 8).layers)
    assert beside == 60 * 3 * 4096 * 1024 * 2 * 7 // 8
    more = best("8xa100-80gb", 2, engine="vllm", dp=2, seqs=9)
    assert more.detail["max_num_seqs"] == 5  # of one replica


def test_sglang_is_told_totals_where_replicas_share_one_world() -> None:
    """It divides requests, state slots and the chunk by --attn-dp-size (sglang 0.5.23 `arg_groups/parallel_hook.py`,
    `mem_cache/kv_cache_configurator.py`), and its tp is that of all replicas together."""
    found = best("8xa100-80gb", 2, engine="sglang", dp=2, seqs=9)
    words, detail = shlex.split(found.command), found.detail
    told = {flag: value for flag, value in pairwise(words) if flag.startswith("--")}
    assert (detail["max_running_requests"], told["--max-running-requests"]) == (5, "10")
    for flag, own in (
        ("--max-mamba-cache-size", "max_mamba_cache_size"),
        ("--chunked-prefill-size", "chunked_prefill_size"),
    ):
        assert told[flag] == str(2 * int(str(detail[own])))
    assert told["--tp-size"] == str(2 * found.tp)
    dense = best("4xh100-sxm", model="27b", engine="sglang", dp=4, tp=1, seqs=8)  # whole replicas: each gets the line
    words = shlex.split(dense.command)
    assert words[words.index("--max-running-requests") + 1] == "2" and "--tp-size" not in words


def test_replicas_of_a_dense_model_are_whole() -> None:
    one, eight = best("h100-sxm", model="9b", engine="vllm"), best("8xh100-sxm", model="9b", engine="vllm", dp=8)
    assert sizes(eight) == (1, 1, 8, 1)
    assert eight.devices[0].memory.weights == one.devices[0].memory.weights
    assert abs(eight.limits.max_seqs - 8 * one.limits.max_seqs) <= 16
    assert eight.limits.max_ctx_tokens == pytest.approx(one.limits.max_ctx_tokens, rel=0.02)


def test_fp8_blocks_decide_where_experts_are_cut() -> None:
    """1,024 rows in blocks of 128 are eight ranks' worth: sixteen cannot have half a block of the shared expert, nor of
    the routed ones."""
    with pytest.raises(Unsupported, match="1024 rows"):
        answer("8xh100-sxm", 2, engine="vllm", weights="fp8", tp=16)
    assert sizes(best("8xh100-sxm", 2, engine="vllm", weights="fp8", dp=2, tp=8)) == (8, 1, 2, 16)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"nodes": 2, "tp": 8, "pp": 1, "dp": 3}, "needs 24 devices"),
        ({"nodes": 2, "engine": "transformers"}, "runs in one box"),
        ({"nodes": 2, "engine": "mlx"}, "one box"),
        ({"dp": 2, "engine": "llama.cpp"}, "no data parallelism"),
        ({"ep": 8, "model": "27b"}, "no experts"),
        ({"ep": 3, "engine": "vllm", "tp": 8}, "tp x dp"),
        ({"nodes": 3, "tp": 8, "pp": 2}, "cannot be laid over"),
        ({"nodes": 2, "dp": 2, "model": "27b", "engine": "sglang"}, "one box"),
    ],
)
def test_what_no_engine_does_is_said(told: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        answer("8xa100-80gb", **{"ctx_tokens": 4096, **told})


@pytest.mark.parametrize("told", [{"nodes": 0}, {"nodes": 129}, {"dp": 0}, {"ep": -1}, {"interconnect": "ib-ndr"}])
def test_bad_numbers_are_refused(told: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        answer("8xa100-80gb", **told)


def test_a_slow_link_is_not_offered_tensor_parallelism() -> None:
    quick, slow = (best("dgx-spark", 4, engine="vllm", interconnect=name) for name in ("cx7-200", "ethernet-10"))
    assert sizes(slow) == (1, 4, 1, 1) and slow.speed and quick.speed
    assert any("--tp 4" in warning for warning in quick.warnings)
    assert not any("--tp 4" in warning for warning in slow.warnings)
    asked = best("dgx-spark", 4, engine="vllm", interconnect="ethernet-10", tp=4)
    assert any("slow for it" in warning for warning in asked.warnings)


def test_nothing_is_told_that_would_be_refused() -> None:
    """`--tp 16` of the 397B in FP8 is refused (its shared expert), in bf16 it is not."""
    told = {
        name: best("h100-sxm", 16, engine="vllm", weights=name, ctx_tokens=8192).warnings for name in ("fp8", "bf16")
    }
    assert not any("--tp 16" in warning for warning in told["fp8"])
    assert any("--tp 16" in warning for warning in told["bf16"])
    assert best("h100-sxm", 16, engine="vllm", weights="bf16", ctx_tokens=8192, tp=16).fits


def test_advice_names_boxes_where_one_is_too_small() -> None:
    found = answer("8xa100-40gb", weights="bf16", engine="vllm")
    assert not found.fits
    boxes = [one for one in found.advice if "--nodes" in one.change]
    assert len(boxes) == 1 and boxes[0].fits and "--nodes 3" in boxes[0].change


def test_the_json_says_it() -> None:
    told: Any = answer("8xa100-80gb", 2, engine="vllm", interconnect="4xib-hdr").to_json()
    request, first = told["request"], told["plans"][0]
    assert (request["nodes"], request["dp"], request["ep"], request["interconnect"]) == (2, None, None, "4xib-hdr")
    assert (first["tp"], first["pp"], first["dp"], first["ep"], first["nodes"]) == (8, 2, 1, 1, 2)
    assert len(first["devices"]) == len(request["devices"]) == 16


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("told", [{}, {"dp": 2}, {"dp": 2, "model": "35b-a3b", "tp": 2, "pp": 4}, {"tp": 16}])
def test_each_box_has_its_line(engine: str, told: dict[str, Any]) -> None:
    found = best("8xa100-80gb", 2, engine=engine, **{"ctx_tokens": 8192, **told})
    lines = [shlex.split(line) for line in found.detail["node_commands"]]  # type: ignore[union-attr]
    assert len(lines) == 2 and lines[0] == shlex.split(found.command)
    assert all("<HEAD_NODE_IP>" in " ".join(line) for line in lines)
    if engine == "sglang":
        assert [line[line.index("--node-rank") + 1] for line in lines] == ["0", "1"]
    else:
        assert "--headless" not in lines[0] and "--headless" in lines[1]
        if "--nnodes" in lines[0]:
            assert [line[line.index("--node-rank") + 1] for line in lines] == ["0", "1"]
        else:
            assert lines[1][lines[1].index("--data-parallel-start-rank") + 1] == str(found.dp // 2)


def test_llama_cpp_reaches_other_boxes_by_rpc() -> None:
    found = best("dgx-spark", 3, engine="llama.cpp", ctx_tokens=8192)
    served, *others = found.detail["node_commands"]  # type: ignore[misc]
    words = shlex.split(str(served))
    assert words[words.index("--rpc") + 1] == "<NODE_1_IP>:50052,<NODE_2_IP>:50052"
    assert [shlex.split(str(line))[0] for line in others] == ["ggml-rpc-server"] * 2
    assert any("checks nobody" in warning for warning in found.warnings)


@settings(max_examples=60, deadline=None)
@given(
    some.sampled_from(["vllm", "sglang"]),
    some.sampled_from(["27b", "35b-a3b", "122b-a10b", LARGE]),
    some.sampled_from(["h100-sxm", "4xh100-sxm", "8xh200"]),
    some.integers(1, 5),
    some.sampled_from([None, 1, 2, 3, 4]),
    some.sampled_from([None, 1, 2, 8, 16]),
    some.integers(1, 9),
)
def test_every_answer_is_one_that_the_engines_could_start(
    engine: str, name: str, box: str, nodes: int, dp: int | None, tp: int | None, seqs: int
) -> None:
    try:
        found = best(box, nodes, engine=engine, model=name, dp=dp, tp=tp, seqs=seqs, ctx_tokens=16384)
    except QwenfitError:
        return
    setup, world = found.setup, found.tp * found.pp * found.dp
    assert len(setup.devices) == world and world % nodes == 0
    assert tp in (None, found.tp) and dp in (None, found.dp)
    assert setup.box_ranks % found.tp == 0 or found.tp % setup.box_ranks == 0
    assert found.ep in (1, found.tp * found.dp)
    large = setup.model
    assert large.num_attention_heads % found.tp == large.linear_num_key_heads % found.tp == 0
    more = found.estimate.shortfall_bytes(16384, seqs + found.dp)
    assert found.shortfall_bytes <= more <= found.estimate.shortfall_bytes(32768, seqs + found.dp)


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ("8xa100-80gb", {"nodes": 2}),
        ("dgx-spark", {"nodes": 4, "tp": 4, "weights": "fp8", "kv_dtype": "fp8", "interconnect": "roce-100"}),
        ("8xa100-80gb", {"nodes": 2, "engine": "sglang", "dp": 2}),
        ("8xh100-sxm", {"ep": 8, "tp": 8}),
        ("dgx-spark", {"nodes": 4, "engine": "llama.cpp"}),
    ],
)
def test_a_plan_over_boxes_is_made_anew_from_its_file(box: str, told: dict[str, Any], tmp_path: Path) -> None:
    made = answer(box, **{"engine": "vllm", "ctx_tokens": 65536, **told})
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(made.to_json()))
    found = read_plan(str(file)).plan
    assert sizes(found) == sizes(made.best) and found.nodes == made.best.nodes
    assert found.command == made.best.command and found.detail == made.best.detail
    assert (found.setup.interconnect is None) == (made.best.setup.interconnect is None)


def test_the_cpu_backend_stays_in_one_box() -> None:
    with pytest.raises(Unsupported):
        answer("desktop-ddr5-2ch-64gb", 2, model="0.8b", engine="vllm", ctx_tokens=4096)
    assert vllm.ENGINE.spans_boxes
