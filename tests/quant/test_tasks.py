"""Reading one ahead: order, how far ahead, and what happens to an error."""

import pytest

from qwenfit.quant.tasks import one_ahead


def test_values_come_in_order_and_at_most_one_is_made_ahead() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number * number

    for taken, value in enumerate(one_ahead(make, range(7))):
        assert value == taken * taken
        assert len(made) <= taken + 2
    assert made == list(range(7))
    assert list(one_ahead(make, [])) == []


def test_an_error_comes_where_its_value_would() -> None:
    values = one_ahead(lambda divisor: 6 // divisor, [3, 2, 0, 1])
    assert [next(values), next(values)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(values)
