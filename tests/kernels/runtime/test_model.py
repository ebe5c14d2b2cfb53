"""The forward pass: what it does not depend on, what a rounded cache and state cost, and all of it on Triton."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize, quantize_rtn
from qwenfit.kernels.operations import REFERENCE, Operations
from qwenfit.kernels.runtime.configuration import Configuration, configuration_of
from qwenfit.kernels.runtime.generate import generate
from qwenfit.kernels.runtime.layers import MLP
from qwenfit.kernels.runtime.memory import Settings, allocate
from qwenfit.kernels.runtime.model import Model, decode_step, embed, forward, logits, prefill_step, weight_bytes
from qwenfit.kernels.runtime.synthetic import random_model
from qwenfit.profiles.model_catalog import model as catalog_model

DATA = Path(__file__).parents[2] / "data"
TOKENS = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(4)).tolist()


def made_model(name: str = "qwen3_5", bits: int = 16, dtype: torch.dtype = torch.float32, **told: Any) -> Model:
    configuration = configuration_of(catalog_model(str(DATA / f"tiny_{name}.json")))
    return random_model(configuration, bits, dtype=dtype, **{"operations": REFERENCE, **told})


def run(model: Model, chunks: list[int], decoded: int = 0, **told: Any) -> Tensor:
    """Float32 logits after every token [T, vocab]: a prompt in chunks of these lengths, then steps of one token."""
    buffers = allocate(model.configuration, Settings(128, **told), model.dtype, model.device)
    found, start = [], 0
    with torch.inference_mode():
        for number, length in enumerate([*chunks, *[1] * decoded]):
            part = torch.tensor(TOKENS[start : start + length]) % model.configuration.vocab_size
            if number < len(chunks):
                step: Any = prefill_step(model, buffers, [0], [start], [length])
            else:
                step = decode_step(model, buffers, [0], [start])
            found.append(logits(model, forward(model, part, step, buffers)))
            start += length
    return torch.cat(found)


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_it_does_not_matter_where_a_prompt_is_cut(name: str) -> None:
    """One piece, pieces of 1 to 64 tokens, token by token: the same logits, float32 to rounding."""
    model = made_model(name)
    whole = run(model, [100])
    for chunks, decoded in (([1, 2, 3, 60, 34], 0), ([64, 36], 0), ([40], 60)):
        assert error_of(run(model, chunks, decoded), whole) < 1e-5


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [({"kv_dtype": "int8"}, 1e-4, 1e-2), ({"state_dtype": "bfloat16"}, 1e-4, 1e-2)],
)
def test_what_rounding_costs(told: dict[str, str], least: float, most: float) -> None:
    """Relative error of the logits of 100 tokens, 60 of them decoded: below 1 % here, and not nothing."""
    model = made_model()
    error = error_of(run(model, [40], 60, **told), run(model, [40], 60))
    print(f"{told}: {error:.2e}")
    assert least < error < most


def test_matrices_that_stay_apart_compute_the_same() -> None:
    """in_proj and gate_up as two matrices each, as where a checkpoint quantizes them differently."""
    model = made_model()

    def halves(weights: Any) -> Any:
        (weight,) = weights
        return weight[: len(weight) // 2], weight[len(weight) // 2 :]

    layers = []
    for layer in model.layers:
        assert isinstance(layer.mlp, MLP)
        attention = replace(layer.attention, in_proj=halves(layer.attention.in_proj))
        layers.append(replace(layer, attention=attention, mlp=replace(layer.mlp, gate_up=halves(layer.mlp.gate_up))))
    assert error_of(run(replace(model, layers=tuple(layers)), [20]), run(model, [20])) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_embedding(bits: int, symmetric: bool) -> None:
    """Only the rows asked for are unpacked: they are those of the whole table."""
    model = made_model()
    table = quantize_rtn(torch.randn(512, 128), bits, 32, symmetric)
    tokens = torch.tensor([511, 0, 7, 7])
    rows = embed(replace(model, embedding=table), tokens)
    assert torch.equal(rows, dequantize(table, torch.float32)[tokens])


def test_a_tied_head_counts_once() -> None:
    """By hand: 512 x 128 more elements of 4 bytes where the head is a matrix of its own."""
    model = made_model()
    assert model.lm_head is model.embedding
    untied = replace(model, lm_head=torch.zeros(512, 128))
    assert weight_bytes(untied) == weight_bytes(model) + 4 * 512 * 128


def test_random_weights_stay_in_bounds() -> None:
    """int4, int8 and bf16 weights drawn by `runtime/synthetic.py`: logits of the size of one, nothing inf or NaN."""
    for name in ("qwen3_5", "qwen3_5_moe"):
        for bits in (4, 8, 16):
            model = made_model(name, bits, torch.bfloat16)
            down: Any = model.layers[0].mlp.down
            assert isinstance(down, QuantizedWeight) == (bits < 16)
            found = run(model, [30], 2)
            assert torch.isfinite(found).all() and 0.2 < found.std() < 5


def triton_operations() -> Operations:
    """Triton's kernels, which the interpreter runs on CPU tensors (a GPU where there is one: see conftest.py)."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    from qwenfit.kernels.gpu.path import triton_path

    return triton_path("cpu")


def smaller(name: str) -> Configuration:
    """One layer of each kind, few heads and experts: the interpreter takes milliseconds for a program of a grid."""
    configuration = configuration_of(catalog_model(str(DATA / f"tiny_{name}.json")))
    few = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    few |= {"vocab_size": 128, "num_experts": 4 if configuration.is_moe else 0}
    return replace(configuration, layer_types=("linear_attention", "full_attention"), **few)


def widened(value: Any) -> Any:
    """The same model with every float in float32: what its numbers stand for, and near enough to exact."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    if is_dataclass(value) and not isinstance(value, type | Operations | Configuration):
        names = (field.name for field in fields(value))
        return replace(value, **{name: widened(getattr(value, name)) for name in names if name != "dtype"})
    return value


def compare_with_twins(name: str, bits: int, chunks: list[int], decoded: int, **told: Any) -> None:
    """Logits in bfloat16 on Triton: at most 1.5 times as far from those in float32 as the twins' in bfloat16 are."""
    model = random_model(smaller(name), bits, group_size=32, operations=REFERENCE)
    truth = run(replace(widened(model), dtype=torch.float32), chunks, decoded, **told)
    twin = error_of(run(model, chunks, decoded, **told), truth)
    found = error_of(run(replace(model, operations=triton_operations()), chunks, decoded, **told), truth)
    print(f"{name} {bits} bits {told}: Triton {found:.2e}, twins {twin:.2e}")
    assert found < 1.5 * twin


def test_a_whole_model_on_triton() -> None:
    """int4, a prompt of 70 tokens in two chunks, the second over the border of 64, and a step."""
    compare_with_twins("qwen3_5", 4, [40, 30], 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("qwen3_5", 8), ("qwen3_5", 16), ("qwen3_5_moe", 4), ("qwen3_5_moe", 16)])
def test_more_whole_models_on_triton(name: str, bits: int) -> None:
    """With an int8 cache and a bfloat16 state."""
    compare_with_twins(name, bits, [50, 16], 2, kv_dtype="int8", state_dtype="bfloat16")


@pytest.mark.slow
def test_drafts_on_triton() -> None:
    """Float32: prefill of two prompts, drafts and steps of three tokens; the tokens of the twins, and of no drafts."""
    model = random_model(smaller("qwen3_5"), drafts=1, dtype=torch.float32, operations=REFERENCE)
    texts = []
    for operations, drafts in ((REFERENCE, 0), (triton_operations(), 2)):
        settings = Settings(128, seqs=2, prefill_chunk_tokens=40, drafts=drafts)
        buffers = allocate(model.configuration, settings, torch.float32, "cpu")
        prompts = [[token % 128 for token in TOKENS[:45]], [3, 4]]
        texts.append(generate(replace(model, operations=operations), buffers, prompts, 5, stop_tokens=()).tokens)
    assert texts[0] == texts[1]
