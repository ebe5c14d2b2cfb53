"""docs/nodes.md shows what happens: its commands are run, and what stands below them is in the answer, in that order.
`...` stands for what was left out.
"""

import re
import shlex
from pathlib import Path

import pytest

from qwenfit.cli.plan import main

PAGE = (Path(__file__).parent.parent / "docs" / "nodes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^    \$ qwen-plan ([^\n]+)\n((?:    [^\n]+\n)+)", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("words", "shown"), BLOCKS)
def test_the_answer_has_what_is_shown(
    words: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(shlex.split(words)) == 0
    answer = capsys.readouterr().out
    place = 0
    for line in shown.splitlines():
        for piece in re.split(r" ?\.\.\. ?", line.strip()):
            found = answer.find(piece, place)
            assert found >= 0, piece
            place = found + len(piece)


def test_there_are_the_three_cases() -> None:
    assert len(BLOCKS) == 3
