"""What a device reaches in a few seconds: reading, copying, matmuls by dtype, and the way from the host to a GPU.

Every figure is the median of a number of rounds, and a round takes the measurements in turn, so that what else a busy
machine does hits all of them. Reading is our own C loop over memory (csrc/read.h) where there is a compiler, else
torch's sum; buffers are larger than any cache. Matmuls are square, of torch's library: the largest of SIZES that is
estimated to take less than MATMUL_S. A dtype that torch cannot multiply there is a sentence, and not an error.
"""

import statistics
import time
from collections.abc import Callable

import torch

from ...profiles.machine_profile import Ceilings
from ..cpu.library import cpu_library
from ..cpu.operations import Program, operation

CPU_BUFFER_BYTES = 256 << 20
GPU_BUFFER_BYTES = 1 << 30
LEAST_BUFFER_BYTES = 16 << 20
SIZES = (512, 1024, 2048, 4096, 8192)
MATMUL_S = 0.08
SAMPLE_S = 0.02  # shorter work is repeated until it takes that long
MOST_REPEATS = 64
CPU_DTYPES = ("fp32", "bf16", "int8")
GPU_DTYPES = ("fp32", "fp16", "bf16", "int8")
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}

Work = Callable[[], object]


class CpuTime:
    """Seconds on the clock and of all CPUs, summed over pieces of work in which every thread has something to do."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def run(self, work: Work) -> None:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        work()
        self.wall_s += time.perf_counter() - start_s
        self.cpu_s += time.process_time() - start_cpu_s


def measure_cpu(threads: int, free_bytes: int, rounds: int = 7) -> Ceilings:
    """The CPU's ceilings with so many threads, in buffers of at most an eighth of `free_bytes` each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size = _buffer_bytes(CPU_BUFFER_BYTES, free_bytes)
        source = torch.ones(size, dtype=torch.uint8)  # written, so that every page is its own
        target = torch.ones(size, dtype=torch.uint8)
        read, by = _reader(source, threads)
        spent = CpuTime()
        works: dict[str, Work] = {"read": lambda: spent.run(read), "copy": lambda: target.copy_(source)}
        matmuls, missing = _matmuls(CPU_DTYPES, torch.device("cpu"))
        times = _times({**works, **{dtype: work for dtype, (work, _) in matmuls.items()}}, rounds, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    typical = _medians(times)
    how = f"{by}, torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''}, median of {rounds} rounds"
    return Ceilings(
        read_bytes_per_s=size / typical["read"],
        copy_bytes_per_s=2 * size / typical["copy"],
        read_range_bytes_per_s=(size / max(times["read"]), size / min(times["read"])),
        flops_per_s={dtype: 2 * side**3 / typical[dtype] for dtype, (_, side) in matmuls.items()},
        cpu_share=min(1.0, spent.cpu_s / (threads * spent.wall_s)),
        how=how,
        not_measured=missing,
    )


def cuda_uuids() -> tuple[str, ...]:
    """UUIDs of the GPUs that torch can use, in its order, as NVML writes them where torch knows them; () for none."""
    if not torch.cuda.is_available():
        return ()
    found = (str(getattr(torch.cuda.get_device_properties(i), "uuid", "")) for i in range(torch.cuda.device_count()))
    return tuple(uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}" for uuid in found)


def measure_cuda(index: int, rounds: int = 7) -> Ceilings:
    """The ceilings of torch's GPU `index`. No GPU has run this yet; its parts are those that the CPU's tests run."""
    device = torch.device("cuda", index)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    size = _buffer_bytes(GPU_BUFFER_BYTES, free_bytes)
    source, target = (torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    pinned = torch.ones(size // 4, dtype=torch.float32).pin_memory()
    works: dict[str, Work] = {
        "read": source.sum,
        "copy": lambda: target.copy_(source),
        "host": lambda: target.copy_(pinned, non_blocking=True),
    }
    matmuls, missing = _matmuls(GPU_DTYPES, device)
    times = _times({**works, **{dtype: work for dtype, (work, _) in matmuls.items()}}, rounds, device)
    typical, moved = _medians(times), source.nbytes
    return Ceilings(
        read_bytes_per_s=moved / typical["read"],
        copy_bytes_per_s=2 * moved / typical["copy"],
        host_to_device_bytes_per_s=moved / typical["host"],
        read_range_bytes_per_s=(moved / max(times["read"]), moved / min(times["read"])),
        flops_per_s={dtype: 2 * side**3 / typical[dtype] for dtype, (_, side) in matmuls.items()},
        how=f"torch {torch.__version__}, median of {rounds} rounds",
        not_measured=missing,
    )


def _buffer_bytes(wanted: int, free_bytes: int) -> int:
    """At most an eighth of what is free, in whole tasks of the C loop."""
    return max(LEAST_BUFFER_BYTES, min(wanted, free_bytes // 8)) & -(1 << 20)


def _reader(memory: torch.Tensor, threads: int) -> tuple[Work, str]:
    """What reads all of `memory`, and its name."""
    library = cpu_library()
    if library.path != "c":
        words = memory.view(torch.int64)
        return words.sum, f"torch's sum ({library.reason})"
    program = Program(library)
    program.add(operation("READ", data=memory.data_ptr(), bytes=memory.numel()), memory)
    return (lambda: program.run(threads)), library.reason


def _matmuls(dtypes: tuple[str, ...], device: torch.device) -> tuple[dict[str, tuple[Work, int]], tuple[str, ...]]:
    """For each dtype its matmul and the side of its matrices, and a sentence for each that cannot be had."""
    found: dict[str, tuple[Work, int]] = {}
    missing: list[str] = []
    for dtype in dtypes:
        try:
            found[dtype] = _largest(TYPES[dtype], device)
        except (RuntimeError, NotImplementedError) as error:  # no such kernel, or out of memory
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            missing.append(f"matmul in {dtype}: torch says {said}")
    return found, tuple(missing)


def _largest(dtype: torch.dtype, device: torch.device) -> tuple[Work, int]:
    """The matmul of the largest size that is short enough, tried from the smallest on."""
    for side in SIZES:
        work = _matmul(dtype, side, device)
        took_s = min(_seconds(work, device) for _ in range(2))  # the first one warms up
        if 8 * took_s > MATMUL_S or side == SIZES[-1]:
            return work, side
    raise AssertionError("SIZES is empty")


def _matmul(dtype: torch.dtype, side: int, device: torch.device) -> Work:
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (side, side), dtype=dtype, device=device) for _ in range(2))
        multiply = getattr(torch, "_int_mm", None)  # not in every torch
        if multiply is None:
            raise NotImplementedError("it has no matmul of int8")
        return lambda: multiply(a, b.t())
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    return lambda: torch.mm(a, b, out=out)


@torch.inference_mode()
def _times(works: dict[str, Work], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work, one figure per round; all of them in turn in every round."""
    repeats = {}
    for name, work in works.items():
        took_s = min(_seconds(work, device) for _ in range(2))
        repeats[name] = max(1, min(MOST_REPEATS, round(SAMPLE_S / max(took_s, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(_seconds(work, device, repeats[name]) / repeats[name])
    return found


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in times.items()}


def _seconds(work: Work, device: torch.device, repeats: int = 1) -> float:
    """Seconds of the work, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
