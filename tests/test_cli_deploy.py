"""`qwen-plan deploy`: statuses and sentences, a folder that is whole or not there, nothing removed that is not ours."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenfit.cli.bundle_folder import write_folder
from qwenfit.planner import Request, plan
from qwenfit.profiles.errors import BadInput

Command = Callable[..., Any]


def plan_file(folder: Path, **told: Any) -> str:
    asked = {"model": "9b", "devices": ("rtx3090",), "ctx_tokens": 32768, "engine": "vllm", **told}
    path = folder / "plan.json"
    path.write_text(json.dumps(plan(Request(**asked)).to_json()))
    return str(path)


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_it_writes_what_it_says(qwen_plan: Command, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bundle"
    done = qwen_plan("deploy", plan_file(tmp_path), str(out))
    assert done.status == 0, done.stderr
    assert "compose.yaml" in done.stdout and "vllm/vllm-openai:v0.32.0" in done.stdout
    there = files(out)
    assert {"compose.yaml", ".env.example", "systemd/engine.service", "kubernetes/kustomization.yaml"} <= there
    told = json.loads((out / "bundle.json").read_text())
    assert set(told["files"]) | {"bundle.json"} == there
    assert yaml.safe_load((out / "compose.yaml").read_text())["services"]["engine"]["entrypoint"] == ["vllm"]
    assert (out / "compose.yaml").stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_says_the_same(qwen_plan: Command, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = qwen_plan("deploy", plan_file(tmp_path), str(out), "--json", "--disk", "5GB/s", "--download", "10Gbit/s")
    told = json.loads(done.stdout)
    assert done.status == 0 and told["fits"] is True and told["folder"] == str(out)
    assert {one["name"] for one in told["files"]} | {"bundle.json"} == files(out)
    assert all((out / one["name"]).stat().st_size == one["bytes"] for one in told["files"])
    assert 600 < told["startup_s"] < 660


def test_a_dry_run_writes_nothing(qwen_plan: Command, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = qwen_plan("deploy", plan_file(tmp_path), str(out), "--dry-run")
    assert done.status == 0 and "Would write" in done.stdout and not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused = qwen_plan("deploy", plan_file(tmp_path), str(out), "--dry-run")
    assert refused.status == 2 and "is not empty" in refused.stderr


def test_a_plan_that_does_not_fit_is_refused(qwen_plan: Command, tmp_path: Path) -> None:
    out, path = tmp_path / "bundle", plan_file(tmp_path, model="27b", weights="bf16")
    done = qwen_plan("deploy", path, str(out))
    assert done.status == 1 and "does not fit" in done.stderr and not out.exists()
    assert qwen_plan("deploy", path, str(out), "--force").status == 0 and (out / "compose.yaml").exists()


def test_another_engine_of_the_file_is_chosen(qwen_plan: Command, tmp_path: Path) -> None:
    path = plan_file(tmp_path, engine=None, weights=None)
    done = qwen_plan("deploy", path, str(tmp_path / "bundle"), "--engine", "llama.cpp", "--json")
    assert done.status == 0 and json.loads(done.stdout)["command"].startswith("llama-server")


def test_what_is_there_is_kept(qwen_plan: Command, tmp_path: Path) -> None:
    path, out = plan_file(tmp_path), tmp_path / "bundle"
    out.mkdir()
    assert qwen_plan("deploy", path, str(out)).status == 0  # an empty folder is as good as none
    again = qwen_plan("deploy", path, str(out))
    assert again.status == 2 and "is not empty" in again.stderr
    (out / "compose.yaml").write_text("mine")
    assert qwen_plan("deploy", path, str(out), "--overwrite").status == 0
    assert (out / "compose.yaml").read_text() != "mine"
    (out / ".env").write_text("LITELLM_MASTER_KEY=mine")
    (out / "models").mkdir()
    (out / "models" / "weights").write_text("mine")
    (out / "systemd" / "mine.conf").write_text("mine")
    assert qwen_plan("deploy", path, str(out), "--overwrite", "--engine", "vllm").status == 0
    assert {".env", "models/weights", "systemd/mine.conf", "compose.yaml"} <= files(out)
    assert not list(tmp_path.glob(".qwen-plan-deploy-*"))


@pytest.mark.parametrize("kind", ["file", "link", "strangers"])
def test_no_place_but_a_folder_of_ours_is_taken(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        (tmp_path / "there").mkdir()
        out.symlink_to(tmp_path / "there")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    with pytest.raises(BadInput):
        write_folder(str(out), {"a.yaml": "x"}, "0" * 64, overwrite=True)
    assert out.exists() and not list(tmp_path.glob(".qwen-plan-deploy-*"))


def test_a_write_that_fails_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    write_folder(str(out), {"a.yaml": "old"}, "0" * 64, overwrite=False)
    (out / ".env").write_text("mine")
    rename = os.rename

    def failing(source: str, target: str) -> None:
        if target == str(out) and source.endswith("new"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(BadInput, match="No space left"):
        write_folder(str(out), {"a.yaml": "new"}, "0" * 64, overwrite=True)
    assert (out / "a.yaml").read_text() == "old" and files(out) == {"a.yaml", "bundle.json", ".env"}
    assert [one.name for one in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--disk", "fast"), "is no rate"),
        (("--engine", "mlx"), "has no plan for"),
        (("--engine", "vlm"), "no engine 'vlm': did you mean vllm?"),
        (("--nope",), "`qwen-plan deploy --help` shows"),
        (("--calibration", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_what_cannot_be_answered_is_2(
    qwen_plan: Command, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = qwen_plan("deploy", plan_file(tmp_path), str(tmp_path / "bundle"), *arguments)
    assert done.status == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "bundle").exists()


def test_the_weights_are_named(qwen_plan: Command, tmp_path: Path) -> None:
    """What is on no hub has to be put somewhere, and both the command and the bundle say what and where."""
    out = tmp_path / "bundle"
    done = qwen_plan("deploy", plan_file(tmp_path, engine="llama.cpp", weights="q4_k_m"), str(out))
    assert "The weights, Qwen3.5-9B-Q4_K_M.gguf, have to be there first" in done.stdout
    told = (out / "README.md").read_text()
    assert "`models/` beside `compose.yaml`" in told and "What the plan warns of" in told
    hub = qwen_plan("deploy", plan_file(tmp_path, weights="bf16", model="4b"), str(out), "--overwrite")
    assert hub.status == 0 and "The weights" not in hub.stdout


def test_a_file_that_is_no_plan_says_what_is_missing(qwen_plan: Command, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    done = qwen_plan("deploy", str(tmp_path / "a.json"), str(tmp_path / "bundle"))
    assert done.status == 2 and "schema is missing; make it anew" in done.stderr


def test_a_changed_plan_is_refused(qwen_plan: Command, tmp_path: Path) -> None:
    path = Path(plan_file(tmp_path))
    path.write_text(path.read_text().replace("--max-num-seqs 1", "--max-num-seqs 1; rm -rf ~"))
    done = qwen_plan("deploy", str(path), str(tmp_path / "bundle"))
    assert done.status == 2 and "was changed" in done.stderr
