"""The order in which an engine that fills a fraction of the device is offered more of it.

vLLM and SGLang both take a fraction and a prefill batch. A plan goes through pairs of them in order of preference and
stops at the first that serves; fractions are whole thousandths.
"""

from collections.abc import Callable, Sequence

from ...profiles.frozen import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """A prefill batch and a fraction of the device."""

    batch: int  # place in the estimate's batches
    thousandths: int
    safe: bool  # leaves room for the upper end of what lies outside that fraction


def choices(
    batches: int,
    default: int,
    fixed: int | None,
    highest: Callable[[int], int],
    surest: Callable[[int], int],
    totals: Callable[[int, int], Sequence[int]],
) -> tuple[Choice, ...]:
    """Pairs in order of preference: the first batch from the default fraction up in hundredths, then the others at
    their highest fractions. `highest` and `surest` give the largest fraction of a batch that leaves room for the
    expected and for the upper figures; `totals` what each device holds with a batch at a fraction: more at a larger
    fraction, and never less along the result.
    """
    steps_of: list[list[int]] = []
    surely: list[int] = []
    for batch in range(batches):
        limit, sure = highest(batch), surest(batch)
        if fixed is not None:
            steps = [fixed]
        elif batch:
            steps = sorted({sure, limit})
        else:
            start = max(10, min(default, sure, limit))
            steps = sorted({start, *range(start // 10 * 10 + 10, limit + 1, 10), sure, limit})
        steps_of.append(steps)
        surely.append(sure)
    found: list[Choice] = []
    least: Sequence[int] | None = None  # of what comes behind
    for batch in reversed(range(batches)):
        steps, sure = steps_of[batch], surely[batch]
        count = len(steps) if least is None else _within(batch, steps, least, totals)
        if count:
            least = totals(batch, steps[0])
            found = [Choice(batch, step, step <= sure) for step in steps[:count]] + found
    return tuple(found)


def last_choice(batch: int, fixed: int | None, highest: int, surest: int) -> Choice:
    """The last of `choices`, without the others: its `batch` is the last, and so are the largest fractions that leave
    room for the expected and for the upper figures."""
    thousandths = max(highest, surest) if fixed is None else fixed
    return Choice(batch, thousandths, thousandths <= surest)


def _within(batch: int, steps: list[int], least: Sequence[int], totals: Callable[[int, int], Sequence[int]]) -> int:
    """How many of the steps, which rise, leave every device with no more than `least`."""
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        if all(map(int.__le__, totals(batch, steps[middle]), least)):
            low = middle + 1
        else:
            high = middle
    return low
