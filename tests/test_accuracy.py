"""docs/accuracy.md is fresh, the speed model still says what was scored, and the project's bounds hold.

The held-out errors are kept in tests/data/speed_held_out.json; `pytest -m slow tests/test_accuracy.py` makes them anew.
"""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from qwenfit.planner.factors import factors_of
from qwenfit.planner.measured import Run
from qwenfit.profiles import speed_data

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "tests" / "data" / "speed_held_out.json"


def digest():
    data = Path(speed_data.RUNS).read_bytes().replace(b"\r\n", b"\n")
    return f"{zlib.crc32(data):08x}-{len(data)}"


def test_the_fit_is_of_these_runs():
    """After an edit of speed_runs.json: python tests/bench/accuracy.py --refit."""
    assert speed_data.fitted()["digest"] == digest()
    assert json.loads(HELD_OUT.read_text())["digest"] == digest()


def test_the_model_says_what_was_scored():
    """Predictions for every published run, from the committed factors through the planner's own arithmetic."""
    logs = speed_data.fitted()["logs"]
    runs = {row["id"]: Run(row) for row in speed_data.runs()}
    for row in json.loads(HELD_OUT.read_text())["rows"]:
        run = runs[row["id"]]
        factors = factors_of(logs, run.keys)
        planned = run.prefill(factors) if row["kind"] == "prefill" else run.decode(factors)
        assert planned == pytest.approx(row["fitted"], rel=1e-3), row["id"]


def test_the_page_is_fresh_and_the_bounds_hold():
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "bench" / "accuracy.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_intervals_contain_what_they_promise():
    """75 to 90 % of the held-out runs of each kind that was measured often lie in their 80 % interval."""
    rows = [row for row in json.loads(HELD_OUT.read_text())["rows"] if row["scored"]]
    for kind in ("decode", "mtp", "prefill"):
        inside = [row["inside"] for row in rows if row["kind"] == kind]
        assert len(inside) >= 40
        assert 0.75 <= sum(inside) / len(inside) <= 0.90, kind


@pytest.mark.slow
def test_the_fit_can_be_repeated(monkeypatch):
    """The command gives the committed factors again, to the digits that matter."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import fit_speed

    seen = fit_speed.observations(map(Run, speed_data.runs()))
    rows = fit_speed.np.flatnonzero([one.is_fitted for one in seen])
    design = fit_speed.Design(seen)
    terms, logs = design.terms(rows, design.fit(rows)), speed_data.fitted()["logs"]
    for one in seen:
        assert fit_speed.error(one, terms) == pytest.approx(fit_speed.error(one, logs), abs=0.02), one.run.id
