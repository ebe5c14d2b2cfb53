"""Fractions and batches in order of preference, and none that would take more memory than a later one."""

from hypothesis import given
from hypothesis import strategies as st

from qwenfit.planner.engines.budget_steps import Choice, choices, last_choice


def order(scratch: list[int], default: int = 900, fixed: int | None = None) -> tuple[Choice, ...]:
    """A device of 1,000 whose batches keep so much outside the fraction, twice as much at the upper end."""
    return choices(
        len(scratch),
        default,
        fixed,
        lambda batch: 1000 - scratch[batch],
        lambda batch: 1000 - 2 * scratch[batch],
        lambda batch, thousandths: (thousandths + scratch[batch],),
    )


def test_the_default_comes_first_and_the_highest_last() -> None:
    found = order([20])
    assert [choice.thousandths for choice in found] == [900, 910, 920, 930, 940, 950, 960, 970, 980]
    assert [choice.safe for choice in found] == [True] * 7 + [False] * 2


def test_a_smaller_batch_follows_and_never_takes_less() -> None:
    """Unsafe steps of the first batch total up to 1,000, the safe one of the second 995: those above are left out."""
    found = order([20, 5])
    assert found[-2:] == (Choice(1, 990, True), Choice(1, 995, False))
    assert max(choice.thousandths for choice in found if choice.batch == 0) == 970


def test_a_fixed_fraction_is_the_only_one() -> None:
    assert order([20], fixed=990) == (Choice(0, 990, False),)


def one_by_one(scratch: list[int], default: int) -> list[Choice]:
    """Every step of every batch, from the last back: those that take no more than the one behind."""
    every: list[Choice] = []
    for batch, outside in enumerate(scratch):
        limit, sure = 1000 - outside, 1000 - 2 * outside
        start = max(10, min(default, sure))
        steps = {sure, limit} if batch else {start, *range(start // 10 * 10 + 10, limit + 1, 10), sure, limit}
        every += [Choice(batch, step, step <= sure) for step in sorted(steps)]
    kept = [every.pop()]
    for choice in reversed(every):
        if choice.thousandths + scratch[choice.batch] <= kept[-1].thousandths + scratch[kept[-1].batch]:
            kept.append(choice)
    return kept[::-1]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.integers(100, 990))
def test_halving_keeps_what_one_by_one_would(scratch: list[int], default: int) -> None:
    assert list(order(scratch, default)) == one_by_one(scratch, default)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.integers(100, 990))
def test_totals_never_fall(scratch: list[int], default: int) -> None:
    scratch.sort(reverse=True)
    found = order(scratch, default)
    totals = [choice.thousandths + scratch[choice.batch] for choice in found]
    assert totals == sorted(totals)
    assert found[-1] == Choice(len(scratch) - 1, 1000 - scratch[-1], False)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.integers(100, 990), st.none() | st.integers(1, 999))
def test_the_last_is_known_without_the_others(scratch: list[int], default: int, fixed: int | None) -> None:
    last = len(scratch) - 1
    assert order(scratch, default, fixed)[-1] == last_choice(last, fixed, 1000 - scratch[-1], 1000 - 2 * scratch[-1])
