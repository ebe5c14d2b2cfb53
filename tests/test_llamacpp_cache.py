"""Cache, state and output rows against the engine's own breakdown (tests/data/llamacpp_alloc.jsonl), to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenfit.planner.engines.llamacpp_cache import cache_cells, cache_types, kv_pool
from qwenfit.profiles.errors import BadInput, UnknownName, Unsupported
from qwenfit.profiles.model_catalog import model

DATA = Path(__file__).parent / "data" / "llamacpp_alloc.jsonl"
MIB = 1 << 20


def rows() -> list[dict[str, Any]]:
    first, *rest = map(json.loads, DATA.read_text(encoding="utf-8").splitlines())
    return [dict(zip(first["meta"]["columns"], row, strict=True)) for row in rest]


def pool_of(row: dict[str, Any]) -> Any:
    return kv_pool(
        model(row["model"]),
        kv_dtype=row["k"] if row["k"] == row["v"] else f"{row['k']}/{row['v']}",
        mtp=1 if row["draft_context"] else row["drafts"],
        ctx_tokens=row["n_ctx"],
        seqs=row["seqs"],
        ubatch=row["ubatch"],
        batch=row["batch"],
        outputs=row["outputs"],
        flash_attn=bool(row["flash_attn"]),
        kv_unified=bool(row["unified"]),
    )


def test_every_row_to_the_byte() -> None:
    """Eight sizes, dense and mixtures of experts, quantized caches, ubatches, rollback, the draft's own context."""
    asked = rows()
    assert len(asked) == 613
    for row in asked:
        found = pool_of(row)
        if row["draft_context"]:
            assert found.mtp_kv_cache_bytes == row["context_bytes"], row
            assert found.mtp_compute_buffer_bytes == row["compute_bytes"], row
            output_bytes = found.mtp_output_buffer_bytes
        else:
            assert found.kv_cache_bytes + found.recurrent_state_bytes == row["context_bytes"], row
            assert found.compute_buffer_bytes == row["compute_bytes"], row
            output_bytes = found.output_buffer_bytes
        if row["output_mib"] is not None:
            assert output_bytes / MIB == pytest.approx(row["output_mib"], abs=0.006)


def test_9b_as_it_is_quoted() -> None:
    """32 KiB a token in f16, 50.25 MiB of state, 8 GiB at 262,144 tokens, 4.25 of them in q8_0."""
    found = kv_pool(model("qwen3.5-9b"), ctx_tokens=262144)
    assert found.kv_cache_bytes == 262144 * 32 * 1024
    assert found.recurrent_state_bytes == 50.25 * MIB
    assert found.output_buffer_bytes == 4 * 248320
    quantized = kv_pool(model("qwen3.5-9b"), ctx_tokens=262144, kv_dtype="q8_0")
    assert quantized.kv_cache_bytes == 4.25 * (1 << 30)
    assert quantized.recurrent_state_bytes == found.recurrent_state_bytes


def test_drafts_multiply_the_state_and_bring_a_context_of_their_own() -> None:
    found = kv_pool(model("qwen3.5-9b"), ctx_tokens=32768, mtp=3)
    assert found.recurrent_state_bytes == 4 * 50.25 * MIB
    assert found.mtp_kv_cache_bytes == 4096 * 32768
    assert found.kv_cache_bytes == 8 * found.mtp_kv_cache_bytes


def test_cells_are_padded_per_sequence_or_shared() -> None:
    assert cache_cells(1000, 1, False) == (1, 1024)
    assert cache_cells(10000, 3, False) == (3, 3584)  # 10,240 / 3 = 3413, padded again
    assert cache_cells(10000, 3, True) == (1, 10240)


def test_types() -> None:
    assert cache_types("q8_0") == ("q8_0", "q8_0")
    assert cache_types("q8_0/q5_0") == ("q8_0", "q5_0")
    with pytest.raises(UnknownName, match="fp8"):
        cache_types("fp8")
    with pytest.raises(UnknownName, match="q4_k"):
        cache_types("f16/q4_k")


@pytest.mark.parametrize("wrong", [{"ctx_tokens": 0}, {"seqs": -1}, {"ubatch": 0}, {"mtp": -1}, {"outputs": -2}])
def test_numbers_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(BadInput):
        kv_pool(model("qwen3.5-9b"), **{"ctx_tokens": 4096, **wrong})  # pyright: ignore[reportArgumentType]


def test_a_quantized_v_needs_flash_attention() -> None:
    with pytest.raises(Unsupported, match="flash attention"):
        kv_pool(model("qwen3.5-9b"), ctx_tokens=4096, kv_dtype="f16/q8_0", flash_attn=False)
    assert kv_pool(model("qwen3.5-9b"), ctx_tokens=4096, kv_dtype="q8_0/f16", flash_attn=False).kv_cache_bytes
