"""The pages in docs are what happens: blocks that begin with `$ qwen-plan` print what stands below, Python runs, every
option of a shell block exists, and no link leads nowhere. QWENFIT_WRITE_GOLDEN=1 pastes the answers of today.

What differs from machine to machine (probe, verify, measurements) is shown with `$` too, on the pages named in
`OF_ONE_MACHINE`: there the options are checked and the output is not. Pages of `TESTED_APART` have tests of their own.
"""

import os
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from qwenfit.cli import plan as qwen_plan
from qwenfit.cli import quant as qwen_quant

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OF_ONE_MACHINE = {"probe.md", "verify.md", "cpu.md", "quantization.md", "serve.md", "accuracy.md"}
TESTED_APART = {"receipts.md", "deploy.md", "nodes.md"}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ANSWER = re.compile(r"^```\n\$ (qwen-plan [^\n]+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = {"qwen-plan": qwen_plan.main, "qwen-quant": qwen_quant.main}


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in OF_ONE_MACHINE | TESTED_APART], ids=lambda page: page.name
)
def test_answers_are_todays(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    text = page.read_text(encoding="utf-8")
    for words, shown in ANSWER.findall(text):
        qwen_plan.main(shlex.split(words)[1:])
        answer = capsys.readouterr().out.rstrip("\n") + "\n"
        if os.environ.get("QWENFIT_WRITE_GOLDEN"):
            text = text.replace(f"$ {words}\n{shown}", f"$ {words}\n{answer}")
            page.write_text(text, encoding="utf-8")
        else:
            assert shown == answer, words


@pytest.mark.parametrize(
    ("page", "number"),
    [
        (page, number)
        for page in PAGES
        for number in range(len(blocks(page, "python")))
        if page.name not in TESTED_APART
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_python_runs(page: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page, "python")[number], page.name, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    """Of every command line that is shown, whatever it would do here."""
    shown = [line for text in blocks(page, "sh") for line in text.replace("\\\n", " ").splitlines()]
    shown += [line[2:] for text in blocks(page, "") for line in text.splitlines() if line.startswith("$ ")]
    for line in shown:
        words = shlex.split(line, comments=True)
        if words[:1] and words[0] in COMMANDS:
            known = flags(words[0], words[1] if len(words) > 1 and words[1] in subcommands(words[0]) else "")
            asked = {word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2}
            assert asked <= known, f"{page.name}: {line}"


@cache
def help_text(command: str, subcommand: str) -> str:
    import io
    from contextlib import redirect_stdout

    told = io.StringIO()
    with redirect_stdout(told):
        COMMANDS[command]([*filter(None, [subcommand]), "--help"])
    return told.getvalue()


def flags(command: str, subcommand: str) -> set[str]:
    return {"--help", *re.findall(r"--[a-z][a-z0-9-]*", help_text(command, subcommand))}


def subcommands(command: str) -> set[str]:
    _, _, listed = help_text(command, "").partition("Commands")
    return set(re.findall(r"^\s{2,}([a-z]+)\s", listed, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index] == []
