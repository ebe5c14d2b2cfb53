"""One answer in every rendering. QWENFIT_WRITE_GOLDEN=1 writes the golden files anew, to be read in the diff."""

import os
from pathlib import Path
from typing import Any

import pytest

from qwenfit.cli.github import annotation, github
from qwenfit.cli.markdown import markdown
from qwenfit.cli.output import Screen
from qwenfit.cli.table import _bar, table
from qwenfit.planner.engines.engine import DeviceShare
from qwenfit.planner.memory import Memory, exactly
from qwenfit.planner.plan import Plan

GOLDEN = Path(__file__).parent / "golden"
WARNING = "600,000 tokens need YaRN rope scaling (factor 4 over 262,144 native tokens)"


def check(name: str, text: str) -> None:
    file = GOLDEN / name
    if os.environ.get("QWENFIT_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_table_that_fits(fitting: Plan) -> None:
    check("fits.txt", table(fitting, Screen(100, False, True), ("--ctx 256k is 256,000 tokens",)))


def test_table_that_does_not_fit_on_a_narrow_ascii_screen(failing: Plan) -> None:
    text = table(failing, Screen(60, False, False))
    check("does_not_fit.txt", text)
    assert text.isascii()
    assert all(len(line) <= 60 for line in text.splitlines() if not line.startswith("llama-server"))


def test_markdown(failing: Plan) -> None:
    check("does_not_fit.md", markdown(failing))


def test_colour_adds_nothing_but_colour(fitting: Plan) -> None:
    plain, painted = (table(fitting, Screen(80, color, True)) for color in (False, True))
    assert "\x1b" not in plain
    for code in ("1;32", "34", "36", "35", "33", "37", "90", "1"):
        painted = painted.replace(f"\x1b[{code}m", "")
    assert painted.replace("\x1b[0m", "") == plain


def test_the_launch_line_is_alone_and_whole(made: Any) -> None:
    command = "vllm serve x " + "--flag value " * 30
    plan = made.plan(command=command)
    for text in (table(plan, Screen(40, False, True)), markdown(plan)):
        assert command in text.splitlines()


def test_equal_devices_are_told_once(made: Any) -> None:
    text = table(made.plan(count=2), Screen(100, False, True))
    assert text.count("2 x NVIDIA GeForce RTX 3060 (rtx3060), each: ~10.27 of 11.62 GiB") == 1
    assert "on 2xrtx3060" in text


def test_host_memory_is_told(made: Any) -> None:
    text = table(made.plan(host=Memory(weights=exactly(3 << 30))), Screen(100, False, True))
    assert "Host memory: 3.00 GiB (weights 3.00 GiB)" in text


@pytest.mark.parametrize("usable_gib", [1, 8, 10, 12, 24, 1000])
@pytest.mark.parametrize("width", [40, 64])
def test_the_bar_is_as_wide_as_it_should_be_and_shows_every_part(made: Any, usable_gib: int, width: int) -> None:
    memory = made.plan().best.devices[0].memory
    usable_bytes = usable_gib << 30
    cells = list(_bar(DeviceShare(made.device(), usable_bytes, memory), width))
    assert sum(count for _, count in cells) == width
    assert all(count >= 0 for _, count in cells)
    assert (("edge", 1) in cells) == (memory.total.mid > usable_bytes)
    if usable_gib <= 24:
        assert {"weights", "kv_cache", "recurrent_state"} <= {key for key, count in cells if count}


HOSTILE = "evil\x1b]0;owned\x07\n::error::x\r`|<b>\u202e"


def test_names_cannot_drive_a_terminal_a_page_or_a_job(
    made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    monkeypatch.setenv("GITHUB_OUTPUT", str(outputs))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    plan = made.plan(device=made.device(name=HOSTILE, title=HOSTILE), command=f"serve {HOSTILE}", warnings=(HOSTILE,))
    for text in (
        table(plan, Screen(80, False, True), (HOSTILE,)),
        markdown(plan, (HOSTILE,)),
        github(plan, (HOSTILE,)),
    ):
        assert all(line.isprintable() for line in text.split("\n"))
        assert not any(line.startswith("::error") for line in text.split("\n"))
    page = markdown(plan, (HOSTILE,)).replace(f"serve {HOSTILE}".encode("unicode_escape").decode(), "")
    assert "<b>" not in page.replace("\\<b\\>", "")
    written = outputs.read_text(encoding="utf-8").splitlines()
    assert [line.split("=")[0] for line in written] == [
        *("fits", "engine", "weights", "kv_dtype", "max_ctx_tokens", "max_seqs"),
        *("decode_tokens_per_s", "ttft_s", "command"),
    ]


def test_github_writes_where_the_job_says(
    failing: Plan, fitting: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    text = github(failing)
    assert text.startswith("::error title=qwen-plan::Does not fit: qwen3.5-9b on rtx3060, 600,000 tokens x 1 sequence")
    assert text.count("\n") == 1 + len(failing.best.warnings)
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == markdown(failing)
    assert github(fitting).startswith("::notice title=qwen-plan::Fits: ")
    assert "fits=false\n" in (tmp_path / "output").read_text() and "fits=true\n" in (tmp_path / "output").read_text()


def test_annotations_escape_what_the_runner_reads() -> None:
    assert annotation("error", "100%\r\nof\nit", "a:b,c") == "::error title=a%3Ab%2Cc::100%25%0Aof%0Ait"
