"""Reading one ahead and saving aside: order, how far ahead, and what happens to an error."""

from threading import Event

import pytest
import torch

from qwenfit.quant.tasks import Aside, one_ahead


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


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_has_its_own_number_of_threads_there(threads: int) -> None:
    before = torch.get_num_threads()
    assert list(one_ahead(lambda _: torch.get_num_threads(), range(3), threads)) == [threads] * 3
    assert torch.get_num_threads() == before


def test_one_call_is_aside_at_a_time() -> None:
    done, gate = [], Event()

    def call(number: int) -> None:
        gate.wait(10)
        done.append(number)

    with Aside() as aside:
        assert aside.is_free()
        aside.start(call, 1)
        assert not aside.is_free() and not done
        gate.set()
        aside.start(call, 2)
        aside.wait()
        assert aside.is_free() and done == [1, 2]
        aside.start(call, 3)
    assert done == [1, 2, 3]  # the end of the context waits


def test_an_error_aside_is_raised_once() -> None:
    with Aside() as aside:
        aside.start(divmod, 1, 0)
        with pytest.raises(ZeroDivisionError):
            aside.wait()
        assert aside.is_free()
