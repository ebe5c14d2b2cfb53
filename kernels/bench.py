"""The bench of the GPU kernels: right first, then how fast, and how near to what this device can do.

    python -m qwenfit.kernels.bench --json h100.json                    every kernel at every shape of the family
    python -m qwenfit.kernels.bench --model qwen3.5-9b --tokens 1 16 --only matmul attention
    python -m qwenfit.kernels.bench --dry-run                           the whole way on a CPU, tiny shapes, no times

A kernel's result is compared with its twin in float64 before it is timed; one that is wrong is not timed, and the run
ends with status 1. What is timed, and how, says `proof/bench_timer.py`; at which shapes, `bench_shapes.py`; against
whom, `bench_rivals.py`. The last columns are the share of the roofline (the longer of least traffic at the copy
bandwidth, and arithmetic at the speed of a large matmul, both measured in this run) and what the rivals take in
microseconds.
Status 2: there is no GPU (or a model is unknown); --dry-run needs none, and goes through Triton's interpreter.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .proof.bench_timer import Ceilings
    from .proof.bench_work import Rival, Setting, Work

SCHEMA = 1
DRY_TOKENS = (1, 2, 70)
DRY_DEPTHS = (70,)
RIVAL_ERROR = 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every kernel was right. 1: one was not. 2: it could not be asked."""
    options = _parser().parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which is below
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("bench: torch sees no GPU here; --dry-run goes the whole way without one", file=sys.stderr)
        return 2
    from ..profiles.errors import QwenfitError
    from .proof.bench_machine import machine
    from .proof.bench_shapes import family, tiny, works

    try:
        models = family(options.model) if options.model else family()
    except QwenfitError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        models = {name: tiny(configuration) for name, configuration in models.items()}
    report: dict[str, Any] = {"schema": SCHEMA, "dry_run": options.dry_run, **machine()}
    setting, ceilings = _setting(options, report), None
    if not options.dry_run:
        from .proof.bench_timer import measure_ceilings

        ceilings = measure_ceilings(setting.dtype, report["device"]["memory_bytes"])
        report["copy_bytes_per_s"] = ceilings.copy_bytes_per_s
        report["matmul_flops_per_s"] = ceilings.matmul_flops_per_s
        speeds = f"{ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, matmul {ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
        print(f"{report['device']['name']}: copy {speeds}")
    rows: list[dict[str, Any]] = []
    report["rows"] = rows
    print(f"{HEAD}  rivals, us")
    try:
        for make in works(models, setting, options.only):
            rows.append(measure(make, ceilings, report["device"].get("cache_bytes", 0), not options.no_rivals))
            print(table_line(rows[-1]), flush=True)
    finally:
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
    bad = sum(row["status"] in ("wrong", "failed") for row in rows)
    print(f"{len(rows)} measured, {bad} of them wrong")
    return 1 if bad else 0


def _setting(options: argparse.Namespace, report: dict[str, Any]) -> "Setting":
    import torch

    from .proof.bench_timer import copies_for
    from .proof.bench_work import DEPTHS, TOKENS, Setting

    bits = tuple(options.bits)
    if options.dry_run:
        tokens, depths = tuple(options.tokens or DRY_TOKENS), tuple(options.depth or DRY_DEPTHS)
        # float16: without the tests' shim Triton 3.9's interpreter computes bfloat16 wrongly.
        return Setting(torch.device("cpu"), torch.float16, lambda _: 2, tokens, depths, bits)
    cache_bytes = report["device"]["cache_bytes"]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    tokens, depths = tuple(options.tokens or TOKENS), tuple(options.depth or DEPTHS)
    return Setting(torch.device("cuda"), dtype, lambda size: copies_for(size, cache_bytes), tokens, depths, bits)


def measure(
    make: Callable[[], "Work"], ceilings: "Ceilings | None", cache_bytes: int, with_rivals: bool
) -> dict[str, Any]:
    """One row of the report. status: ok, wrong (not timed), failed (raised), or skipped (out of memory)."""
    import torch

    row: dict[str, Any] = {"work": getattr(make, "args", ())[1:]}
    torch.manual_seed(0)  # the same numbers, whatever was measured before
    try:
        work = make()
        names = ("operation", "shape", "models", "tokens", "bytes", "flops", "copies")
        row = {name: getattr(work, name) for name in names}
        _judge(work, row)
        if row["status"] == "ok" and ceilings is not None:
            _time(work, row, ceilings, cache_bytes)
        if row["status"] == "ok" and with_rivals:
            row["rivals"] = {
                name: _rival(ready, work, ceilings is not None, cache_bytes) for name, ready in work.rivals.items()
            }
    except torch.OutOfMemoryError as error:
        row |= {"status": "skipped", "reason": str(error).split(". ")[0]}
    except Exception as error:
        row |= {"status": "failed", "reason": _said(error)}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def _judge(work: "Work", row: dict[str, Any]) -> None:
    import torch

    from .proof.bench_work import TIMES_STANDARD, UNIT, dtype_of, relative_error

    result = work.result(work.run(0))
    truth = work.twin(torch.float64)
    standard = work.standard() if work.standard else work.twin(dtype_of(result))
    error, bound = relative_error(result, truth), TIMES_STANDARD * relative_error(standard, truth) + UNIT
    row |= {"error": error, "bound": bound, "status": "ok" if error <= bound else "wrong"}


def _time(work: "Work", row: dict[str, Any], ceilings: "Ceilings", cache_bytes: int) -> None:
    from dataclasses import asdict

    from .proof.bench_machine import clocks
    from .proof.bench_timer import time_calls

    timing = time_calls(work.run, work.copies, work.bytes, cache_bytes)
    roofline_s = ceilings.roofline_s(work.bytes, work.flops)
    row |= {**asdict(timing), "roofline_s": roofline_s, "roofline_share": roofline_s / timing.median_s}
    row["clocks"] = clocks()


def _rival(ready: Callable[[], "Rival"], work: "Work", on_gpu: bool, cache_bytes: int) -> dict[str, Any]:
    import torch

    from .proof.bench_work import relative_error

    try:
        rival = ready()
        error = relative_error(rival.result(rival.run(0)), work.twin(torch.float64))
        if error > RIVAL_ERROR:
            return {"reason": f"its result is off by {error:.2g}", "error": error}
        if not on_gpu:
            return {"error": error}
        from .proof.bench_timer import time_calls

        return {"error": error, "median_s": time_calls(rival.run, rival.copies, rival.bytes, cache_bytes).median_s}
    except Exception as error:  # whatever other people's code raises is the reason that it is not in the table
        return {"reason": _said(error)}


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


HEAD = f"{'operation':26}{'shape':42}{'tokens':>7}{'error':>9}{'us':>10}{'GB/s':>7}{'TFLOP/s':>8}{'roofline':>9}"


def table_line(row: dict[str, Any]) -> str:
    """One row as text."""
    if "operation" not in row:
        return f"{row['status']}: {row['work']}: {row['reason']}"
    start = f"{row['operation']:26}{row['shape']:42}{row['tokens']:7}"
    if "error" not in row:
        return f"{start} {row['status']}: {row['reason']}"
    start += f"{row['error']:9.1e}"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row.get('reason', '')} bound {row['bound']:.1e}"
    if "median_s" in row:
        seconds = row["median_s"]
        start += f"{seconds * 1e6:10.1f}{row['bytes'] / seconds / 1e9:7.0f}{row['flops'] / seconds / 1e12:8.1f}"
        start += f"{row['roofline_share']:9.0%}" + ("" if row["cold"] else " (in cache)")
    shown = (f"{name} {_rival_words(rival)}" for name, rival in row.get("rivals", {}).items())
    return f"{start}  {', '.join(shown)}"


def _rival_words(rival: dict[str, Any]) -> str:
    return f"{rival['median_s'] * 1e6:.1f}" if "median_s" in rival else "-"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwenfit.kernels.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--model", nargs="+", help="models of the catalog; default: 0.8B to 35B-A3B")
    kinds = ("matmul", "experts", "delta", "norm", "attention")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="kinds of kernels; default: all")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 1 2 4 8 16 64 512 4096")
    parser.add_argument("--depth", nargs="+", type=int, help="tokens before the new ones; default: 4096 32768")
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=(4, 8))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--no-rivals", action="store_true", help="our kernels only")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU through the interpreter, tiny, without times")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
