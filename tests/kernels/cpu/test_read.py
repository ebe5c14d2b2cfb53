"""The plain sum that the tables' read bandwidth comes from: every line once, whatever the streams, and not one more."""

import pytest
import torch

from qwenfit.kernels.bench_cpu import READS
from qwenfit.kernels.cpu.library import available_isas, cpu_library
from qwenfit.kernels.cpu.operations import Program, operation

pytestmark = pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")
TASK_BYTES = 1 << 20  # READ_TASK_BYTES of csrc/read.h


@pytest.mark.parametrize(("streams", "ahead_bytes"), sorted({read[:2] for read in READS}))
def test_every_line_is_read_once(streams: int, ahead_bytes: int) -> None:
    size = 2 * TASK_BYTES + 4096  # two whole tasks and a short one
    words = torch.randint(-(2**31), 2**31, (size // 4,)).int()
    program = Program(cpu_library())
    read = operation("READ", data=words.data_ptr(), bytes=size, streams=streams, ahead_bytes=ahead_bytes)
    program.add(read, words)
    program.run(threads=2)
    tasks = [int(part.long().sum()) % 2**32 for part in words.split(TASK_BYTES // 4)]
    assert read.sum == sum(tasks)
