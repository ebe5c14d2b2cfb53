"""YAML of the users' own: one sentence with file and line, whatever is in it. The cases are made by hand."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from qwenfit.profiles.errors import BadInput
from qwenfit.profiles.yaml_file import LIMIT_BYTES, read_yaml


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    length_tokens: int
    share: float = 1.0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    parts: list[Inner]
    rate: float = 1.0


def written(folder: Path, text: str | bytes) -> str:
    file = folder / "w.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def refused(folder: Path, text: str | bytes) -> str:
    with pytest.raises(BadInput) as error:
        read_yaml(written(folder, text)).checked(Outer)
    sentence = str(error.value)
    assert "w.yaml" in sentence and "\n" not in sentence and len(sentence) < 600
    return sentence


def test_what_is_right_is_read(tmp_path: Path) -> None:
    read = read_yaml(written(tmp_path, "rate: 2.5\nparts:\n  - length_tokens: 5\n  - {length_tokens: 6, share: 0.5}\n"))
    assert read.checked(Outer) == Outer(rate=2.5, parts=[Inner(length_tokens=5), Inner(length_tokens=6, share=0.5)])
    assert read.line(("parts", 1, "share")) == 4 and read.line(("parts", 0)) == 3 and read.line(("nowhere",)) == 1


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("parts:\n  - length_tokens: 5\n    shares: 1.0\n", 3, "did you mean share"),
        ("parts: []\nrates: 3\n", 2, "did you mean rate"),
        ("parts:\n  - length_tokens: many\n", 2, "whole number"),
        ("rate: .inf\nparts:\n  - {length_tokens: 1.5}\n", 3, "whole number"),
        ("\n\nrate: quick\nparts: []\n", 3, "finite number"),
        ("rate: 1.0\n", 1, "parts is missing"),
        ("rate: 1.0\nrate: 2.0\nparts: []\n", 2, "twice"),
        ("a: &x 1\nb: *x\n", 2, "aliases"),
        ("parts:\n  - 5\n", 2, "key: value"),
        ("rate: [\n", 2, "not YAML"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    sentence = refused(tmp_path, text)
    assert f"w.yaml, line {line}:" in sentence and says in sentence


@pytest.mark.parametrize(
    "text", ["", "- 1\n", "just words\n", b"\xff\xfe", "[" * 3000, "a: " + "[" * 60, "!!python/name:os.system x"]
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str | bytes) -> None:
    refused(tmp_path, text)


def test_ten_megabytes_are_refused_unread(tmp_path: Path) -> None:
    assert f"{LIMIT_BYTES:,}" in refused(tmp_path, b"a: 1\n" * 2_000_000)


def test_only_files_are_opened(tmp_path: Path) -> None:
    for path in (str(tmp_path), str(tmp_path / "none.yaml"), "nul\0.yaml"):
        with pytest.raises(BadInput):
            read_yaml(path)


@given(st.text(max_size=200))
def test_any_text_is_a_value_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        read_yaml(written(folder, text.encode("utf-8", "surrogatepass"))).checked(Outer)
    except BadInput as error:
        assert "w.yaml" in str(error)
