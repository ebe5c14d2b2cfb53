"""ggml's graph allocator, replayed: what devices and host take for one batch (tests/data/llamacpp_devices.jsonl)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenfit.planner.engines.llamacpp_cache import FLOAT_TYPES, cache_cells
from qwenfit.planner.engines.llamacpp_compute import (
    WHOLE,
    Batch,
    Place,
    batch_tokens,
    compute_bytes,
    flash_scratch_bytes,
    host_bytes,
    reserve,
)
from qwenfit.profiles.model_catalog import model

DATA = Path(__file__).parent / "data" / "llamacpp_devices.jsonl"
HOST_ALIGNED = 32  # of the remote CPU backends that stood for devices
MODELS = ("qwen3.5-0.8b", "qwen3.5-9b", "qwen3.6-27b", "qwen3.5-35b-a3b", "qwen3.5-397b-a17b")


def rows() -> list[dict[str, Any]]:
    first, *rest = map(json.loads, DATA.read_text(encoding="utf-8").splitlines())
    return [dict(zip(first["meta"]["columns"], row, strict=True)) for row in rest]


def batch_of(row: dict[str, Any]) -> Batch:
    streams, cells = cache_cells(row["n_ctx"], row["seqs"], bool(row["unified"]))
    tokens = min(streams * cells, row["batch"], row["ubatch"])
    return Batch(
        batch_tokens(streams * cells, tokens, row["seqs"]),
        row["seqs"],
        streams,
        min(tokens, row["outputs"]),
        cells,
        rotate_k=row["k"] not in FLOAT_TYPES,
        rotate_v=row["v"] not in FLOAT_TYPES,
        drafts=row["drafts"],
    )


def test_one_device_and_two_in_a_pipeline_to_the_byte() -> None:
    asked = rows()
    assert len(asked) == 110
    for row in asked:
        asked_model, batch, found = model(row["model"]), batch_of(row), row["device_compute_bytes"]
        copies = 4 if len(found) > 1 else 1
        for index, expected in enumerate(found):
            begin = "next" if index else "first"
            place = Place(begin, index == len(found) - 1, copies, alignment=HOST_ALIGNED)
            assert compute_bytes(asked_model, batch, place) == expected, (row, index)
        assert host_bytes(asked_model, batch, copies) == row["host_compute_bytes"], row


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", [WHOLE, Place("first"), Place("first", f16_cache=True), Place("next")])
def test_the_short_form_is_the_long_one(name: str, place: Place) -> None:
    """`reserve` is asked for every context of a search, `compute_bytes` walks the graph each time."""
    for seqs, drafts in ((1, 0), (1, 3), (4, 0), (7, 2), (16, 0), (64, 0)):
        rows = min(512, seqs * (1 + drafts))
        batch = Batch(batch_tokens(512, 512, seqs), seqs, seqs, rows, 0, rotate_k=True, rotate_v=True, drafts=drafts)
        short = reserve(model(name), batch, place)
        for cells in (256, 4096, 32768, 262144, 1048576):
            long = compute_bytes(model(name), replace(batch, cells=cells), place)
            if place.f16_cache and cells < 4096:  # little enough for a hole: up to 7 % less than is found
                assert short.buffer_bytes(cells) == pytest.approx(long, rel=0.07)
            else:
                assert short.buffer_bytes(cells) == long, (seqs, drafts, cells)


def test_a_draft_is_close_up_to_eight_sequences() -> None:
    for name in MODELS:
        for seqs in (1, 2, 4, 8):
            batch = Batch(512, seqs, seqs, seqs, 0)
            short = reserve(model(name), batch, Place("draft on device"))
            for cells in (4096, 32768, 262144):
                long = compute_bytes(model(name), replace(batch, cells=cells), Place("draft on device"))
                assert short.buffer_bytes(cells) == pytest.approx(long, rel=0.15)


def test_flash_attention_makes_room_for_a_layer_in_f16() -> None:
    """9B at 262,144 tokens: 2 x 4 heads x 256 x 2 bytes = 4 KiB a token, 1 GiB (ggml-cuda/fattn.cu, b11434)."""
    assert flash_scratch_bytes(model("qwen3.5-9b"), 262144, 1) == 1 << 30
    batch = Batch(512, 1, 1, 1, 262144, rotate_k=True, rotate_v=True)
    plain = compute_bytes(model("qwen3.5-9b"), batch, Place("first"))
    with_copy = compute_bytes(model("qwen3.5-9b"), batch, Place("first", f16_cache=True))
    assert 0.85 * (1 << 30) < with_copy - plain < 1 << 30  # it stands on what else is there, not on the highest mark


def test_a_copied_input_is_kept_in_a_pipeline() -> None:
    batch = Batch(512, 1, 1, 1, 262144)
    one, four = (compute_bytes(model("qwen3.5-9b"), batch, Place("first", copies=copies)) for copies in (1, 4))
    mask = 2 * 512 * 262144
    assert four - one > 3 * mask
