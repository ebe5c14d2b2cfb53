"""A plan for the native runtime, run: `python -m qwenfit.kernels.run` in a process of its own, and what it printed.

The process loads a checkpoint, or draws weights of the planned shapes in the planned format, allocates what was
planned, fills every sequence to the planned depth and decodes. What it allocated is told part by part in the words of
a boot log, so that a run is scored like one. The model's first layers may stand for all (`sliced`): plan and
measurement are then both of the slice.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from ...profiles.errors import BadInput, Unsupported
from ...profiles.frozen import dataclass, replace
from ...profiles.json_file import parse_json_object
from ...profiles.model import Model, first_layers
from ..candidates import engine_module
from ..logs.dialect import LoggedPart
from ..logs.engine_log import EngineLog
from ..logs.redaction import redact
from ..plan import EnginePlan

REPORT_LIMIT_BYTES = 4 << 20
KILLED, KILLED_SENTENCE = -9, "it was killed (signal 9), as Linux does where memory runs out"
# torch on CUDA; torch and Python on a CPU
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "MemoryError")
PAGES_BYTES = 64 << 10  # memory comes in pages, and dt_bias is float32 in the runtime: 2 bytes more per value head
PARTS = {
    "weights": "weights",
    "kv_cache": "kv_cache",
    "recurrent_state": "recurrent_state",
    "scratch": "activation",
    "runtime": "runtime",
}


@dataclass(frozen=True, slots=True)
class NativeRun:
    """What came of it. Rates are of all sequences together; `computed_tokens` of a prompt that was cut short."""

    log: EngineLog
    peak_bytes: int
    depth_tokens: int
    computed_tokens: int
    prefill_is_estimated: bool
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    steps: int
    accepted_per_step: float
    facts: Mapping[str, object]


def sliced(plan: EnginePlan, layers: int | None) -> EnginePlan:
    """The plan of the model's first layers, as if there were no more. Unsupported where they are no whole periods."""
    if layers is None or layers == plan.setup.model.num_layers:
        return plan
    model = first_layers(plan.setup.model, layers)
    setup = replace(plan.setup, model=model)
    return EnginePlan(
        plan.engine, setup, engine_module(plan.engine).estimate(setup), plan.ctx_tokens, plan.seqs, plan.notes
    )


def words(plan: EnginePlan, checkpoint: str | None, layers: int | None, steps: int, limit_s: float) -> list[str]:
    """The command. Unsupported where the context has no room for `steps` steps behind a prompt."""
    depth = plan.ctx_tokens - steps * (1 + plan.mtp)
    if depth < 1:
        raise Unsupported(f"a context of {plan.ctx_tokens} tokens has no room for {steps} steps: give --steps")
    model = plan.setup.model
    line = shlex.split(plan.command)  # python -m qwenfit.kernels.run MODEL --ctx ...
    found = [sys.executable, *line[1:3]]
    found += [checkpoint] if checkpoint else [model.path or model.name, "--random", plan.weights]
    found += [*line[4:], "--depth", str(depth), "--tokens", str(steps), "--limit-s", f"{limit_s:g}", "--json"]
    return found + (["--layers", str(layers)] if layers else [])


def died(errors: str, status: int | None) -> str | None:
    """The sentence of a run that ran out of memory, None of every other one."""
    if status == KILLED:
        return KILLED_SENTENCE
    last = _last_line(errors)
    return last if status and any(word in last for word in OUT_OF_MEMORY) else None


def dead_log(plan: EnginePlan, sentence: str) -> EngineLog:
    """What a run that ran out of memory says: nothing but that."""
    return EngineLog("native", plan.engine_version, plan.setup.model.name, died=redact(sentence))


def read_run(output: bytes, errors: str, status: int | None, plan: EnginePlan) -> NativeRun:
    """The run behind what its process printed. BadInput with its own sentence where it failed."""
    if status != 0:
        raise BadInput(f"the run failed: {_last_line(errors) or f'it ended with status {status} and said nothing'}")
    if len(output) > REPORT_LIMIT_BYTES:
        raise BadInput(f"the run printed {len(output)} bytes, more than the {REPORT_LIMIT_BYTES} that are read")
    report = parse_json_object(output, "the run's report")
    try:
        return _run(report, plan)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is not one ({error})"
        raise BadInput(f"the run's report {what}: is another version of qwenfit installed?") from None


def _last_line(errors: str) -> str:
    told = [line.strip() for line in errors.splitlines() if line.strip()]
    return told[-1].removeprefix("qwenfit.kernels.run: ")[:300] if told else ""


def _run(report: dict[str, Any], plan: EnginePlan) -> NativeRun:
    memory, speed = report["memory"], report["speed"]
    parts = [
        LoggedPart(part, "device0", int(memory[name]["allocated"]), PAGES_BYTES, f"{name} as allocated")
        for name, part in PARTS.items()
        if memory[name]["allocated"] is not None
    ]
    settings = {"ctx_tokens": plan.ctx_tokens, "seqs": plan.seqs, "kv_dtype": plan.kv_dtype}
    facts = {name: report[name] for name in ("device", "threads", "layers", "start_bytes")}
    facts |= {f"{name} by": str(reason)[:200] for name, reason in report["operations"].items()}
    steps = int(speed["steps"])
    return NativeRun(
        log=EngineLog("native", plan.engine_version, plan.setup.model.name, settings, tuple(parts), facts),
        peak_bytes=int(memory["peak"]["allocated"]),
        depth_tokens=int(speed["depth_tokens"]),
        computed_tokens=int(speed["computed_tokens"]),
        prefill_is_estimated=bool(speed["prefill_is_estimated"]),
        prefill_tokens_per_s=float(speed["prefill_tokens_per_s"]),
        decode_tokens_per_s=float(speed["decode_tokens_per_s"]),
        steps=steps,
        accepted_per_step=speed["decode_tokens"] / (steps * plan.seqs),
        facts=facts,
    )


def whole(measured_bytes: int, plan_of_slice: int, plan_of_all: int) -> int:
    """What a measured part of a slice says of the whole: as far off as it was there."""
    return round(measured_bytes / plan_of_slice * plan_of_all) if plan_of_slice else plan_of_all


def checked(plan: EnginePlan, found: Model, where: str, tolerance: float = 0.05) -> None:
    """BadInput where a checkpoint is not of the planned model, or of another size than planned."""
    planned = plan.setup.model
    if plan.engine == "native" and not os.path.isdir(where):
        raise BadInput(f"{where}: the native runtime loads folders of safetensors; give one, or --engine llama.cpp")
    for name in ("architecture", "hidden_size", "num_layers", "num_attention_heads", "vocab_size", "num_experts"):
        mine, theirs = getattr(planned, name), getattr(found, name)
        if mine != theirs:
            raise BadInput(
                f"{where} does not match the plan: its {name} is {theirs}, planned was {mine} ({planned.name}); plan "
                f"with --model {where}"
            )
    from ..request import Request
    from ..search import search

    own = search(
        Request(
            model=where,
            devices=tuple(device.name for device in plan.setup.devices),
            ctx_tokens=plan.ctx_tokens,
            seqs=plan.seqs,
            engine=f"{plan.engine}@{plan.engine_version}",
            kv_dtype=plan.kv_dtype,
            state_dtype=plan.state_dtype,
            mtp=plan.mtp,
            vision=plan.vision,
            tp=plan.tp,
            pp=plan.pp,
            options=plan.setup.options,
        ),
        devices=plan.setup.devices,
    ).best
    mine, theirs = (sum(share.memory.weights.mid for share in one.devices) for one in (plan, own))
    if abs(theirs / max(mine, 1) - 1) > tolerance:
        raise BadInput(
            f"{where} does not match the plan: its weights take {theirs:,} bytes, planned were {mine:,}; plan with "
            f"--model {where}"
        )
