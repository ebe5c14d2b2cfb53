"""`qwen-plan receipt` and `qwen-plan calibrate` as commands: what they print, their statuses, and the loop between."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenfit.cli.plan import main

LOGS = Path(__file__).parent / "data" / "logs"
SIZES = str(LOGS.parent / "published_sizes.json")
CPU = str(LOGS / "vllm-0.32.0-cpu.log")
RTX5090 = str(LOGS / "vllm-0.24.0.log")
ON_CPU = ("--model", "0.8b", "--text-only", "--gpu", "epyc-rome-8ch-128gb")


def test_a_boot_beside_its_plan(qwen_plan: Any) -> None:
    done = qwen_plan("receipt", CPU, *ON_CPU)
    assert done.status == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Within 5% (0.0% off in all): vllm 0.32.0, of m08, 4,096 tokens, 2 sequences")
    rows = [line.split() for line in lines]
    assert ["+", "recurrent", "state", "=1.000", "GiB", "1.000", "GiB", "+0.0%", "yes"] in [row[3:] for row in rows]
    assert ["kv", "cache", "tokens", "42,850", "42,850"] in rows


def test_out_of_tolerance_is_one(qwen_plan: Any) -> None:
    """Cache and state of llama.cpp b8946 are exact, its compute buffer is another one than b11434's."""
    gguf = str(LOGS / "llamacpp-b8946-rtx3090.log")
    done = qwen_plan("receipt", gguf, "--model", "qwen3.6-27b", "--gpu", "rtx3090", "--weights", "q4_k_m")
    assert done.status == 1 and done.stdout.startswith("Out of 5% (device0 activation +64.6%): llama.cpp b8946")
    done = qwen_plan("receipt", RTX5090, "--gpu", "rtx5090", "--tolerance", "0.01")
    assert done.status == 0  # 3 % off, and in its interval


def test_an_engine_that_died_is_one_and_its_sentence_is_the_answer(qwen_plan: Any) -> None:
    options = ("--model", "qwen3.6-27b", "--gpu", "rtx3090", "--ctx", "32768", "--weights", "int4")
    done = qwen_plan("receipt", str(LOGS / "vllm-2026-05-died.log"), *options)
    assert done.status == 1
    assert done.stdout.startswith("Died at boot: vllm")
    assert (
        "It ran out of memory: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.02 GiB." in done.stdout
    )
    assert "/home/" not in done.stdout


def test_json_is_one_document_and_the_file_is_the_receipt(qwen_plan: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "one.json")
    done = qwen_plan("receipt", CPU, *ON_CPU, "--json", "--output", path, "--date", "2026-11-22", "--source", "ours")
    assert done.status == 0 and done.stderr == f"qwen-plan: wrote {path}\n"
    shown, saved = json.loads(done.stdout), json.loads(Path(path).read_text())
    assert shown["schema"] == 1 and shown["within_tolerance"] is True and shown["date"] == "2026-11-22"
    assert {key: shown[key] for key in saved} == saved
    assert saved["request"]["engine"] == "vllm@0.32.0" and saved["devices"][0]["name"] == "epyc-rome-8ch-128gb"


def test_a_log_from_a_pipe() -> None:
    command = [sys.executable, "-m", "qwenfit.cli.plan", "receipt", "-", *ON_CPU]
    with open(CPU, "rb") as log:
        done = subprocess.run(command, stdin=log, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("receipt", "no.log", "--gpu", "rtx3090"), "no.log cannot be read: No such file or directory"),
        (("receipt", CPU), "the log calls its model m08, which is in no catalog: give --model"),
        (("receipt", RTX5090), "does not say on which device it was written: give --gpu"),
        (("receipt", CPU, *ON_CPU, "--engine", "tgi"), "no boot log of tgi is known"),
        (("receipt", CPU, *ON_CPU, "--engine", "llama.cpp"), "has no line in which llama.cpp says how much memory"),
        (("receipt", CPU, *ON_CPU, "--tolerance", "7"), "--tolerance 7: give a share"),
        (("receipt", CPU, *ON_CPU, "--date", "today"), "--date today: write it like 2026-11-22"),
        (("receipt", CPU, "--gpu", "rtx9999", "--model", "9b"), "no device is called 'rtx9999'"),
        (("receipt",), "Missing argument"),
        (("receipt", SIZES, *ON_CPU, "--engine", "sglang"), "sglang says how much memory it took"),
        (("calibrate", "nowhere"), "nowhere cannot be read"),
        (("calibrate", CPU), "is not JSON"),
        (("calibrate",), "Missing argument"),
        (("--gpu", "rtx3060", "--calibration", CPU), "--calibration: "),
        (("--gpu", "rtx3060", "--calibration", "none.yaml"), "none.yaml cannot be read"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and says in shown.err and "Traceback" not in shown.err and shown.err.count("\n") == 1


def test_receipts_in_and_constants_out(qwen_plan: Any, tmp_path: Path) -> None:
    """Boot logs, receipts, constants, and a plan with them: what is estimated moves, what is exact does not."""
    folder = tmp_path / "receipts"
    folder.mkdir()
    for place, graphs in enumerate(("0.30", "0.31", "0.29")):
        log = tmp_path / f"{place}.log"
        boot = Path(RTX5090).read_text(encoding="utf-8")
        log.write_text(f"{boot}Graph capturing finished in 3 secs, took {graphs} GiB\n", encoding="utf-8")
        output = ("--output", str(folder / f"{place}.json"), "--source", f"run {place}")
        qwen_plan("receipt", str(log), "--gpu", "rtx5090", *output)
    constants = str(tmp_path / "constants.yaml")
    done = qwen_plan("calibrate", str(folder), "--output", constants)
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("3 receipts of 3 sources speak of estimated constants.")
    told = json.loads(qwen_plan("calibrate", str(folder), "--json").stdout)
    assert told["schema"] == 1 and told["sources"] == 3
    [held] = told["held_out"]
    assert held["part"] == "graph" and held["after"] < 0.8 * held["before"]

    asked = ("--model", "9b", "--gpu", "rtx5090", "--engine", "vllm", "--weights", "int4", "--json")
    before = json.loads(qwen_plan(*asked).stdout)
    after = json.loads(qwen_plan(*asked, "--calibration", constants).stdout)
    memory = [answer["plans"][0]["devices"][0]["memory"] for answer in (before, after)]
    assert memory[1]["graph_bytes"] > 1.5 * memory[0]["graph_bytes"]
    assert memory[1]["weights_bytes"] == memory[0]["weights_bytes"]
    assert after["request"]["options"]["calibration"] == constants


def test_a_plan_from_its_file(qwen_plan: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    asked = ("--model", "0.8b", "--text-only", "--gpu", "epyc-rome-8ch-128gb", "--engine", "vllm", "--weights", "bf16")
    path.write_text(qwen_plan(*asked, "--ctx", "4096", "--seqs", "2", "--kv-dtype", "bf16", "--json").stdout)
    done = qwen_plan("receipt", CPU, "--plan", str(path))
    assert done.status == 0 and done.stdout.startswith("Within 5% (0.0% off in all): vllm 0.32.0"), done.stderr
    done = qwen_plan("receipt", CPU, "--plan", str(path), "--ctx", "8192", "--gpu", "rtx3060")
    assert done.status == 2 and "--plan says what was started: leave out --ctx or --gpu" in done.stderr
    done = qwen_plan("receipt", str(LOGS / "llamacpp-b11434-cpu.log"), "--plan", str(path))
    assert done.status == 2 and "has no plan for 'llama.cpp'" in done.stderr


def test_help_names_both(qwen_plan: Any) -> None:
    told = qwen_plan("--help").stdout
    assert "receipt" in told and "calibrate" in told and "--calibration" in told
    assert "--tolerance" in qwen_plan("receipt", "--help").stdout
    assert "--output" in qwen_plan("calibrate", "--help").stdout


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "qwenfit.cli.plan", "receipt", CPU, *ON_CPU]
    with os.fdopen(write_end, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and done.stderr == b""
