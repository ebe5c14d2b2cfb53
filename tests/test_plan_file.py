"""A plan's file: read back it is the same plan; changed, stale or hostile it is one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenfit.planner import Request, plan
from qwenfit.planner.calibration import Calibration, Factor
from qwenfit.planner.documents import digest
from qwenfit.planner.plan_file import read_plan
from qwenfit.profiles.errors import BadInput

CUSTOM = """
name: my-box
vendor: cpu
kind: cpu
architecture: x86_64
memory_gib: 64
memory_bandwidth_bytes_per_s: 40000000000
"""


def written(path: Path, document: dict[str, Any], signed: bool = True) -> str:
    told = {**document, "sha256": digest(document)} if signed else document
    path.write_text(json.dumps(told))
    return str(path)


@pytest.mark.parametrize(
    "request_",
    [
        Request(devices=("rtx3060",), ctx_tokens=262144),
        Request("qwen3.5-35b-a3b", ("2xrtx3090",), 32768, seqs=4, mtp=1),
        Request("qwen3.5-27b", ("rtx4090,rtx3060",), 32768),
        Request("qwen3.5-397b-a17b", ("8xh100-sxm",), 131072, seqs=8),
        Request("qwen3.5-4b", ("m1-16gb",), 8192, kv_dtype="q8_0", engine="llama.cpp"),
        Request("qwen3.5-9b", ("rtx3060",), 8192, engine="native", weights="int4-g64"),
    ],
)
def test_every_plan_of_a_file_is_made_anew(request_: Request, tmp_path: Path) -> None:
    made = plan(request_)
    path = written(tmp_path / "plan.json", made.to_json(), signed=False)
    for one in made.plans:
        found = read_plan(path, one.engine)
        assert found.sha256 == made.to_json()["sha256"]
        old, new = one.to_json(), found.plan.to_json()
        for key in ("engine", "engine_version", "weights", "kv_dtype", "devices", "command", "fits", "speed"):
            assert new[key] == old[key], key
    assert read_plan(path).plan.engine == made.best.engine


def test_a_device_of_the_users_own_travels_with_the_plan(tmp_path: Path) -> None:
    """The file of the device is gone when the plan is read: its figures are in the plan."""
    device = tmp_path / "box.yaml"
    device.write_text(CUSTOM)
    path = written(tmp_path / "plan.json", plan(Request(devices=(str(device),), ctx_tokens=4096)).to_json(), False)
    device.unlink()
    found = read_plan(path)
    assert found.devices[0].name == "my-box" and found.devices[0].memory_bandwidth_bytes_per_s == 40_000_000_000
    assert str(tmp_path) not in Path(path).read_text()


def test_a_calibration_is_asked_for_again(tmp_path: Path) -> None:
    own = Calibration("mine.yaml", (Factor("vllm", "runtime", "", "", 3, 3, 1.5, 0.9, 1.1),))
    base = Request(devices=("rtx3090",), engine="vllm")
    from qwenfit.profiles.frozen import replace

    asked = replace(base, options=replace(base.options, calibration=own))
    path = written(tmp_path / "plan.json", plan(asked).to_json(), signed=False)
    with pytest.raises(BadInput, match=r"planned with the calibration 'mine\.yaml': give --calibration again"):
        read_plan(path)
    assert read_plan(path, calibration=own).plan.to_json()["devices"] == plan(asked).best.to_json()["devices"]


def first(document: dict[str, Any]) -> Any:
    return document["plans"][0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: first(d)["devices"][0]["memory"].update(weights_bytes=1), "out of date: it plans 1 weights bytes"),
        (lambda d: first(d).update(command="rm -rf /"), "today's launch line is another"),
        (lambda d: d["request"].update(ctx_tokens=4096), "out of date"),
        (lambda d: d["request"].update(ctx_tokens=0), "request.ctx_tokens is 0"),
        (lambda d: d["request"].update(devices=["rtx4090"]), "names the device 'rtx4090' and does not say what it is"),
        (lambda d: d["request"].update(model="nobody/nothing"), "cannot be planned anew"),
        (lambda d: d.update(plans=[]), "plans is a list of 0"),
        (lambda d: d.update(plans=[1]), "no plan that `qwen-plan --json` wrote"),
        (lambda d: d["profiles"][0].update(memory_bytes=-1), "profiles.0.memory_bytes"),
        (lambda d: d.update(schema=2), "schema is 2"),
        (lambda d: first(d)["options"].update(host_memory_bytes="x"), "options.host_memory_bytes"),
    ],
)
def test_a_changed_file_is_a_sentence(change: Callable[[Any], None], sentence: str, tmp_path: Path) -> None:
    """Signed anew by whoever changed it: then its figures are not today's. Unsigned: the digest tells."""
    document: Any = json.loads(json.dumps(plan(Request(devices=("rtx3060",))).to_json()))
    change(document)
    with pytest.raises(BadInput, match=r"sha256 is of something else|no plan that|profiles\.0|schema"):
        read_plan(written(tmp_path / "unsigned.json", document, signed=False))
    with pytest.raises(BadInput, match=sentence) as refused:
        read_plan(written(tmp_path / "signed.json", document))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', "{" * 4000, "\0\0", '{"a": NaN}'])
def test_what_is_no_plan(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"plan\.json"):
        read_plan(str(path))


def test_an_engine_that_is_not_in_it(tmp_path: Path) -> None:
    path = written(tmp_path / "p.json", plan(Request(devices=("rtx3060",), engine="vllm")).to_json(), False)
    with pytest.raises(BadInput, match="no plan for 'sglang', but for vllm: give --engine vllm, or plan with"):
        read_plan(path, "sglang")
