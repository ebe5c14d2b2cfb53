"""`qwen-plan deploy PLAN.json OUT/`: the files that start a plan.

0 written (or what would be), 1 the plan does not fit, 2 no answer.
"""

import os
from collections.abc import Mapping
from json import dumps
from typing import Any

from ..planner.deployment.bundle import Bundle, Speeds, bundle
from ..planner.plan_file import PlanFile, read_plan
from ..profiles.errors import BadInput
from ..profiles.interconnect import rate_of
from ..profiles.names import quote
from .bundle_folder import kept_files, write_folder
from .output import clean, quietly_closed, say, write


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
    texts = {name: text_of(document) for name, document in made.files.items()}
    if dry_run:
        kept_files(out, overwrite)  # says what writing would say
    else:
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


def text_of(document: Any) -> str:
    """Text as it is; anything else as YAML, whose writer quotes what has to be."""
    if isinstance(document, str):
        return document
    import yaml

    class Plain(yaml.SafeDumper):
        """Says twice what stands twice: the readers of these files need know no aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(document, Dumper=Plain, sort_keys=False, allow_unicode=True, width=1 << 20)


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
    if made.launch.local:
        lines += [f"The weights, {clean(made.launch.model)}, have to be there first: README.md says where."]
    lines += [
        f"Image {made.service.image}; the first answer may take {minutes} minutes: the health checks wait that long.",
        f"Start it in {clean(out)}: cp .env.example .env, fill it in, docker compose up -d (README.md has the rest).",
    ]
    return "\n".join(lines) + "\n"
