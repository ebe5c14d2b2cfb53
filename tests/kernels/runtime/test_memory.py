"""What is allocated against what the planner says: `planner/engines/native.py` is the contract, to the byte."""

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenfit.kernels.layout.packing import empty
from qwenfit.kernels.operations import REFERENCE
from qwenfit.kernels.runtime.assembly import assemble
from qwenfit.kernels.runtime.configuration import Configuration, configuration_of
from qwenfit.kernels.runtime.memory import (
    Settings,
    allocate,
    arena_bytes,
    kv_bytes,
    reserve_scratch,
    scratch_bytes,
    state_bytes,
)
from qwenfit.kernels.runtime.model import forward, prefill_step, weight_bytes
from qwenfit.kernels.runtime.synthetic import random_model
from qwenfit.planner.engines import native
from qwenfit.planner.engines.engine import Setup
from qwenfit.planner.request import Options
from qwenfit.profiles.formats import weight_format
from qwenfit.profiles.model_catalog import model as catalog_model
from qwenfit.profiles.model_catalog import models

DATA = Path(__file__).parents[2] / "data"
CPU: Any = SimpleNamespace(kind="cpu", title="A CPU", compute_capability=None, usable_bytes=1 << 40, name="made-cpu")


def planned(name: str, settings: Settings, weights: str = "int4") -> Any:
    """The planner's allocation for the same request."""
    setup = Setup(
        model=catalog_model(name),
        weights=weight_format(weights),
        devices=(CPU,),
        version="0.1",
        kv_dtype=settings.kv_dtype,
        state_dtype=settings.state_dtype,
        tp=1,
        pp=1,
        mtp=settings.drafts,
        vision=False,
        options=Options(max_num_batched_tokens=settings.prefill_chunk_tokens),
    )
    return native.estimate(setup)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drafts", [0, 3])
def test_allocated_is_planned(name: str, kv_dtype: str, state_dtype: str, drafts: int) -> None:
    path = str(DATA / f"tiny_{name}.json")
    settings = Settings(1001, 2, kv_dtype, state_dtype, 64, drafts)
    memory = planned(path, settings).allocate(1001, 2).devices[0].memory
    configuration = configuration_of(catalog_model(path))
    buffers = allocate(configuration, settings, torch.bfloat16, "cpu")
    assert buffers.kv_bytes == kv_bytes(configuration, settings) == memory.kv_cache.mid
    assert buffers.state_bytes == state_bytes(configuration, settings) == memory.recurrent_state.mid
    assert scratch_bytes(configuration, settings, on_cpu=True) == memory.activation.mid


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([model.name for model in models()]),
    settings=st.builds(
        Settings,
        ctx_tokens=st.integers(1, 1 << 20),
        seqs=st.integers(1, 64),
        kv_dtype=st.sampled_from(["bf16", "int8"]),
        state_dtype=st.sampled_from(["float32", "bfloat16"]),
        prefill_chunk_tokens=st.integers(1, 8192),
        drafts=st.integers(0, 7),
    ),
)
def test_the_same_formulas_for_every_release(name: str, settings: Settings) -> None:
    """Nothing is allocated here: the two sets of formulas agree for every model, context and setting."""
    memory = planned(name, settings).allocate(settings.ctx_tokens, settings.seqs).devices[0].memory
    configuration = configuration_of(catalog_model(name))
    assert kv_bytes(configuration, settings) == memory.kv_cache.mid
    assert state_bytes(configuration, settings) == memory.recurrent_state.mid
    assert scratch_bytes(configuration, settings, on_cpu=True) == memory.activation.mid


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize(("weights", "bits"), [("bf16", 16), ("int4-sym", 4), ("int8", 8)])
def test_weights_are_as_planned(name: str, weights: str, bits: int) -> None:
    """But for dt_bias, which the delta rule reads in float32 (planned as stored, bf16): 2 bytes per value head."""
    path = str(DATA / f"tiny_{name}.json")
    configuration = configuration_of(catalog_model(path))
    for drafts in (0, 1):
        model = random_model(configuration, bits, drafts=drafts, operations=REFERENCE)
        estimate = planned(path, Settings(64, drafts=drafts), weights)
        heads = configuration.linear_attention_layers * configuration.linear_num_value_heads
        assert weight_bytes(model) == estimate.weights_bytes + 2 * heads


def test_slots_of_a_sequence_take_turns() -> None:
    """Three slots each: a step of three tokens writes all, the one it reads last; two accepted, two further on."""
    configuration = configuration_of(catalog_model(str(DATA / "tiny_qwen3_5.json")))
    buffers = allocate(configuration, Settings(64, seqs=2, drafts=2), torch.bfloat16, "cpu")
    assert buffers.source_slot(1) == 3 and buffers.target_slots(1, 3) == [4, 5, 3]
    buffers.advance(1, 2)
    assert buffers.source_slot(1) == 5 and buffers.target_slots(1, 3) == [3, 4, 5]
    assert buffers.source_slot(0) == 0 and buffers.target_slots(0, 1) == [1]


def test_a_reset_is_of_one_sequence() -> None:
    configuration = configuration_of(catalog_model(str(DATA / "tiny_qwen3_5.json")))
    buffers = allocate(configuration, Settings(64, seqs=2), torch.float32, "cpu")
    for state in (*buffers.states, *buffers.conv_states):
        state.fill_(1)
    buffers.reset(1)
    for state in (*buffers.states, *buffers.conv_states):
        assert state[0].min() == 1 and state[1].abs().max() == 0


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"ctx_tokens": 0}, "ctx_tokens is 0: give 1 or more"),
        ({"kv_dtype": "fp8"}, "the native runtime has no fp8 cache: give bf16 or int8"),
        ({"state_dtype": "float16"}, "the recurrent state is no float16: give float32 or bfloat16"),
        ({"drafts": 8}, "8 draft tokens: give 0 to 7"),
    ],
)
def test_settings_are_checked(told: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Settings(**{"ctx_tokens": 64, **told})


class Shapes:
    """A `Source` of tensors without memory ("meta"): int4 as Qwen3.5's checkpoints have it."""

    def __init__(self, configuration: Configuration) -> None:
        self.is_moe = configuration.is_moe

    def has(self, module: str) -> bool:
        return self.is_moe if module.endswith((".mlp.gate", "gate_up_proj")) else not module.endswith("in_proj_qkvz")

    def matrix(self, module: str, rows: int, columns: int) -> Any:
        if module.endswith(("embed_tokens", "lm_head", "in_proj_a", "in_proj_b")):
            return self.tensor(module, (rows, columns))
        return empty(rows, columns, 4, 128, torch.bfloat16, False, device="meta")

    def stack(self, module: str, count: int, rows: int, columns: int) -> Any:
        return empty(rows, columns, 4, 128, torch.bfloat16, False, device="meta", stack=(count,))

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still alive, and the most that they have been."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most_bytes = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in given | self.known:
                self.known.add(id(storage))
                self.bytes += storage.nbytes()
                self.most_bytes = max(self.most_bytes, self.bytes)
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        return result

    def forget(self, identity: int, size_bytes: int) -> None:
        self.known.remove(identity)
        self.bytes -= size_bytes


@pytest.mark.parametrize("name", ["qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3.5-397b-a17b"])
def test_a_chunk_takes_no_more_than_the_arena(name: str) -> None:
    """The forward pass of 2,048 tokens at real shapes on tensors without memory, with the workspace of the delta
    rule."""
    pytest.importorskip("triton", reason="what the delta rule's kernels take is said by their host")
    from qwenfit.kernels.gpu.delta_prefill import prefill_scratch_bytes
    from qwenfit.kernels.library import library_operations

    library, tokens = library_operations(), 2048
    configuration = configuration_of(catalog_model(name))
    heads = (configuration.linear_num_key_heads, configuration.linear_num_value_heads)
    dims = (configuration.linear_key_head_dim, configuration.linear_value_head_dim)

    def with_workspace(*arguments: Any) -> torch.Tensor:
        workspace = torch.empty(prefill_scratch_bytes(tokens, 1, *heads, *dims), dtype=torch.uint8, device="meta")
        result = library.gated_delta_rule_prefill(*arguments)
        del workspace
        return result

    operations = replace(library, gated_delta_rule_prefill=with_workspace)
    meta = torch.device("meta")
    model = assemble(Shapes(configuration), configuration, torch.bfloat16, meta, operations, with_prediction=False)
    buffers = allocate(configuration, Settings(4096), torch.bfloat16, meta)
    step = prefill_step(model, buffers, [0], [0], [tokens])
    with torch.inference_mode(), Live() as live:
        forward(model, torch.empty(tokens, dtype=torch.long, device=meta), step, buffers)
    share = live.most_bytes / arena_bytes(configuration, tokens)
    print(f"{name}: {live.most_bytes / tokens:.0f} bytes per token, {share:.0%} of the arena")
    assert 0.7 < share <= 1


def test_scratch_is_reserved_on_gpus_only() -> None:
    """A request far beyond this machine: on the CPU nothing is taken."""
    reserve_scratch(1 << 60, torch.device("cpu"))
