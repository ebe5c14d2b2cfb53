"""How fast the CPU path is: each operation beside the read bandwidth measured with it, and the whole model beside
llama.cpp.

    python -m qwenfit.kernels.bench_cpu                                    the operations at the 9B model's shapes
    python -m qwenfit.kernels.bench_cpu --model qwen3.5-0.8b --head int8   decode and prefill of random weights
    python -m qwenfit.kernels.bench_cpu --model qwen3.5-0.8b --head int8 \\
        --llama-bench build/bin/llama-bench --gguf 0.8B-Q4_0.gguf          the same, in turn with llama.cpp

Weights are rotated over more than LARGEST_CACHE_BYTES, so that they come from memory. The read bandwidth is that of
sums over as much memory, by two rulers: the plain sum that anyone would write, over memory as anyone gets it
(PLAIN_READ), and the strongest of all READS, the others over huge pages as a model's weights lie in: the one that is
fastest as a rule, the same in all rounds (the fastest in each would be the luck of four tries beside one of ours: 2 %
more than any of them). A shared machine is never
quiet: what is compared is measured in turn within each round, reads before and after ours, and the table has the median
of the rounds' ratios beside the best times. A round between whose two plain reads memory became MOST_DRIFT times as
fast or as slow says nothing, and is measured again (a virtual machine's processors are moved about, from minute to
minute).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .cpu.attention import attention_decode
from .cpu.delta import gated_delta_rule_prefill, gated_delta_rule_step
from .cpu.huge_pages import HugePages
from .cpu.library import CpuLibrary, cpu_library
from .cpu.matmul import dense_linear, planes_of
from .cpu.operations import Program, operation
from .cpu.packed import packed_matmul
from .cpu.writer import Writer, kind_of
from .layout.kv_cache import allocate_kv_cache
from .layout.packing import QuantizedWeight, pack_int4
from .layout.tiles import tile

LARGEST_CACHE_BYTES = 128 << 20
PLAIN_READ = (1, 0, False)  # streams side by side, bytes that they ask for ahead, whether memory is in huge pages
READS = (PLAIN_READ, (1, 0, True), (4, 0, True), (1, 1024, True))  # no processor likes all
MOST_DRIFT, MOST_TRIES = 1.08, 4  # tries: for each round, before any is taken as it is
SHAPES = (
    (12288, 4096),
    (4096, 12288),
    (8192, 4096),
    (7168, 1024),
    (1024, 3584),
)  # rows x columns of the 9B and 0.8B models


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    library = cpu_library()
    print(library.reason)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        if options.model:
            from .proof.bench_cpu_model import compare

            rows += compare(options, threads)
        else:
            rows += operations(library, threads, options.rounds)
    if options.json:
        print(json.dumps(rows))
    return 0


def operations(library: CpuLibrary, threads: int, rounds: int) -> list[dict[str, object]]:
    """One table of operations for a number of threads."""
    if library.path != "c":
        raise ValueError(f"nothing of our own to measure: {library.reason}")
    rows = []
    print(f"\n{threads} thread(s), median of {rounds} rounds\n")
    print("| operation | best ms | GB/s | plain read GB/s, % | strongest read GB/s, % | GFLOP/s | aten int4pack ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in _cases(library, threads):
        rows.append(_measure(library, case, threads, rounds))
    return rows


class Case:
    """Something to time: runs on copies of its data in turn, `copies` in each run and `bytes` in each copy; `flops` of
    one, 0 where memory is what counts."""

    def __init__(
        self,
        name: str,
        bytes: int,
        runs: list[Callable[[], object]],
        flops: float = 0,
        rival: list[Callable[[], object]] | None = None,
        copies: int = 1,
    ) -> None:
        self.name, self.bytes, self.runs, self.flops, self.rival = name, bytes, runs, flops, rival
        self.copies = copies


def random_weight(rows: int, columns: int, bits: int, group_size: int, asymmetric: bool = False) -> QuantizedWeight:
    """Random codes and scales, rows a multiple of 16 and columns of 128."""
    groups = columns // group_size
    scales = (torch.rand(groups, rows) * 0.02 + 0.005).to(torch.bfloat16)
    zeros = torch.randint(0, 16, (groups, rows)).to(torch.bfloat16) if asymmetric else None
    if bits == 8:
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    else:
        codes = pack_int4(torch.randint(0, 16, (rows, columns), dtype=torch.uint8))
    return QuantizedWeight(codes, scales, zeros, bits, group_size, rows, columns)


def matmul_run(
    library: CpuLibrary, weights: Sequence[QuantizedWeight], x: Tensor, threads: int
) -> Callable[[], object]:
    """x [T, K] times each of the weights, one after the other in one program: what decode steps are written of
    (`cpu/writer.py`), without a call from Python between."""
    writer = Writer(library, x.shape[0], planes_of(x.dtype))
    pages = HugePages()
    for weight in weights:
        weight = tile(weight, pages.room)
        kind = kind_of(weight)
        source = writer.unrounded(x, {kind: writer.rounded("x", weight.columns, kind)})
        writer.linear(source, [(weight, writer.buffer("y", weight.rows))])
        writer.program.held.append(weight)
    writer.program.held.append(x)
    return lambda: writer.program.run(threads)


def _cases(library: CpuLibrary, threads: int) -> list[Case]:
    cases = []
    for rows, columns in SHAPES:
        for bits, group_size in ((4, 128), (4, 32), (8, 128)) if (rows, columns) == SHAPES[0] else ((4, 128),):
            for tokens in (1, 4, 8) if (rows, columns) == SHAPES[0] else (1,):
                cases.append(_matmul_case(library, rows, columns, bits, group_size, tokens, threads))
    for tokens in (16, 128, 512):
        cases.append(_matmul_case(library, 4096, 4096, 4, 128, tokens, threads))
    head = [torch.randn(32768, 4096).to(torch.bfloat16) for _ in range(2)]
    x = torch.randn(1, 4096).to(torch.bfloat16)
    cases.append(Case("bf16 head 32768 x 4096", head[0].nbytes, [lambda w=w: dense_linear(x, w) for w in head]))
    for dtype in (torch.bfloat16, torch.int8):
        cache = allocate_kv_cache(1, 4, 32768, 256, dtype)
        for tensor in (cache.keys, cache.values):
            tensor.copy_(torch.randint(-99, 99, tensor.shape))
        q, slot, length = (
            torch.randn(1, 1, 16, 256).to(torch.bfloat16),
            torch.zeros(1).int(),
            torch.full((1,), 32767).int(),
        )
        run = partial(attention_decode, q, q, cache, slot, length)
        cases.append(Case(f"attention, 1 query of 16 heads on 4, 32,768 tokens, {str(dtype)[6:]}", cache.bytes, [run]))
    cases += _delta_cases()
    return cases


def _matmul_case(
    library: CpuLibrary, rows: int, columns: int, bits: int, group_size: int, tokens: int, threads: int
) -> Case:
    first = random_weight(rows, columns, bits, group_size)
    copies = 1 if tokens > 8 else -(-LARGEST_CACHE_BYTES // first.bytes)
    weights = [first, *(random_weight(rows, columns, bits, group_size) for _ in range(copies - 1))]
    x = torch.randn(tokens, columns).to(torch.bfloat16)
    run = matmul_run(library, weights, x, threads)
    rival: list[Callable[[], object]] | None = None
    if (bits == 4 and (rows, columns) == SHAPES[0] and tokens == 1) or tokens > 8:
        rival = [partial(packed_matmul, x, weight) for weight in weights]  # as many copies as ours: from memory, too
        _seconds(rival)  # packs them
    flops = 2.0 * rows * columns * tokens
    name = f"int{bits} g{group_size} {rows} x {columns}, {tokens} token(s)"
    return Case(name, first.bytes, [run], flops, rival, copies)


def _delta_cases() -> list[Case]:
    heads, tokens = 32, 512
    state = torch.zeros(1, heads, 128, 128)
    qkv, gate = torch.randn(tokens, 8192).to(torch.bfloat16), torch.randn(tokens, heads).to(torch.bfloat16)
    rest = (torch.randn(heads), torch.randn(heads), state)
    slot, ends = torch.zeros(1).int(), torch.tensor([0, tokens]).int()
    first = (qkv[None, :1], gate[None, :1], gate[None, :1])
    step = partial(gated_delta_rule_step, *first, *rest, slot, slot[None], 16)
    prefill = partial(gated_delta_rule_prefill, qkv, gate, gate, *rest, slot, ends, 16)
    flops = tokens * heads * 128 * 128 * 6.0
    return [
        Case("delta rule, 1 token, 32 heads of 128 x 128", 2 * state.nbytes, [step]),
        Case("delta rule, 512 tokens, 32 heads of 128 x 128", 2 * state.nbytes, [prefill], flops),
    ]


def _measure(library: CpuLibrary, case: Case, threads: int, rounds: int) -> dict[str, object]:
    count = len(case.runs) * case.copies
    total = case.bytes * count
    size = max(total, LARGEST_CACHE_BYTES)
    memory = {False: torch.ones(size, dtype=torch.uint8), True: HugePages().room(size).fill_(1)}
    sums = [_sum_of(library, memory[is_huge], streams, ahead) for streams, ahead, is_huge in READS]

    def read_seconds() -> list[float]:
        return [_seconds([partial(program.run, threads)]) * total / size for program in sums]

    plain = READS.index(PLAIN_READ)
    ours: list[float] = []
    rivals: list[float] = []
    reads: list[list[float]] = [[] for _ in sums]
    tries = 0
    while len(ours) < rounds:
        tries += 1
        before, mine, after = read_seconds(), _seconds(case.runs), read_seconds()
        drift = max(before[plain], after[plain]) / min(before[plain], after[plain])
        if drift > MOST_DRIFT and tries <= MOST_TRIES * rounds:
            continue
        ours.append(mine)
        for seconds, one, other in zip(reads, before, after, strict=True):
            seconds.append((one + other) / 2)
        if case.rival:
            rivals.append(_seconds(case.rival) / len(case.rival))
    percents = [100 * statistics.median(a / b for a, b in zip(read, ours, strict=True)) for read in reads]
    strongest = min(range(len(reads)), key=percents.__getitem__)
    best = min(ours) / count
    row = {
        "operation": case.name,
        "threads": threads,
        "best_ms": best * 1e3,
        "gb_per_s": case.bytes / best / 1e9,
        "plain_read_gb_per_s": total / min(reads[plain]) / 1e9,
        "percent_of_plain_read": percents[plain],
        "read_gb_per_s": total / min(reads[strongest]) / 1e9,
        "percent_of_read": percents[strongest],
        "gflop_per_s": case.flops / best / 1e9,
        "aten_int4pack_ms": min(rivals) * 1e3 if rivals else None,
    }
    is_memory = case.flops == 0 or case.flops / case.bytes < 64
    shown = [
        f"{best * 1e3:.3f}",
        f"{row['gb_per_s']:.1f}",
        f"{row['plain_read_gb_per_s']:.1f}, {percents[plain]:.0f}" if is_memory else "",
        f"{row['read_gb_per_s']:.1f}, {percents[strongest]:.0f}" if is_memory else "",
        f"{row['gflop_per_s']:.0f}" if case.flops else "",
        f"{min(rivals) * 1e3:.2f}" if rivals else "",
    ]
    print(f"| {case.name} | {' | '.join(shown)} |", flush=True)
    return row


def _sum_of(library: CpuLibrary, memory: Tensor, streams: int, ahead_bytes: int) -> Program:
    program = Program(library)
    pattern = {"streams": streams, "ahead_bytes": ahead_bytes}
    program.add(operation("READ", data=memory.data_ptr(), bytes=memory.numel(), **pattern), memory)
    return program


def _seconds(runs: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwenfit.kernels.bench_cpu", description="CPU path: speed tables")
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", help="a model of the catalog: decode and prefill with random int4 weights")
    parser.add_argument("--head", choices=("bf16", "int8", "int4"), default="bf16", help="how lm_head is stored")
    parser.add_argument("--depths", type=lambda text: [int(part) for part in text.split(",")], default=[0, 32768])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16, help="decode steps per round")
    parser.add_argument("--llama-bench", help="path of llama.cpp's llama-bench, built in Release")
    parser.add_argument("--gguf", help="the same model for llama.cpp")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
