"""Kernels that break budgets, for `test_compile_matrix.py`: run as a script it prints what is said of each, as JSON.

A process of its own, because TRITON_INTERPRET is read when a kernel's module is imported.
"""

import json
import os

import triton
import triton.language as tl

from qwenfit.kernels.compile_matrix import compile_all
from qwenfit.kernels.gpu.compile_case import CompileCase
from qwenfit.kernels.gpu.target import target
from qwenfit.kernels.proof.budget import violations


@triton.jit
def copy(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def sort_rows(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.cumsum(tl.load(x + at) * 2.0, 0) + tl.load(x + SIZE - 1 - at))


@triton.jit
def matmul(x, y, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros([M, N], tl.float32)
    for first in range(0, K, BLOCK):
        a = tl.load(x + m[:, None] * K + first + k[None, :])
        b = tl.load(y + n[None, :] * K + first + k[:, None])
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + m[:, None] * N + n[None, :], total)


@triton.jit
def unknown_name(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), no_such_name)  # type: ignore[name-defined]  # noqa: F821


def end_the_process(*_: object) -> None:
    os._exit(9)


def cases() -> list[CompileCase]:
    def product(name: str, kind: str, rows: int, columns: int, **more: object) -> CompileCase:
        signature = {"x": kind, "y": kind, "out": "*fp32", "K": "i32"}
        constants = {"M": rows, "N": columns, "BLOCK": 32}
        return CompileCase(name, matmul, signature, constants, ("x", "y", "out", "K"), **more)  # type: ignore[arg-type]

    pointers = {"x": "*fp32", "y": "*fp32"}
    return [
        CompileCase("empty", copy, pointers, {"SIZE": 128}, wide_loads=False),
        CompileCase("narrow", sort_rows, pointers, {"SIZE": 1024}),
        product("spilling", "*bf16", 128, 256, matrix=True),
        product("no matrix unit", "*fp32", 16, 16, matrix=True),
        product("good", "*bf16", 64, 64, matrix="HGMMA"),
        CompileCase("wrong", unknown_name, {"x": "*fp32"}, {"SIZE": 128}),
        CompileCase("forgotten", copy, {"x": "*fp32"}, {"SIZE": 128}),
        CompileCase("slow", sort_rows, pointers, {"SIZE": 2048}, options={"num_ctas": 1}),
    ]


if __name__ == "__main__":
    hopper = target("sm_90")
    found = {row.case.name: violations(row) for row in compile_all([(case, hopper) for case in cases()[:-1]], jobs=2)}
    slow = list(compile_all([(cases()[-1], hopper)], limit_s=0.01))
    found["slow"] = violations(slow[0])
    from qwenfit.kernels import compile_matrix

    compile_matrix.compile_kernel = end_the_process  # type: ignore[assignment]
    found["dead"] = violations(next(iter(compile_all([(cases()[0], hopper)]))))
    print(json.dumps(found))
