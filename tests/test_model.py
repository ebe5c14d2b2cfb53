"""Models by every name that people type, and what follows from a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.profiles.errors import BadInput, QwenfitError, UnknownName, Unsupported
from qwenfit.profiles.model import Model, Tensor, Vision, first_layers, stored_bytes
from qwenfit.profiles.model_catalog import model, models

CONFIGS = json.loads((Path(__file__).parent / "data" / "model_configs.json").read_text())["models"]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("9b", "qwen3.5-9b"),
        ("qwen3.5-9b", "qwen3.5-9b"),
        ("Qwen3.5-9B", "qwen3.5-9b"),
        ("Qwen/Qwen3.5-9B", "qwen3.5-9b"),
        (" QWEN/QWEN3.5-9B ", "qwen3.5-9b"),
        ("0.8B", "qwen3.5-0.8b"),
        ("27b", "qwen3.5-27b"),
        ("35b-a3b", "qwen3.5-35b-a3b"),
        ("397b", "qwen3.5-397b-a17b"),
        ("qwen3.6-27b", "qwen3.6-27b"),
        ("Qwen/Qwen3.6-35B-A3B", "qwen3.6-35b-a3b"),
        ("qwen3-next-80b", "qwen3-next-80b"),
        ("qwen3.5:9b", "qwen3.5-9b"),
        ("Qwen3.5 35B A3B", "qwen3.5-35b-a3b"),
        ("Qwen3-Next-80B-A3B-Thinking", "qwen3-next-80b"),
    ],
)
def test_names(typed, name):
    assert model(typed).name == name


def test_look_ups_return_one_object():
    assert model("9b") is model("Qwen/Qwen3.5-9B") is models()[3]
    assert model("Qwen/Qwen3.5-27B-FP8") is model("qwen3.5-27b-fp8")


def test_the_catalog():
    names = [found.name for found in models()]
    assert len(names) == len(set(names)) == 11
    for found in models():
        assert model(found.name) is found and model(found.repo) is found
        assert found.source.startswith("https://") and found.stored is None and found.path is None


@pytest.mark.parametrize(
    ("repo", "name", "stored"),
    [
        ("Qwen/Qwen3.5-27B-FP8", "qwen3.5-27b", "fp8"),
        ("Qwen/Qwen3.5-35B-A3B-GPTQ-Int4", "qwen3.5-35b-a3b", "gptq-int4-official"),
        ("nvidia/Qwen3.5-397B-A17B-NVFP4", "qwen3.5-397b-a17b", "nvfp4"),
        ("Qwen/Qwen3.6-35B-A3B-FP8", "qwen3.6-35b-a3b", "fp8"),
    ],
)
def test_quantized_repositories_are_the_same_model_in_a_format(repo, name, stored):
    found = model(repo.upper())
    assert (found.name, found.stored, found.repo) == (name, stored, repo)
    assert found.tensors == model(name).tensors and found.parameters == model(name).parameters


def test_base_models_keep_their_repository():
    assert model("Qwen/Qwen3.5-9B-Base").repo == "Qwen/Qwen3.5-9B-Base"
    assert model("Qwen/Qwen3.5-9B-Base").checkpoint_bytes == model("9b").checkpoint_bytes


@pytest.mark.parametrize(("typed", "hint"), [("qwen3.5-8b", "qwen3.5-9b"), ("Qwen/Qwen3.5-9", "qwen/qwen3.5-9b")])
def test_unknown_names_come_with_the_nearest(typed, hint):
    with pytest.raises(UnknownName, match=f"no model is called '{typed}'; did you mean .*{hint}"):
        model(typed)


def test_unknown_names_without_neighbours():
    with pytest.raises(UnknownName, match="`qwen-plan models` lists them") as caught:
        model("gpt2-but-otherwise")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("typed", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c", "x.gguf", "dir\\x", "c.json"])
def test_paths_that_do_not_exist_say_so(typed):
    with pytest.raises(BadInput, match="is neither a file nor a folder"):
        model(typed)


@given(st.text(max_size=200))
def test_any_name_is_a_model_or_an_error_of_ours(name):
    try:
        assert model(name).parameters > 0
    except QwenfitError as refused:
        assert "\n" not in str(refused)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="is not a model"):
        model(str(path))


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["qwen3.5-9b"]))
    first = model(str(path))
    assert first.num_layers == 32 and model(str(path)) is first
    path.write_text(json.dumps(CONFIGS["qwen3.5-27b"]))
    assert model(str(path)).num_layers == 64


def test_names_of_tensors():
    single = Tensor("lm_head.weight", (4, 2), "BF16", "text", "lm_head")
    layered = Tensor("l.{layer}.w", (4,), "F32", "text", "norm", layers=(3, 7))
    expert = Tensor("l.{layer}.e.{expert}.w", (4,), "U8", "text", "experts.up_proj", layers=(0, 5), experts=2)
    assert list(single.names()) == ["lm_head.weight"]
    assert list(layered.names()) == ["l.3.w", "l.7.w"]
    assert list(expert.names()) == ["l.0.e.0.w", "l.0.e.1.w", "l.5.e.0.w", "l.5.e.1.w"]
    assert (single.count, layered.count, expert.count) == (1, 2, 4)
    assert (single.stored_bytes, layered.stored_bytes, expert.stored_bytes) == (16, 16, 4)


def test_expanded_names_are_the_checkpoints():
    names = [name for name, _ in model("9b").expanded()]
    assert len(names) == len(set(names)) == 775
    assert "model.language_model.layers.3.self_attn.q_proj.weight" in names
    assert "model.language_model.layers.4.linear_attn.A_log" in names
    assert "model.language_model.layers.3.linear_attn.A_log" not in names
    assert "mtp.layers.0.mlp.up_proj.weight" in names and "model.visual.blocks.26.norm2.bias" in names
    assert len({name for name, _ in model("qwen3-next-80b").expanded()}) == 75944


def test_stored_bytes():
    """F4 packs two elements into a byte; Q4_K has 144 bytes for 256 elements, Q8_0 34 for 32 (ggml-common.h)."""
    assert stored_bytes((3, 8), "F4") == 12
    assert stored_bytes((2, 512), "Q4_K") == 4 * 144
    assert stored_bytes((2, 64), "Q8_0") == 4 * 34
    with pytest.raises(KeyError):
        stored_bytes((1,), "F5")


def test_dimensions_of_9b():
    """Figures of config.json, and what follows: 6,144 + 2,048 channels, 32 states of 128 x 128."""
    found = model("9b")
    assert (found.full_attention_layers, found.linear_attention_layers) == (8, 24)
    assert found.layer_types[3] == found.layer_types[31] == "full_attention"
    assert (found.conv_dim, found.state_elements) == (8192, 32 * 128 * 128)
    assert (found.is_moe, found.has_vision, found.max_image_tokens) == (False, True, 16384)
    assert found.vision == Vision(27, 1152, 4304, 16, 4096)


def test_active_parameters():
    """35B-A3B: 3.45 B pass through for one token, of 34.66 B text parameters (8 of 256 experts)."""
    assert model("35b-a3b").active_parameters == 3454988928
    assert model("397b").active_parameters == 17349040896
    assert model("9b").active_parameters == 8953803264


def test_yarn_reaches_what_the_model_does_not():
    """The model card: factor 4.0 for 1,010,000 tokens, 2.0 for 524,288; rope_parameters as its recipe has them."""
    found = model("9b")
    assert (found.yarn_factor(262144), found.yarn_rope(262144)) == (None, None)
    assert [found.yarn_factor(tokens) for tokens in (262145, 524288, 524289, 1010000, 1 << 20)] == [2, 2, 3, 4, 4]
    assert found.yarn_rope(1010000) == {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "rope_type": "yarn",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "factor": 4.0,
        "original_max_position_embeddings": 262144,
    }


def test_a_config_with_yarn_in_it_reaches_further(tmp_path):
    config = json.loads(json.dumps(CONFIGS["qwen3.5-9b"]))
    config["text_config"]["rope_parameters"].update(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=262144
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    found = model(str(path))
    assert found.native_context_tokens == 1048576 and found.yarn_factor(1010000) is None
    assert found.yarn_factor(1 << 21) == 8


def test_a_catalog_name_costs_little():
    """No YAML, no pydantic, nothing numeric: the command has 0.15 s in all."""
    code = (
        "import sys; from qwenfit.profiles import model; model('qwen3.5-9b')\n"
        "heavy = {'yaml', 'pydantic', 'numpy', 'torch', 'difflib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-35b-a3b"])
def test_the_first_layers_have_their_share_of_the_bytes(name: str) -> None:
    """A fourth of the layers has a fourth of the layers' bytes, for each kind of layer repeats; what occurs once (the
    embedding, lm_head, the final norm) and what is not text stays whole."""
    whole = model(name)
    part = first_layers(whole, whole.num_layers // 4 // 4 * 4)

    def layer_bytes(one: Model) -> int:
        return sum(
            tensor.stored_bytes * tensor.count for tensor in one.tensors if tensor.part == "text" and tensor.layers
        )

    assert layer_bytes(part) * whole.num_layers == layer_bytes(whole) * part.num_layers
    assert part.checkpoint_bytes - layer_bytes(part) == whole.checkpoint_bytes - layer_bytes(whole)
    with pytest.raises(Unsupported, match="give a multiple of 4"):
        first_layers(whole, 3)
