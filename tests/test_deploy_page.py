"""docs/deploy.md shows what happens: its commands are run one after another, and print what stands below them.
QWENFIT_WRITE_GOLDEN=1 pastes the answers of today, to be read in the diff.
"""

import os
import re
import shlex
from pathlib import Path

import pytest

from qwenfit.cli.plan import main

PAGE = Path(__file__).parent.parent / "docs" / "deploy.md"
BLOCK = re.compile(r"(?<=```\n)((?:\$ qwen-plan [^\n]+\n)+)((?:[^`$][^\n]*\n)*)(?=```\n)")


def test_every_command_prints_what_stands_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    answers: dict[str, str] = {}
    for commands, _ in BLOCK.findall(page):
        shown = ""
        for line in commands.splitlines():
            words, _, file = line.removeprefix("$ qwen-plan ").partition(" > ")
            assert main(shlex.split(words)) == 0
            printed = capsys.readouterr().out
            if file:
                Path(file).write_text(printed, encoding="utf-8")
            else:
                shown += printed
        answers[commands] = shown
    assert len(answers) == 4
    if os.environ.get("QWENFIT_WRITE_GOLDEN"):
        page = BLOCK.sub(lambda match: match[1] + answers[match[1]], page)
        PAGE.write_text(page, encoding="utf-8")
    for commands, below in BLOCK.findall(page):
        assert below == answers[commands], commands


def test_it_tells_of_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    rows = " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))
    shown = {line.strip() for line in re.findall(r"^  (\S+)$", page, re.MULTILINE)}
    assert len(shown) > 12
    for name in shown - {"README.md"}:
        assert name.partition("/")[0] in rows or "box-" in name, name
