"""A tokenizer as GGUF metadata: every token under its id and type, and a name for how text is split."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenfit.profiles.errors import BadInput, QwenfitError, Unsupported
from qwenfit.quant.gguf_vocabulary import add_vocabulary

pytest.importorskip("gguf", reason="GGUF files are written with it: pip install gguf")


class Recorder:
    """Stands in for a GGUFWriter: what was added under which name."""

    def __init__(self) -> None:
        self.added: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        return lambda value: self.added.__setitem__(name.removeprefix("add_"), value)


def added(folder: Path, vocab_size: int = 512) -> dict[str, Any]:
    recorder: Any = Recorder()
    add_vocabulary(recorder, str(folder), vocab_size)
    return recorder.added


@pytest.fixture
def copied(checkpoint: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_5"), tmp_path / "source"))


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_tokens_under_their_ids(copied: Path) -> None:
    found = added(copied)
    tokens, types = found["token_list"], found["token_types"]
    assert len(tokens) == len(types) == 512
    assert (tokens[65], types[65]) == ("A", 1) and tokens[32] == "Ġ"
    assert [tokens[256], tokens[257], tokens[260]] == ["<|endoftext|>", "<|im_end|>", "Ġthe"]
    assert types[256:262] == [3, 3, 1, 1, 1, 5] and tokens[300] == "[PAD300]"
    assert found["token_merges"] == ["t h", "th e", "Ġ the"]
    assert (found["tokenizer_model"], found["tokenizer_pre"]) == ("gpt2", "qwen35")
    assert (found["eos_token_id"], found["pad_token_id"], found["add_bos_token"]) == (257, 256, False)
    assert found["chat_template"] == (copied / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            "qwen2",
        ),
        (None, "gpt-2"),
    ],
)
def test_how_text_is_split_has_a_name(copied: Path, pattern: str | None, name: str) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        parts = tokenizer["pre_tokenizer"]["pretokenizers"]
        if pattern is None:
            tokenizer["pre_tokenizer"] = {**parts[1], "use_regex": True}
        else:
            parts[0]["pattern"]["Regex"] = pattern

    assert added(changed(copied, change))["tokenizer_pre"] == name


def test_added_tokens_that_are_no_control_tokens(copied: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"] += [
            {"id": 261, "content": "<think>", "special": False},
            {"id": 262, "content": "<|box|>", "special": False},
        ]

    assert added(changed(copied, change))["token_types"][261:263] == [4, 3]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="."),
            Unsupported,
            "splits text as no",
        ),
        (lambda t: t["model"].update(type="Unigram"), Unsupported, "is no BPE"),
        (lambda t: t["model"]["vocab"].update(x=512), BadInput, "token 'x' has the id 512, outside vocab_size 512"),
        (lambda t: t["model"]["vocab"].update(x=-1), BadInput, "has the id -1"),
        (lambda t: t["added_tokens"].append({"id": 3}), BadInput, "which is no token"),
        (lambda t: t["model"].update(merges=[]), Unsupported, "has no merges"),
    ],
)
def test_what_llama_cpp_would_get_wrong(
    copied: Path, change: Callable[[Any], None], error: type[QwenfitError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        added(changed(copied, change))


def test_a_folder_without_a_tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"has no tokenizer\.json, which a GGUF file needs; finish the download"):
        added(copied)
