"""The table of the CPU path's speed: what is counted as one copy, and that a run does what its row says."""

from typing import Any

import pytest
import torch

from qwenfit.kernels import bench_cpu
from qwenfit.kernels.bench_cpu import Case, matmul_run, random_weight
from qwenfit.kernels.cpu.library import cpu_library
from qwenfit.kernels.cpu.writer import Writer
from qwenfit.kernels.reference.dense import quantized_matmul

needs_compiler = pytest.mark.skipif(cpu_library().path != "c", reason="no C compiler: nothing of our own to measure")


@needs_compiler
def test_shares_are_of_bytes_read_in_the_same_round(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Four copies of 64 MiB in one second, beside 256 MiB read in half of one by the way to read that is fastest as a
    rule (the second; the first was once luckier), and in 0.7 by the plain one: 64 MiB in 0.25 s, 50 % and 70 %."""
    rounds = ([0.7, 0.5, 0.6, 0.6, 1.0], [0.7, 0.4, 0.6, 0.6, 1.0], [0.7, 0.5, 0.6, 0.6, 1.0])
    seconds = iter([second for reads in rounds for second in (*reads, *reads[:4])])
    monkeypatch.setattr(bench_cpu, "_seconds", lambda runs: next(seconds))
    row = bench_cpu._measure(cpu_library(), Case("made", 64 << 20, [print], copies=4), threads=1, rounds=3)
    assert row["best_ms"] == 250 and row["percent_of_read"] == 50
    assert row["gb_per_s"] == pytest.approx(0.2684, rel=1e-3)
    assert row["read_gb_per_s"] == pytest.approx(0.6711, rel=1e-3)  # its lucky round
    assert row["percent_of_plain_read"] == pytest.approx(70)
    assert row["plain_read_gb_per_s"] == pytest.approx(0.3835, rel=1e-3)
    assert capsys.readouterr().out == "| made | 250.000 | 0.3 | 0.4, 70 | 0.7, 50 |  |  |\n"


@needs_compiler
def test_a_round_in_which_memory_changed_is_measured_again(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Reads of 0.5 s before and 1.0 after say nothing of what lay between; those of 0.50 and 0.52 do."""
    reads = (0.5, 0.5, 0.5)
    moved, quiet = (0.5, *reads, 0.9, 1.0, *reads), (0.5, *reads, 0.6, 0.52, *reads)
    seconds = iter([*moved, *quiet, *moved, *quiet])
    monkeypatch.setattr(bench_cpu, "_seconds", lambda runs: next(seconds))
    row = bench_cpu._measure(cpu_library(), Case("made", 256 << 20, [print]), threads=1, rounds=2)
    assert row["best_ms"] == 600 and row["percent_of_plain_read"] == pytest.approx(85)
    always = iter([*moved] * (bench_cpu.MOST_TRIES + 1))  # where it always changes, a round is taken as it is
    monkeypatch.setattr(bench_cpu, "_seconds", lambda runs: next(always))
    assert bench_cpu._measure(cpu_library(), Case("made", 256 << 20, [print]), threads=1, rounds=1)["best_ms"] == 900


@needs_compiler
def test_a_run_multiplies_by_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[torch.Tensor] = []

    def seen(writer: Writer, source: Any, pairs: Any) -> None:
        results.extend(y for _, y in pairs)
        linear(writer, source, pairs)

    linear = Writer.linear
    monkeypatch.setattr(Writer, "linear", seen)
    weights = [random_weight(rows, 256, 4, 128) for rows in (32, 48, 64)]  # each with rows of its own in y
    x = torch.randn(2, 256)
    matmul_run(cpu_library(), weights, x, threads=1)()
    for weight, y in zip(weights, results, strict=True):
        exact = quantized_matmul(x, weight)
        assert (y - exact).norm() <= 1e-3 * exact.norm()
