"""Words of a launch line: quoting that a shell undoes, names of checkpoints, rope scaling where a model has it."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.planner.engines.launch import checkpoint_name, compact_json, rope_overrides, shell_line
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


def test_rope_scaling_goes_where_the_architecture_keeps_it() -> None:
    assert rope_overrides(model("qwen3.5-9b"), 262144) is None
    nested, flat = rope_overrides(model("qwen3.5-9b"), 262145), rope_overrides(model("qwen3-next-80b"), 262145)
    assert nested and list(nested) == ["text_config"]
    assert flat and list(flat) == ["rope_parameters"]


def test_releases_are_compared_as_numbers() -> None:
    assert release("v0.20.1rc1.dev16") == (0, 20, 1) and release("nightly") == ()
    assert since("0.32", "0.30") and since("0.30.0", "0.30") and not since("0.9.2", "0.20") and since("0.100", "0.30")
    assert since("", "0.30")
