"""What is left out without being priced would not have won: answers with it and without are the same."""

from typing import Any

import pytest

from qwenfit.planner import Request, plan
from qwenfit.planner.candidates import Candidates, candidates
from qwenfit.profiles import QwenfitError

QUESTIONS = (
    Request("9b", ("rtx3060",), 32768),
    Request("27b", ("rtx3060",) * 2, 262144, 8),
    Request("397b", ("rtx3090",) * 2, 32768),
    Request("35b-a3b", ("rtx3060",), 131072, 4),
    Request("122b-a10b", ("rtx4090", "rtx4090", "rtx3090"), 1_000_000, 64, kv_dtype="auto"),
    Request("397b", ("h100-sxm",) * 8, 131072, 16, mtp=2, vision=True),
    Request("35b-a3b", ("dgx-spark",), 262144, 2),
    Request("27b", ("rtx3090",) * 4, 131072, 256, mtp=1, nodes=2),
    Request("397b", ("a100-80gb",) * 8, 8192, nodes=2),
    Request("397b", ("rtx3060",) * 8, 8192, 4, nodes=3),
)


def told(request: Request) -> Any:
    candidates.cache_clear()
    try:
        return plan(request).to_json()
    except QwenfitError as error:
        return str(error)


@pytest.mark.parametrize("request_", QUESTIONS, ids=lambda one: f"{one.model}-{one.devices[0]}-{one.nodes}")
def test_pricing_everything_changes_no_answer(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    few = told(request_)
    monkeypatch.setattr(Candidates, "floor", lambda _self, _place: None)
    assert told(request_) == few


def test_of_what_misses_by_far_hardly_anything_is_priced() -> None:
    """397B on one RTX 3060: each engine would go through dozens."""
    candidates.cache_clear()
    priced: list[int] = []

    kept = Candidates.estimate

    def counted(self: Candidates, place: int) -> Any:
        priced.append(place)
        return kept(self, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Candidates, "estimate", counted)
        plan(Request("397b", ("rtx3060",), 8192, engine="vllm"))
    assert 0 < len(priced) <= 4
