"""A plan run on this machine, natively or in the engine that it is for, and scored part by part."""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory

from ...profiles.errors import BadInput, install_hint
from ...profiles.frozen import dataclass, replace
from ...profiles.model_catalog import model
from ..logs.engine_log import EngineLog, read_log_file
from ..plan import EnginePlan
from ..plan_file import PlanFile
from ..scores import score
from ..speed import Interval
from . import completions, native, servers
from .completions import Answer
from .other_work import OtherWork, noted
from .process import MAX_OUTPUT_BYTES, OwnProcess
from .verification import RateScore, Verification, at

LOOK_S = 0.2
DYING_S = 3.0  # that an engine gets to end once it has stopped to answer
LAST_WORDS_BYTES = 64 << 10

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a verification is told beside the plan."""

    date: str
    qwenfit: str
    machine: Mapping[str, object]
    checkpoint: str | None = None
    layers: int | None = None
    steps: int = 32  # of decode, natively
    fill_limit_s: float = 120.0  # for reading the prompt
    limit_s: float = 3600.0  # for a native run as a whole, and for one request to an engine
    boot_limit_s: float = 1800.0
    binary: str | None = None
    port: int | None = None
    requests: int = 3  # to an engine, one after the other, of so many tokens each
    prompt_tokens: int = 512
    output_tokens: int = 64
    tolerance: float = 0.05
    memory_only: bool = False
    log: str | None = None  # where the engine's log is to stay


def verify_native(file: PlanFile, asked: Asked, tell: Tell) -> Verification:
    """Allocate, fill and decode with the bundled kernels. BadInput where it could not be tried; a run that ran out of
    memory is an answer."""
    if importlib.util.find_spec("torch") is None:
        raise BadInput(f"a native run needs torch: {install_hint('quant')}; or verify in an engine with --engine")
    if asked.binary or asked.port:
        raise BadInput("--binary and --port are for an engine: give --engine, or leave them out")
    plan = native.sliced(file.plan, asked.layers)
    if asked.checkpoint:
        native.checked(file.plan, model(asked.checkpoint), asked.checkpoint)
    words = native.words(plan, asked.checkpoint or _stored(plan), asked.layers, asked.steps, asked.fill_limit_s)
    tell(f"runs {servers.words_of(words)}")
    with TemporaryDirectory(prefix="qwenfit-verify-") as folder:
        output, errors = os.path.join(folder, "report.json"), asked.log or os.path.join(folder, "errors.txt")
        other = OtherWork()
        with OwnProcess(words, {}, output, errors) as process:
            status = process.wait(asked.limit_s)
            if status is None:
                raise BadInput(f"the run took more than {asked.limit_s:g} s: give --limit-s, fewer --layers, or --ctx")
        _refuse_flood(process)
        with open(output, "rb") as file_:
            told = file_.read(native.REPORT_LIMIT_BYTES + 1)
        said, command = _last_words(errors), servers.words_of(words)
        if sentence := native.died(said, status):
            dead = native.dead_log(plan, sentence)
            return _verification(file, plan, asked, command, dead, (), process.peak_bytes, [])
        run = native.read_run(told, said, status, plan)
    rates = (
        _accepting(_rate("decode_tokens_per_s", plan, run.decode_tokens_per_s, run.depth_tokens, plan.seqs), plan, run),
        _rate(
            "prefill_tokens_per_s",
            plan,
            run.prefill_tokens_per_s,
            run.depth_tokens,
            plan.seqs,
            run.prefill_is_estimated,
        ),
    )
    notes = [*_notes(file.plan, plan, run), *_noted(other)]
    if not asked.checkpoint and not _stored(plan):
        notes.append("weights were drawn at random, in the planned shapes and format: what they say means nothing")
    return _verification(file, plan, asked, command, run.log, rates, run.peak_bytes, notes)


def verify_engine(file: PlanFile, asked: Asked, tell: Tell) -> Verification:
    """Start the engine as planned, send it a few requests, stop it, read its log. BadInput where it could not be tried;
    an engine that ran out of memory is an answer."""
    plan = file.plan
    if asked.layers:
        raise BadInput(f"--layers is for the native runtime: {plan.engine} loads whole models")
    launch = servers.launch(plan, asked.checkpoint, asked.binary, asked.port)
    if os.path.exists(launch.model):
        native.checked(plan, model(launch.model), launch.model)
    tell(f"starts {servers.words_of(launch.words)} on port {launch.port}")
    with TemporaryDirectory(prefix="qwenfit-verify-") as folder:
        log = asked.log or os.path.join(folder, "engine.log")
        answers: list[Answer] = []
        other = OtherWork()
        with OwnProcess(launch.words, launch.environment, log) as process:
            ready = _wait(process, launch, servers.rule(plan.engine).ready_path, asked.boot_limit_s, log)
            if ready:
                tell("is ready; requests are sent")
                try:
                    answers = _ask(plan, launch, asked)
                except BadInput:
                    if process.wait(DYING_S) is None:
                        raise
                    ready = False
            ended = process.status
        _refuse_flood(process)
        boot = _boot(plan, log, ended, ready)
    rates = _rates(plan, answers)
    notes = [_requests(answers), *_noted(other)] if answers else []
    command = servers.words_of(launch.words, launch.environment)
    return _verification(file, plan, asked, command, boot, rates, process.peak_bytes, notes)


def _verification(
    file: PlanFile,
    plan: EnginePlan,
    asked: Asked,
    command: str,
    log: EngineLog,
    rates: tuple[RateScore, ...],
    peak_bytes: int,
    notes: list[str],
) -> Verification:
    scores = score(plan, log)
    if not scores and not log.died:
        raise BadInput(f"{plan.engine} told nothing of its memory that the plan could be compared with")
    return Verification(
        date=asked.date,
        qwenfit=asked.qwenfit,
        plan_sha256=file.sha256,
        plan=plan,
        planned_layers=file.plan.setup.model.num_layers,
        command=command,
        weights="checkpoint" if asked.checkpoint or plan.engine != "native" or _stored(plan) else "synthetic",
        machine=asked.machine,
        log=log,
        scores=scores,
        rates=rates,
        peak_bytes=peak_bytes,
        tolerance=asked.tolerance,
        memory_only=asked.memory_only,
        notes=tuple(notes),
    )


def _refuse_flood(process: OwnProcess) -> None:
    if process.flooded:
        raise BadInput(f"{os.path.basename(process.words[0])} printed more than {MAX_OUTPUT_BYTES >> 20} MiB and was "
                       "stopped: its log is of no use")  # fmt: skip


def _requests(answers: list[Answer]) -> str:
    read, written = answers[0].prompt_tokens, answers[0].output_tokens
    return f"{len(answers)} requests of {read:,} tokens, answered with {written:,}, one after the other"


def _stored(plan: EnginePlan) -> str | None:
    """The folder that the plan itself was made from, where it has weights."""
    path = plan.setup.model.path
    return path if path and os.path.isdir(path) and plan.setup.model.stored else None


def _noted(other: OtherWork) -> list[str]:
    sentence = noted(other.share())
    return [sentence] if sentence else []


def _notes(whole: EnginePlan, plan: EnginePlan, run: native.NativeRun) -> list[str]:
    notes = []
    if run.prefill_is_estimated:
        notes.append(
            f"of {run.depth_tokens * plan.seqs:,} tokens {run.computed_tokens:,} were read, the others filled in: how "
            "long the whole prompt takes is reckoned from the first chunks and the last"
        )
    mine, all_of_it = plan.setup.model.num_layers, whole.setup.model.num_layers
    if mine < all_of_it:
        of_slice, of_all = plan.devices[0].memory.parts, whole.devices[0].memory.parts
        total = sum(
            part.bytes if part.part == "runtime"
            else native.whole(part.bytes, of_slice[part.part].mid, of_all[part.part].mid)
            for part in run.log.parts
        )  # fmt: skip
        planned = sum(of_all[part.part].mid for part in run.log.parts)
        notes.append(
            f"{mine} of {all_of_it} layers were run, and planned and measured are theirs: as far off, the whole would "
            f"take {total:,} bytes, planned {planned:,}"
        )
    if not any(part.part == "runtime" for part in run.log.parts):
        notes.append(
            "the driver does not say what the process takes: the runtime beside the allocator (context, kernels) is in "
            "no figure"
        )
    if plan.mtp:
        notes.append(
            f"{run.accepted_per_step:.2f} tokens per step were accepted, and the planned rate is one of as many: "
            "drafts of random weights say nothing"
        )
    return notes


def _rate(
    name: str, plan: EnginePlan, measured: float, context: int, seqs: int, is_estimated: bool = False
) -> RateScore:
    speed = at(plan, context, seqs)
    planned = getattr(speed.full, name) if speed else None
    return RateScore(name, planned, measured, context, seqs, is_estimated)


def _accepting(rate: RateScore, plan: EnginePlan, run: native.NativeRun) -> RateScore:
    """With drafts, what was planned at the acceptance that was measured: that of random weights says nothing."""
    speed = at(plan, run.depth_tokens, plan.seqs)
    if rate.planned is None or speed is None or speed.drafts is None:
        return rate
    share, planned = run.accepted_per_step / speed.drafts.tokens_per_pass, rate.planned
    return replace(rate, planned=Interval(planned.low * share, planned.mid * share, planned.high * share))


def _rates(plan: EnginePlan, answers: list[Answer]) -> tuple[RateScore, ...]:
    """The median request. Prompts are read alone; a token comes behind the prompt and half of the answer."""
    if not answers:
        return ()
    by_prefill = sorted(answers, key=lambda one: one.prefill_tokens_per_s)
    middle = by_prefill[len(answers) // 2]
    found = [_rate("prefill_tokens_per_s", plan, middle.prefill_tokens_per_s, middle.prompt_tokens, 1)]
    decodes = sorted(rate for one in answers if (rate := one.decode_tokens_per_s))
    if decodes:
        depth = middle.prompt_tokens + middle.output_tokens // 2
        found.insert(0, _rate("decode_tokens_per_s", plan, decodes[len(decodes) // 2], depth, 1))
    return tuple(found)


def _wait(process: OwnProcess, launch: servers.Launch, path: str, limit_s: float, log: str) -> bool:
    """Whether it came up; False where it ended. BadInput where it does neither."""
    deadline = time.monotonic() + limit_s
    while (left := deadline - time.monotonic()) > 0:
        if process.status is not None:
            return False
        if completions.is_ready(launch.address, path, min(completions.READY_S, left)):
            return process.status is None  # else it was another one that answered
        time.sleep(LOOK_S)
    raise BadInput(
        f"the engine was not ready after {limit_s:g} s and was stopped: give a longer --boot-limit; it said last: "
        f"{_last_line(log)}"
    )


def _boot(plan: EnginePlan, log: str, status: int | None, is_up: bool) -> EngineLog:
    """What the log says. BadInput where the engine ended by itself for another reason than memory."""
    if is_up:
        return read_log_file(log, plan.engine)
    try:
        boot = read_log_file(log, plan.engine)
    except BadInput:
        boot = EngineLog(plan.engine, None, None)
    if not boot.died and status == native.KILLED:
        boot = replace(boot, died=native.KILLED_SENTENCE)
    if not boot.died:
        raise BadInput(f"{plan.engine} ended by itself with status {status}; it said last: {_last_line(log)}")
    return boot


def _ask(plan: EnginePlan, launch: servers.Launch, asked: Asked) -> list[Answer]:
    """A short request to warm up, and the timed ones, as long as the context has room for."""
    prompt = max(1, min(asked.prompt_tokens, plan.ctx_tokens - asked.output_tokens - 1))
    output = max(1, min(asked.output_tokens, plan.ctx_tokens - prompt - 1))
    if servers.rule(plan.engine).speaks == "words":
        completions.ask_words(launch.address, launch.model, 8, 2, 0, asked.limit_s)
        return [
            completions.ask_words(launch.address, launch.model, prompt, output, seed + 1, asked.limit_s)
            for seed in range(asked.requests)
        ]
    name, vocabulary = completions.served_name(launch.address), plan.setup.model.vocab_size
    completions.ask_tokens(launch.address, name, min(8, prompt), 2, vocabulary, 0, asked.limit_s)
    return [
        completions.ask_tokens(launch.address, name, prompt, output, vocabulary, seed + 1, asked.limit_s)
        for seed in range(asked.requests)
    ]


def _last_words(path: str) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LAST_WORDS_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _last_line(path: str) -> str:
    from ..logs.redaction import redact

    lines = [line.strip() for line in _last_words(path).splitlines() if line.strip()]
    return redact(lines[-1])[:300] if lines else "nothing"
