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
    totals: Callable[[Choice], Sequence[int]],
) -> tuple[Choice, ...]:
    """Pairs in order of preference: the first batch from the default fraction up in hundredths, then the others at
    their highest fractions. `highest` and `surest` give the largest fraction of a batch that leaves room for the
    expected and for the upper figures; `totals` what each device then holds, which never falls along the result.
    """
    found: list[Choice] = []
    for batch in range(batches):
        limit, sure = highest(batch), surest(batch)
        if fixed is not None:
            steps = [fixed]
        elif batch:
            steps = sorted({sure, limit})
        else:
            start = max(10, min(default, sure, limit))
            steps = sorted({start, *range(start // 10 * 10 + 10, limit + 1, 10), sure, limit})
        found += [Choice(batch, step, step <= sure) for step in steps]
    kept = [found.pop()]
    least = totals(kept[0])
    for choice in reversed(found):
        taken = totals(choice)
        if all(map(int.__le__, taken, least)):
            kept.append(choice)
            least = taken
    return tuple(reversed(kept))
