"""A kernel with one of its default configurations, as the compile matrix and the launch both use it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class CompileCase:
    """What Triton needs to compile a kernel without a device, and what must come of it.

    name: "w4a16_gemv", with what tells configurations apart behind a slash: "w4a16_gemv/m1".
    kernel: the function under @triton.jit.
    signature: runtime argument -> Triton's type ("*bf16", "i32", "fp32"), in the kernel's order.
    constants: constexpr argument -> value. A None argument is a constant, too.
    aligned: arguments divisible by 16 (pointers from torch are; strides and sizes where the launch guarantees it).
    matrix: True where a matrix instruction of the target must come out of it; or the start of the one that must.
    wide_loads: whether its main stream must be read 128 bits at a time.
    least_wide_share: of the bytes that the main loop loads, how much so; below a half only with a reason beside it.
    weights_per_iteration: quantized weights that all threads of a program decode in one turn of the main loop (0:
    none).
    options: further options of the launch ("waves_per_eu", "maxnreg"), the same that the host passes.
    large: pointers to tensors that may exceed 2 GiB: on ROCm the others are read by 32-bit offsets, as at launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    matrix: bool | str = False
    wide_loads: bool = True
    least_wide_share: float = 0.5
    weights_per_iteration: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    large: tuple[str, ...] = ()
