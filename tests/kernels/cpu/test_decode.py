# pyright: reportAttributeAccessIssue=false
"""A decode step as one program, against the same model's operations one by one, dense and with experts, with drafts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwenfit.kernels.cpu import decode as cpu_decode
from qwenfit.kernels.cpu import library as cpu_library
from qwenfit.kernels.cpu.library import available_isas
from qwenfit.kernels.cpu.path import cpu_path
from qwenfit.kernels.layout.packing import QuantizedWeight, quantize_rtn
from qwenfit.kernels.operations import REFERENCE
from qwenfit.kernels.runtime.configuration import Configuration
from qwenfit.kernels.runtime.memory import Settings, allocate
from qwenfit.kernels.runtime.model import Model, decode_step, forward, logits, prefill_step
from qwenfit.kernels.runtime.synthetic import random_model

pytestmark = pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")
VOCABULARY = 300


def configuration(experts: int = 0, value_dim: int = 128) -> Configuration:
    rope = {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    }
    return Configuration(
        architecture="qwen3_5_moe" if experts else "qwen3_5",
        hidden_size=192,
        layer_types=("linear_attention", "full_attention", "linear_attention"),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=4,
        vocab_size=VOCABULARY,
        intermediate_size=0 if experts else 320,
        num_experts=experts,
        num_experts_per_tok=3 if experts else 0,
        moe_intermediate_size=64 if experts else 0,
        shared_expert_intermediate_size=64 if experts else 0,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        mtp_num_hidden_layers=0,
        mamba_ssm_dtype="float32",
        rope=rope,
    )


def run(model: Model, drafts: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of three steps of two sequences (1, 3 and 1 tokens) after prompts, and all that was left in
    buffers."""
    generator = torch.Generator().manual_seed(1)
    buffers = allocate(model.configuration, Settings(200, 3, drafts=drafts), model.dtype, "cpu")
    prompt = torch.randint(0, VOCABULARY, (40,), generator=generator)
    plain = replace(model, operations=replace(REFERENCE))
    forward(plain, prompt, prefill_step(model, buffers, [0, 2], [0, 0], [30, 10]), buffers)
    lengths, results = [30, 10], []
    for steps in (1, 3, 1):
        tokens = torch.randint(0, VOCABULARY, (2 * steps,), generator=generator)
        results.append(forward(model, tokens, decode_step(model, buffers, [0, 2], lengths, steps), buffers))
        for sequence in (0, 2):
            buffers.advance(sequence, steps)
        lengths = [length + steps for length in lengths]
    left = [*buffers.states, *buffers.conv_states, *(cache.keys for cache in buffers.caches)]
    return torch.cat(results), left


def rms_error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("value_dim", [128, 48])  # heads that are a block of activations, and heads that are not
def test_one_program_is_the_operations_one_by_one(experts: int, bits: int, value_dim: int) -> None:
    model = random_model(configuration(experts, value_dim), bits, 64, 0, torch.float32, operations=cpu_path())
    y, left = run(model)
    exact, other = run(replace(model, operations=REFERENCE))
    assert rms_error(y, exact) < 2e-5
    assert all(rms_error(mine, theirs) < 2e-5 for mine, theirs in zip(left, other, strict=True))


def test_bfloat16_is_nearer_to_float32_than_operations_that_round_in_between() -> None:
    model = random_model(configuration(), 4, 64, 0, torch.bfloat16, operations=cpu_path())
    wide = random_model(configuration(), 4, 64, 0, torch.float32, operations=REFERENCE)
    exact = run(wide)[0]
    assert rms_error(run(model)[0], exact) < 1.5 * rms_error(run(replace(model, operations=REFERENCE))[0], exact)


def test_weights_of_several_kinds_columns_in_another_order_and_a_packed_embedding() -> None:
    model = random_model(configuration(), 16, 64, 0, torch.float32, operations=cpu_path())
    layer = model.layers[0]

    def pack(weight: Tensor, bits: int, group: int, symmetric: bool, shuffled: bool = False) -> QuantizedWeight:
        packed = quantize_rtn(weight, bits, group, symmetric)
        order = torch.randperm(packed.columns, generator=torch.Generator().manual_seed(2)).int()
        return replace(packed, order=order) if shuffled else packed

    (gate_up,) = layer.mlp.gate_up  # type: ignore[union-attr]
    halves = gate_up.split(gate_up.shape[0] // 2)
    mlp = replace(
        layer.mlp,
        gate_up=(pack(halves[0], 4, 32, True), pack(halves[1], 8, 64, False)),
        down=pack(layer.mlp.down, 4, 64, True, shuffled=True),  # type: ignore[union-attr,arg-type]
    )
    embedding = pack(model.embedding, 8, 64, True)  # type: ignore[arg-type]
    model = replace(model, layers=(replace(layer, mlp=mlp), *model.layers[1:]), embedding=embedding, lm_head=embedding)
    assert rms_error(run(model)[0], run(replace(model, operations=REFERENCE))[0]) < 2e-5


def test_drafts_see_the_logits_that_single_steps_see() -> None:
    model = random_model(configuration(), 4, 64, 0, torch.bfloat16, operations=cpu_path())
    tokens = torch.randint(0, VOCABULARY, (4,), generator=torch.Generator().manual_seed(3))
    both = []
    for pieces in ([4], [1, 1, 1, 1]):
        buffers = allocate(model.configuration, Settings(100, 1, drafts=3), model.dtype, "cpu")
        seen, rows = 0, []
        for steps in pieces:
            step = decode_step(model, buffers, [0], [seen], steps)
            rows.append(logits(model, forward(model, tokens[seen : seen + steps], step, buffers)))
            buffers.advance(0, steps)
            seen += steps
        both.append(torch.cat(rows))
    assert torch.equal(both[0], both[1])


def test_instruction_sets_and_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(configuration(8), 4, 64, 0, torch.bfloat16, operations=cpu_path())
    expected = run(model)[0]
    before = torch.get_num_threads()
    try:
        for isa in available_isas():
            monkeypatch.setenv("QWENFIT_CPU_ISA", isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(run(model)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_a_program_is_written_once_and_belongs_to_its_buffers() -> None:
    model = random_model(configuration(), 4, 64, 0, torch.float32, operations=cpu_path())
    buffers = [allocate(model.configuration, Settings(100, 2), model.dtype, "cpu") for _ in range(2)]
    for position in range(3):
        for one in buffers:
            forward(model, torch.tensor([5]), decode_step(model, one, [0], [position]), one)
    assert [len(one.programs) for one in buffers] == [1, 1]
    assert torch.equal(buffers[0].states[0], buffers[1].states[0])


def test_what_cannot_be_a_program_runs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(configuration(), 4, 64, 0, torch.float32, operations=cpu_path())
    library = cpu_library.cpu_library()
    assert cpu_decode.unsupported(model, library) is None
    odd = replace(model, configuration=replace(model.configuration, linear_key_head_dim=24))
    assert "linear_key_head_dim is 24" in (cpu_decode.unsupported(odd, library) or "")
    exact = run(model)[0]
    monkeypatch.setenv("QWENFIT_CPU_PATH", "torch")
    assert "QWENFIT_CPU_PATH=torch" in (cpu_decode.unsupported(model, cpu_library.cpu_library()) or "")
    assert rms_error(run(model)[0], exact) < 2e-5
