"""docs/receipts.md shows what happens: its commands are run one after another, and print what stands below them.
QWENFIT_WRITE_GOLDEN=1 pastes the answers of today, to be read in the diff.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from qwenfit.cli.plan import main

PAGE = Path(__file__).parent.parent / "docs" / "receipts.md"
LOGS = Path(__file__).parent / "data" / "logs"
BLOCK = re.compile(r"```\n\$ qwen-plan ([^\n]+)\n(.*?)```\n", re.DOTALL)


def test_every_command_prints_what_stands_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(LOGS, tmp_path / "logs")
    (tmp_path / "logs" / "receipts").mkdir()
    monkeypatch.chdir(tmp_path / "logs")
    monkeypatch.setenv("COLUMNS", "110")
    page = PAGE.read_text(encoding="utf-8")
    answers: dict[str, str] = {}
    for words, _ in BLOCK.findall(page):
        main(shlex.split(words))
        answers[words] = capsys.readouterr().out.rstrip("\n") + "\n"
    if os.environ.get("QWENFIT_WRITE_GOLDEN"):
        fresh = BLOCK.sub(lambda match: f"```\n$ qwen-plan {match[1]}\n{answers[match[1]]}```\n", page)
        PAGE.write_text(fresh, encoding="utf-8")
        page = fresh
    assert len(answers) > 5
    for words, shown in BLOCK.findall(page):
        assert shown == answers[words], words


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factor = "{engine: vllm, part: graph, receipts: 3, sources: 3, factor: 0.5, low: 0.8, high: 1.2}"
    text = f"schema: 1\nfactors:\n  - {factor}\n"
    (tmp_path / "constants.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "receipts.md", "exec"), {})
