"""What a setup takes at the very least: no engine may come out below it, or a plan that would win is left out."""

from itertools import product

import pytest

from qwenfit.planner import Options
from qwenfit.planner.candidates import ENGINE_MODULES, Candidates, candidates, engine_module
from qwenfit.planner.floor import floor
from qwenfit.planner.placement import Spread
from qwenfit.profiles import device, model
from qwenfit.profiles.interconnect import interconnect

GIB = 1 << 30
BOXES = (
    ("rtx3060",),
    ("rtx3090",) * 2,
    ("rtx4090", "rtx4090", "rtx3060"),
    ("h100-sxm",) * 8,
    ("dgx-spark",),
    ("m3-ultra-256gb",),
    ("desktop-ddr5-2ch-64gb",),
)
MODELS = ("qwen3.5-0.8b", "qwen3.5-9b", "qwen3.6-27b", "qwen3.6-35b-a3b", "qwen3.5-397b-a17b")
OPTIONS = (
    Options(),
    Options(offload_experts=False),
    Options(host_memory_bytes=64 * GIB),
    Options(host_memory_bytes=64 * GIB, offload_experts=True, prefix_caching=False),
)
ASKED = ((1, 1), (8192, 1), (131072, 4), (1_000_000, 64), (300, 2000))


def offered(
    engine: str, name: str, box: tuple[str, ...], options: Options, mtp: int = 0, spread: Spread | None = None
) -> Candidates:
    module = engine_module(engine)
    version, devices = module.ENGINE.default_version, tuple(map(device, box))
    return candidates(
        module, version, model(name), devices, None, None, "float32", mtp, False, None, None, options, spread
    )


def holds(found: Candidates) -> int:
    """How many of the setups' floors lie above 0 for some question, and none above the shortfall then."""
    above = 0
    for place, setup in enumerate(found.setups):
        least, estimate = floor(found.engine, setup), found.estimate(place)
        if least is None or estimate is None:
            continue
        for ctx_tokens, seqs in ASKED:
            missing = least.missing_bytes(ctx_tokens, seqs)
            if missing > 0:
                above += 1
                what = found.engine.name, setup.weights.name, setup.kv_dtype, setup.tp, setup.pp, setup.dp
                assert missing <= estimate.shortfall_bytes(ctx_tokens, seqs), (what, ctx_tokens, seqs)
    return above


@pytest.mark.parametrize("engine", ENGINE_MODULES)
def test_no_shortfall_is_below_the_floor(engine: str) -> None:
    above = 0
    for name, box, options in product(MODELS, BOXES, OPTIONS):
        above += holds(offered(engine, name, box, options))
    assert above or engine == "native"


@pytest.mark.parametrize("engine", ("vllm", "sglang", "llama.cpp"))
def test_nor_with_drafts_and_replicas_and_over_boxes(engine: str) -> None:
    link, above = interconnect("ib-ndr"), 0
    for name, nodes, dp, ep, across in product(
        ("qwen3.6-27b", "qwen3.5-397b-a17b"), (2, 3), (None, 2), (None, 1), (False, True)
    ):
        if (dp and (engine == "llama.cpp" or nodes % dp)) or (across and engine == "llama.cpp"):
            continue
        for box in (("rtx3060",) * 8, ("rtx3090", "rtx4090")):
            spread = Spread(nodes, dp, ep, link, across)
            above += holds(offered(engine, name, box, Options(offload_experts=False), 2, spread))
    assert above


def test_of_what_lacks_a_lot_the_floor_is_most() -> None:
    """397B in bf16 on two RTX 3090: 12 times what they have. Within a twentieth of what is missing."""
    found = offered("vllm", "qwen3.5-397b-a17b", ("rtx3090",) * 2, Options())
    least, estimate = floor(found.engine, found.setups[0]), found.estimate(0)
    assert least and estimate and found.setups[0].weights.name == "bf16"
    assert least.missing_bytes(8192, 1) > 0.95 * estimate.shortfall_bytes(8192, 1)


def test_the_native_runtime_has_none() -> None:
    """Its own layout of the weights may be smaller than the file."""
    found = offered("native", "qwen3.5-9b", ("rtx3060",), Options())
    assert floor(found.engine, found.setups[0]) is None
