"""The command as scripts see it: exit status, what is on stdout and what on stderr, and the JSON of the contract."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from qwenfit.cli import plan as command
from qwenfit.profiles.errors import BadInput

QUESTION = ("--gpu", "rtx3060", "--ctx", "262144")
MEMORY = {
    *("weights_bytes", "kv_cache_bytes", "recurrent_state_bytes", "activation_bytes", "graph_bytes", "runtime_bytes"),
    "total_bytes",
}


def test_it_fits(qwen_plan: Any) -> None:
    done = qwen_plan(*QUESTION)
    assert done.status == 0 and done.stderr == ""
    first, *lines = done.stdout.splitlines()
    assert first == "Fits: qwen3.5-9b on rtx3060, 262,144 tokens x 1 sequence"
    launch = lines[lines.index("Launch it with") + 1]
    assert launch and not launch.startswith(" ")
    assert "\x1b" not in done.stdout


def test_it_does_not_fit(qwen_plan: Any) -> None:
    done = qwen_plan("--model", "27b", "--weights", "bf16", "--engine", "vllm", *QUESTION)
    assert done.status == 1 and done.stderr == ""
    assert done.stdout.startswith("Does not fit: qwen3.5-27b on rtx3060")
    assert "What to change" in done.stdout


UNANSWERABLE = [
    ("--gpu rtx3061", "rtx3061"),
    ("--gpu rtx3060 --model 9c", "9c"),
    ("--gpu rtx3060 --engine vlm", "vllm"),
    ("--gpu rtx3060 --engine vllm@zero", "zero"),
    ("--gpu rtx3060 --weights int5", "int5"),
    ("--gpu rtx3060 --state-dtype int8", "int8"),
    ("--gpu rtx3060 --ctx 0", "context"),
    ("--gpu rtx3060 --ctx -1", "--ctx"),
    ("--gpu rtx3060 --ctx 1000000000000", "context"),
    ("--gpu rtx3060 --ctx parsecs", "--ctx"),
    ("--gpu rtx3060 --ctx 1.5K", "--ctx"),
    ("--gpu rtx3060 --seqs 0", "sequences"),
    ("--gpu rtx3060 --mtp 99", "draft"),
    ("--gpu 0xrtx3060", "0xrtx3060"),
    ("--gpu nowhere.yaml", "nowhere.yaml"),
    ("--gpu rtx3060 --model nowhere/config.json", "nowhere"),
    ("--gpu rtx3060,,rtx3090", "empty"),
    ("--gpu=", "empty"),
    ("--gpus rtx3060", "--gpus"),
    ("--gpu", "--gpu"),
    ("rtx3060", "rtx3060"),
    ("prob", "prob"),
    ("--json --format table", "--json"),
    ("--format yaml", "--format"),
    ("--ctx 5 devices", "devices"),
    ("devices no-such-device", "no-such-device"),
    ("models --format=yaml", "--format"),
]


@pytest.mark.parametrize(("arguments", "named"), UNANSWERABLE)
def test_no_answer_is_one_sentence_and_two(qwen_plan: Any, arguments: str, named: str) -> None:
    done = qwen_plan(*arguments.split())
    assert done.status == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("qwen-plan: ")
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.cpu_s < 1


def test_words_of_a_number_are_one_argument(qwen_plan: Any) -> None:
    done = qwen_plan("--gpu", "rtx3060", "--ctx", "12 parsecs")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.startswith("qwen-plan: --ctx: '12 parsecs' is no number of tokens")


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\u202eevil"])
def test_control_characters_do_not_come_back(qwen_plan: Any, name: str) -> None:
    for arguments in (("--gpu", name), ("--gpu", "rtx3060", "--model", name), ("devices", name), (f"--{name}", "1")):
        done = qwen_plan(*arguments)
        assert done.status == 2 and done.stderr.count("\n") == 1
        assert done.stderr[:-1].isprintable()


def test_json_is_one_document_of_the_contract(qwen_plan: Any) -> None:
    done = qwen_plan(*QUESTION, "--json")
    assert done.status == 0 and done.stderr == "" and done.stdout.isascii()
    answer = json.loads(done.stdout)
    assert answer["schema"] == 1 and answer["fits"] is True
    assert {"schema", "request", "fits", "plans", "advice"} <= answer.keys()
    asked = {"model": "qwen3.5-9b", "devices": ["rtx3060"], "ctx_tokens": 262144, "seqs": 1}
    assert asked.items() <= answer["request"].items()
    for plan in answer["plans"]:
        check_plan(plan)
    assert answer["plans"][0]["fits"] is True


def check_plan(plan: dict[str, Any]) -> None:
    types: dict[str, Any] = {
        **dict.fromkeys(("engine", "engine_version", "weights", "kv_dtype", "state_dtype", "command"), str),
        **dict.fromkeys(("tp", "pp", "mtp"), int),
        **dict.fromkeys(("vision", "fits"), bool),
        **dict.fromkeys(("reasons", "warnings", "devices"), list),
        **dict.fromkeys(("host", "limits", "detail"), dict),
    }
    for key, kind in types.items():
        assert type(plan[key]) is kind, key
    assert {"decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "bound_by"} <= plan["speed"].keys()
    assert plan["energy"] is None or {"joules_per_token", "usd_per_million_tokens"} <= plan["energy"].keys()
    assert plan["fits"] is not bool(plan["reasons"])
    assert "\n" not in plan["command"]
    assert {"max_ctx_tokens", "max_seqs"} <= plan["limits"].keys()
    for share in plan["devices"]:
        assert {"name", "capacity_bytes", "usable_bytes", "free_bytes", "memory"} <= share.keys()
        check_memory(share["memory"])
        assert share["free_bytes"] == share["usable_bytes"] - share["memory"]["total_bytes"]
    check_memory(plan["host"]["memory"])


def check_memory(memory: dict[str, Any]) -> None:
    assert memory.keys() >= MEMORY
    assert all(type(memory[key]) is int for key in MEMORY)
    assert memory["total_bytes"] == sum(memory[key] for key in MEMORY - {"total_bytes"})


def test_what_was_meant_by_a_small_k_is_said(qwen_plan: Any) -> None:
    said = "--ctx 256k is 256,000 tokens (k = 1000, m = 1,000,000); 256K would be 262,144"
    assert said in qwen_plan("--gpu", "rtx3060", "--ctx", "256k", env={"COLUMNS": "200"}).stdout
    done = qwen_plan("--gpu", "rtx3060", "--ctx", "256k", "--json")
    assert json.loads(done.stdout)["request"]["ctx_tokens"] == 256_000
    assert done.stderr == f"qwen-plan: {said}\n"


@pytest.mark.parametrize("form", ["table", "markdown", "github"])
def test_formats(qwen_plan: Any, form: str) -> None:
    done = qwen_plan(*QUESTION, "--format", form)
    assert done.status == 0 and "qwen3.5-9b" in done.stdout


def test_an_error_in_a_job_is_annotated(qwen_plan: Any) -> None:
    done = qwen_plan("--gpu", "rtx3061", "--format", "github")
    assert done.status == 2 and done.stderr.startswith("::error title=qwen-plan::")


def test_devices(qwen_plan: Any) -> None:
    done = qwen_plan("devices", "rtx30")
    assert done.status == 0 and done.stderr == ""
    title, *rows = done.stdout.splitlines()
    assert title.split()[0] == "name" and len(rows) > 5
    assert all("rtx30" in row.lower().replace(" ", "") for row in rows)
    records = json.loads(qwen_plan("devices", "--json").stdout)["devices"]
    assert len(records) >= 100
    (card,) = [record for record in records if record["name"] == "rtx3060"]
    assert card["memory_bytes"] == 12 << 30 and card["source"].startswith("http")


def test_models(qwen_plan: Any) -> None:
    done = qwen_plan("models", "9b", "--json")
    (model,) = json.loads(done.stdout)["models"]
    assert model["name"] == "qwen3.5-9b"
    # 19,306,216,416: total_size of Qwen/Qwen3.5-9B's index; 32 KiB: 8 layers x 4 heads x 256 x 2 x 2 bytes
    assert (model["checkpoint_bytes"], model["kv_bytes_per_token"]) == (19_306_216_416, 32_768)
    # 24 layers x (32 x 128 x 128 floats + 3 x 8192 bf16)
    assert model["state_bytes_per_sequence"] == 24 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert "| qwen3.5-9b |" in qwen_plan("models", "--format", "markdown").stdout.replace("\\", "")
    assert len(json.loads(qwen_plan("models", "--json").stdout)["models"]) >= 11


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_plain_and_whole(qwen_plan: Any, flag: str) -> None:
    done = qwen_plan(flag, env={"FORCE_COLOR": "1", "GITHUB_ACTIONS": "true", "COLUMNS": "100"})
    assert done.status == 0 and "\x1b" not in done.stdout
    for word in ("--gpu DEVICE", "--ctx TOKENS", "--vision", "--text-only", "devices", "models", "Exit status"):
        assert word in done.stdout, word


def test_version(qwen_plan: Any) -> None:
    done = qwen_plan("--version")
    assert done.status == 0 and done.stdout.startswith("qwenfit ")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("--gpu rtx306", "rtx3060"),
        ("--gpu 2xrtx309", "2xrtx3090"),
        ("--gpu rtx3060,rtx309", "rtx3060,rtx3090"),
        ("--model qwen3.5-9", "qwen3.5-9b"),
        ("--engine vl", "vllm"),
        ("--weights q4_k", "q4_k_m"),
        ("--state-dtype b", "bfloat16"),
        ("--format m", "markdown"),
        ("dev", "devices"),
    ],
)
def test_completion(qwen_plan: Any, words: str, offered: str) -> None:
    env = {"_QWEN_PLAN_COMPLETE": "complete_bash", "COMP_WORDS": f"qwen-plan {words}"}
    env["COMP_CWORD"] = str(len(words.split()))
    done = qwen_plan(env=env)
    assert offered in done.stdout.split() and done.stderr == ""


def test_completion_can_be_installed(qwen_plan: Any, tmp_path: Any) -> None:
    done = qwen_plan("--show-completion", "bash", env={"HOME": str(tmp_path), "SHELL": "/bin/bash"})
    assert done.status == 0 and "_QWEN_PLAN_COMPLETE" in done.stdout


# What follows runs in this process, with an answer that goes wrong.


def failing(error: BaseException) -> Callable[..., int]:
    def answer(values: object) -> int:
        raise error

    return answer


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWENFIT_DEBUG", raising=False)


@pytest.mark.parametrize("arguments", [[], ["--ctx", "-5"]])  # the second goes by way of Typer
def test_our_own_bug_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(command, "answer", failing(KeyError("lost")))
    assert command.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "KeyError" in said.err and "QWENFIT_DEBUG=1" in said.err and "Traceback" not in said.err
    monkeypatch.setenv("QWENFIT_DEBUG", "1")
    assert command.main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadInput("no"), 2),
        (RecursionError(), 2),
        (MemoryError(), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_statuses(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int) -> None:
    monkeypatch.setattr(command, "answer", failing(error))
    assert command.main([]) == status
    assert command.main(["--ctx", "-5"]) == status


def test_no_arguments_means_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(command, "answer", lambda values: seen.append(values) or 0)
    monkeypatch.setattr("sys.argv", ["qwen-plan", "--ctx=7"])
    assert command.main() == 0 and seen == [{"ctx_tokens": "7"}]
    assert os.environ.get(command.COMPLETION) is None


def installed(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script's own road, after `script` has prepared the process."""
    start = f"import sys; sys.argv = ['qwen-plan', *{arguments!r}]; {script}; from qwenfit.cli.start import qwen_plan"
    return subprocess.run([sys.executable, "-c", f"{start}; qwen_plan()"], capture_output=True, text=True, timeout=60)


def test_the_installed_command_gives_its_answer_before_it_leaves() -> None:
    done = installed("pass", "models", "9b")
    assert done.returncode == 0 and "qwen3.5-9b" in done.stdout and done.stderr == ""
    assert installed("pass", "models", "no-such").returncode == 2


def test_a_broken_installation_is_no_answer() -> None:
    done = installed("sys.modules['qwenfit.planner.plan'] = None", "models")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("qwen-plan: this installation is broken") and done.stderr.count("\n") == 1


def test_nothing_given_is_about_this_machine(qwen_plan: Any) -> None:
    done = qwen_plan("--json")
    assert done.status in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    assert answer["request"]["ctx_tokens"] == 32768 and answer["request"]["devices"]
    assert answer["request"]["model"] == "qwen3.5-9b"
