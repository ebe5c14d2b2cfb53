"""The folder of a bundle: written whole or not at all, and never in the place of what is no bundle."""

import os
from collections.abc import Iterator, Mapping
from json import dumps

from ..profiles.errors import BadInput
from ..profiles.json_file import read_json_object
from ..profiles.names import quote

MANIFEST = "bundle.json"  # what was written, so that --overwrite replaces nothing else


def write_folder(out: str, texts: Mapping[str, str], sha256: str, overwrite: bool) -> None:
    """The folder with these files, all of them or none: it is made beside its place and then takes it. What somebody
    put beside an older bundle's files (.env, weights) moves along.

    BadInput where something else is there: without `overwrite` anything, with it what is no bundle of ours.
    """
    from shutil import rmtree
    from tempfile import mkdtemp

    place = os.path.abspath(out)
    kept = kept_files(out, overwrite)
    manifest = dumps({"schema": 1, "plan_sha256": sha256, "files": [*texts]}, indent=1) + "\n"
    made: list[str] = []
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        made = [mkdtemp(prefix=".qwen-plan-deploy-", dir=os.path.dirname(place)) for _ in range(2)]
        fresh, old = os.path.join(made[0], "new"), os.path.join(made[1], "old")
        for name, text in {**texts, MANIFEST: manifest}.items():
            _write_file(os.path.join(fresh, *name.split("/")), text)
        _swap(fresh, place, old, kept)
    except OSError as error:
        raise BadInput(f"{quote(out)} cannot be written: {error.strerror}") from None
    finally:
        for folder in made:
            rmtree(folder, ignore_errors=True)


def _write_file(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _swap(fresh: str, place: str, old: str, kept: list[str]) -> None:
    """`fresh` becomes `place`, and `place` becomes `old`, but for what is kept; or everything stays as it was."""
    moved: list[str] = []
    if not os.path.isdir(place):
        os.rename(fresh, place)
        return
    os.rename(place, old)
    try:
        for name in kept:
            os.makedirs(os.path.dirname(os.path.join(fresh, name)), exist_ok=True)
            os.rename(os.path.join(old, name), os.path.join(fresh, name))
            moved.append(name)
        os.rename(fresh, place)
    except OSError:
        for name in moved:
            os.rename(os.path.join(fresh, name), os.path.join(old, name))
        os.rename(old, place)
        raise


def kept_files(out: str, overwrite: bool) -> list[str]:
    """What is to stay of the folder that is there, as paths in it. BadInput where the folder is not to be touched."""
    place = os.path.abspath(out)
    if os.path.islink(place) or (os.path.exists(place) and not os.path.isdir(place)):
        raise BadInput(f"{quote(out)} is no folder: give one that is empty or not there yet")
    try:
        there = os.listdir(place) if os.path.isdir(place) else []
    except OSError as error:
        raise BadInput(f"{quote(out)} cannot be read: {error.strerror}") from None
    if not there:
        return []
    if not overwrite:
        raise BadInput(f"{quote(out)} is not empty: give another folder, or --overwrite for a bundle made before")
    try:
        listed = read_json_object(os.path.join(place, MANIFEST)).get("files")
    except BadInput:
        raise BadInput(
            f"{quote(out)} holds no bundle that `qwen-plan deploy` made: nothing is replaced there"
        ) from None
    names = listed if isinstance(listed, list) else []
    ours = {MANIFEST, *(name for name in names if isinstance(name, str))}
    return sorted(_strangers(place, "", ours))


def _strangers(place: str, folder: str, ours: set[str]) -> Iterator[str]:
    """What is not of the bundle; of a folder that holds nothing of it, the folder."""
    for entry in os.scandir(os.path.join(place, folder)):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if name in ours:
            continue
        if entry.is_dir(follow_symlinks=False) and any(one.startswith(name + "/") for one in ours):
            yield from _strangers(place, name, ours)
        else:
            yield name
