"""Plans of the native runtime as commands, and what a run printed as figures; runs are in tests/test_cli_verify.py."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner import Request, plan
from qwenfit.planner.plan import EnginePlan
from qwenfit.planner.scores import score
from qwenfit.planner.verification import native
from qwenfit.planner.verification.native import read_run, sliced, words
from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.profiles.frozen import replace
from qwenfit.profiles.model_catalog import model

DATA = Path(__file__).parent.parent / "data"


def planned(name: str = "0.8b", weights: str = "int4", **asked: Any) -> EnginePlan:
    return plan(Request(name, ("epyc-rome-8ch-128gb",), 4096, engine="native", weights=weights, **asked)).best


def printed(one: EnginePlan) -> dict[str, Any]:
    """What `python -m qwenfit.kernels.run --json` prints of a run in which everything is as planned."""
    memory = one.devices[0].memory
    parts = {name: memory.parts[part].mid for name, part in native.PARTS.items()}
    return {
        "device": "cpu",
        "threads": 2,
        "layers": one.setup.model.num_layers,
        "start_bytes": 2 << 20,
        "operations": {"matmul": "C kernels"},
        "memory": {
            **{name: {"planned": None, "allocated": amount} for name, amount in parts.items()},
            "peak": {"planned": None, "allocated": sum(parts.values())},
        },
        "speed": {
            "depth_tokens": 4064, "computed_tokens": 1024, "prefill_is_estimated": True,
            "prefill_tokens_per_s": 100.5, "decode_tokens_per_s": 7.25, "decode_tokens": 32 * one.seqs, "steps": 32,
        },
    }  # fmt: skip


def test_the_command_is_the_planned_one_at_its_depth() -> None:
    one = planned(seqs=2, kv_dtype="int8")
    line = shlex.split(one.command)
    found = words(one, None, None, 32, 120.0)
    assert found[:3] == [sys.executable, "-m", "qwenfit.kernels.run"] and line[:3] == ["python", *found[1:3]]
    assert found[3:6] == ["qwen3.5-0.8b", "--random", "int4"]
    assert found[6 : 6 + len(line) - 4] == line[4:]
    behind = ["--depth", "4064", "--tokens", "32", "--limit-s", "120", "--json"]
    assert found[6 + len(line) - 4 :] == behind
    own = words(one, "/models/mine", 8, 32, 120.0)
    assert own[3:5] == ["/models/mine", "--ctx"] and own[-2:] == ["--layers", "8"]


def test_steps_with_drafts_take_more_room() -> None:
    found = words(planned(mtp=2), None, None, 32, 120.0)
    assert found[found.index("--depth") + 1] == str(4096 - 3 * 32)
    with pytest.raises(Unsupported, match="a context of 4096 tokens has no room for 4096 steps: give --steps"):
        words(planned(), None, None, 4096, 120.0)


@pytest.mark.parametrize("name", ["0.8b", "35b-a3b", "tiny_qwen3_5_moe.json"])
@pytest.mark.parametrize("weights", ["bf16", "int4", "int8"])
def test_layers_of_a_slice_add_up(name: str, weights: str) -> None:
    """Bytes are those of embedding and head once, and of the layers one by one: a slice plus the layers that it lacks
    is the whole."""
    path = str(DATA / name) if name.endswith(".json") else name
    one = planned(path, weights)
    layers = one.setup.model.num_layers
    assert sliced(one, None) is sliced(one, layers) is one
    if layers < 8:
        with pytest.raises(Unsupported, match="give a multiple of"):
            sliced(one, 2)
        return
    amounts = {count: sliced(one, count).devices[0].memory.parts for count in (4, 8, layers)}
    for part in ("weights", "kv_cache", "recurrent_state"):
        period = amounts[8][part].mid - amounts[4][part].mid
        assert amounts[4][part].mid + (layers // 4 - 1) * period == amounts[layers][part].mid, part
    assert amounts[4]["activation"] == amounts[layers]["activation"]


@pytest.mark.parametrize("count", [-4, 3, 28, 400])
def test_slices_that_stand_for_nothing(count: int) -> None:
    with pytest.raises(Unsupported, match=r"give a multiple of 4, up to 24"):
        sliced(planned(), count)


def test_a_run_as_planned() -> None:
    one = planned(seqs=2)
    run = read_run(json.dumps(printed(one)).encode(), "", 0, one)
    assert (run.depth_tokens, run.computed_tokens, run.prefill_is_estimated) == (4064, 1024, True)
    assert (run.prefill_tokens_per_s, run.decode_tokens_per_s, run.accepted_per_step) == (100.5, 7.25, 1)
    scores = {found.part: found for found in score(one, run.log)}
    assert set(scores) == {"weights", "kv_cache", "recurrent_state", "activation", "runtime", "total"}
    assert all(found.error == 0 and found.within for found in scores.values())
    assert run.peak_bytes == scores["total"].measured_bytes and run.facts["matmul by"] == "C kernels"


def test_a_driver_that_does_not_say() -> None:
    """CUDA without NVML's figure of the process: the runtime is in no score, and in no total."""
    one, told = planned(), printed(planned())
    told["memory"]["runtime"]["allocated"] = None
    scores = {found.part: found for found in score(one, read_run(json.dumps(told).encode(), "", 0, one).log)}
    assert "runtime" not in scores and scores["total"].error == 0


@pytest.mark.parametrize(
    ("errors", "status", "sentence"),
    [
        ("", 2, "the run failed: it ended with status 2 and said nothing"),
        ("qwenfit.kernels.run: torch sees no CUDA device\n", 2, r"the run failed: torch sees no CUDA device$"),
        ("Traceback\n  x\nImportError: no safetensors\n\n", 1, "the run failed: ImportError: no safetensors"),
    ],
)
def test_runs_that_failed(errors: str, status: int, sentence: str) -> None:
    assert native.died(errors, status) is None
    with pytest.raises(BadInput, match=sentence):
        read_run(b"", errors, status, planned())


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ("qwenfit.kernels.run: CUDA out of memory. Tried to allocate 2.00 GiB.\n", 2),
        ("Traceback\nRuntimeError: [enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to", 1),
        ("Traceback\nMemoryError\n", 1),
        ("", -9),
    ],
)
def test_runs_that_ran_out_of_memory(errors: str, status: int) -> None:
    sentence = native.died(errors, status)
    assert sentence and native.dead_log(planned(), sentence).died
    assert native.died("a warning: CUDA out of memory was caught", 0) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda told: told.pop("memory"), "lacks 'memory'"),
        (lambda told: told["memory"].pop("scratch"), "lacks 'scratch'"),
        (lambda told: told.update(memory=[1]), "is not one"),
        (lambda told: told.update(operations=[1]), "is not one"),
        (lambda told: told["memory"]["weights"].update(allocated="many"), "is not one"),
        (lambda told: told["speed"].update(steps=0), "is not one"),
        (lambda told: told["speed"].update(depth_tokens=None), "is not one"),
    ],
)
def test_broken_reports(change: Any, sentence: str) -> None:
    one = planned()
    told = printed(one)
    change(told)
    with pytest.raises(BadInput, match=f"^the run's report {sentence}.*is another version of qwenfit installed"):
        read_run(json.dumps(told).encode(), "", 0, one)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_run_or_a_sentence(output: bytes) -> None:
    with pytest.raises(BadInput) as raised:
        read_run(output, "", 0, ONE)
    assert "\n" not in str(raised.value)


ONE = planned()


def test_a_report_without_end() -> None:
    with pytest.raises(BadInput, match="the run printed 4194305 bytes, more than"):
        read_run(b" " * (native.REPORT_LIMIT_BYTES + 1), "", 0, planned())


def test_checkpoints_of_another_model(tmp_path: Path) -> None:
    one = planned()
    folder = str(tmp_path)
    with pytest.raises(BadInput, match=r"does not match the plan: its hidden_size is 4096, planned was 1024"):
        native.checked(one, model("9b"), folder)
    experts = replace(model("0.8b"), num_experts=8)
    with pytest.raises(BadInput, match=r"its num_experts is 8, planned was 0 \(qwen3\.5-0\.8b\); plan with --model"):
        native.checked(one, experts, folder)
    with pytest.raises(BadInput, match=r"its weights take [\d,]+ bytes, planned were [\d,]+; plan with --model"):
        native.checked(planned(str(DATA / "small_hybrid" / "config.json"), "int4"), model(str(DATA / "small_hybrid")),
                       str(DATA / "small_hybrid"))  # fmt: skip
    native.checked(planned(str(DATA / "small_hybrid" / "config.json"), "bf16"), model(str(DATA / "small_hybrid")),
                   str(DATA / "small_hybrid"))  # fmt: skip
    with pytest.raises(BadInput, match=r"x\.gguf: the native runtime loads folders of safetensors"):
        native.checked(one, model("0.8b"), "x.gguf")


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "int8"])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_weights_of_a_quantized_folder_are_those_that_the_runtime_loads(form: str, scheme: str, tmp_path: Path) -> None:
    """Packed zero points of the file are bf16 in the runtime, and shapes and indices are not kept: on a 0.8B
    5.8 MB were missing. dt_bias is float32 in the runtime: 2 bytes x 4 heads x 3 layers."""
    pytest.importorskip("torch", reason="the quantizer needs torch")
    from qwenfit.kernels.runtime.loading import load
    from qwenfit.kernels.runtime.model import weight_bytes
    from qwenfit.quant import Recipe, quantize

    folder = str(tmp_path / "made")
    recipe = Recipe(
        format=form, bits=8 if scheme == "int8" else 4, method="rtn",
        symmetric=None if scheme == "int8" else scheme == "symmetric",
    )  # fmt: skip
    quantize(str(DATA / "small_hybrid"), folder, recipe)
    found = plan(Request(folder, ("epyc-rome-8ch-128gb",), 1024, engine="native")).best
    assert weight_bytes(load(folder)) == found.devices[0].memory.weights.mid + 2 * 4 * 3
