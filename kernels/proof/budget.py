"""What a compiled kernel may ask for at most, and what it must have: the sentences of the compile matrix.

Whatever came before: it compiles; nothing spilled; shared memory within the device; tensor memory within 512 columns;
more than 100 instructions (on sm_100 a kernel that wants more tensor memory than there is compiles to 16 instructions
without a word); the matrix instruction that the case expects; its main stream read 128 bits at a time (half of the
bytes of the main loop at least: scales and indices may be narrow; a case that asks for less says why). Against what the
golden file remembers of it: registers + 8, instructions per weight + 5 %, the same kinds of matrix instruction.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..gpu.compile_case import CompileCase
from ..gpu.target import Target
from .machine_code import MachineCode

LEAST_INSTRUCTIONS = 100
TENSOR_MEMORY_COLUMNS = 512
MOST_MORE_REGISTERS = 8
MOST_INSTRUCTIONS_PER_WEIGHT = 1.05


@dataclass(frozen=True, slots=True)
class Row:
    """A case on a target: what it compiled to, or why it did not."""

    case: CompileCase
    target: Target
    code: MachineCode | None
    error: str = ""

    @property
    def instructions_per_weight(self) -> float | None:
        """Instructions of all threads in a turn of the main loop per quantized weight that it decodes."""
        if self.code is None or not self.case.weights_per_iteration:
            return None
        threads = self.case.num_warps * self.target.warp_threads
        return self.code.loop_instructions * threads / self.case.weights_per_iteration

    def summary(self) -> dict[str, Any]:
        """What the golden file keeps of it."""
        code, per_weight = self.code, self.instructions_per_weight
        if code is None:
            return {"error": self.error}
        columns = {"tensor_memory_columns": code.tensor_memory_columns} if code.tensor_memory_columns else {}
        return {
            "registers": code.registers,
            "spill_bytes": code.spill_bytes,
            "shared_bytes": code.shared_bytes,
            **columns,
            "matrix": dict(sorted(code.matrix.items())),
            "loads": by_width(code.loads),
            "instructions": code.instructions,
            "loop_instructions": code.loop_instructions,
            **({} if per_weight is None else {"instructions_per_weight": round(per_weight, 3)}),
        }


def violations(row: Row, golden: Mapping[str, Any] | None = None) -> list[str]:
    """The budgets that a row breaks, one sentence each; `golden`: the summary to hold it to, where there is one."""
    code, case, where = row.code, row.case, row.target
    if code is None:
        return [f"does not compile: {row.error}"]
    broken = []
    if code.spill_bytes or code.spill_instructions:
        broken.append(f"spills {code.spill_bytes} bytes per thread in {code.spill_instructions} instructions")
    if code.shared_bytes > where.shared_bytes:
        broken.append(f"wants {code.shared_bytes:,} bytes of shared memory, {where.name} has {where.shared_bytes:,}")
    if code.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        broken.append(f"wants {code.tensor_memory_columns} columns of tensor memory out of {TENSOR_MEMORY_COLUMNS}")
    if code.instructions <= LEAST_INSTRUCTIONS:
        broken.append(f"has {code.instructions} instructions: nothing is left of the kernel")
    wanted = case.matrix if isinstance(case.matrix, str) else ""
    if case.matrix and not any(name.startswith(wanted) for name in code.matrix):
        broken.append(f"has matrix instructions {counts(code.matrix)}, wanted {wanted or where.matrix_instruction}")
    if case.wide_loads and code.wide_share() < case.least_wide_share:
        loads = counts(by_width(code.loop_loads or code.loads))
        broken.append(f"reads {code.wide_share():.0%} of its bytes 128 bits at a time: {loads}")
    return broken if golden is None else broken + _worse(golden, row.summary())


def _worse(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if "error" in before:
        return []
    broken = []
    if now["registers"] > before["registers"] + MOST_MORE_REGISTERS:
        broken.append(f"takes {now['registers']} registers, {before['registers']} before")
    if set(now["matrix"]) != set(before["matrix"]):
        broken.append(f"has matrix instructions {counts(now['matrix'])}, before {counts(before['matrix'])}")
    old, new = before.get("instructions_per_weight"), now.get("instructions_per_weight")
    if old is not None and new is not None and new > old * MOST_INSTRUCTIONS_PER_WEIGHT:
        broken.append(f"takes {new:.2f} instructions per weight, {old:.2f} before")
    return broken


def by_width(loads: Mapping[str, int]) -> dict[str, int]:
    """Loads, the widest first."""
    return dict(sorted(loads.items(), key=lambda item: 1 << 30 if item[0] == "tma" else int(item[0]), reverse=True))


def counts(amounts: Mapping[str, int]) -> str:
    """ "128 x4 32 x2", or "none"."""
    return " ".join(f"{name} x{count}" for name, count in amounts.items()) or "none"
