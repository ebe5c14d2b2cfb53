"""What the timer decides without a device: how many copies keep the cache cold, and what the roofline says."""

import pytest

from qwenfit.kernels.proof.bench_timer import MOST_COPIES, Ceilings, copies_for


@pytest.mark.parametrize(
    ("size", "cache", "copies"),
    [(1 << 20, 50 << 20, 100), (1 << 30, 50 << 20, 1), (100 << 20, 50 << 20, 1), (99 << 20, 50 << 20, 2)],
)
def test_copies_fill_twice_the_cache(size: int, cache: int, copies: int) -> None:
    assert copies_for(size, cache) == copies
    assert copies_for(size, cache) * size >= 2 * cache


def test_tiny_data_is_not_copied_for_ever() -> None:
    assert copies_for(16, 50 << 20) == MOST_COPIES and copies_for(0, 50 << 20) == MOST_COPIES
    assert copies_for(16, 0) == 1


def test_roofline_is_the_longer_of_traffic_and_arithmetic() -> None:
    ceilings = Ceilings(copy_bytes_per_s=2e12, matmul_flops_per_s=5e14)
    assert ceilings.roofline_s(2_000_000, 1000) == pytest.approx(1e-6)
    assert ceilings.roofline_s(2_000_000, 10**9) == pytest.approx(2e-6)
