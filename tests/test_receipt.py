"""Receipts: what a log leaves open is asked for, the plan can be made anew, and a file is checked before it counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner import Options, Request, plan
from qwenfit.planner.logs.engine_log import EngineLog, read_log, read_log_file
from qwenfit.planner.receipt import Receipt, asked, receipt, replan, rescored
from qwenfit.planner.receipt_file import from_json, read_receipt, read_receipts, text
from qwenfit.profiles.errors import BadInput

LOGS = Path(__file__).parent / "data" / "logs"


def made(name: str = "vllm-0.24.0.log", **given_fields: Any) -> Receipt:
    log = read_log_file(str(LOGS / name))
    fields = {"devices": ("rtx5090",), **given_fields}
    request, _ = asked(log, Request(**fields), set(fields))
    return receipt(plan(request).best, log, "2026-11-22", "0.1.0", "https://github.com/noonghunna/club-3090/issues/612")


def test_what_the_log_says_need_not_be_typed() -> None:
    """club-3090 issue 612: only the device is in no line of it."""
    log = read_log_file(str(LOGS / "vllm-0.24.0.log"))
    request, notes = asked(log, Request(devices=("rtx5090",)), {"devices"})
    assert request == Request(
        model="qwen3.6-35b-a3b",
        devices=("rtx5090",),
        ctx_tokens=131072,
        seqs=1,
        engine="vllm@0.24.0",
        weights="nvfp4",
        kv_dtype="fp8",
        vision=True,
        options=Options(max_num_batched_tokens=8192, prefix_caching=True),
    )
    assert notes == ()


@pytest.mark.parametrize(
    ("line", "vision"),
    [
        ("INFO [model.py:547] Resolved architecture: Qwen3_5MoeForConditionalGeneration", True),
        ("INFO [model.py:547] Resolved architecture: Qwen3_5MoeForCausalLM", False),
        ("INFO [api_utils.py:286] non-default args: {'language_model_only': True}", False),
    ],
)
def test_vllm_loads_the_vision_tower_unless_it_says_otherwise(line: str, vision: bool) -> None:
    log = read_log(f"{line}\n{(LOGS / 'vllm-0.24.0.log').read_text(encoding='utf-8')}")
    request, _ = asked(log, Request(devices=("rtx5090",)), {"devices"})
    assert request.vision is vision


def test_what_is_typed_counts_more_than_the_log() -> None:
    log = read_log_file(str(LOGS / "vllm-0.24.0.log"))
    typed = Request(model="qwen3.5-9b", devices=("rtx5090",), ctx_tokens=4096, seqs=2, weights="bf16", kv_dtype="bf16")
    request, _ = asked(log, typed, {"model", "devices", "ctx_tokens", "seqs", "weights", "kv_dtype"})
    assert (request.model, request.ctx_tokens, request.seqs, request.weights) == ("qwen3.5-9b", 4096, 2, "bf16")


def test_a_gguf_says_its_model_type_and_device() -> None:
    boot = (LOGS / "llamacpp-b9140-cpu.log").read_text(encoding="utf-8")
    log = read_log("  Device 0: NVIDIA GeForce RTX 3090, compute capability 8.6, VMM: yes\n" + boot)
    request, notes = asked(log, Request(), set())
    assert (request.model, request.weights, request.devices) == ("qwen3.5-2b", "q8_0", ("rtx3090",))
    assert (request.ctx_tokens, request.seqs, request.kv_dtype) == (65536, 4, "f16")
    assert request.options.ubatch_tokens == 1024
    assert "b9140 is older than the oldest whose rules were read" in notes[0]
    assert notes[1] == "4 slots share one cache: planned as 4 equal parts"


def test_sequences_are_those_that_there_is_room_for() -> None:
    """SGLang keeps five states per running request: 82 slots are 16 requests, whatever it admits."""
    log = read_log_file(str(LOGS / "sglang-2026-02-tp2.log"))
    request, notes = asked(
        log, Request(model="35b-a3b", devices=("2xrtx4090",), weights="bf16"), {"model", "devices", "weights"}
    )
    assert (request.seqs, request.ctx_tokens) == (16, 8192)
    assert "the log has 82 state slots: planned as 16 sequences" in notes


@pytest.mark.parametrize(
    ("name", "typed", "says"),
    [
        ("vllm-0.24.0.log", {}, "does not say on which device it was written: give --gpu"),
        ("vllm-2025-09.log", {"devices": ("rtx3090",)}, "does not say which model it is: give --model"),
        ("vllm-2026-04.log", {"devices": ("rtx3090",), "model": "9b"}, "how long its context is: give --ctx"),
        ("vllm-0.32.0-cpu.log", {"devices": ("rtx3090",)}, "calls its model m08, which is in no catalog"),
    ],
)
def test_what_neither_says_is_asked_for(name: str, typed: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        asked(read_log_file(str(LOGS / name)), Request(**typed), set(typed))


def test_a_log_of_nothing_that_was_planned_gives_no_receipt() -> None:
    found = plan(Request(model="9b", devices=("rtx3090",), ctx_tokens=4096, engine="llama.cpp")).best
    with pytest.raises(BadInput, match="nothing in the log stands on a device of the plan"):
        receipt(found, EngineLog("llama.cpp", None, None), "2026-11-22", "0")


def test_a_receipt_comes_back_from_its_file(tmp_path: Path) -> None:
    one = made()
    path = tmp_path / "one.json"
    path.write_text(text(one), encoding="utf-8")
    back = read_receipt(str(path))
    assert back.to_json() == one.to_json()
    assert (back.request, back.log, back.scores) == (one.request, one.log, one.scores)
    assert [receipt.date for receipt in read_receipts([str(tmp_path)])] == ["2026-11-22"]


def test_the_plan_can_be_made_anew() -> None:
    one = from_json(json.loads(text(made())), "x")
    again = replan(one)
    assert again is not None and again.command == one.command
    assert rescored(one) == one.scores


def test_a_receipt_of_a_file_that_only_its_writer_has_keeps_its_scores(tmp_path: Path) -> None:
    one = made()
    told = json.loads(text(one))
    told["request"]["model"] = "a-model-of-mine"
    back = from_json(told, "x")
    assert replan(back) is None and back.scores == one.scores


def test_nothing_private_is_in_a_receipt() -> None:
    """The boot line quotes the whole command, with a path and, elsewhere, hosts and keys."""
    boot = (LOGS / "vllm-0.24.0.log").read_text(encoding="utf-8")
    boot = boot.replace("~/.cache/huggingface/", "/home/jane/secret/").replace(
        "'host': '0.0.0.0'", "'api_key': 'sk-12345678'"
    )
    log = read_log(f"jane-desktop vllm[1]: {boot}\nALL hf_abcdefghijklmnop 192.168.1.17\n")
    request, _ = asked(log, Request(devices=("rtx5090",)), {"devices"})
    told = text(receipt(plan(request).best, log, "2026-11-22", "0", "jane's run on /home/jane/x"))
    for secret in ("/home", "secret", "sk-12345678", "jane-desktop", "hf_abc", "192.168"):
        assert secret not in told


@pytest.mark.parametrize(
    ("asked_for", "served"),
    [("x", "MODEL"), (".", "."), ("janes/config.json", "MODEL"), ("{home}/janes/config.json", "MODEL")],
)
def test_the_line_keeps_its_words_and_loses_the_path(
    asked_for: str, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every `.` and every `x` of the line were once replaced; the folder of a config.json was left in it."""
    for folder in (tmp_path / "x", tmp_path / "janes", tmp_path):
        folder.mkdir(exist_ok=True)
        shutil.copy(LOGS.parent / "tiny_qwen3_5.json", folder / "config.json")
    monkeypatch.chdir(tmp_path)
    asked_for = asked_for.format(home=tmp_path)
    request = Request(model=asked_for, devices=("rtx5090",), ctx_tokens=2048, engine="vllm", weights="bf16")
    best = plan(request).best
    line = receipt(best, read_log_file(str(LOGS / "vllm-0.24.0.log")), "2026-11-22", "0").command
    words = best.command.split()
    assert line.split() == [served if place == 2 else word for place, word in enumerate(words)]


def damaged(change: Any) -> dict[str, Any]:
    told = json.loads(text(made()))
    change(told)
    return told


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda told: told.update(schema=2), "schema"),
        (lambda told: told.update(kind="plan"), "kind"),
        (lambda told: told.pop("log"), "log"),
        (lambda told: told.update(more=1), "more"),
        (lambda told: told.update(date="yesterday"), "date"),
        (lambda told: told["request"].update(ctx_tokens=0), "request.ctx_tokens"),
        (lambda told: told["request"].update(seqs=True), "request.seqs"),
        (lambda told: told["devices"][0].update(memory_bytes=-1), "devices.0.memory_bytes"),
        (lambda told: told["log"]["parts"][0].update(bytes=1 << 60), "log.parts.0.bytes"),
        (lambda told: told["log"]["parts"][0].update(place="/etc"), "log.parts.0.place"),
        (lambda told: told["scores"][0]["planned_bytes"].update(low=1 << 49), "no interval"),
        (lambda told: told["scores"][0].update(error="1"), "scores.0.error"),
        (lambda told: told.update(devices=[]), "devices"),
    ],
)
def test_a_damaged_receipt_is_refused_by_its_field(change: Any, says: str) -> None:
    with pytest.raises(BadInput, match=f"x is no receipt: .*{says}") as caught:
        from_json(damaged(change), "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from(["schema", "request", "devices", "log", "scores", "date", "source", "command"]),
)
@settings(max_examples=40, deadline=None)
def test_any_value_anywhere_is_a_receipt_or_a_sentence(value: Any, field: str) -> None:
    told = {**TOLD, field: value}
    try:
        from_json(told, "x")
    except BadInput as error:
        assert str(error).startswith("x is no receipt")


TOLD = json.loads(text(made()))


def test_a_folder_without_receipts_and_no_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no receipt in"):
        read_receipts([str(tmp_path)])
    with pytest.raises(BadInput, match="cannot be read"):
        read_receipts([str(tmp_path / "none")])
