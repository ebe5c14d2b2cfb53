"""Plans beside runs on this machine: native int4 and int8 of three sizes at two depths, and llama.cpp's buffers.

    python tests/bench/verify_matrix.py --device here.yaml              native, 12 runs, 20 minutes on two cores
    python tests/bench/verify_matrix.py --device here.yaml --llama-server PATH --gguf FILE --gguf FILE
    python tests/bench/verify_matrix.py --table                                  docs/verify.md anew from what was run

`here.yaml` is what `qwen-plan probe --measure --output here.yaml` wrote. Every run is a `qwen-plan verify` and leaves
its verification and its receipt in docs/receipts. Weights are drawn in the planned shapes and format: bytes and seconds
do not depend on their values. An exit status of 1 where a figure is missed: total memory within 3 % of the measured
peak, decode speed inside its interval, llama.cpp's buffers within 2 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECEIPTS, PAGE = ROOT / "docs" / "receipts", ROOT / "docs" / "verify.md"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
MODELS, FORMATS, CONTEXTS = ("0.8b", "4b", "9b"), ("int4", "int8"), (4096, 32768)
MEMORY_GOAL, BUFFER_GOAL = 0.03, 0.02
GIB = 1 << 30


def qwen_plan(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "qwenfit.cli.plan", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stdout


def run(name: str, plan_words: list[str], verify_words: list[str]) -> None:
    """One plan, verified; its verification and receipt under `name`."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder, "plan.json")
        status, text = qwen_plan(*plan_words, "--json")
        if status == 2:
            raise SystemExit(f"{name}: no plan")
        plan.write_text(text)
        out = ["--output", str(RECEIPTS / f"{name}.json"), "--receipt", str(RECEIPTS / f"{name}.receipt.json")]
        status, text = qwen_plan("verify", str(plan), *verify_words, *out)
        print(text, flush=True)
        if status == 2:
            raise SystemExit(f"{name}: could not be verified")


def rows() -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in RECEIPTS.glob("*.json") if ".receipt." not in path.name]
    order = {"native": 0, "llama.cpp": 1}
    return sorted(found, key=lambda one: (order.get(one["engine"], 2), len(one["model"]), one["model"], one["weights"],
                                          one["ctx_tokens"]))  # fmt: skip


def missed(one: dict[str, Any]) -> list[str]:
    """What this run misses of the goals."""
    found = []
    total = next((score for score in one["scores"] if score["part"] == "total"), None)
    if one["engine"] == "native":
        if total is None or abs(total["error"]) > MEMORY_GOAL:
            found.append("memory")
        decode = next(rate for rate in one["rates"] if rate["name"] == "decode_tokens_per_s")
        if not decode["within"]:
            found.append("decode")
    else:
        found += [
            score["part"]
            for score in one["scores"]
            if abs(score["planned_bytes"]["mid"] - score["measured_bytes"])
            > BUFFER_GOAL * score["measured_bytes"] + score["resolution_bytes"]
        ]
    return found


def table() -> str:
    head = ["| run | context | memory planned, measured | error | decode planned, measured (tokens/s) | prefill |"]
    lines = [*head, "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for one in rows():
        total = next(score for score in one["scores"] if score["part"] == "total")
        rates = {rate["name"]: rate for rate in one["rates"]}
        cells = [f"{one['engine']} {one['model']} {one['weights']}", f"{one['ctx_tokens']:,}"]
        cells.append(f"{total['planned_bytes']['mid'] / GIB:.3f}, {total['measured_bytes'] / GIB:.3f} GiB")
        cells.append(f"{total['error']:+.1%}")
        cells += [rate_cell(rates.get(f"{name}_tokens_per_s")) for name in ("decode", "prefill")]
        lines.append("| " + " | ".join(cells) + " |")
    worst = max(abs(next(s for s in one["scores"] if s["part"] == "total")["error"]) for one in rows())
    lines += ["", f"The largest error of a total is {worst:.1%}."]
    return "\n".join(lines)


def rate_cell(rate: dict[str, Any] | None) -> str:
    if rate is None or rate["planned"] is None:
        return ""
    planned = f"{rate['planned']['low']:.3g} to {rate['planned']['high']:.3g}"
    measured = f"{'~' if rate['is_estimated'] else ''}{rate['measured']:.3g}"
    return f"{planned}, {measured}{'' if rate['within'] else ' (outside)'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", help="the YAML that qwen-plan probe --measure wrote")
    parser.add_argument("--llama-server", help="the llama-server to start")
    parser.add_argument("--gguf", action="append", default=[], help="a model for it")
    parser.add_argument("--fill-limit", type=float, default=60.0, help="seconds that a context is read for")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    asked = parser.parse_args()
    if not asked.table and not asked.device:
        parser.error("give --device, or --table")
    RECEIPTS.mkdir(exist_ok=True)
    if asked.device and not asked.gguf:
        for model in MODELS:
            for weights in FORMATS:
                for ctx in CONTEXTS:
                    words = ["--model", model, "--gpu", asked.device, "--engine", "native", "--weights", weights]
                    run(f"native-{model}-{weights}-{ctx}", [*words, "--ctx", str(ctx)],
                        ["--fill-limit", str(asked.fill_limit)])  # fmt: skip
    for gguf in asked.gguf:
        for ctx in CONTEXTS:
            words = ["--model", gguf, "--gpu", asked.device, "--engine", "llama.cpp", "--ctx", str(ctx)]
            run(f"llama.cpp-{Path(gguf).stem}-{ctx}", words,
                ["--engine", "llama.cpp", "--binary", asked.llama_server, "--memory-only", "--prompt-tokens", "16",
                 "--requests", "1", "--output-tokens", "2"])  # fmt: skip
    if PAGE.exists() and BEGIN in PAGE.read_text():
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
    found = {f"{one['engine']} {one['model']} {one['weights']} {one['ctx_tokens']}": missed(one) for one in rows()}
    for name, what in found.items():
        print(f"{name}: {'missed ' + ', '.join(what) if what else 'as it should be'}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
