"""config.json alone gives the published sizes; anything wrong in it is one sentence that names file and field."""

import copy
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenfit.profiles.config import read_config
from qwenfit.profiles.errors import BadInput, QwenfitError, Unsupported
from qwenfit.profiles.model_catalog import model

CONFIGS = json.loads((Path(__file__).parent / "data" / "model_configs.json").read_text())["models"]
TINY = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
TINY_MOE = TINY | {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "intermediate_size": 96,
}
# Fields without which a size would be a guess.
REQUIRED = [
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "vocab_size",
    "max_position_embeddings",
]


def _model(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return model(str(path))


def _refused(tmp_path, config, kind: type[QwenfitError] = BadInput):
    start = time.process_time()
    with pytest.raises(kind) as caught:
        _model(tmp_path, config)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert "config.json" in message and "\n" not in message and len(message) < 500 + len(str(tmp_path))
    return message


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_give_the_catalogs_model(tmp_path, name):
    """Every dimension and every tensor, so also the published total_size: test_tensors.py pins the catalog's."""
    found, expected = _model(tmp_path, CONFIGS[name]), model(name)
    same = (
        "architecture",
        "hidden_size",
        "layer_types",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "conv_dim",
        "state_elements",
        "vocab_size",
        "intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "mtp_num_hidden_layers",
        "mamba_ssm_dtype",
        "vision",
        "rope",
        "checkpoint_bytes",
        "parameters",
    )
    assert {field: getattr(found, field) for field in same} == {field: getattr(expected, field) for field in same}

    def listed(model):
        return sorted((t.name, t.shape, t.dtype, t.part, t.role, t.layers, t.experts) for t in model.tensors)

    assert listed(found) == listed(expected)


def test_a_tiny_text_only_model(tmp_path):
    """Two layers, counted by hand: 64 x 128 embedding, one layer of each kind, no MTP, float32."""
    found = _model(tmp_path, TINY)
    delta_net = (32 + 32) * 64 + 32 * 64 + 2 * 2 * 64 + 64 * 4 + 2 + 2 + 16 + 64 * 32
    attention = 128 * 64 + 2 * 32 * 64 + 64 * 64 + 2 * 32
    mlp_and_norms = 2 * (3 * 64 * 96 + 2 * 64)
    assert found.parameters == 128 * 64 + delta_net + attention + mlp_and_norms + 64
    assert found.checkpoint_bytes == 4 * found.parameters
    assert found.layer_types == ("linear_attention", "full_attention")
    assert not found.has_vision and found.mtp_num_hidden_layers == 0 and found.mamba_ssm_dtype == "auto"
    assert all(tensor.name.startswith("model.") for tensor in found.tensors)


def test_a_text_only_model_inside_a_vision_language_config(tmp_path):
    config = copy.deepcopy(CONFIGS["qwen3.5-9b"])
    del config["vision_config"]
    found = _model(tmp_path, config)
    assert not found.has_vision and found.parameters == model("9b").parameters - 456010480
    config = CONFIGS["qwen3.5-9b"] | {"language_model_only": True}
    assert not _model(tmp_path, config).has_vision


def test_experts_and_dense_layers(tmp_path):
    sparse = _model(tmp_path, TINY_MOE)
    assert (sparse.num_experts, sparse.intermediate_size) == (4, 0)
    mixed = _model(tmp_path, TINY_MOE | {"mlp_only_layers": [1]})
    layers = {tensor.role: tensor.layers for tensor in mixed.tensors}
    assert (layers["mlp.gate_proj"], layers["experts.gate_up_proj"]) == ((1,), (0,))
    assert mixed.intermediate_size == 96
    without = {name: value for name, value in TINY_MOE.items() if name != "intermediate_size"}
    assert "intermediate_size is missing" in _refused(tmp_path, without | {"mlp_only_layers": [1]})


def test_names_come_from_the_folder_or_the_file(tmp_path):
    folder = tmp_path / "My-Qwen"
    folder.mkdir()
    for file, name in (("config.json", "my-qwen"), ("other.json", "other")):
        (folder / file).write_text(json.dumps(TINY))
        assert model(str(folder / file)).name == name


@pytest.mark.parametrize("field", REQUIRED)
def test_every_missing_field_is_named(tmp_path, field):
    config = {name: value for name, value in TINY.items() if name != field}
    assert f"{field} is missing" in _refused(tmp_path, config)
    nested = copy.deepcopy(CONFIGS["qwen3.5-9b"])
    del nested["text_config"][field]
    assert f"text_config.{field} is missing" in _refused(tmp_path, nested)


@pytest.mark.parametrize("field", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_every_missing_field_of_a_mixture_of_experts_is_named(tmp_path, field):
    assert f"{field} is missing" in _refused(tmp_path, {k: v for k, v in TINY_MOE.items() if k != field})


@pytest.mark.parametrize("field", list(CONFIGS["qwen3.5-9b"]["vision_config"]))
def test_every_missing_field_of_the_vision_tower_is_named(tmp_path, field):
    config = copy.deepcopy(CONFIGS["qwen3.5-9b"])
    del config["vision_config"][field]
    if field in ("deepstack_visual_indexes", "hidden_act", "initializer_range", "model_type"):
        assert _model(tmp_path, config).parameters == model("9b").parameters
    else:
        assert f"vision_config.{field} is missing" in _refused(tmp_path, config)


def test_a_missing_tie_word_embeddings_is_named(tmp_path):
    assert "tie_word_embeddings is missing" in _refused(tmp_path, {k: v for k, v in TINY.items() if "tie" not in k})


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30, "64", 64.0, 64.5, True, None, [64], {"a": 1}, "x" * 10_000])
@pytest.mark.parametrize("field", [name for name in REQUIRED if name != "max_position_embeddings"])
def test_every_wrong_value_is_named(tmp_path, field, value):
    assert f": {field} is " in _refused(tmp_path, TINY | {field: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads 3 is no multiple of"),
        ({"linear_num_value_heads": 3, "linear_num_key_heads": 2}, "linear_num_value_heads 3 is no multiple of"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, but num_hidden_layers is 2"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types has no linear_attention layer"),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types has no full_attention layer"),
        ({"layer_types": ["full_attention", "mamba"]}, "layer_types.1 is 'mamba'"),
        ({"layer_types": ["full_attention"] * 100_000}, "layer_types is a list of 100000"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"full_attention_interval": None}, "layer_types is missing, and so is full_attention_interval"),
        ({"full_attention_interval": 4}, "layer_types has no full_attention layer"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"dtype": ["bfloat16"]}, "dtype is a list of 1"),
        ({"mamba_ssm_dtype": "float8"}, "mamba_ssm_dtype is 'float8'"),
        ({"mtp_num_hidden_layers": 10**9}, "mtp_num_hidden_layers is 1000000000"),
        ({"rope_parameters": {"factor": -1}}, "rope_parameters.factor"),
        ({"rope_parameters": 3}, "rope_parameters is 3, but it should be an object"),
        ({"quantization_config": []}, "quantization_config is a list of 0"),
        ({"quantization_config": {}}, "quantization_config.quant_method is None"),
        ({"text_config": 7}, "text_config is 7"),
        ({"text_config": {}}, "text_config.hidden_size is missing"),
        ({"architectures": None, "model_type": None}, "architectures is missing"),
        ({"architectures": [7]}, "architectures is missing"),
    ],
)
def test_every_contradiction_is_named(tmp_path, change, words):
    assert words in _refused(tmp_path, TINY | change)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("out_hidden_size", 3584, "out_hidden_size 3584 differs from text_config.hidden_size 4096"),
        ("num_heads", 7, "hidden_size 1152 is no multiple of num_heads 7"),
        ("depth", 0, "vision_config.depth is 0"),
    ],
)
def test_contradictions_of_the_vision_tower_are_named(tmp_path, field, value, words):
    config = copy.deepcopy(CONFIGS["qwen3.5-9b"])
    config["vision_config"][field] = value
    assert words in _refused(tmp_path, config)


def test_a_vision_tower_that_is_no_object_is_named(tmp_path):
    config = CONFIGS["qwen3.5-9b"] | {"vision_config": []}
    assert "vision_config is a list of 0, but it should be an object" in _refused(tmp_path, config)


def test_more_experts_per_token_than_experts(tmp_path):
    assert "num_experts_per_tok 5 exceeds num_experts 4" in _refused(tmp_path, TINY_MOE | {"num_experts_per_tok": 5})


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("LlamaForCausalLM", "llama"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Qwen4ExpForConditionalGeneration", "qwen4_exp"),
        (None, "qwen4_exp"),
        ("Qwen3_5ForSequenceClassification", "qwen3_5"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, architecture, model_type):
    config = TINY | {"architectures": architecture and [architecture], "model_type": model_type}
    message = _refused(tmp_path, config, Unsupported)
    assert f"is a '{architecture or model_type}'; qwenfit takes Qwen3_5ForConditionalGeneration" in message


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_5"])
def test_without_architectures_the_model_type_decides(tmp_path, model_type):
    config = {name: value for name, value in TINY.items() if name != "architectures"} | {"model_type": model_type}
    assert _model(tmp_path, config).architecture == "qwen3_5"


@pytest.mark.parametrize("field", ["attention_bias", "mtp_use_dedicated_embeddings"])
def test_what_no_release_has_is_not_sized_wrongly(tmp_path, field):
    assert f"{field} true is not supported" in _refused(tmp_path, TINY | {field: True}, Unsupported)


def test_queries_without_gates(tmp_path):
    shapes = {tensor.role: tensor.shape for tensor in _model(tmp_path, TINY | {"attn_output_gate": False}).tensors}
    assert shapes["self_attn.q_proj"] == (64, 64)


def test_qwen3_next_has_an_mtp_layer_that_its_config_does_not_mention(tmp_path):
    """81,324,862,720 published parameters hold it; vLLM qwen3_next_mtp.py takes one layer where nothing is said."""
    assert "mtp_num_hidden_layers" not in CONFIGS["qwen3-next-80b"]
    assert _model(tmp_path, CONFIGS["qwen3-next-80b"]).parameters == 81324862720
    without = CONFIGS["qwen3-next-80b"] | {"num_nextn_predict_layers": 0}
    assert _model(tmp_path, without).parameters == 79674391296


def test_hostile_json_reaches_nobody(tmp_path):
    deep = json.dumps(TINY)[:-1] + ', "x": ' + "[" * 10_000 + "]" * 10_000 + "}"
    assert "nested too deeply" in _refused(tmp_path, deep)
    assert "twice" in _refused(tmp_path, json.dumps(TINY)[:-1] + ', "hidden_size": 64}')
    assert "NaN" in _refused(tmp_path, json.dumps(TINY | {"x": float("nan")}))


_VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*TINY_MOE, "layer_types", "rope_parameters", "mlp_only_layers"]), _VALUES))
def test_any_change_gives_a_model_or_an_error_of_ours(tmp_path, change):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY_MOE | change))
    try:
        found = read_config(str(path)).model()
    except QwenfitError as refused:
        assert "\n" not in str(refused)
        return
    assert found.parameters > 0 and found.checkpoint_bytes > 0
