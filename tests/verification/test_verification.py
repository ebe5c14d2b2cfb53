"""The verdict, the document, and the receipt that is made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner import Request, plan
from qwenfit.planner.calibration import fit
from qwenfit.planner.logs.dialect import LoggedPart
from qwenfit.planner.logs.engine_log import EngineLog
from qwenfit.planner.receipt_file import read_receipt, text
from qwenfit.planner.scores import score
from qwenfit.planner.speed import Interval
from qwenfit.planner.verification.completions import Answer
from qwenfit.planner.verification.verification import RateScore, Verification, at
from qwenfit.planner.verification.verify import _rates

ONE = plan(Request("0.8b", ("epyc-rome-8ch-128gb",), 4096, engine="native", weights="int4")).best
MEMORY = ONE.devices[0].memory
PARTS = ("weights", "kv_cache", "recurrent_state", "activation", "runtime")


def made(
    off: dict[str, float] | None = None, rates: tuple[float, ...] = (), died: str | None = None, **told: Any
) -> Verification:
    """A run whose parts are so many times the planned ones, and whose rates lie at so many times the planned middle."""
    parts = tuple(
        LoggedPart(part, "device0", round(MEMORY.parts[part].mid * (off or {}).get(part, 1)), 1 << 16, "x")
        for part in PARTS
    )
    log = EngineLog("native", "0.1", "x", parts=() if died else parts, died=died)
    fields: dict[str, Any] = {
        "date": "2026-11-22", "qwenfit": "0.1.0", "plan_sha256": "0" * 64, "plan": ONE, "planned_layers": 24,
        "command": "python -m x", "weights": "synthetic", "machine": {"system": "x"}, "log": log,
        "scores": score(ONE, log), "peak_bytes": 1, "tolerance": 0.05, "memory_only": False,
        "rates": tuple(
            RateScore("decode_tokens_per_s", Interval(80.0, 100.0, 125.0), 100.0 * rate, 4096, 1) for rate in rates
        ),
    }  # fmt: skip
    return Verification(**{**fields, **told})


shares = st.just(1.0) | st.just(1.0) | st.floats(0.5, 2)  # mostly right, so that each fault is met alone


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(PARTS, shares)), st.lists(shares, max_size=3), st.booleans(), st.booleans())
def test_it_holds_if_and_only_if(off: dict[str, float], rates: list[float], memory_only: bool, has_died: bool) -> None:
    """Exact parts exact, the total within the tolerance, estimated parts within it or within their own interval, and
    every rate in its interval unless only memory counts; and nothing ran out of memory."""
    found = made(off, tuple(rates), "out of memory" if has_died else None, memory_only=memory_only)

    def right(part: str) -> bool:
        amount, doubt = MEMORY.parts[part], 1 << 16
        seen = round(amount.mid * off[part])
        inside = amount.low - doubt <= seen <= amount.high + doubt
        return inside or (not amount.exact and abs(amount.mid / seen - 1) <= 0.05)

    total = sum(round(MEMORY.parts[part].mid * off[part]) for part in PARTS)
    memory = all(map(right, PARTS)) and abs(MEMORY.total.mid / total - 1) <= 0.05
    assert found.memory_within == (memory and not has_died)
    fast = all(0.8 <= rate <= 1.25 for rate in rates)
    assert found.rates_within == (fast if rates else None)
    assert found.holds == (found.memory_within and (memory_only or fast))


def test_rates_that_nobody_planned_do_not_count() -> None:
    unknown = RateScore("decode_tokens_per_s", None, 3.0, 10, 1)
    found = made(rates=(1.0,))
    assert found.holds and unknown.error is None and unknown.within is None
    assert made().rates_within is None and made().holds
    assert not made(rates=(1.0, 3.0)).holds


def test_the_document() -> None:
    """Keys may be added; none of these may change its name or its meaning."""
    told = json.loads(json.dumps(made({"runtime": 1.01}, (0.9,)).to_json(), allow_nan=False))
    assert set(told) == {
        "schema", "kind", "date", "qwenfit", "plan_sha256", "holds", "memory_within", "rates_within", "tolerance",
        "memory_only", "machine", "engine", "engine_version", "model", "weights", "weights_from", "layers",
        "planned_layers", "ctx_tokens", "seqs", "command", "scores", "rates", "peak_bytes", "settings", "facts", "died",
        "notes",
    }  # fmt: skip
    assert (told["schema"], told["kind"], told["engine"], told["model"]) == (
        1,
        "verification",
        "native",
        "qwen3.5-0.8b",
    )
    for one in told["scores"]:
        assert set(one) == {
            "part", "place", "planned_bytes", "basis", "measured_bytes", "resolution_bytes", "error", "within",
        }  # fmt: skip
        assert set(one["planned_bytes"]) == {"low", "mid", "high"}
    (rate,) = told["rates"]
    assert set(rate) == {
        "name", "planned", "measured", "at_tokens", "seqs", "is_estimated", "error", "within",
    }  # fmt: skip
    assert rate["error"] == pytest.approx(100 / 90 - 1)


@pytest.mark.parametrize("died", [None, "CUDA out of memory"])
def test_its_receipt_is_read_back(died: str | None, tmp_path: Path) -> None:
    own = made({"runtime": 1.2}, died=died).receipt()
    (tmp_path / "r.json").write_text(text(own))
    found = read_receipt(str(tmp_path / "r.json"))
    assert found.to_json() == own.to_json() and found.source == "qwen-plan verify, plan 000000000000"
    learned = {one.part: one.factor for one in fit([found]).factors}
    if died:
        assert not learned
    else:
        assert 1.0 < learned["runtime"] < 1.2 and learned["activation"] == pytest.approx(1)


def test_rates_of_requests_are_the_median_ones() -> None:
    """Prefill by the time of the first token, decode behind it; planned at the depth and the one sequence that were."""
    answers = [Answer(512, 65, first, first + gap) for first, gap in ((1.0, 8.0), (2.0, 6.4), (4.0, 12.8))]
    decode, prefill = _rates(ONE, answers)
    assert (prefill.measured, decode.measured) == (256.0, 8.0)
    assert (prefill.at_tokens, decode.at_tokens, decode.seqs) == (512, 544, 1)
    speed = at(ONE, 544, 1)
    assert speed and decode.planned == speed.full.decode_tokens_per_s
    assert _rates(ONE, []) == () and len(_rates(ONE, [Answer(512, 1, 1.0, 1.0)])) == 1
