"""The capacity report of the page: a load that fits its context, and the report that the command writes of it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("anyio", reason="not installed: anyio (qwenfit[serve])")

from qwenfit.cli import page_report
from qwenfit.cli.workload_file import read_workload
from qwenfit.planner import Request
from qwenfit.profiles.errors import BadInput

ASKED = "model=0.8b&gpu=rtx3060&n=1&ctx=4K&seqs=2&engine=llama.cpp&weights=q8_0"


@settings(deadline=None, max_examples=50)
@given(st.integers(16, 1_010_000), st.integers(1, page_report.MAX_USERS), st.sampled_from([None, False, True]))
def test_the_file_is_one_that_the_command_reads(
    tmp_path_factory: Any, ctx_tokens: int, users: int, vision: bool | None
) -> None:
    """Prompt, image and answer together stay within the context, and everything that was fixed stays fixed: with
    images the tower is loaded and works."""
    boxes = ("rtx3060", "rtx3090", "rtx3060")
    request = Request("qwen3.5-9b", boxes, ctx_tokens, users, "vllm", "int4", "fp8", vision=vision)
    file: Path = tmp_path_factory.mktemp("w") / "workload.yaml"
    file.write_text(page_report.workload(request), encoding="utf-8")
    read = read_workload(str(file))
    assert read.workload.max_request_tokens <= ctx_tokens and read.workload.users == users
    assert bool(read.request.vision) == read.workload.sees_images == bool(vision)
    for name in ("model", "ctx_tokens", "engine", "weights", "kv_dtype", "state_dtype"):
        assert getattr(read.request, name) == getattr(request, name)
    assert read.sites[0].devices == "2xrtx3060,1xrtx3090"
    assert dict(read.tariff.device_usd) == {"rtx3060": 329, "rtx3090": 1499}


def test_boxes_and_drafts_stay_as_they_were_asked(tmp_path: Path) -> None:
    """What the file can say of the question, it says: left out, a report would be of something else."""
    request = Request(
        "27b", ("l40s", "l40s"), engine="vllm", mtp=2, tp=2, pp=2, dp=1, ep=1, nodes=2, interconnect="roce-100"
    )
    file = tmp_path / "workload.yaml"
    file.write_text(page_report.workload(request), encoding="utf-8")
    read = read_workload(str(file)).request
    assert [getattr(read, name) for name in page_report.FIXED] == [getattr(request, name) for name in page_report.FIXED]


def test_the_report_is_the_commands(page: Any) -> None:
    client = page()
    told = client.get(f"/report.json?{ASKED}")
    assert told.headers["content-disposition"] == 'attachment; filename="report.json"'
    report = told.json()
    assert report["title"] == "0.8b for 2 users" and report["workload"]["users"] == 2
    assert report["replicas"][0]["engine"] == "llama.cpp" and report["replicas"][0]["weights"] == "q8_0"
    asked = client.get(f"/report.yaml?{ASKED}")
    assert asked.headers["content-disposition"] == 'attachment; filename="workload.yaml"'
    assert asked.text.startswith("title: 0.8b for 2 users\n")


def test_what_the_command_refuses_is_its_sentence(page: Any) -> None:
    told = page().get("/report.md?model=27b&gpu=rtx3060&n=1&ctx=256K&seqs=2&weights=q8_0")
    assert told.status_code == 422
    assert told.json()["error"].startswith("the longest request does not fit") and "/" not in told.json()["error"]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Traceback ...\n  File /x/y.py\nqwen-plan: the workload is too long\n", BadInput),
        ("qwen-plan: KeyError: '/x' (a bug in qwenfit: QWENFIT_DEBUG=1 shows where; please report it)\n", RuntimeError),
        ("Killed\n", RuntimeError),
        ("", RuntimeError),
    ],
)
def test_only_a_sentence_leaves_the_server(said: str, kind: type[Exception]) -> None:
    refused = page_report._refused(said)
    assert type(refused) is kind
    assert kind is RuntimeError or str(refused) == "the workload is too long"


def test_a_simulation_that_takes_too_long_is_ended(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_report, "LIMIT_S", 0.01)
    told = page().get(f"/report.md?{ASKED}")
    assert told.status_code == 422 and "`qwen-plan report` it" in told.json()["error"]


def test_without_what_draws_the_charts(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_report, "has_html", lambda: False)
    client = page()
    assert client.get(f"/report.html?{ASKED}").status_code == 422
    assert "/report.html" not in client.get(f"/?{ASKED}").text and "/report.md" in client.get(f"/?{ASKED}").text


@pytest.mark.parametrize(("seqs", "ctx_tokens", "says"), [(65, 4096, "65 users"), (1, 15, "context of 15 tokens")])
def test_bounds(seqs: int, ctx_tokens: int, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        page_report.workload(Request(devices=("rtx3060",), seqs=seqs, ctx_tokens=ctx_tokens))
