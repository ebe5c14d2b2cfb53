"""What transformers does, asked of itself: no quantized cache, four columns of state, bytes alive in prefill.

It runs in an interpreter that has torch and transformers 5.23; give it by QWENFIT_TRANSFORMERS_PYTHON.
"""

import json
import os
import subprocess

import pytest

pytestmark = pytest.mark.engines

SCRIPT = r"""
import json, weakref
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.cache_utils import QuantizedCache
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM


class Live(TorchDispatchMode):
    # bytes of all storages that are alive, and the most that ever were
    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage.nbytes():
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, storage._cdata)
        return made

    def free(self, key):
        self.now -= self.sizes.pop(key, 0)


def config(hidden, inner, key_heads, value_heads, layers):
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    return Qwen3_5TextConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=len(layers), layer_types=layers,
        vocab_size=512, num_attention_heads=2, num_key_value_heads=1, linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        rope_parameters={**rope, "mrope_section": [11, 11, 10], "mrope_interleaved": True},
    )


def run(tokens, *shape):
    network = Qwen3_5ForCausalLM(config(*shape)).to(torch.bfloat16).eval()
    with torch.no_grad(), Live() as live:
        made = network(torch.zeros(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1)
    return live.peak, made.past_key_values


def slope(*shape):
    return (run(1024, *shape)[0] - run(512, *shape)[0]) / 512


both = ["linear_attention", "full_attention"]
shapes = ((256, 2, 4), (512, 4, 8))
answer = {"delta_rule": [[h, 256 * k + 128 * v, v, slope(h, 256, k, v, both)] for h, k, v in shapes]}
answer["mlp"] = [[256, inner, slope(256, inner, 1, 1, ["full_attention"])] for inner in (2048, 4096)]
cache = run(64, 256, 512, 2, 4, both)[1]
state = cache.layers[0]
answer["columns"], answer["state_dtype"] = state.conv_states[0].shape[-1], str(state.recurrent_states[0].dtype)
try:
    QuantizedCache("hqq", config(256, 512, 2, 4, both))
    answer["quantized"] = "accepted"
except ValueError as refusal:
    answer["quantized"] = str(refusal)
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def answer() -> dict[str, list]:
    interpreter = os.environ.get("QWENFIT_TRANSFORMERS_PYTHON")
    if not interpreter:
        pytest.skip("QWENFIT_TRANSFORMERS_PYTHON is not set: give an interpreter with torch and transformers 5.23")
    told = subprocess.run([interpreter, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True)
    return json.loads(told.stdout.splitlines()[-1])


def test_delta_rule_in_float32(answer: dict[str, list]) -> None:
    """4 E + 2 C + 6166 NV bytes per token, and about 264 for positions and rotary angles."""
    for hidden, channels, heads, slope in answer["delta_rule"]:
        assert slope == pytest.approx(4 * hidden + 2 * channels + 6166 * heads + 264, rel=0.01)


def test_mlp(answer: dict[str, list]) -> None:
    """6 (F + E), beside one layer's cache of 1024 bytes."""
    for hidden, inner, slope in answer["mlp"]:
        assert slope == pytest.approx(6 * (inner + hidden) + 264 + 1024, rel=0.01)


def test_state_and_cache(answer: dict[str, list]) -> None:
    assert answer["columns"] == 4
    assert answer["state_dtype"] == "torch.float32"
    assert "only full attention layers" in answer["quantized"]
