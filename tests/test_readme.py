"""What the README shows is what happens. QWENFIT_WRITE_GOLDEN=1 pastes the answer of today, to be read in the diff."""

import os
from pathlib import Path
from typing import Any

import pytest

from qwenfit.cli.options import BY_FLAG, read

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PROMPT = "$ qwen-plan --gpu rtx3060 --ctx 262144\n"
INSTALL, TEST = (
    "pip install . && qwen-plan --gpu rtx3060 --ctx 262144",
    "pip install -e '.[test]' -r tests/requirements.txt && pytest",
)


def blocks(kind: str) -> list[str]:
    """The code blocks of that language."""
    parts = README.read_text(encoding="utf-8").split("```")
    return [part.removeprefix(f"{kind}\n") for part in parts[1::2] if part.startswith(f"{kind}\n")]


def test_the_answer_is_todays(qwen_plan: Any) -> None:
    answer = qwen_plan("--gpu", "rtx3060", "--ctx", "262144").stdout
    text = README.read_text(encoding="utf-8")
    before, prompt, rest = text.partition(PROMPT)
    shown, fence, after = rest.partition("```\n")
    if os.environ.get("QWENFIT_WRITE_GOLDEN"):
        README.write_text(before + prompt + answer + fence + after, encoding="utf-8")
        shown = answer
    assert shown == answer


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "Traceback" not in capsys.readouterr().err


def test_the_two_commands_are_those_of_ci() -> None:
    shell = [line for block in blocks("sh") for line in block.splitlines()]
    assert INSTALL in shell and TEST in shell
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f'"{INSTALL}"' in run and f'"{TEST}"' in run
    assert TEST in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert TEST in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_its_examples_are_options_that_exist() -> None:
    commands = [
        line.partition("#")[0].partition(" > ")[0].split() for block in blocks("sh") for line in block.splitlines()
    ]
    asked = [words[1:] for words in commands if words[:1] == ["qwen-plan"]]
    assert len(asked) > 5
    for words in asked:
        if words[:1] in (["probe"], ["verify"], ["calibrate"], ["serve"], ["deploy"]):  # docs pages run those
            continue
        if words[:1] in (["matrix"], ["report"], ["receipt"]):  # subcommands with options of their own
            assert (ROOT / words[1]).exists(), words
            continue
        known = {"devices", "models", "serve", "--help"} & set(words)
        assert known or read(words) is not None, words
        assert all(word in BY_FLAG or word == "--help" for word in words if word.startswith("--"))
