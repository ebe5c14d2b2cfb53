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


JOBS = ROOT / "docs/examples/matrix/job-78m.yaml"


def test_the_documented_job_is_what_the_command_says(qwen_plan: Any) -> None:
    """docs/matrix.md: 78 million output tokens on five devices. QWENFIT_WRITE_GOLDEN=1 writes it anew."""
    done = qwen_plan("matrix", "docs/examples/matrix/job-78m.yaml", "--format", "markdown", cwd=ROOT)
    page = JOBS.with_suffix(".md")
    if os.environ.get("QWENFIT_WRITE_GOLDEN"):
        page.write_text(done.stdout)
    assert done.status == 0 and done.stdout == page.read_text()
    shown = yaml.safe_load((ROOT / "docs/matrix.md").read_text().split("```yaml")[3].split("```")[0])
    assert shown == yaml.safe_load(JOBS.read_text())


def test_a_jobs_figures_follow_from_rate_power_and_prices(qwen_plan: Any, write: Any) -> None:
    """Hours are tokens over the cell's rate; dollars energy at 0.5 a kWh, and 1,000 for the device over two years of
    31,557,600 s. Two of them cost twice that; where one has no price, energy alone counts; nobody
    says what a Mac draws."""
    money = "money: {kwh_price_usd: 0.5, device_price_usd: {RTX 3090: 1000}, years: 2}\n"
    text = "rows:\n  - device: [rtx3090, 2xrtx3090, 'rtx3090,rtx3060', m4-max-128gb]\n    job_tokens: 1m\n"
    found = json.loads(qwen_plan("matrix", write(text + money), "--json").stdout)["cells"]
    for cell, price in zip(found, (1000, 2000, 0, None), strict=True):
        hours = 1_000_000 / cell["decode_tokens_per_s"]["mid"] / 3600
        assert cell["job_tokens"] == 1_000_000 and cell["job_hours"]["mid"] == pytest.approx(hours)
        assert cell["job_hours"]["low"] == pytest.approx(1_000_000 / cell["decode_tokens_per_s"]["high"] / 3600)
        if price is None:
            assert cell["job_kwh"] is None and cell["job_usd"] is None
            continue
        usd = cell["job_kwh"]["mid"] * 0.5 + price * hours / (2 * 365.25 * 24)
        assert cell["job_usd"]["mid"] == pytest.approx(usd)


def test_a_row_of_several_boxes_is_what_the_command_plans(qwen_plan: Any, write: Any) -> None:
    """The rows that docs/matrix.md shows; each cell says what `--nodes` of the command says."""
    page = (ROOT / "docs/matrix.md").read_text().split("```yaml")[2].split("```")[0]
    done = qwen_plan("matrix", write(page), "--json")
    assert done.status == 0, done.stderr
    large, sparks = json.loads(done.stdout)["cells"]
    assert (large["nodes"], sparks["nodes"]) == (2, 4)
    assert large["key"] == "8xa100-80gb qwen3.5-397b-a17b 262144x1 weights=bf16 nodes=2"
    assert sparks["key"].endswith("engine=vllm tp=4 nodes=4 interconnect=roce-100")
    asked = "--model 397b --engine vllm --gpu dgx-spark --nodes 4 --tp 4 --interconnect roce-100 --ctx 256K --json"
    own = json.loads(qwen_plan(*asked.split()).stdout)["plans"][0]
    assert sparks["command"] == own["command"] and "--nnodes 4" in own["command"]
    assert sparks["decode_tokens_per_s"]["mid"] == pytest.approx(own["speed"]["decode_tokens_per_s"]["mid"], rel=1e-3)
    assert "2 boxes of 8xa100-80gb" in qwen_plan("matrix", write(page)).stdout


def test_the_devices_of_every_box_are_paid_for(qwen_plan: Any, write: Any) -> None:
    """Two boxes with a card of 9,000 each: 18,000 over two years of 31,557,600 s."""
    text = "rows:\n  - {device: l40s, nodes: 2, model: 27b, engine: vllm, weights: bf16, job_tokens: 1m}\n"
    found = []
    for money in ("", "money: {device_price_usd: {l40s: 9000}, years: 2}\n"):
        found += json.loads(qwen_plan("matrix", write(text + money), "--json").stdout)["cells"]
    energy, with_devices = found
    devices_usd = with_devices["job_usd"]["mid"] - energy["job_usd"]["mid"]
    assert devices_usd == pytest.approx(18000 * energy["job_hours"]["mid"] / (2 * 365.25 * 24))


def test_a_job_on_what_does_not_fit_is_not_told(qwen_plan: Any, write: Any) -> None:
    text = "rows:\n  - {device: rtx3060, model: 27b, ctx_tokens: 1M, must_fit: false, job_tokens: 1m}\n"
    cell = json.loads(qwen_plan("matrix", write(text), "--json").stdout)["cells"][0]
    assert cell["job_hours"] is None and cell["job_usd"] is None
    assert "hours" in qwen_plan("matrix", write(text)).stdout
    assert "hours" not in qwen_plan("matrix", write(GOOD)).stdout


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
        ("rows:\n  - device: l40s\n    job_tokens: 0\n", 3, "at least 1"),
        ("rows:\n  - device: l40s\n    nodes: 0\n", 3, "at least 1"),
        ("rows:\n  - device: l40s\n    nodes: 129\n", 3, "at most 128"),
        ("rows:\n  - device: l40s\n    nodes: 2.5\n", 3, "whole number"),
        ("rows:\n  - device: l40s\n    dp: 0\n", 3, "at least 1"),
        ("rows:\n  - device: l40s\n    ep: 1025\n", 3, "at most 1024"),
        ("rows:\n  - device: l40s\n    interconnect: ib-ndr\n", 3, "give nodes too"),
        ("rows:\n  - device: l40s\n    nodes: 2\n    interconnect: ib-xyz\n", 4, "no interconnect 'ib-xyz'"),
        ("defaults: {interconnect: ib-ndr}\nrows:\n  - device: l40s\n", 1, "give nodes too"),
        ("rows:\n  - device: l40s\nmoney: {device_price_usd: {l40x: 1}}\n", 3, "l40x"),
        ("rows:\n  - device: l40s\nmoney: {device_price_usd: {2xl40s: 1}}\n", 3, "one device"),
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
