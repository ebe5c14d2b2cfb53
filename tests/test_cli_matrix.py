"""`qwen-plan matrix` as a CI job sees it: status, annotations, outputs, files, and the action's own steps in bash."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenfit.cli import plan as command

ROOT = Path(__file__).parent.parent
GOOD = "rows:\n  - device: [rtx3060, l40s]\n    model: 9b\n    ctx_tokens: [8K, 32K]\n"
BAD = "rows:\n  - device: l40s\n    ctx_tokens: 32K\n  - device: rtx3060\n    model: 27b\n    ctx_tokens: 1M\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def put(text: str, name: str = "m.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return put


def test_all_cells_pass(qwen_plan: Any, write: Any) -> None:
    done = qwen_plan("matrix", write(GOOD))
    assert done.status == 0 and done.stderr == "" and "All 4 cells pass; 4 fit." in done.stdout


def test_one_cell_fails(qwen_plan: Any, write: Any) -> None:
    done = qwen_plan("matrix", write(BAD), "--json")
    told = json.loads(done.stdout)
    assert done.status == 1 and told["schema"] == 1 and told["passes"] is False
    assert [one["passes"] for one in told["cells"]] == [True, False]
    assert told["cells"][1]["line"] == 4 and "does not fit" in told["cells"][1]["failures"][0]


def test_annotations_summary_and_outputs(qwen_plan: Any, write: Any, tmp_path: Path) -> None:
    summary, output = tmp_path / "summary", tmp_path / "output"
    env = {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output)}
    path = write(BAD)
    done = qwen_plan("matrix", path, "--format", "github", "--save-markdown", str(tmp_path / "c.md"), env=env)
    assert done.status == 1
    assert (
        f"::error file={path.replace(':', '%3A')},line=4,title=qwen-plan matrix::qwen3.5-27b on rtx3060" in done.stdout
    )
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    jobs = json.loads(outputs["matrix"])["include"]
    assert outputs["passes"] == "false" and outputs["failed"] == outputs["worse"] == "1"
    assert [one["device"] for one in jobs] == ["l40s"] and jobs[0]["command"]
    assert summary.read_text() == (tmp_path / "c.md").read_text()
    assert "**Failed**" in summary.read_text() and "<details>" in summary.read_text()


def test_against_fails_only_on_what_got_worse(qwen_plan: Any, write: Any, tmp_path: Path) -> None:
    path, old = write(BAD), str(tmp_path / "old.json")
    assert qwen_plan("matrix", path, "--save-json", old).status == 1
    again = qwen_plan("matrix", path, "--against", old)
    assert again.status == 0 and "Nothing changed." in again.stdout
    told = json.loads(Path(old).read_text())
    told["cells"][0]["memory_bytes"]["mid"] /= 2
    Path(old).write_text(json.dumps(told))
    worse = qwen_plan("matrix", path, "--against", old, "--format", "github")
    assert worse.status == 1 and "line=2" in worse.stdout.splitlines()[0]
    assert qwen_plan("matrix", path, "--against", old, "--tolerance", "1.5").status == 2


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("rows:\n  - device: rtx3061\n", 2, "rtx3061"),
        ("rows:\n  - device: l40s\n    model: 9c\n", 3, "9c"),
        ("rows:\n  - model: 9b\n", 2, "device is missing"),
        ("rows:\n  - device: [l40s, L40S]\n", 2, "asks again"),
        ("rows:\n  - device: l40s\n  - device: l40s\n    model: Qwen/Qwen3.5-9B\n", 3, "asks again what line 2"),
        ("rows:\n  - device: l40s\n    ctx: 5\n", 3, "did you mean ctx_tokens"),
        ("rows:\n  - device: l40s\n    seqs: 0\n", 3, "at least 1"),
        ("rows:\n  - device: l40s\n    min_decode_tokens_per_s: .inf\n", 3, "finite"),
        ("rows:\n  - device: l40s\n    min_decode_tokens_per_s: -1.0\n", 3, "more than 0"),
        ("rows:\n  - device: l40s\n    max_memory_bytes: 11 parsecs\n", 3, "amount of memory"),
        ("rows:\n  - device: l40s\n    engine: vlm\n", 2, "vllm"),
        ("rows: []\n", 1, "rows is empty"),
        ("row:\n  - device: l40s\n", 1, "did you mean rows"),
    ],
)
def test_bad_files_are_one_sentence_with_the_line(
    capsys: pytest.CaptureFixture[str], write: Any, text: str, line: int, says: str
) -> None:
    assert command.main(["matrix", write(text)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"m.yaml, line {line}: " in said.err and says in said.err
    assert command.main(["matrix", write(text), "--format", "github"]) == 2
    assert f"m.yaml,line={line},title=" in capsys.readouterr().err


@pytest.mark.parametrize("old", ["", "{}", '{"schema": 1, "cells": [5]}', '{"schema": 1, "cells": [{"key": "a"}]}'])
def test_an_older_run_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], write: Any, old: str) -> None:
    assert command.main(["matrix", write(GOOD), "--against", write(old, "old.json")]) == 2
    assert "old.json" in capsys.readouterr().err


def test_the_action_runs_as_it_is(write: Any, tmp_path: Path) -> None:
    """The steps of action.yml in bash, as a runner starts them, with this installation in place of the first step's."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert all(f"steps.matrix.outputs.{name}" in one["value"] for name, one in action["outputs"].items())
    step = action["runs"]["steps"][1]
    given = {name: one.get("default", "") for name, one in action["inputs"].items()} | {"matrix": write(GOOD)}
    env = {name: given[value.removeprefix("${{ inputs.").removesuffix(" }}")] for name, value in step["env"].items()}
    output = tmp_path / "output"
    bin_folder = tmp_path / "qwen-plan" / "bin"
    bin_folder.mkdir(parents=True)
    script = f"#!{sys.executable}\nfrom qwenfit.cli.start import qwen_plan\nqwen_plan()\n"
    (bin_folder / "qwen-plan").write_text(script)
    (bin_folder / "qwen-plan").chmod(0o755)
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", step["run"]],
        env={**os.environ, **env, "RUNNER_TEMP": str(tmp_path), "GITHUB_OUTPUT": str(output)},
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {line.split("=")[0] for line in output.read_text().splitlines()} == set(action["outputs"])
    assert (tmp_path / "qwen-plan-matrix.json").exists() and (tmp_path / "qwen-plan-matrix.md").exists()


def test_the_projects_own_workflow_uses_the_action() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/hardware.yml").read_text())
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = next(one for one in workflow["jobs"]["plan"]["steps"] if one.get("uses") == "./")
    assert set(step["with"]) <= set(action["inputs"]) and (ROOT / step["with"]["matrix"]).exists()


def test_a_file_of_several_devices_is_named_as_it_is(tmp_path: Path) -> None:
    """Not once for every device in it: two of them are six devices."""
    from qwenfit.cli.matrix_file import _device_name
    from qwenfit.profiles import devices_of

    file = tmp_path / "box.yaml"
    file.write_text("devices:\n  - {like: rtx3090, count: 2}\n  - like: rtx4090\n", encoding="utf-8")
    assert len(devices_of(_device_name(f" {file}"))) == 3
    assert len(devices_of(_device_name(f"2x{file}"))) == 6
    assert _device_name("RTX 3090") == "rtx3090" and _device_name("auto") == "auto"
