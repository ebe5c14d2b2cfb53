"""Every budget of the compile matrix, broken on purpose: the sentence that comes out, and none where it is kept."""

from dataclasses import replace
from typing import Any

import pytest

from qwenfit.kernels.gpu.compile_case import CompileCase
from qwenfit.kernels.gpu.target import target
from qwenfit.kernels.proof.budget import Row, violations
from qwenfit.kernels.proof.machine_code import MachineCode

CASE = CompileCase("k", None, {}, {}, num_warps=4, matrix=True, weights_per_iteration=4096)
CODE = MachineCode(
    registers=100,
    spill_bytes=0,
    spill_instructions=0,
    shared_bytes=99 * 1024,
    tensor_memory_columns=512,
    matrix={"HMMA": 8},
    loads={"128": 8, "16": 1},
    loop_loads={"128": 4, "32": 4},
    instructions=101,
    loop_instructions=96,
)
SM_89 = target("sm_89")


def sentences(code: MachineCode | None = CODE, case: CompileCase = CASE, golden: Any = None, error: str = "") -> str:
    return "; ".join(violations(Row(case, SM_89, code, error), golden))


def test_a_kernel_within_its_budgets_breaks_none() -> None:
    assert sentences() == ""
    assert Row(CASE, SM_89, CODE).instructions_per_weight == 96 * 128 / 4096
    assert sentences(golden=Row(CASE, SM_89, CODE).summary()) == ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"spill_bytes": 4}, "spills 4 bytes per thread in 0 instructions"),
        ({"spill_instructions": 1}, "spills 0 bytes per thread in 1 instructions"),
        ({"shared_bytes": 99 * 1024 + 1}, "wants 101,377 bytes of shared memory, sm_89 has 101,376"),
        ({"tensor_memory_columns": 576}, "wants 576 columns of tensor memory out of 512"),
        ({"instructions": 16}, "has 16 instructions: nothing is left of the kernel"),
        ({"matrix": {}}, "has matrix instructions none, wanted HMMA"),
        ({"loop_loads": {"128": 1, "32": 5}}, "reads 44% of its bytes 128 bits at a time: 128 x1 32 x5"),
        ({"loop_loads": {}, "loads": {"64": 2}}, "reads 0% of its bytes 128 bits at a time: 64 x2"),
    ],
)
def test_a_broken_budget_is_said(change: dict[str, Any], sentence: str) -> None:
    assert sentences(replace(CODE, **change)) == sentence


def test_what_a_case_does_not_expect_is_not_asked_of_it() -> None:
    assert sentences(replace(CODE, matrix={}), replace(CASE, matrix=False)) == ""
    assert sentences(replace(CODE, loop_loads={"32": 9}), replace(CASE, wide_loads=False)) == ""
    assert sentences(case=replace(CASE, matrix="HGMMA")) == "has matrix instructions HMMA x8, wanted HGMMA"
    assert Row(replace(CASE, weights_per_iteration=0), SM_89, CODE).instructions_per_weight is None


def test_worse_than_the_golden_file_is_said() -> None:
    golden = Row(CASE, SM_89, CODE).summary()
    assert sentences(replace(CODE, registers=108, loop_instructions=100), golden=golden) == ""
    assert sentences(replace(CODE, registers=109), golden=golden) == "takes 109 registers, 100 before"
    slower = sentences(replace(CODE, loop_instructions=101), golden=golden)
    assert slower == "takes 3.16 instructions per weight, 3.00 before"
    other = sentences(replace(CODE, matrix={"HGMMA": 1}), golden=golden)
    assert other == "has matrix instructions HGMMA x1, before HMMA x8"
    assert sentences(golden={"error": "did not compile before"}) == ""


def test_what_does_not_compile_is_a_row_with_its_reason() -> None:
    row = Row(CASE, SM_89, None, "PTXASError: no")
    assert row.summary() == {"error": "PTXASError: no"} and row.instructions_per_weight is None
    assert violations(row) == ["does not compile: PTXASError: no"]


def test_a_case_may_ask_for_less_wide_loads() -> None:
    narrow = replace(CODE, loop_loads={"128": 1, "32": 5})
    assert sentences(narrow, replace(CASE, least_wide_share=0.4)) == ""
    assert sentences(narrow, replace(CASE, least_wide_share=0.45)).startswith("reads 44%")
