"""Words of a launch line: quoting that a shell undoes, names of checkpoints, rope scaling where a model has it."""

import shlex
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.planner import Request, plan
from qwenfit.planner.engines.launch import base_name, checkpoint_name, compact_json, rope_overrides, shell_line
from qwenfit.planner.engines.versions import release, since
from qwenfit.profiles import model, weight_format


@given(st.lists(st.text(st.characters(exclude_characters="\x00"), max_size=12), min_size=1, max_size=5))
def test_a_shell_reads_back_the_words(words: list[str]) -> None:
    assert shlex.split(shell_line(words)) == words


def test_numbers_and_plain_words_stay_bare() -> None:
    assert shell_line(["A=1", "vllm", "./Qwen3.5-9B-int4", 0.92, 262144]) == "A=1 vllm ./Qwen3.5-9B-int4 0.92 262144"
    assert compact_json({"a": [1, 2]}) == '{"a":[1,2]}'


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("qwen3.5-9b", "bf16", "Qwen/Qwen3.5-9B"),
        ("qwen3.5-9b", "int8", "./Qwen3.5-9B-int8"),
        ("qwen3.5-122b-a10b", "fp8", "Qwen/Qwen3.5-122B-A10B-FP8"),
        ("qwen3.5-122b-a10b", "gptq-int4-official", "Qwen/Qwen3.5-122B-A10B-GPTQ-Int4"),
        ("qwen3.5-122b-a10b", "nvfp4", "nvidia/Qwen3.5-122B-A10B-NVFP4"),
        ("qwen3.5-9b", "nvfp4", "./Qwen3.5-9B-nvfp4"),
    ],
)
def test_checkpoints_by_format(name: str, weights: str, expected: str) -> None:
    assert checkpoint_name(model(name), weight_format(weights)) == expected


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config.json and no weights, which is also where one stands."""
    made = tmp_path / "my-model"
    made.mkdir()
    shutil.copy(Path(__file__).parent / "data" / "tiny_qwen3_5.json", made / "config.json")
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize(
    ("engine", "weights", "device", "word"),
    [
        ("vllm", "int4", "rtx3090", "./my-model-int4"),
        ("sglang", "int4", "rtx3090", "./my-model-int4"),
        ("llama.cpp", "q4_k_m", "rtx3090", "my-model-Q4_K_M.gguf"),
        ("transformers", "q4_k_m", "rtx3090", ".:my-model-Q4_K_M.gguf"),
        ("mlx", "mlx-4bit", "m4-32gb", "./my-model-4bit"),
    ],
)
def test_what_is_made_of_a_folder_is_called_after_it(
    folder: Path, engine: str, weights: str, device: str, word: str
) -> None:
    """However the folder was named: `.` made `.-BF16.gguf`, config.json `config.json-BF16.gguf`, and a repository of
    somebody else's conversion was asked for weights that nobody else has."""
    for asked in (".", str(folder), f"{folder}/", "./config.json", str(folder / "config.json")):
        found = plan(Request(model=asked, devices=(device,), ctx_tokens=1024, engine=engine, weights=weights))
        assert word in shlex.split(found.best.command), found.best.command


@pytest.mark.parametrize(("asked", "given"), [(".", "."), ("config.json", "."), ("./config.json", ".")])
def test_an_engine_is_given_the_folder_of_a_config(folder: Path, asked: str, given: str) -> None:
    found = plan(Request(model=str(asked), devices=("rtx3090",), ctx_tokens=1024, engine="vllm", weights="bf16"))
    assert shlex.split(found.best.command)[:3] == ["vllm", "serve", given]
    assert base_name(found.best.setup.model) == found.best.setup.model.name == "my-model"


def test_ollama_makes_a_model_of_a_file_first(folder: Path) -> None:
    """`ollama create` reads a Modelfile, and no standard input (cmd/cmd.go `getModelfileName`)."""
    found = plan(Request(model=".", devices=("rtx3090",), ctx_tokens=1024, engine="ollama", weights="q4_k_m"))
    assert found.best.command.endswith(
        "ollama serve & sleep 3; echo 'FROM ./my-model-Q4_K_M.gguf' > my-model.Modelfile; "
        "ollama create my-model -f my-model.Modelfile; ollama run my-model"
    )


def test_rope_scaling_goes_where_the_architecture_keeps_it() -> None:
    assert rope_overrides(model("qwen3.5-9b"), 262144) is None
    nested, flat = rope_overrides(model("qwen3.5-9b"), 262145), rope_overrides(model("qwen3-next-80b"), 262145)
    assert nested and list(nested) == ["text_config"]
    assert flat and list(flat) == ["rope_parameters"]


def test_releases_are_compared_as_numbers() -> None:
    assert release("v0.20.1rc1.dev16") == (0, 20, 1) and release("nightly") == ()
    assert since("0.32", "0.30") and since("0.30.0", "0.30") and not since("0.9.2", "0.20") and since("0.100", "0.30")
    assert since("", "0.30")
