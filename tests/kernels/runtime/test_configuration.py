"""What the runtime reads of a config.json, and what it refuses rather than compute something else."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenfit.kernels.runtime.configuration import configuration_of, read_configuration
from qwenfit.profiles.model_catalog import model as catalog_model

DATA = Path(__file__).parents[2] / "data"


def write(folder: Path, name: str = "qwen3_5", generation: Any = None, **changes: Any) -> str:
    """A folder with a tiny model's config.json and no weights; None takes a field out."""
    fields = {**json.loads((DATA / f"tiny_{name}.json").read_text()), **changes}
    kept = {key: value for key, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


def test_dimensions_of_the_9b() -> None:
    """By hand from its published config: 16 and 32 heads of 128 make 8,192 channels and a state of 524,288 elements."""
    config = configuration_of(catalog_model("qwen3.5-9b"))
    assert (config.num_layers, config.full_attention_layers, config.linear_attention_layers) == (32, 8, 24)
    assert (config.key_dim, config.value_dim, config.conv_dim, config.state_elements) == (2048, 4096, 8192, 524288)
    assert config.rms_norm_eps == 1e-6 and not config.is_moe and config.rope["rope_theta"] == 10_000_000


def test_a_folder_says_what_the_catalog_does_not(tmp_path: Path) -> None:
    config = read_configuration(write(tmp_path, rms_norm_eps=1e-5))
    assert config.rms_norm_eps == 1e-5 and config.stop_tokens == (1,)
    assert config.architecture == "qwen3_5" and config.rope["mrope_section"] == [4, 2, 2]


@pytest.mark.parametrize(
    ("generation", "eos", "expected"),
    [
        ({"eos_token_id": [7, 8]}, 1, (7, 8)),
        ({"eos_token_id": 7}, 1, (7,)),
        ({}, 1, (1,)),
        (None, [3, 4], (3, 4)),
        (None, None, ()),
    ],
)
def test_stop_tokens(tmp_path: Path, generation: Any, eos: Any, expected: tuple[int, ...]) -> None:
    """generation_config.json comes first: it has two for Qwen3.5, config.json one."""
    assert read_configuration(write(tmp_path, generation=generation, eos_token_id=eos)).stop_tokens == expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and the native runtime computes 'silu' only"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, not a small number"),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps is 2.0"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "is a 'LlamaForCausalLM'"),
    ],
)
def test_other_math_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_configuration(write(tmp_path, **changes))


def test_router_weights_that_are_not_normalised_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="norm_topk_prob is False"):
        read_configuration(write(tmp_path, "qwen3_next", norm_topk_prob=False))


def test_swish_is_silu(tmp_path: Path) -> None:
    """Qwen3.6-27B says output_gate_type swish."""
    assert read_configuration(write(tmp_path, output_gate_type="swish")).hidden_size == 128
