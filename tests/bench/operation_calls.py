"""What a call through `torch.ops.qwenfit` costs more than the function behind it: CPU microseconds per call.

    python tests/bench/operation_calls.py

The functions behind are replaced by ones that only allocate their result, so that the difference is the dispatcher's,
the schema's and the unpacking of a quantized weight. `custom_op` is the same behind torch.library.custom_op.
"""

import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwenfit.kernels import library
from qwenfit.kernels.layout.packing import QuantizedWeight, quantize_rtn

CALLS, REPEATS = 2000, 9


def microseconds(call: Callable[[], Any]) -> float:
    """The least of several repeats: what it costs when nothing else runs."""
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS, timer=time.process_time)) / CALLS * 1e6


def main() -> None:
    def behind(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        return x.new_empty((x.shape[0], weight.rows))

    @torch.library.custom_op("qwenfit_bench::matmul", mutates_args=())
    def custom(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        order: Tensor | None,
        bits: int,
        group_size: int,
        rows: int,
        columns: int,
        bias: Tensor | None,
    ) -> Tensor:
        return behind(x, QuantizedWeight(codes, scales, zeros, bits, group_size, rows, columns, order), bias)

    def norm_behind(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.empty_like(x)

    hosts = {"quantized_matmul": behind, "rms_norm": norm_behind}
    library.hosts = lambda _: hosts  # type: ignore[assignment]
    weight = quantize_rtn(torch.randn(64, 128), 4, 128)
    x, norm = torch.randn(1, 128).bfloat16(), torch.zeros(128).bfloat16()
    parts = (weight.codes, weight.scales, weight.zeros, weight.order, 4, 128, 64, 128, None)
    calls = {
        "quantized_matmul, function": lambda: behind(x, weight),
        "quantized_matmul, torch.ops": lambda: library.quantized_matmul(x, weight),
        "quantized_matmul, custom_op": lambda: custom(x, *parts),
        "rms_norm, function": lambda: norm_behind(x, norm, 1e-6),
        "rms_norm, torch.ops": lambda: library.OPS["rms_norm"](x, norm, 1e-6),
    }
    with torch.inference_mode():
        for name, call in calls.items():
            print(f"{name:30} {microseconds(call):6.1f} us")


if __name__ == "__main__":
    main()
