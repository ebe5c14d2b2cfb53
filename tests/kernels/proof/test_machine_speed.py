"""What `qwen-plan probe --measure` runs: small here; figures of a busy machine are only bounded."""

from typing import Any

import pytest
import torch

from qwenfit.kernels.proof import machine_speed
from qwenfit.kernels.proof.machine_speed import measure_cpu

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed, "SIZES", (128, 256))
    monkeypatch.setattr(machine_speed, "SAMPLE_S", 0.001)


def test_a_cpu_has_every_ceiling() -> None:
    """Within what any CPU does: 0.1 to 10,000 GB/s; the threads are as they were."""
    before = torch.get_num_threads()
    found = measure_cpu(1, 128 * MIB, rounds=3)
    assert torch.get_num_threads() == before
    assert found.read_bytes_per_s and 1e8 < found.read_bytes_per_s < 1e13
    assert found.copy_bytes_per_s and 1e8 < found.copy_bytes_per_s < 1e13
    low, high = found.read_range_bytes_per_s
    assert low <= found.read_bytes_per_s <= high
    assert found.cpu_share and 0 < found.cpu_share <= 1
    assert found.host_to_device_bytes_per_s is None
    assert set(found.flops_per_s) | {said.split()[2].rstrip(":") for said in found.not_measured} == {
        "fp32",
        "bf16",
        "int8",
    }
    assert all(1e6 < rate < 1e16 for rate in found.flops_per_s.values())
    assert "1 thread, median of 3 rounds" in found.how


def test_without_a_compiler_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENFIT_CPU_PATH", "torch")
    assert measure_cpu(1, 128 * MIB, rounds=1).how.startswith("torch's sum")


def test_a_dtype_that_torch_lacks_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise RuntimeError('"addmm_impl_cpu_" not implemented for this\nstack of lines')

    monkeypatch.setattr(torch, "mm", refuse)
    monkeypatch.delattr(torch, "_int_mm", raising=False)
    found = measure_cpu(1, 128 * MIB, rounds=1)
    assert found.flops_per_s == {} and len(found.not_measured) == 3
    assert found.not_measured[0] == 'matmul in fp32: torch says "addmm_impl_cpu_" not implemented for this'
    assert found.not_measured[2] == "matmul in int8: torch says it has no matmul of int8"


def test_buffers_leave_most_of_the_memory() -> None:
    """An eighth of what is free each, and at least 16 MiB; whole MiB, for the C loop takes tasks of 64 KiB."""
    assert machine_speed._buffer_bytes(256 * MIB, 800 * MIB + 7) == 100 * MIB
    assert machine_speed._buffer_bytes(256 * MIB, 0) == 16 * MIB
    assert machine_speed._buffer_bytes(256 * MIB, 1 << 40) == 256 * MIB
    assert machine_speed.LEAST_BUFFER_BYTES % (1 << 20) == 0


def test_the_median_ignores_a_round_that_was_disturbed() -> None:
    assert machine_speed._medians({"read": [1.0, 1.1, 90.0]}) == {"read": 1.1}


@pytest.mark.gpu
def test_a_gpu_has_every_ceiling() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    found = machine_speed.measure_cuda(0, rounds=3)
    assert machine_speed.cuda_uuids()[0].startswith(("GPU-", "MIG-"))
    assert found.read_bytes_per_s and found.read_bytes_per_s > 1e10
    assert found.host_to_device_bytes_per_s and found.host_to_device_bytes_per_s < found.read_bytes_per_s
    assert found.flops_per_s["bf16"] > found.flops_per_s["fp32"]
