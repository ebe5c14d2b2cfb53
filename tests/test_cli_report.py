"""`qwen-plan report`: files, JSON, exit status, and one sentence with file and line for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenfit.cli import report as command_report
from qwenfit.cli.plan import main
from qwenfit.cli.report_page import seconds
from qwenfit.cli.workload_file import read_workload
from qwenfit.planner.money import Tariff, bill
from qwenfit.profiles.device_names import device

ROOT = Path(__file__).parent.parent
SMALL = """title: A small one
model: 0.8b
engine: llama.cpp
weights: q8_0
deployment: {devices: rtx3060, replicas: 1, seats: 2}
workload:
  users: 2
  think_s: 5
  prompt_tokens: {tokens: 300}
  output_tokens: {tokens: 100}
  targets: {p95_ttft_s: 2, p95_tpot_s: 0.1}
money: {device_price_usd: {rtx3060: 300}, kwh_price_usd: 0.3, api_price_usd_per_million_tokens: 1}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def put(text: str) -> str:
        (tmp_path / "w.yaml").write_text(text)
        return str(tmp_path / "w.yaml")

    return put


def test_json_and_markdown_say_the_same(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = tmp_path / "r.md"
    assert main(["report", write(SMALL), "--json", "--output", str(note)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == 1 and told["holds"] is True and told["model"] == "qwen3.5-0.8b"
    [kind] = told["replicas"]
    assert kind["limits"]["max_num_seqs"] == 2 and kind["measured"]["requests"] >= 4000
    assert kind["cautious"]["ttft_s"][2] > kind["measured"]["ttft_s"][2]  # the slow end is slower
    assert len(told["memory"]["contexts_tokens"]) == 11 and told["memory"]["contexts_tokens"][-1] == 1_010_000
    assert sum(curve["chosen"] for curve in told["memory"]["curves"]) == 1
    assert told["cost"]["devices_usd"] == 300 and told["assumptions"]
    text = note.read_text()
    for title in ("What users see", "What breaks first", "Memory over context", "Tokens per second over concurrency"):
        assert f"## {title}" in text
    assert seconds(kind["measured"]["ttft_s"][2]) in text and "| as asked |" in text


def test_a_replica_may_be_several_boxes(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = tmp_path / "r.md"
    boxes = "model: 27b\nengine: vllm\nweights: bf16\nnodes: 2\npp: 2\ntp: 2\ninterconnect: roce-100"
    text = SMALL.replace("model: 0.8b\nengine: llama.cpp\nweights: q8_0", boxes)
    text = text.replace("rtx3060", "2xl40s", 1).replace("money: {device_price_usd: {rtx3060: 300}", "money: {years: 3")
    assert main(["report", write(text), "--json", "--output", str(note)]) == 0
    [kind] = json.loads(capsys.readouterr().out)["replicas"]
    assert "--nnodes 2 --node-rank 0" in kind["command"]
    told = note.read_text()
    assert "(2 boxes of 2xl40s)" in told and "pipeline parallel 2, 2 boxes over roce-100" in told
    assert "RoCE, 100 Gb/s" in told


def test_an_impossible_promise_is_an_answer(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    impossible = SMALL.replace("p95_ttft_s: 2", "p95_ttft_s: 0.0001").replace(", replicas: 1", "")
    assert main(["report", write(impossible), "--format", "markdown"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("# A small one\n\n**No.**") and "even with a replica to itself" in said


def test_without_its_libraries_it_says_what_to_install(
    write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", write(SMALL), "--output", "x.html"]) == 2
    assert capsys.readouterr().err == f"qwen-plan: {command_report.NEEDS}\n"


BAD = [
    ("users: 2", "users: 0", 7, "at least 1"),
    ("users: 2", "rate_requests_per_s: 0.0", 7, "more than 0"),
    ("users: 2", "rate_requests_per_s: -3.5", 7, "more than 0"),
    ("users: 2", "rate_requests_per_s: .inf", 7, "finite"),
    ("users: 2", "rate_requests_per_s: .nan", 7, "finite"),
    ("users: 2", "rate_requests_per_s: 2.0\n  users: 2", 6, "either"),
    ("  users: 2\n", "", 6, "either"),
    ("users: 2", "user: 2", 7, "did you mean users"),
    ("{tokens: 300}", "[{share: 0.5, tokens: 3}, {share: 0.4, tokens: 4}]", 9, "sum to 0.9"),
    ("{tokens: 300}", "{share: 1.5, tokens: 300}", 9, "at most 1"),
    ("{tokens: 300}", "{min_tokens: 300, max_tokens: 20}", 9, "more than max_tokens"),
    ("{tokens: 300}", "{median_tokens: 300, p95_tokens: 20, max_tokens: 400}", 9, "less than p95_tokens"),
    ("{tokens: 300}", "{tokens: 3, max_tokens: 400}", 9, "a length is tokens"),
    ("{tokens: 300}", "{tokens: 3e9}", 9, "prompt_tokens"),
    ("{tokens: 300}", "{}", 9, "a length is tokens"),
    ("p95_ttft_s: 2", "p95_ttft_s: 0", 11, "more than 0"),
    ("rtx3060, replicas", "rtx3061, replicas", 5, "rtx3061"),
    ("model: 0.8b", "model: 0.9b", 2, "0.9b"),
    ("model: 0.8b", "model: 0.8b\nmodel: 9b", 3, "twice"),
    ("engine: llama.cpp", "ctx_tokens: 256", 3, "the longest request has 400 tokens"),
    ("engine: llama.cpp", "candidates: [l40s, l40s]", 3, "twice"),
    ("engine: llama.cpp", "interconnect: ib-ndr", 3, "give nodes too"),
    ("engine: llama.cpp", "interconnect: ib-xyz\nnodes: 2", 3, "no interconnect"),
    ("engine: llama.cpp", "nodes: 0", 3, "nodes"),
    ("engine: llama.cpp", "candidates: [l41s]", 3, "l40s"),
    ("{rtx3060: 300}", "{rtx3061: 300}", 12, "rtx3061"),
    ("{devices: rtx3060, replicas: 1, seats: 2}", "[{devices: rtx3060}, {devices: l40s}]", 5, "a mix needs replicas"),
    ("{devices: rtx3060, replicas: 1, seats: 2}", "[{devices: l40s}, {devices: l40s}]", 5, "twice"),
]


@pytest.mark.parametrize(("old", "new", "line", "says"), BAD)
def test_bad_files_are_one_sentence_with_the_line(
    write: Any, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, says: str
) -> None:
    assert old in SMALL
    assert main(["report", write(SMALL.replace(old, new, 1))]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"w.yaml, line {line}: " in said.err and says in said.err, said.err


def test_an_unknown_engine_and_an_ending_are_told(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", write(SMALL.replace("llama.cpp", "llama.cp"))]) == 2
    assert "llama.cpp" in capsys.readouterr().err
    assert main(["report", write(SMALL), "--output", "report.pdf"]) == 2
    assert ".html, .md or .json" in capsys.readouterr().err


def test_ten_megabytes_are_refused(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", write("a: 1\n" * 2_000_000)]) == 2
    assert "more than the" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rtx3060-home", "l40s-200-users", "fleet-2000-rps"])
def test_the_examples_are_read_and_their_reports_are_there(name: str) -> None:
    question = read_workload(str(ROOT / f"docs/examples/{name}.yaml"))
    report = json.loads((ROOT / f"docs/examples/{name}.json").read_text())
    assert report["title"] == question.title
    assert question.title in (ROOT / f"docs/examples/{name}.html").read_text()
    assert question.title in (ROOT / f"docs/examples/{name}.md").read_text()


def test_a_bill_worked_out_by_hand() -> None:
    """rtx3060 of 170 W, always at work at 90 %: 153 W, 730.5 hours a month at 0.20 dollars: 22.35. 300 dollars over 36
    months: 8.33. 10 tokens a second: 26.3 million a month, which at one dollar a million cost 26.30."""
    owed = bill([(device("rtx3060"), 1, 1.0)], 10.0, Tariff(0.2, (("rtx3060", 300.0),), 3.0, 1.0))
    assert owed.power_w is not None and owed.power_w[1] == pytest.approx(153)
    assert owed.energy_usd_per_month == pytest.approx(22.35, abs=0.01)
    assert owed.usd_per_month == pytest.approx(22.35 + 8.33, abs=0.01)
    assert owed.joules_per_token == pytest.approx(15.3)
    assert owed.api_usd_per_month[0] == pytest.approx(26.30, abs=0.01)
    assert owed.break_even_months == pytest.approx(300 / (26.298 - 22.353), rel=0.01)
    assert bill([(device("rtx3060"), 1, 1.0)], 10.0, Tariff(0.2, (), 3.0, 1.0)).usd_per_month is None
