"""Amounts add up part by part, and a sum is exact only where every part is."""

from hypothesis import given
from hypothesis import strategies as st

from qwenfit.planner.memory import NOTHING, Memory, estimated, exactly

amounts = st.integers(0, 10**12)


@given(amounts, amounts, amounts)
def test_a_total_is_the_sum_of_its_parts_at_both_ends(weights, kv_cache, scratch):
    memory = Memory(
        weights=exactly(weights),
        kv_cache=exactly(kv_cache),
        activation=estimated(scratch / 2, scratch, scratch * 2),
    )
    total = memory.total
    assert (total.low, total.mid) == (weights + kv_cache + int(scratch / 2), weights + kv_cache + scratch)
    assert total.high == weights + kv_cache + 2 * scratch
    assert not total.exact


def test_exact_parts_make_an_exact_total():
    assert Memory(weights=exactly(3), graph=exactly(4)).total == exactly(7)
    assert Memory().total == NOTHING
    assert exactly(1) + estimated(1, 2, 3) == estimated(2, 3, 4)


def test_the_parts_are_the_contracts():
    assert list(Memory().parts) == ["weights", "kv_cache", "recurrent_state", "activation", "graph", "runtime"]
