"""Multi-token prediction: the layer against plain torch, and drafts that change how fast tokens come, never which."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from qwenfit.kernels.operations import REFERENCE
from qwenfit.kernels.runtime.configuration import Configuration, configuration_of
from qwenfit.kernels.runtime.generate import generate, prefill
from qwenfit.kernels.runtime.layers import MLP
from qwenfit.kernels.runtime.memory import Buffers, Settings, allocate
from qwenfit.kernels.runtime.model import Model, decode_step, forward, predict, prefill_step
from qwenfit.kernels.runtime.sampling import Sampling
from qwenfit.kernels.runtime.speculation import Confirmed, draft
from qwenfit.kernels.runtime.synthetic import random_model
from qwenfit.profiles.model_catalog import model as catalog_model

DATA = Path(__file__).parents[2] / "data"
PROMPTS = ([5, 6, 7, 8, 9, 10, 11] * 5, [3, 4], list(range(100, 121)))
FLOAT = torch.float32
SHARES = {"qwen3_5": 0.2, "qwen3_5_moe": 0.02}
"""How much the layers of a model with foresight say: so much that its prediction layer is right in part of the
cases."""


def made_configuration(name: str) -> Configuration:
    return configuration_of(catalog_model(str(DATA / f"tiny_{name}.json")))


def made_buffers(configuration: Configuration, drafts: int, ctx_tokens: int = 128, **told: Any) -> Buffers:
    settings = Settings(ctx_tokens, seqs=3, prefill_chunk_tokens=16, drafts=drafts, **told)
    return allocate(configuration, settings, FLOAT, "cpu")


def made_model(name: str, foresight: bool) -> Model:
    """A random model; with foresight its layers say little beside the embedding, and the prediction layer hands the
    embedding of its token on: so it often knows what the model will say to that token."""
    model = random_model(made_configuration(name), drafts=1, dtype=FLOAT, operations=REFERENCE)
    if foresight:
        prediction = model.prediction
        assert prediction is not None and isinstance(prediction.fc, torch.Tensor)
        size = model.configuration.hidden_size
        prediction.fc.zero_()
        prediction.fc[:, :size] = torch.eye(size)
        prediction.embedding_norm.zero_()
        prediction.norm.copy_(model.norm)
        for layer, share in ((prediction.layer, 0.0), *((layer, SHARES[name]) for layer in model.layers)):
            downs = [layer.attention.out_proj, layer.mlp.down]
            downs += [] if isinstance(layer.mlp, MLP) else [layer.mlp.shared.down]
            for down in downs:
                assert isinstance(down, torch.Tensor)
                down.mul_(share)
        if model.lm_head is model.embedding:  # else every token would call for itself
            assert isinstance(model.embedding, torch.Tensor)
            model = replace(model, lm_head=model.embedding.roll(7, 0))
    return model


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("foresight", [False, True])
def test_drafts_change_no_token(name: str, foresight: bool) -> None:
    """Three prompts of different lengths, 0 to 3 drafts; with foresight many are accepted, and steps saved."""
    model, count = made_model(name, foresight), 40 if foresight else 12
    plain = generate(model, made_buffers(model.configuration, 0), PROMPTS, count, stop_tokens=())
    assert plain.drafted == plain.accepted == 0 and plain.steps == count - 1
    for drafts in (1, 2, 3):
        found = generate(model, made_buffers(model.configuration, drafts), PROMPTS, count, stop_tokens=())
        assert found.tokens == plain.tokens
        assert found.drafted >= drafts * found.steps
        if foresight:
            assert found.accepted > 0.2 * found.drafted and found.steps < count - 5
        else:
            assert found.accepted < 0.1 * found.drafted


def test_drafts_change_no_drawn_token() -> None:
    """The random number of a token depends on seed, sequence and position: the same text, drafted or not."""
    model, sampling = made_model("qwen3_5", True), Sampling(temperature=0.7, top_k=50, top_p=0.95, seed=3)
    plain = generate(model, made_buffers(model.configuration, 0), PROMPTS, 30, sampling, stop_tokens=())
    greedy = generate(model, made_buffers(model.configuration, 0), PROMPTS, 30, stop_tokens=())
    found = generate(model, made_buffers(model.configuration, 2), PROMPTS, 30, sampling, stop_tokens=())
    assert found.tokens == plain.tokens != greedy.tokens
    assert found.accepted > 0


def test_a_rejected_draft_leaves_the_state_as_it_was() -> None:
    """After a step with all drafts wrong the state is that of one token: what comes next is as without drafts."""
    model = made_model("qwen3_5", False)
    plain, drafted = made_buffers(model.configuration, 0), made_buffers(model.configuration, 3)
    for buffers in (plain, drafted):
        prefill(model, buffers, [PROMPTS[0]])
    length = len(PROMPTS[0])
    forward(model, torch.tensor([7]), decode_step(model, plain, [0], [length]), plain)
    forward(model, torch.tensor([7, 1, 2, 3]), decode_step(model, drafted, [0], [length], 4), drafted)
    drafted.advance(0, 1)
    for one, other in zip((*plain.states, *plain.conv_states), (*drafted.states, *drafted.conv_states), strict=True):
        torch.testing.assert_close(other[drafted.source_slot(0)], one[0], rtol=0, atol=1e-5)


def test_drafts_stop_where_the_context_is_full() -> None:
    """A context of 64 tokens and three drafts: no step may write past the cache, and text fills the context exactly."""
    model = made_model("qwen3_5", True)
    prompts = [[5] * 50, [6] * 30]
    plain = generate(model, made_buffers(model.configuration, 0, 64), prompts, 100, stop_tokens=())
    found = generate(model, made_buffers(model.configuration, 3, 64), prompts, 100, stop_tokens=())
    assert found.tokens == plain.tokens
    assert [len(text) for text in found.tokens] == [14, 34]


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_layer_is_what_it_should_be(name: str) -> None:
    """Against plain torch in float64: a prompt's prefill in chunks, a step of three pairs, and drafts from drafts."""
    model = made_model(name, False)
    torch.manual_seed(1)
    tokens, hidden = torch.randint(0, 512, (40,)), torch.randn(40, model.configuration.hidden_size)
    expected = plain_prediction(model, hidden, tokens)
    buffers = made_buffers(model.configuration, 3)
    found = []
    for start, length in ((0, 17), (17, 1), (18, 19)):
        step, part = prefill_step(model, buffers, [2], [start], [length]), slice(start, start + length)
        found.append(predict(model, hidden[part], tokens[part], step, buffers))
    found.append(predict(model, hidden[37:], tokens[37:], decode_step(model, buffers, [2], [37], 3), buffers))
    error = torch.cat(found).double() - expected
    assert error.norm() < 1e-5 * expected.norm()

    confirmed = Confirmed((2,), hidden[None, 37:], tokens[None, 37:], (37,), (2,))
    drafts = draft(model, buffers, confirmed, 3)[0].tolist()
    assert drafts == plain_drafts(model, hidden[:39], tokens[:39], 3)
    # Pairs 37 and 38 stood; the one behind them is overwritten by that of draft 1, and draft 3 makes no pair any more.
    keys = buffers.caches[-1].keys[2].abs().amax((0, 2))
    assert keys[:41].min() > 0 and keys[41:].max() == 0


def test_prompts_are_read_by_the_layer_too() -> None:
    """Its keys after prefill in chunks of 16 that prompts share: every position but the last, as in one chunk."""
    model = made_model("qwen3_5", False)
    caches = []
    for chunk in (16, 512):
        settings = Settings(128, seqs=3, prefill_chunk_tokens=chunk, drafts=1)
        buffers = allocate(model.configuration, settings, FLOAT, "cpu")
        prefill(model, buffers, PROMPTS)
        caches.append(buffers.caches[-1].keys)
    torch.testing.assert_close(caches[0], caches[1])
    for prompt, keys in zip(PROMPTS, caches[0].abs().amax((1, 3)), strict=True):
        known = len(prompt) - 1
        assert keys[:known].min() > 0 and keys[known:].max() == 0


def plain_drafts(model: Model, hidden: torch.Tensor, tokens: torch.Tensor, count: int) -> list[int]:
    drafts: list[int] = []
    for _ in range(count):
        out = plain_prediction(model, hidden, tokens)[-1:]
        drafts.append(int((out @ as_double(model.lm_head).T).argmax()))
        hidden, tokens = torch.cat((hidden, out.float())), torch.cat((tokens, torch.tensor(drafts[-1:])))
    return drafts


def as_double(weight: Any) -> torch.Tensor:
    return weight.double()


def plain_prediction(model: Model, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """mtp.* by the book (vLLM `qwen3_5_mtp.py`): all pairs at once, float64, a causal mask, no cache, no kernels."""
    config, prediction = model.configuration, model.prediction
    assert prediction is not None
    layer = prediction.layer
    attention: Any = layer.attention

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())

    embedded = as_double(model.embedding)[tokens]
    pairs = (norm(embedded, prediction.embedding_norm), norm(hidden.double(), prediction.hidden_norm))
    residual = torch.cat(pairs, -1) @ as_double(prediction.fc).T
    projected = norm(residual, layer.input_norm) @ as_double(attention.in_proj[0]).T
    heads, size = config.num_attention_heads, config.head_dim
    wide, narrow = heads * size, config.num_key_value_heads * size
    q, gate, k, v = (part.unflatten(-1, (-1, size)) for part in projected.split((wide, wide, narrow, narrow), -1))
    q, k = (plain_rope(norm(x, weight)) for x, weight in ((q, attention.q_norm), (k, attention.k_norm)))
    k, v = (x.repeat_interleave(heads // config.num_key_value_heads, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / size**0.5
    mask = torch.full(scores.shape[1:], float("-inf"), dtype=torch.double).triu(1)
    mixed = torch.einsum("hts,shd->thd", (scores + mask).softmax(-1), v) * torch.sigmoid(gate)
    residual = residual + mixed.flatten(1) @ as_double(attention.out_proj).T
    x = norm(residual, layer.post_norm)
    return norm(residual + plain_mlp(layer.mlp, x), prediction.norm)


def plain_rope(x: torch.Tensor) -> torch.Tensor:
    """A quarter of 64 dimensions: 8 frequencies of base 1e7, pairs 8 apart; position t of row t."""
    angles = torch.arange(x.shape[0])[:, None, None] * 1e7 ** -(torch.arange(8, dtype=torch.double) / 8)
    first, second = x[..., :8], x[..., 8:16]
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat((*turned, x[..., 16:]), -1)


def plain_mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(mlp, MLP):
        gate, up = (x @ as_double(mlp.gate_up[0]).T).chunk(2, -1)
        return (silu(gate) * up) @ as_double(mlp.down).T
    out = torch.sigmoid(x @ mlp.shared_gate.double().T) * plain_mlp(mlp.shared, x)
    shares, chosen = (x @ mlp.router.double().T).softmax(-1).topk(mlp.per_token)
    shares = shares / shares.sum(-1, keepdim=True)
    for token in range(x.shape[0]):
        for share, expert in zip(shares[token], chosen[token].tolist(), strict=True):
            gate, up = (as_double(mlp.gate_up[0][expert]) @ x[token]).chunk(2)
            out[token] += share * (as_double(mlp.down[expert]) @ (silu(gate) * up))
    return out


def test_a_model_without_the_layer_says_so() -> None:
    model = random_model(made_configuration("qwen3_5"), dtype=FLOAT, operations=REFERENCE)
    buffers = made_buffers(model.configuration, 1)
    with pytest.raises(ValueError, match="without its prediction layer: load it with drafts"):
        generate(model, buffers, [[1, 2, 3]], 5)
