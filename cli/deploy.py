"""`qwen-plan deploy PLAN.json OUT/`: the files that start a plan.

0 written (or what would be), 1 the plan does not fit, 2 no answer.
"""

import os
from collections.abc import Iterator, Mapping
from json import dumps
from typing import Any

from ..planner.deployment.bundle import Bundle, Speeds, bundle
from ..planner.plan_file import PlanFile, read_plan
from ..profiles.errors import BadInput
from ..profiles.interconnect import rate_of
from ..profiles.names import quote
from .output import clean, quietly_closed, say, write

MANIFEST = "bundle.json"  # what this command wrote, so that --overwrite replaces nothing else


def deploy(
    path: str, out: str, engine: str | None, calibration: str | None, disk: str | None, download: str | None,
    overwrite: bool, force: bool, dry_run: bool, json: bool,
) -> int:  # fmt: skip
    """The exit status. `disk` and `download` are rates such as 3GB/s; `engine` chooses among the file's plans."""
    from ..planner.calibration_file import read_calibration

    speeds = Speeds(**_rates(disk_bytes_per_s=disk, download_bytes_per_s=download))
    file = read_plan(path, engine, read_calibration(calibration) if calibration else None)
    if not file.plan.fits and not force:
        why = file.plan.reasons[0] if file.plan.reasons else "memory is short"
        say(f"qwen-plan: the plan does not fit, and nothing was written: {clean(why)}; --force writes it all the same")
        return 1
    made = bundle(file.plan, file.sha256, speeds)
    texts = {name: _text(document) for name, document in made.files.items()}
    if not dry_run:
        write_folder(out, texts, file.sha256, overwrite)
    try:
        write(_json(file, made, out, texts, dry_run) if json else _said(made, out, texts, dry_run))
    except BrokenPipeError:
        quietly_closed()
    return 0


def _rates(**given: str | None) -> dict[str, float]:
    found = {}
    for name, text in given.items():
        if text is None:
            continue
        rate = rate_of(text)
        if rate is None:
            raise BadInput(f"{quote(text)} is no rate: write it like 3GB/s or 1Gbit/s")
        found[name] = rate
    return found


def _text(document: Any) -> str:
    """Text as it is; anything else as YAML, whose writer quotes what has to be."""
    if isinstance(document, str):
        return document
    import yaml

    class Plain(yaml.SafeDumper):
        """Says twice what stands twice: the readers of these files need know no aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(document, Dumper=Plain, sort_keys=False, allow_unicode=True, width=1 << 20)


def write_folder(out: str, texts: Mapping[str, str], sha256: str, overwrite: bool) -> None:
    """The folder with these files, all of them or none: it is made beside its place and then takes it. What somebody
    put beside an older bundle's files (.env, weights) moves along.

    BadInput where something else is there: without `overwrite` anything, with it what is no bundle of ours.
    """
    from shutil import rmtree
    from tempfile import mkdtemp

    place = os.path.abspath(out)
    kept = _kept(place, out, overwrite)
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


def _kept(place: str, out: str, overwrite: bool) -> list[str]:
    """What is to stay of the folder that is there, as paths in it. BadInput where the folder is not to be touched."""
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
    from ..profiles.json_file import read_json_object

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


def _json(file: PlanFile, made: Bundle, out: str, texts: Mapping[str, str], dry_run: bool) -> str:
    told = {
        "schema": 1,
        "plan_sha256": file.sha256,
        "folder": None if dry_run else os.path.abspath(out),
        "image": made.service.image,
        "command": file.plan.command,
        "fits": file.plan.fits,
        "startup_s": made.startup_s,
        "files": [{"name": name, "bytes": len(text.encode())} for name, text in texts.items()],
        "left_out": list(made.left_out),
    }
    return dumps(told, indent=2, allow_nan=False) + "\n"


def _said(made: Bundle, out: str, texts: Mapping[str, str], dry_run: bool) -> str:
    lines = [f"{'Would write' if dry_run else 'Wrote'} {len(texts)} files into {clean(out)}:"]
    lines += [f"  {name}" for name in texts]
    lines += [f"Left out, {clean(reason)}" for reason in made.left_out]
    minutes = -(-made.startup_s // 60)
    lines += [
        f"Image {made.service.image}; the first answer may take {minutes} minutes: the health checks wait that long.",
        f"Start it in {clean(out)}: cp .env.example .env, fill it in, docker compose up -d (README.md has the rest).",
    ]
    return "\n".join(lines) + "\n"
