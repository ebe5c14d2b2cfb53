"""What a matrix asks and what changed since last time. The figures of the cells are made by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from qwenfit.planner import plan
from qwenfit.planner.matrix import Cell, Requirements, Verdict, answer, cells_of, changes, refuse_duplicates
from qwenfit.planner.request import Request
from qwenfit.profiles.errors import BadInput
from qwenfit.profiles.frozen import replace

GIB = 1 << 30


PLAIN = Requirements()


def cell(requirements: Requirements = PLAIN, line: int = 3, **asked: Any) -> Cell:
    return Cell(Request(**{"devices": ("rtx3060",), "ctx_tokens": 32768, **asked}), requirements, line)


def verdict(**changed: Any) -> Verdict:
    plain = Verdict(
        cell(), True, "vllm 0.32.0", "int4", "fp8", (9.0 * GIB, 10.0 * GIB, 11.0 * GIB), (40.0, 50.0, 60.0),
        65536, 2, "vllm serve", (), (),
    )  # fmt: skip
    return replace(plain, **changed)


def only(request_cell: Cell) -> Verdict:
    return answer([request_cell], "m.yaml", plan)[0]


def test_a_row_is_a_product() -> None:
    row = list(
        cells_of(7, ["rtx3060", "l40s"], ["qwen3.5-9b"], Request(engine="vllm"), [1024, 2048], [1, 4], Requirements())
    )
    assert len(row) == 8 and len({one.key for one in row}) == 8
    assert all(one.line == 7 and one.request.engine == "vllm" for one in row)


def test_a_question_asked_twice_is_refused_with_both_lines() -> None:
    with pytest.raises(BadInput, match=r"m\.yaml, line 9: asks again what line 3 asks"):
        refuse_duplicates([cell(), cell(line=9)], "m.yaml")
    refuse_duplicates([cell(), cell(line=9, engine="vllm")], "m.yaml")


def test_a_key_says_what_is_fixed_and_nothing_else() -> None:
    """Keys are compared with those of older runs: what a request leaves open, and one box, are not in them."""
    assert cell().key == "rtx3060 qwen3.5-9b 32768x1"
    assert cell(vision=False, mtp=0, nodes=1).key == cell().key
    assert cell(tp=1).key == "rtx3060 qwen3.5-9b 32768x1 tp=1"
    boxes = cell(nodes=2, dp=2, ep=4, interconnect="ib-ndr", vision=True)
    assert boxes.key == "rtx3060 qwen3.5-9b 32768x1 vision=True dp=2 ep=4 nodes=2 interconnect=ib-ndr"


def test_requirements_on_a_real_plan() -> None:
    """rtx3060 with the 9B at 32K fits in about 9.5 GiB (README), and 27B at 256K does not fit at all."""
    assert only(cell()).passes
    small = only(cell(Requirements(max_memory_bytes=GIB)))
    assert not small.passes and "more than the 1.00 GiB allowed" in small.failures[0]
    assert "does not fit" in only(cell(model="qwen3.5-27b", ctx_tokens=262144)).failures[0]
    allowed = only(cell(Requirements(must_fit=False), model="qwen3.5-27b", ctx_tokens=262144))
    assert allowed.passes and not allowed.fits


def test_memory_that_may_be_too_much_is_a_caution() -> None:
    known = only(cell()).memory_bytes
    assert known is not None
    between = int(known[1] + known[2]) // 2
    judged = only(cell(Requirements(max_memory_bytes=between)))
    assert judged.passes and "may take up to" in judged.cautions[0]


@pytest.mark.parametrize(("least", "passes", "cautions"), [(35.0, True, 0), (45.0, True, 1), (55.0, False, 0)])
def test_speed_is_judged_by_the_middle_and_cautioned_by_the_low_end(
    monkeypatch: pytest.MonkeyPatch, least: float, passes: bool, cautions: int
) -> None:
    monkeypatch.setattr("qwenfit.planner.matrix.decode_tokens_per_s", lambda _: (40.0, 50.0, 60.0))
    judged = only(cell(Requirements(min_decode_tokens_per_s=least)))
    assert (judged.passes, len(judged.cautions)) == (passes, cautions)


def test_what_cannot_run_fails_and_unknown_names_are_errors_with_their_line() -> None:
    assert "cannot run" in only(cell(engine="mlx")).failures[0]
    assert only(cell(Requirements(must_fit=False), engine="mlx")).passes
    with pytest.raises(BadInput, match=r"m\.yaml, line 3: .*engine"):
        only(cell(engine="vlm"))


CHANGED: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, None, ""),
    ({"memory_bytes": (9.0, 10.05 * GIB, 11.0)}, None, ""),
    ({"memory_bytes": (9.0, 10.2 * GIB, 11.0)}, "worse", "10.00 to 10.20 GiB"),
    ({"memory_bytes": (9.0, 9.0 * GIB, 11.0)}, "better", "10.00 to 9.00 GiB"),
    ({"decode_tokens_per_s": (1.0, 49.0, 60.0)}, "worse", "50.00 to 49.00 tokens/s"),
    ({"decode_tokens_per_s": (1.0, 49.9, 60.0)}, None, ""),
    ({"decode_tokens_per_s": (1.0, 70.0, 90.0)}, "better", "tokens/s"),
    ({"fits": False, "failures": ("does not fit: why",)}, "worse", "no longer fits"),
    ({"failures": ("takes more",)}, "worse", "takes more"),
    ({"weights": "int8", "memory_bytes": (9.0, 20.0 * GIB, 21.0)}, "changed", "weights int4 to int8"),
]


@pytest.mark.parametrize(("changed", "kind", "what"), CHANGED)
def test_changes_since_last_time(changed: dict[str, Any], kind: str | None, what: str) -> None:
    old = {verdict().cell.key: verdict().to_json()}
    found = changes(old, [verdict(**changed)], 0.01)
    assert [one.kind for one in found] == ([kind] if kind else [])
    assert all(what in one.what for one in found)


def test_new_cells_and_gone_ones() -> None:
    old = {"another": verdict().to_json()}
    assert {one.kind for one in changes(old, [verdict()], 0.01)} == {"new", "gone"}
    failing = changes(old, [verdict(failures=("does not fit",))], 0.01)
    assert failing[0].kind == "worse" and "new: does not fit" in failing[0].what


def test_what_failed_before_and_fails_as_before_is_no_change() -> None:
    failed = verdict(fits=False, failures=("does not fit: why",))
    assert changes({failed.cell.key: failed.to_json()}, [failed], 0.0) == ()


def test_worse_and_better_are_opposites() -> None:
    """Seen from the other side, what got worse got better: no change is lost or counted twice."""
    turn: Callable[[Verdict, Verdict], list[str]] = lambda a, b: [  # noqa: E731
        one.kind for one in changes({a.cell.key: a.to_json()}, [b], 0.01)
    ]
    for changed, kind, _ in CHANGED:
        if kind in ("worse", "better") and changed:
            other = {"worse": "better", "better": "worse"}[kind]
            assert turn(verdict(**changed), verdict()) == [other]
