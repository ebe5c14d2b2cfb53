"""The folder of a run: there under its name when it is complete, and never over anything that is no checkpoint."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenfit.profiles.errors import BadInput
from qwenfit.quant.output import Output, open_output
from qwenfit.quant.source import Source, open_source

QUANTIZATION = {"quant_method": "made", "bits": 4}


@pytest.fixture
def source(checkpoint: Callable[..., Path], tmp_path: Path) -> Source:
    folder = Path(shutil.copytree(checkpoint("qwen3_5"), tmp_path / "source"))
    others = {
        "merges.txt": b"#version\n",
        "preprocessor_config.json": b'{"size": {"longest_edge": 1}}',
        "LICENSE": b"Apache\n",
        "special_tokens_map.json": b"{ }\r\n",
        "README.md": b"theirs",
        "quantize_config.json": b"{}",
        "modeling.py": b"import os",
        "pytorch_model.bin": b"\x80",
        ".gitattributes": b"x",
        "other.index.json": b"{}",
    }
    for name, content in others.items():
        (folder / name).write_bytes(content)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    return open_source(str(folder))


def finished(output: Output, source: Source) -> None:
    Path(output.folder, "weights").write_text("made")
    output.finish(source, QUANTIZATION, {"README.md": "ours"})


def test_it_appears_whole(source: Source, tmp_path: Path) -> None:
    output = open_output(str(tmp_path / "made"), source.folder)
    assert Path(output.folder) == tmp_path / ".made.partial" and not output.resumed
    Path(output.journal("done.jsonl")).write_text("0\n")
    assert not (tmp_path / "made").exists()
    finished(output, source)
    assert not (tmp_path / ".made.partial").exists()
    copied = ["LICENSE", "additional_chat_templates", "chat_template.jinja", "generation_config.json", "merges.txt"]
    copied += ["preprocessor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "made")) == sorted([*copied, "README.md", "config.json", "weights"])
    for name in copied:
        for file in [Path(name)] if name != "additional_chat_templates" else [Path(name, "tool.jinja")]:
            assert (tmp_path / "made" / file).read_bytes() == Path(source.folder, file).read_bytes()
    assert (tmp_path / "made" / "README.md").read_text() == "ours"
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (
        config == {**source.config, "quantization_config": QUANTIZATION} and "quantization_config" not in source.config
    )
    assert list(config)[:-1] == list(source.config)  # in their order, so that people can compare


def test_a_gguf_folder_holds_what_it_is_given(source: Source, tmp_path: Path) -> None:
    output = open_output(str(tmp_path / "made"), source.folder)
    Path(output.folder, "model.gguf").write_text("made")
    output.finish(source, None, {"README.md": "ours"})
    assert sorted(os.listdir(tmp_path / "made")) == ["README.md", "model.gguf"]


def test_what_is_there_is_kept_without_overwrite(source: Source, tmp_path: Path) -> None:
    target = str(tmp_path / "made")
    finished(open_output(target, source.folder), source)
    with pytest.raises(BadInput, match="made exists: give another target, or --overwrite to replace it"):
        open_output(target, source.folder)
    output = open_output(target, source.folder, overwrite=True)
    assert Path(target, "weights").exists()  # until the new one is complete
    Path(output.folder, "new").write_text("made")
    output.finish(source, QUANTIZATION)
    assert Path(target, "new").exists() and not Path(target, "weights").exists()
    assert sorted(os.listdir(tmp_path)) == ["made", "source"]


@pytest.mark.parametrize("made", ["folder", "file", "link"])
def test_nothing_but_a_checkpoint_is_replaced(made: str, source: Source, tmp_path: Path) -> None:
    target = tmp_path / "made"
    if made == "file":
        target.write_text("mine")
    elif made == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    else:
        target.symlink_to(source.folder)
    with pytest.raises(BadInput, match=r"(is no checkpoint, and nothing else is replaced|one inside the other)"):
        open_output(str(target), source.folder, overwrite=True)
    assert target.exists()


def test_an_empty_folder_is_as_good_as_none(source: Source, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    finished(open_output(str(tmp_path / "made"), source.folder), source)
    assert (tmp_path / "made" / "weights").exists()


def test_what_was_begun_is_gone_on_with_or_begun_anew(source: Source, tmp_path: Path) -> None:
    target = str(tmp_path / "made")
    first = open_output(target, source.folder)
    Path(first.folder, "half").write_text("done")
    Path(first.folder, ".activations-x").mkdir()  # what a killed run needed for itself alone
    first.release()
    with pytest.raises(BadInput, match="begun and not finished: --resume goes on, --overwrite begins anew"):
        open_output(target, source.folder)
    again = open_output(target, source.folder, resume=True)
    assert again.resumed and again.folder == first.folder and Path(again.folder, "half").exists()
    assert not Path(again.folder, ".activations-x").exists()
    again.release()
    anew = open_output(target, source.folder, overwrite=True)
    assert not anew.resumed and not Path(anew.folder, "half").exists()
    anew.discard()
    assert not open_output(target, source.folder, resume=True).resumed


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
@pytest.mark.parametrize("option", [{}, {"resume": True}, {"overwrite": True}])
def test_two_runs_do_not_write_into_one_folder(option: dict[str, bool], source: Source, tmp_path: Path) -> None:
    """Two of the same command would: one that is told to go on while the first is still at work."""
    first = open_output(str(tmp_path / "made"), source.folder)
    Path(first.folder, "half").write_text("done")
    with pytest.raises(BadInput, match="made is being written by another run: wait for it, or end it first"):
        open_output(str(tmp_path / "made"), source.folder, **option)
    assert Path(first.folder, "half").exists()
    finished(first, source)
    assert open_output(str(tmp_path / "made"), source.folder, overwrite=True).discard() is None


def test_a_run_killed_while_it_replaced(source: Source, tmp_path: Path) -> None:
    """Between the two renames the old checkpoint has a hidden name, and the target none: it is put back."""
    target = tmp_path / "made"
    finished(open_output(str(target), source.folder), source)
    target.rename(tmp_path / ".made.replaced")
    with pytest.raises(BadInput, match="made exists"):
        open_output(str(target), source.folder)
    assert (target / "weights").exists() and not (tmp_path / ".made.replaced").exists()
    shutil.copytree(target, tmp_path / ".made.replaced")  # killed after the second rename: rubbish
    open_output(str(target), source.folder, overwrite=True).discard()
    assert not (tmp_path / ".made.replaced").exists()


@pytest.mark.parametrize("inside", ["source", "source/made", "."])
def test_source_and_target_are_apart(inside: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="one inside the other: give a target of its own"):
        open_output(str(tmp_path / inside), source.folder, overwrite=True)
    assert Path(source.folder, "model.safetensors").exists()


@pytest.mark.parametrize("call", ["makedirs", "rename"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_what_the_disk_refuses(
    call: str, number: int, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"qwenfit.quant.output.os.{call}", refuse)
    with pytest.raises(BadInput, match=r"cannot be written: .*; (give another target|free some space)"):
        finished(open_output(str(tmp_path / "made"), source.folder), source)
    assert not (tmp_path / "made").exists()
