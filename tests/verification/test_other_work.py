"""What other work took: ticks of a made /proc/stat against the CPU seconds of this process (proc(5): 100 ticks a second
here and nearly everywhere)."""

import os
from pathlib import Path

import pytest

from qwenfit.planner.verification import other_work
from qwenfit.planner.verification.other_work import OtherWork, noted

TICKS = os.sysconf("SC_CLK_TCK")


def write(path: Path, *seconds: float) -> Path:
    """user, nice, system, idle, iowait, irq, softirq, steal, guest."""
    path.write_text("cpu  " + " ".join(str(int(second * TICKS)) for second in seconds) + "\ncpu0 1 2 3\n")
    return path


def test_what_was_neither_idle_nor_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 s 4 are idle and 3 stolen, and 12 are ours: 4 s, a fifth, went to others. Guests are users, too, and are
    not counted twice."""
    stat = write(tmp_path / "stat", 100, 0, 5, 50, 1, 0, 0, 7, 40)
    own = iter([30.0, 42.0])
    monkeypatch.setattr(other_work, "_own_s", lambda: next(own))
    other = OtherWork(stat)
    write(stat, 112, 0, 6, 53, 2, 0, 0, 10, 47)
    assert other.share() == pytest.approx(4 / 20)


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu 1 2\n", "cpu a b c d\n", "intr 1 2 3 4 5\n", "\0" * 9000])
def test_a_system_that_does_not_say(tmp_path: Path, text: str) -> None:
    stat = tmp_path / "stat"
    stat.write_text(text)
    assert OtherWork(stat).share() is None
    assert OtherWork(tmp_path / "missing").share() is None


def test_a_clock_that_stands_still_says_nothing(tmp_path: Path) -> None:
    assert OtherWork(write(tmp_path / "stat", 1, 0, 0, 1)).share() is None


def test_on_this_machine_it_is_a_share() -> None:
    other = OtherWork()
    sum(range(3_000_000))
    share = other.share()
    assert share is None or 0 <= share <= 1


def test_little_is_not_told() -> None:
    assert noted(None) is None and noted(0.09) is None
    assert "took 31% of the processors' time" in (noted(0.31) or "")
