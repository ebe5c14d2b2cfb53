"""Which kernel multiplies: the borders that the table states, and the sentences that say why."""

from statistics import median

import pytest
import torch

from qwenfit.kernels.gpu.matmul_paths import (
    ISSUE,
    UNPACK_ROWS,
    choose_expert_path,
    choose_path,
    gemv_configuration,
    has_tiles,
    splits_for,
    tile_configuration,
)
from qwenfit.kernels.gpu.target import TARGETS, Target, target
from qwenfit.profiles import devices


@pytest.fixture(autouse=True)
def no_path_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWENFIT_MATMUL_PATH", raising=False)


@pytest.mark.parametrize(
    ("where", "rows", "path"),
    (
        ("sm_75", 1, "gemv"),
        ("sm_75", 16, "gemv"),
        ("sm_75", 17, "unpack"),
        ("sm_80", 1, "tiles"),  # gemv's 5 instructions per weight against 70 % of the 5.5 that it can issue
        ("sm_86", 2, "gemv"),
        ("sm_86", 3, "tiles"),
        ("sm_89", 4, "gemv"),
        ("sm_89", 5, "tiles"),
        ("sm_90", 1, "tiles"),
        ("sm_90", 703, "tiles"),
        ("sm_90", 704, "unpack"),
        ("gfx942", 1, "tiles"),
        ("gfx1100", 1, "gemv"),
        ("gfx1100", 96, "unpack"),
    ),
)
def test_the_borders_of_the_table(where: str, rows: int, path: str) -> None:
    chosen, reason = choose_path(target(where), torch.float16, rows)
    assert chosen == path
    assert reason and not reason.endswith(".")


@pytest.mark.parametrize("where", TARGETS, ids=lambda where: where.name)
def test_the_tables_are_those_of_the_catalog(where: Target) -> None:
    """Medians over the devices that `profiles/*.yaml` has of a target, by the formulas in the module's docstring."""
    capability = f"{where.capability / 10}" if where.backend == "cuda" else where.name
    those = [device for device in devices() if device.compute_capability == capability and device.kind == "discrete"]
    counted = 2.0 if where.name in ("sm_75", "sm_80") else 0.5 if where.backend == "hip" else 1.0
    issue = median(counted * d.flops_per_s["fp32"] / (4 * d.memory_bandwidth_bytes_per_s) for d in those)
    assert ISSUE[where.name] == pytest.approx(issue, abs=0.06)
    if where.matrix_instruction is None:
        return
    share = 0.45 if where.name == "sm_100" else 0.25 if where.backend == "hip" else 0.6
    balance = median(d.flops_per_s["bf16"] / d.memory_bandwidth_bytes_per_s for d in those if "bf16" in d.flops_per_s)
    assert UNPACK_ROWS[where.name] == 32 * round(4.5 * balance / 2 / (1 / share - 1) / 32)


def test_turing_says_why() -> None:
    assert "sm_75 has no tensor cores in Triton" in choose_path(target("sm_75"), torch.float16, 100)[1]


def test_float32_never_meets_a_matrix_unit() -> None:
    for where in TARGETS:
        assert not has_tiles(where, torch.float32)
        assert {choose_path(where, torch.float32, rows)[0] for rows in (1, 16, 17, 5000)} == {"gemv", "unpack"}


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENFIT_MATMUL_PATH", "unpack")
    assert choose_path(target("sm_90"), torch.bfloat16, 1) == ("unpack", "QWENFIT_MATMUL_PATH says so")
    monkeypatch.setenv("QWENFIT_MATMUL_PATH", "cutlass")
    with pytest.raises(ValueError, match="one of gemv, tiles, unpack"):
        choose_path(target("sm_90"), torch.bfloat16, 1)


def test_the_path_of_experts_follows_rows_device_and_type() -> None:
    choose = choose_expert_path
    assert choose(target("sm_89"), torch.bfloat16, 8, 256)[0] == "gemv"
    assert choose(target("sm_90"), torch.bfloat16, 8, 256)[0] == "tiles"
    assert choose(target("sm_89"), torch.bfloat16, 512, 256)[0] == "tiles"
    assert choose(target("sm_75"), torch.float16, 512, 256)[0] == "gemv"
    path, reason = choose(target("sm_75"), torch.float16, 4096, 256)
    assert path == "unpack" and "sm_75 has no tensor cores" in reason


def test_splits_fill_the_device_and_no_more() -> None:
    """N = K = 4,096 on 132 processors: 64 programs of two warps become 8 times as many, of 4 blocks each."""
    assert splits_for(64, 2, 32, 1, 132) == 8
    assert splits_for(528, 2, 32, 1, 132) == 1
    assert splits_for(400, 2, 32, 64, 132) == 1  # three quarters of the device; sums would add half of the traffic
    assert splits_for(1, 1, 4, 1, 132) == 1  # nothing below 4 blocks


def test_configurations_exist_for_all_that_a_weight_can_be() -> None:
    for where in TARGETS[1:]:
        for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 2000):
            for bits, group in ((4, 128), (4, 32), (4, 0), (8, 64), (16, 0)):
                use = tile_configuration(where, rows, bits, group)
                assert use.rows in (16, 32, 64, 128) and use.columns % 16 == 0
    for rows in range(1, 9):
        assert gemv_configuration(rows, 4).rows == min(rows, 4)
