"""The folder that a run fills: hidden beside its target while it is being written, under its name once it is complete.

    output = open_output("Qwen3.5-9B-int4", source.folder, overwrite=False, resume=False)
    Shards(output.folder, entries, resume=output.resumed) ...
    output.finish(source, quantization, {"README.md": card})

A target is a complete checkpoint or is not there: renaming a folder is one step. With overwrite the old one steps aside
under another hidden name first and is deleted last; a run that is killed in between puts it back next time.
"""

import copy
import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from typing import Any

from ..profiles.errors import BadInput
from .placed_file import refuse
from .positioned import claim
from .shards import write_text
from .source import Source

# Beside the weights everything is copied that is no weight, no code and not written anew. Names of other quantizers'
# configurations would contradict ours.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".pkl")
_CODE = (".py", ".pyc", ".so", ".sh")
_WRITTEN = ("config.json", "README.md", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
_COPIED_FOLDERS = ("additional_chat_templates",)
_LIMIT_BYTES = 256 << 20
_CLAIM = ".running"
SCRATCH = ".activations-"
"""What the name of a folder begins with that a run needs for itself alone: one that was killed leaves it behind."""


@dataclass(frozen=True, slots=True)
class Output:
    """`folder` is where to write; `target` what it will be called; `resumed`: it was there already.

    It is claimed for this process until `release`: two runs of one command would write into the same files.
    """

    target: str
    folder: str
    resumed: bool
    claimed: FileIO

    def finish(
        self, source: Source, quantization: Mapping[str, Any] | None = None, texts: Mapping[str, str] | None = None
    ) -> None:
        """Copies what goes with the weights, writes config.json and `texts` (file name -> text), and renames.

        quantization: the `quantization_config` of config.json; None (a GGUF file has everything inside) copies nothing
        and writes no config.json. `BadInput` where the disk says no; then the folder stays, for --resume.
        """
        try:
            if quantization is not None:
                copy_beside(source.folder, self.folder)
                config = copy.deepcopy(dict(source.config))
                config["quantization_config"] = quantization
                write_text(os.path.join(self.folder, "config.json"), json.dumps(config, indent=2) + "\n")
            for name, text in (texts or {}).items():
                write_text(os.path.join(self.folder, name), text)
            self.release()
            for name in os.listdir(self.folder):
                if name.startswith("."):  # the run's own notes, see `journal`
                    _remove(os.path.join(self.folder, name))
            _replace(self.folder, self.target)
        except OSError as error:
            refuse(self.target, error)

    def release(self) -> None:
        """Lets another run have the folder, as the end of the process would."""
        self.claimed.close()

    def journal(self, name: str) -> str:
        """Where a run keeps a note for --resume: a hidden file or folder that `finish` removes."""
        return os.path.join(self.folder, f".{name}")

    def discard(self) -> None:
        """Removes what was written so far."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def open_output(target: str, source_folder: str, overwrite: bool = False, resume: bool = False) -> Output:
    """A folder to write into. With `resume` the one of an interrupted run, where there is one.

    `BadInput` in one sentence: the target exists and `overwrite` is not given, or it is no checkpoint (nothing else is
    ever replaced), an interrupted run lies there and neither `resume` nor `overwrite` is given, another run is still at
    work there, the source is inside the target or the other way round, or nothing can be written there.
    """
    target = os.path.abspath(target)
    parent, name = os.path.split(target)
    _check_apart(target, os.path.realpath(source_folder))
    folder, old = os.path.join(parent, f".{name}.partial"), os.path.join(parent, f".{name}.replaced")
    try:
        if os.path.lexists(old):
            _put_back(old, target)
        if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
            _check_replaceable(target, overwrite)
        if os.path.isdir(folder):
            claimed = _claimed(folder, target)
            if resume:
                _remove_scratch(folder)
                return Output(target, folder, True, claimed)
            claimed.close()
            if not overwrite:
                raise BadInput(f"{target} was begun and not finished: --resume goes on, --overwrite begins anew")
            shutil.rmtree(folder)
        os.makedirs(folder)
        return Output(target, folder, False, _claimed(folder, target))
    except OSError as error:
        refuse(parent if error.errno in (errno.EACCES, errno.EROFS) else target, error)


def copy_beside(source_folder: str, folder: str) -> None:
    """Tokenizer, chat template, processor files, generation_config, licences: byte for byte."""
    for name in sorted(os.listdir(source_folder)):
        path = os.path.join(source_folder, name)
        lower = name.lower()
        if os.path.isdir(path):
            if name in _COPIED_FOLDERS:
                shutil.copytree(path, os.path.join(folder, name), dirs_exist_ok=True)
            continue
        is_ours = name.startswith(".") or name in _WRITTEN or lower.endswith((*_WEIGHTS, *_CODE, ".index.json"))
        if not is_ours and os.path.isfile(path) and os.path.getsize(path) <= _LIMIT_BYTES:
            shutil.copyfile(path, os.path.join(folder, name))


def _claimed(folder: str, target: str) -> FileIO:
    file = claim(os.path.join(folder, _CLAIM))
    if file is None:
        raise BadInput(f"{target} is being written by another run: wait for it, or end it first")
    return file


def _remove_scratch(folder: str) -> None:
    for name in os.listdir(folder):
        if name.startswith(SCRATCH):
            shutil.rmtree(os.path.join(folder, name))


def _check_apart(target: str, source: str) -> None:
    real = os.path.realpath(target)
    if real == source or source.startswith(real + os.sep) or real.startswith(source + os.sep):
        raise BadInput(f"{target} and the source {source} are one inside the other: give a target of its own")


def _check_replaceable(target: str, overwrite: bool) -> None:
    if not overwrite:
        raise BadInput(f"{target} exists: give another target, or --overwrite to replace it")
    names = os.listdir(target) if os.path.isdir(target) else []
    if os.path.islink(target) or not any(name == "config.json" or name.endswith(".gguf") for name in names):
        raise BadInput(f"{target} is no checkpoint, and nothing else is replaced: give another target")


def _replace(folder: str, target: str) -> None:
    parent, name = os.path.split(target)
    old = os.path.join(parent, f".{name}.replaced")
    if os.path.lexists(target):
        os.rename(target, old)
    os.rename(folder, target)
    if os.name != "nt":  # Windows opens no folders, and has renamed when it returns
        descriptor = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: str, target: str) -> None:
    """What a killed run left: the old checkpoint where the new one did not take its place, else rubbish."""
    if os.path.lexists(target):
        shutil.rmtree(old)
    else:
        os.rename(old, target)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
