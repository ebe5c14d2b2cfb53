"""The compile matrix: every kernel x its default configurations x every target, compiled here, held to budgets.

    python -m qwenfit.kernels.compile_matrix                    all of it: a table per kernel, exit 1 if a budget broke
    python -m qwenfit.kernels.compile_matrix --target sm_90 gfx942 --kernel attention_decode
    python -m qwenfit.kernels.compile_matrix --module matmul    the kernels of one file
    python -m qwenfit.kernels.compile_matrix --check            also against the golden file: nothing grew, none missing
    python -m qwenfit.kernels.compile_matrix --write            the golden file anew (read its diff)

A kernel takes part by `compile_cases(target)` in its module, made by the same function that configures its launch, and
by a line in `MODULES`. `proof/budget.py` says what is asked of it. The figures of the golden file belong to the version
of Triton that it names; under another one only the absolute budgets are checked.

Every case is compiled in a process of its own (a fork: Triton and the kernels are imported once), so that LLVM may
abort and ptxas may hang without taking the table along: a row then says so. Triton's cache (TRITON_CACHE_DIR) makes a
second run quick. Needs Triton, so Linux, and no GPU; not in a process whose kernels are interpreted.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .gpu.compile_case import CompileCase
from .gpu.target import TARGETS, Target, target
from .proof.budget import Row, by_width, counts, violations
from .proof.machine_code import MachineCode, compile_kernel

MODULES = (
    "attention_decode",
    "attention_prefill",
    "conv",
    "delta_decode",
    "delta_prefill",
    "experts",
    "kv_store",
    "matmul",
    "norm",
    "rope",
)
GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "compile_matrix.json"
SCHEMA = 1
LIMIT_S = 300.0

Pair = tuple[CompileCase, Target]
Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]  # kernel -> target -> summary


def collect(targets: Iterable[Target], kernels: Sequence[str] = (), modules: Sequence[str] = MODULES) -> list[Pair]:
    """The cases of these modules for these targets, by name; of `kernels` only, where named ("w4a16_gemv" has them
    all).

    ValueError where a name is no kernel's, or a case occurs twice.
    """
    targets = tuple(targets)
    found: dict[tuple[str, int], Pair] = {}
    for name in modules:
        compile_cases = importlib.import_module(f".gpu.{name}", __package__).compile_cases
        for at, where in enumerate(targets):
            for case in compile_cases(where):
                if (case.name, at) in found:
                    raise ValueError(f"{name}: {case.name} occurs twice for {where.name}")
                found[case.name, at] = (case, where)
    known = {name for name, _ in found}
    for kernel in kernels:
        if not any(_belongs(name, kernel) for name in known):
            raise ValueError(f"no kernel {kernel!r} on these targets: one of {', '.join(sorted(known))}")
    chosen = (key for key in sorted(found) if not kernels or any(_belongs(key[0], kernel) for kernel in kernels))
    return [found[key] for key in chosen]


def _belongs(case: str, kernel: str) -> bool:
    return case == kernel or case.startswith(f"{kernel}/")


def compile_all(pairs: Sequence[Pair], jobs: int = 1, limit_s: float = LIMIT_S) -> Iterator[Row]:
    """A row per case and target, in their order; up to `jobs` at a time, each given up after `limit_s`."""
    _read_triton_once()
    fork = multiprocessing.get_context("fork")
    rows: dict[int, Row] = {}
    running: dict[Connection, tuple[int, Any, float]] = {}
    ahead = list(enumerate(pairs))[::-1]
    shown = 0
    try:
        while ahead or running:
            while ahead and len(running) < jobs:
                at, (case, where) = ahead.pop()
                ours, theirs = fork.Pipe(duplex=False)
                process = fork.Process(target=_compile_into, args=(theirs, case, where), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (at, process, time.monotonic() + limit_s)
            nearest = min(deadline for _, _, deadline in running.values()) - time.monotonic()
            ready = wait(list(running), timeout=max(0.0, nearest))
            for pipe in [pipe for pipe in running if pipe in ready or time.monotonic() > running[pipe][2]]:
                at, process, _ = running.pop(pipe)
                rows[at] = Row(*pairs[at], *_outcome(pipe, process, limit_s))
            while shown in rows:
                yield rows.pop(shown)
                shown += 1
    finally:
        for _, process, _ in running.values():
            process.kill()


def _read_triton_once() -> None:
    """The name of an entry in Triton's cache holds the hash of all of Triton, 2 s of CPU; forks find it in memory."""
    with suppress(ImportError):  # older versions keep it elsewhere, and take their 2 s
        from triton.runtime.cache import triton_key

        triton_key()


def _compile_into(pipe: Connection, case: CompileCase, where: Target) -> None:
    """The forked process: compiles one case and sends what came of it."""
    # What LLVM, MLIR and ptxas print about a kernel that they refuse is not part of the table.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        pipe.send((compile_kernel(case, where), ""))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        pipe.send((None, f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]))


def _outcome(pipe: Connection, process: Any, limit_s: float) -> tuple[MachineCode | None, str]:
    try:
        if not pipe.poll():
            process.kill()
            return None, f"gave up after {limit_s:.0f} s"
        return pipe.recv()
    except EOFError:
        process.join()
        return None, f"the compiler died with status {process.exitcode}"
    finally:
        process.join()
        pipe.close()


def read_golden(path: Path = GOLDEN) -> dict[str, Any]:
    """{"schema", "triton", "rows": {kernel: {target: summary}}}; no rows where there is no file."""
    if not path.exists():
        return {"schema": SCHEMA, "triton": "", "rows": {}}
    golden = json.loads(path.read_text(encoding="utf-8"))
    if golden.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} has schema {golden.get('schema')}, not {SCHEMA}: write it anew with --write")
    return golden


def golden_text(triton_version: str, rows: Rows) -> str:
    """One line per kernel and target, so that the change of a kernel is the change of a line."""
    order = {where.name: at for at, where in enumerate(TARGETS)}
    blocks = []
    for kernel in sorted(rows):
        names = sorted(rows[kernel], key=lambda name: order.get(name, len(order)))
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows[kernel][name])}" for name in names)
        blocks.append(f"{json.dumps(kernel)}: {{\n{lines}}}")
    head = f'"schema": {SCHEMA},\n"triton": {json.dumps(triton_version)},\n'
    return "{\n" + head + '"rows": {\n' + ",\n".join(blocks) + "\n}}\n"


def table_line(row: Row) -> str:
    """One line of a kernel's table."""
    if row.code is None:
        return f"{row.target.name:10} {row.error}"
    code, per_weight = row.code, row.instructions_per_weight
    numbers = f"{code.registers:5}{code.spill_bytes:6}{code.shared_bytes:8}{code.tensor_memory_columns or '':>5}"
    numbers += f"{code.instructions:6}{code.loop_instructions:6}{'' if per_weight is None else f'{per_weight:.2f}':>8}"
    loads, matrix = counts(by_width(code.loads)), counts(code.matrix)
    return f"{row.target.name:10}{numbers}{code.compile_s:6.1f}  loads {loads}; matrix {matrix}"


HEAD = f"{'':10}{'regs':>5}{'spill':>6}{'shared':>8}{'tmem':>5}{'code':>6}{'loop':>6}{'/weight':>8}{'s':>6}"


def compare(rows: Iterable[Row], held: Rows | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Prints the tables while the rows come in. The summaries of all rows, and the budgets that they break."""
    summaries: dict[str, dict[str, Any]] = {}
    broken: list[str] = []
    for row in rows:
        kernel, place = row.case.name, row.target.name
        if kernel not in summaries:
            print(f"\n{kernel}\n{HEAD}")
        print(table_line(row), flush=True)
        summaries.setdefault(kernel, {})[place] = row.summary()
        old = None if held is None else held.get(kernel, {}).get(place)
        found = violations(row, old)
        if held is not None and old is None:
            found.append("is not in the golden file: --write puts it there")
        broken += [f"{kernel} on {place} {sentence}" for sentence in found]
    return summaries, broken


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every budget is kept. 1: one is broken. 2: it could not be asked."""
    command = "python -m qwenfit.kernels.compile_matrix"
    parser = argparse.ArgumentParser(prog=command, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", nargs="+", default=[where.name for where in TARGETS], help="default: all of them")
    parser.add_argument("--kernel", nargs="+", default=[], help="default: all of them")
    parser.add_argument("--module", nargs="+", default=list(MODULES), help="files of kernels; default: all of them")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    parser.add_argument("--check", action="store_true", help="against the golden file, too")
    parser.add_argument("--write", action="store_true", help="write the golden file")
    chosen = parser.parse_args(arguments)
    import triton

    try:
        pairs = collect([target(name) for name in chosen.target], chosen.kernel, chosen.module)
        golden = read_golden()
    except ValueError as error:
        print(f"compile_matrix: {error}", file=sys.stderr)
        return 2
    held = golden["rows"] if chosen.check and golden["triton"] == triton.__version__ else None
    if chosen.check and held is None:
        print(f"the golden figures are of Triton {golden['triton'] or '(none)'}, this is {triton.__version__}")
    summaries, broken = compare(compile_all(pairs, max(1, chosen.jobs)), held)
    everything = not chosen.kernel and set(chosen.module) >= set(MODULES) and len(chosen.target) == len(TARGETS)
    if held is not None and everything:
        gone = [(name, where) for name in held for where in held[name] if where not in summaries.get(name, {})]
        broken += [f"{name} on {where} is in the golden file and nowhere else" for name, where in gone]
    if chosen.write:
        kept = {} if everything else read_golden()["rows"]  # as it is now: another run may have written meanwhile
        merged = {name: {**kept.get(name, {}), **summaries.get(name, {})} for name in {*kept, *summaries}}
        GOLDEN.write_text(golden_text(triton.__version__, merged), encoding="utf-8")
    print(f"\n{len(pairs)} compiled, {len(broken)} budgets broken", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
