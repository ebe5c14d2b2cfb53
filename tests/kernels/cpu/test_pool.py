"""The thread pool under strain: many tiny operations in a chain, more threads than cores, one answer.

In a process of its own: a pool that loses a task waits for it for ever.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from qwenfit.kernels.cpu.library import available_isas, cpu_library, openmp_of_torch
from qwenfit.kernels.cpu.matmul import add_matmul, dense_matrix
from qwenfit.kernels.cpu.operations import Program, address, operation, pointer, rows_of

pytestmark = pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")

# Rows of the matrices of the chain: 1 to 7 tasks of 32, so that their number grows and shrinks from one operation
# to the next. A thread that came late with the shares of one operation and the count of the next would compute a task
# twice or not at all.
ROWS = [32 * tasks - 5 for tasks in (1, 7, 2, 1, 5, 3, 1, 1, 6, 4)] * 12


def chain(values: torch.Tensor) -> tuple[Program, torch.Tensor, list[torch.Tensor]]:
    """values -> W1 values -> W2 W1 values ..., each product an operation that needs all tasks of the one before."""
    generator = torch.Generator().manual_seed(0)
    program, x, outputs = Program(cpu_library()), values, []
    for rows in ROWS:
        matrix = torch.randn(rows, x.shape[1], generator=generator) / x.shape[1] ** 0.5
        y = torch.zeros(1, rows)
        add_matmul(program, [dense_matrix(matrix, y)], 1, floats=rows_of(x))
        program.held.extend((x, y))
        x = y
        outputs.append(y)
    return program, x, outputs


def run_here(what: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
    """This file as a program of its own."""
    command, variables = [sys.executable, __file__, what], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("threads_of", ["torch", "the pool", "torch, two of them"])
def test_every_task_is_done_once_and_after_those_before_it(threads_of: str) -> None:
    """Where the runtime gives two threads in place of six, nobody has the shares of the other four: they are taken from
    the back, or the program would never end."""
    if threads_of != "the pool" and openmp_of_torch() is None:
        pytest.skip("torch's OpenMP runtime cannot be borrowed here")
    run_here(threads_of, {"OMP_THREAD_LIMIT": "2"} if threads_of == "torch, two of them" else {})


def run_chain(threads_of: str) -> None:
    if threads_of == "the pool":
        cpu_library().host.qwenfit_borrow(None)
    program, last, outputs = chain(torch.randn(1, 64, generator=torch.Generator().manual_seed(1)))
    program.run(threads=1)
    alone = last.clone()
    assert alone.abs().sum() > 0
    for run in range(400):
        for y in outputs:
            y.fill_(float("nan"))
        program.run(threads=2 + run % 5)
        assert torch.equal(last, alone), f"run {run} on {2 + run % 5} threads"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_no_threads_are_added_to_those_of_torch() -> None:
    """Two sets of threads that spin would want the same cores: a loop of torch's, then a program on as many threads."""
    code = """
        import os, sys, torch
        torch.set_num_threads(3)
        torch.randn(1 << 20).exp().sum()
        from test_pool import chain, cpu_library
        library = cpu_library()
        if sys.argv[1] == "the pool": library.host.qwenfit_borrow(None)
        program, _, _ = chain(torch.randn(1, 64))
        before = len(os.listdir("/proc/self/task"))
        program.run(threads=3)
        print(len(os.listdir("/proc/self/task")) - before)
    """
    added = {}
    for threads_of in ("torch", "the pool"):
        command = [sys.executable, "-c", textwrap.dedent(code), threads_of]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, check=True, cwd=Path(__file__).parent
        )
        added[threads_of] = int(done.stdout)
    assert added == {"torch": 0, "the pool": 2} if openmp_of_torch() else {"torch": 2, "the pool": 2}


def test_more_tasks_than_a_share_can_count_are_taken_several_at_a_time() -> None:
    """What is taken of a thread's share is counted in 16 bits: 65,535 at most (csrc/progress.h)."""
    run_here("many tasks")


def test_programs_of_several_callers_wait_for_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    chains = [chain(torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))) for seed in range(4)]
    expected = []
    for program, last, _ in chains:
        program.run(threads=1)
        expected.append(last.clone())
    with ThreadPoolExecutor(4) as callers:
        for _ in range(20):
            list(callers.map(lambda one: one[0].run(threads=3), chains))
            assert all(torch.equal(last, alone) for (_, last, _), alone in zip(chains, expected, strict=True))


def run_many_tasks() -> None:
    for threads in (1, 3):
        rows = 65535 * threads * 2 + 7
        table, y = torch.randn(5, 16), torch.full((rows, 16), float("nan"))
        tokens = torch.arange(rows, dtype=torch.int32) % 5
        matrix, held = dense_matrix(table, torch.zeros(1, 5))
        program = Program(cpu_library())
        embed = operation("EMBED", tokens=pointer(tokens), count=rows, matrix=address(matrix), y=rows_of(y))
        program.add(embed, matrix, held)
        program.run(threads=threads)
        assert torch.equal(y, table[tokens.long()])


if __name__ == "__main__":
    run_many_tasks() if sys.argv[1] == "many tasks" else run_chain(sys.argv[1])
