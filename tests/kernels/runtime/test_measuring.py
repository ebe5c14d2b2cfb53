"""Speed at a depth: what was read and what was filled in, and that both lead to the same decode."""

from pathlib import Path

import pytest
import torch

from qwenfit.kernels.operations import REFERENCE
from qwenfit.kernels.runtime import measuring
from qwenfit.kernels.runtime.configuration import configuration_of
from qwenfit.kernels.runtime.generate import chunks, prefill
from qwenfit.kernels.runtime.measuring import fill_caches, measure
from qwenfit.kernels.runtime.memory import Buffers, Settings, allocate
from qwenfit.kernels.runtime.model import Model
from qwenfit.kernels.runtime.synthetic import Scheme, random_model, scheme_of
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.model_catalog import model as catalog_model

PATH = str(Path(__file__).parents[2] / "data" / "tiny_qwen3_5.json")


def made(**told: object) -> tuple[Model, Buffers]:
    settings = Settings(**{"ctx_tokens": 128, "prefill_chunk_tokens": 8, **told})  # type: ignore[arg-type]
    model = random_model(
        configuration_of(catalog_model(PATH)), drafts=settings.drafts, dtype=torch.float32, operations=REFERENCE
    )
    return model, allocate(model.configuration, settings, torch.float32, "cpu")


def test_without_a_limit_everything_is_read() -> None:
    """Caches are those of `prefill` on the same tokens, in a sequence that is split over chunks."""
    model, buffers = made(seqs=2)
    found = measure(model, buffers, 21, 1, seed=5)
    assert (found.computed_tokens, found.is_estimated, found.depth_tokens, found.sequences) == (42, False, 21, 2)
    assert found.prefill_tokens_per_s > 0 < found.decode_tokens_per_s and found.accepted_per_step == 1
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, model.configuration.vocab_size, (42,), generator=draw).view(2, 21).tolist()
    other = allocate(model.configuration, buffers.settings, torch.float32, "cpu")
    prefill(model, other, tokens)
    for one, two in zip(buffers.caches, other.caches, strict=True):
        torch.testing.assert_close(one.keys[:, :, :21], two.keys[:, :, :21])


def test_past_the_limit_caches_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that adds a second per look: the first chunk takes one, the limit is 1.5, so 2 of 12 chunks are read
    and the last. Their tokens take 1/8 s each, and so would all 96."""
    ticks = iter(range(1000))
    monkeypatch.setattr(measuring, "_now", lambda model: float(next(ticks)))
    model, buffers = made()
    found = measure(model, buffers, 96, 3, limit_s=1.5)
    assert (found.computed_tokens, found.is_estimated) == (24, True)
    assert found.prefill_s == pytest.approx(12) and found.prefill_tokens_per_s == pytest.approx(8)
    assert found.first_chunk_s == found.last_chunk_s == 1 and found.steps == 3
    for cache in buffers.caches:
        assert (cache.keys.flatten(0, 2).abs().sum(-1) > 0).all()  # every position has keys, read or filled in


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_filled_caches_are_those_of_heads(kv_dtype: str) -> None:
    """Keys of normalised heads are about 1 in size, whatever they are stored in, and none is inf or NaN."""
    _, buffers = made(kv_dtype=kv_dtype)
    fill_caches(buffers)
    for cache in buffers.caches:
        keys = cache.keys.float() * (1 if cache.key_scales is None else cache.key_scales[..., None])
        assert keys.isfinite().all() and 0.1 < keys.std() < 2


def test_drafts_gain_tokens_or_not() -> None:
    model, buffers = made(drafts=2)
    found = measure(model, buffers, 20, 4)
    assert 1 <= found.accepted_per_step <= 3 and found.steps == 4


@pytest.mark.parametrize(("depth", "steps"), [(0, 1), (1, 0), (126, 3), (129, 1)])
def test_no_room_is_a_sentence(depth: int, steps: int) -> None:
    model, buffers = made()
    with pytest.raises(ValueError, match="do not go into a context of 128"):
        measure(model, buffers, depth, steps)


def test_schemes_are_those_of_the_formats() -> None:
    assert scheme_of(weight_format("bf16")) == Scheme()
    assert scheme_of(weight_format("int4")) == Scheme(4, 128, False)
    assert scheme_of(weight_format("int4-g64-head8")) == Scheme(4, 64, False, lm_head_bits=8)
    assert scheme_of(weight_format("int4-g64-head8")).of("lm_head") == (8, True)
    assert scheme_of(weight_format("int8")).of("mtp.layers.0.mlp.gate_proj") == (16, True)
    with pytest.raises(ValueError, match="the runtime has bf16, int8 and int4"):
        scheme_of(weight_format("q4_k_m"))


@pytest.mark.parametrize(("layers", "ok"), [(4, True), (None, True), (3, False), (0, False), (400, False)])
def test_layers_are_whole_repetitions(layers: int | None, ok: bool) -> None:
    """Three linear layers and one of full attention make a period of the 24 layers of 0.8B."""
    configuration = configuration_of(catalog_model("qwen3.5-0.8b"))
    if ok:
        assert configuration.with_layers(layers).num_layers == (layers or 24)
    else:
        with pytest.raises(ValueError, match="give a multiple of 4, up to 24"):
            configuration.with_layers(layers)


@pytest.mark.parametrize("seqs", [1, 2, 5])
@pytest.mark.parametrize("read", [1, 3, 14])
def test_what_was_not_read_is_reckoned_by_a_straight_line(seqs: int, read: int) -> None:
    """Tokens of 1 ms and a microsecond per token before them, in chunks of 64 of prompts of 1,024: with one sequence
    the whole comes out, with several within half a chunk's rise per sequence."""
    depth = 1024
    pieces = list(chunks([depth] * seqs, 64))
    seconds = [
        sum(1e-3 + 1e-6 * (start + token) for _, start, length in piece for token in range(length)) for piece in pieces
    ]
    shown, known = [*pieces[:read], pieces[-1]], [*seconds[:read], seconds[-1]]
    whole = sum(known) + measuring.unread_s(shown, known, depth, seqs)
    assert whole == pytest.approx(sum(seconds), rel=1e-9 if seqs == 1 else 0.02)
