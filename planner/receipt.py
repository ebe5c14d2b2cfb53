"""A receipt: what was planned for a boot, what its log says, and how far apart they are.

A receipt holds the request with everything resolved and the devices with their figures, so that the plan can be made
anew, by later rules or with a calibration (`replan`); of the log it quotes the lines that say bytes, and nothing else.
What the asker leaves out is taken from the log (`asked`).
"""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..profiles.device import Device
from ..profiles.device_names import device
from ..profiles.errors import BadInput, UnknownName, Unsupported
from ..profiles.formats import weight_format
from ..profiles.frozen import dataclass, fields, replace
from ..profiles.model_catalog import model, models
from .candidates import engine_module
from .documents import device_json, options_json
from .engines.sglang_pool import SLOTS_PER_REQUEST
from .engines.versions import release
from .logs.dialect import integer, text_of
from .logs.engine_log import EngineLog
from .logs.redaction import redact
from .plan import EnginePlan
from .request import Request
from .scores import PartScore, score
from .search import search

SCHEMA = 1
_FILE_TYPE = re.compile(r"(?i)(?:^|[-_.])(?:ud-)?((?:iq|q)\d(?:_[a-z0-9]{1,3}){1,2}|bf16|f16|q8_0)(?=[-_.]|$)")
_LLAMA_TYPES = {"small": "s", "medium": "m", "large": "l"}
_NAMED_FORMATS = (  # of repositories, the first that a name holds
    ("nvfp4", "nvfp4"),
    ("gptq-int4", "gptq-int4-official"),
    ("gptq", "int4"),
    ("autoround", "int4"),
    ("awq", "int4"),
    ("int4", "int4"),
    ("w4a16", "int4"),
    ("fp8", "fp8"),
    ("int8", "int8"),
    ("w8a8", "int8"),
    ("w8a16", "int8"),
)
_SIZE = re.compile(r"(?i)qwen[-_ ]?3\.(\d)[-_: ](\d{1,3}(?:\.\d)?b(?:[-_]a\d{1,2}b)?)")


@dataclass(frozen=True, slots=True)
class Receipt:
    """One boot beside its plan."""

    date: str  # ISO, as the caller says it
    qwenfit: str  # version that made it
    source: str | None  # where the log stands, if it may be told: a link, or a name of the run
    request: Request  # resolved; `devices` are names
    devices: tuple[Device, ...]  # of the plan's setup, with the figures of their profiles
    command: str
    log: EngineLog
    scores: tuple[PartScore, ...]

    @property
    def group(self) -> str:
        """Receipts of one source are one witness, however many there are."""
        return self.source or f"{self.date} {self.request.model} {' '.join(self.request.devices)}"

    def to_json(self) -> dict[str, object]:
        log = self.log
        return {
            "schema": SCHEMA,
            "kind": "receipt",
            "date": self.date,
            "qwenfit": self.qwenfit,
            "source": self.source,
            "request": request_json(self.request),
            "devices": [device_json(device) for device in self.devices],
            "command": self.command,
            "log": {
                "engine": log.engine,
                "version": log.version,
                "model": log.model,
                "settings": dict(log.settings),
                "facts": dict(log.facts),
                "parts": [
                    {
                        "part": part.part,
                        "place": part.place,
                        "bytes": part.bytes,
                        "resolution_bytes": part.resolution_bytes,
                        "line": part.line,
                        "covers": list(part.covers),
                    }
                    for part in log.parts
                ],
                "died": log.died,
                "notes": list(log.notes),
            },
            "scores": [one.to_json() for one in self.scores],
        }


def receipt(plan: EnginePlan, log: EngineLog, date: str, qwenfit: str, source: str | None = None) -> Receipt:
    """The receipt of a boot that was planned. Raises BadInput where nothing of the log can be compared."""
    scores = score(plan, log)
    if not scores and not log.died:
        raise BadInput("nothing in the log stands on a device of the plan: check --gpu and the engine")
    setup = plan.setup
    asked = Request(
        model=setup.model.name,
        devices=tuple(device.name for device in setup.devices),
        ctx_tokens=plan.ctx_tokens,
        seqs=plan.seqs,
        engine=f"{plan.engine}@{setup.version}",
        weights=setup.weights.name,
        kv_dtype=setup.kv_dtype,
        state_dtype=setup.state_dtype,
        mtp=setup.mtp,
        vision=setup.vision,
        tp=setup.tp,
        pp=setup.pp,
        nodes=setup.nodes,
        dp=setup.dp,
        ep=setup.ep,
        interconnect=setup.interconnect.name if setup.interconnect else None,
        options=replace(setup.options, calibration=None),
    )
    told = source if source is None or source.startswith(("http://", "https://")) else redact(source)
    return Receipt(date, qwenfit, told, asked, setup.devices, _without_paths(plan), log, scores)


def replan(made: Receipt, calibration: Any = None) -> EnginePlan | None:
    """The receipt's plan by today's rules, with a calibration or without. None where its model was a file, or an
    engine no longer takes what it took."""
    request = made.request
    box = made.devices[: len(made.devices) // request.nodes]
    try:
        return search(replace(request, options=replace(request.options, calibration=calibration)), devices=box).best
    except (BadInput, UnknownName, Unsupported):
        return None


def rescored(made: Receipt, calibration: Any = None) -> tuple[PartScore, ...] | None:
    """The scores by today's rules, None where the plan cannot be made anew."""
    plan = replan(made, calibration)
    return score(plan, made.log) if plan else None


def asked(log: EngineLog, request: Request, given: Collection[str]) -> tuple[Request, tuple[str, ...]]:
    """The request behind a log: of `request` the fields that are named in `given`, the rest in the log's own words,
    with notes on what was taken. Raises BadInput where neither says it."""
    settings = log.settings
    name = request.model if "model" in given else _model_of(log)
    devices = request.devices if "devices" in given else _devices_of(log)
    engine, notes = _engine(log, request.engine)
    seqs, told = _seqs(log)
    found: dict[str, object] = {
        "ctx_tokens": integer(settings, "ctx_tokens"),
        "seqs": seqs,
        "kv_dtype": text_of(settings, "kv_dtype"),
        "state_dtype": _state_dtype(settings),
        "mtp": integer(settings, "mtp"),
        "vision": _vision(log, name),
        "tp": integer(settings, "tp"),
        "pp": integer(settings, "pp") if log.engine in ("vllm", "sglang") else None,
    }
    if "weights" not in given:
        chosen = model(name)
        found["weights"] = None if chosen.path or chosen.stored else _weights_of(log, name)
    changes: dict[str, Any] = {key: value for key, value in found.items() if value is not None and key not in given}
    if "ctx_tokens" not in given and "ctx_tokens" not in changes:
        raise BadInput("the log does not say how long its context is: give --ctx")
    options = {key: value for key, value in _options(log).items() if key not in given}
    asked_for = replace(
        request, model=name, devices=devices, engine=engine, options=replace(request.options, **options), **changes
    )
    return asked_for, (*notes, *(() if "seqs" in given else told))


def _options(log: EngineLog) -> dict[str, Any]:
    settings = log.settings
    taken = {
        "gpu_memory_utilization": settings.get("gpu_memory_utilization"),
        "max_num_batched_tokens": integer(settings, "max_num_batched_tokens"),
        "ubatch_tokens": integer(settings, "ubatch_tokens"),
        "prefix_caching": settings.get("prefix_caching"),
        "cuda_graphs": False if settings.get("eager") is True else None,
    }
    if settings.get("device_kind") == "cpu":
        taken["gpu_memory_utilization"] = None  # its CPU backend is told the cache's size
    return {key: value for key, value in taken.items() if value is not None}


def _vision(log: EngineLog, name: str) -> bool | None:
    """vLLM loads the tower unless told otherwise; what the others load is for the asker to say."""
    if log.engine != "vllm" or not model(name).has_vision:
        return None
    of_text = (text_of(log.settings, "architecture") or "").endswith("ForCausalLM")
    return log.settings.get("text_only") is not True and not of_text


def _devices_of(log: EngineLog) -> tuple[str, ...]:
    """Profiles by the names that the log gives its devices."""
    names = log.settings.get("devices")
    if isinstance(names, str) and names:
        try:
            return tuple(device(name).name for name in names.split("; "))
        except (UnknownName, BadInput):
            raise BadInput(f"the log was written on {redact(names)}, which has no profile: give --gpu") from None
    raise BadInput("the log does not say on which device it was written: give --gpu")


def _model_of(log: EngineLog) -> str:
    """A catalog name in what the log calls the model or its file."""
    told = [told for told in (log.model, text_of(log.settings, "file")) if told]
    known = {one.name for one in models()}
    for name in told:
        found = _SIZE.search(name)
        if found and (ours := f"qwen3.{found[1]}-{found[2].lower().replace('_', '-')}") in known:
            return ours
        try:
            return model(name).name
        except (BadInput, UnknownName, Unsupported):
            continue
    said = f"calls its model {told[0]}, which is in no catalog" if told else "does not say which model it is"
    raise BadInput(f"the log {said}: give --model (a name, a folder or a .gguf)")


def _weights_of(log: EngineLog, name: str) -> str | None:
    """The weight format in the file's name, its type, or the repository's name."""
    file, told = text_of(log.settings, "file"), f"{log.model or ''} {name}".lower()
    if log.engine in ("llama.cpp", "ollama"):
        found = _FILE_TYPE.search((file or "").removesuffix(".gguf"))
        kind = found[1].lower() if found else _file_type(text_of(log.settings, "file_type"))
        try:
            return weight_format(kind).name if kind else None
        except UnknownName:
            raise BadInput(f"the log's file is of type {kind}, which is not known: give --weights") from None
    quantization = text_of(log.settings, "quantization")
    for word, known in _NAMED_FORMATS:
        if word in told:
            return known
    if quantization not in (None, "None"):
        for word, known in _NAMED_FORMATS:
            if word in (quantization or ""):
                return known
        raise BadInput(f"the log says quantization {quantization}, which is several formats: give --weights")
    return "bf16"


def _file_type(text: str | None) -> str | None:
    """`Q4_K - Medium` is q4_k_m, `Q8_0` is q8_0."""
    if not text:
        return None
    head, _, size = text.replace("(guessed)", "").partition(" - ")
    kind = head.strip().lower()
    return f"{kind}_{_LLAMA_TYPES[size.strip().lower()]}" if size.strip().lower() in _LLAMA_TYPES else kind or None


def _state_dtype(settings: Mapping[str, object]) -> str | None:
    told = text_of(settings, "state_dtype")
    return told if told in ("float32", "bfloat16") else None


def _engine(log: EngineLog, given: str | None) -> tuple[str, tuple[str, ...]]:
    """Engine and version; the oldest known where the log's is older."""
    name, _, version = (given or log.engine).partition("@")
    engine = engine_module(name).ENGINE
    version = version or log.version or ""
    oldest = engine.versions[0]
    if version and (not release(version) or release(version) < release(oldest)[: len(release(version))]):
        note = f"{name} {version} is older than the oldest whose rules were read: those of {oldest} are used"
        return f"{name}@{oldest}", (note,)
    if not version:
        note = f"the log does not say {name}'s version: {engine.default_version} is taken"
        return f"{name}@{engine.default_version}", (note,)
    return f"{name}@{version}", ()


def _seqs(log: EngineLog) -> tuple[int, tuple[str, ...]]:
    """Sequences that the boot has room for at full length: more may be admitted than that."""
    settings, facts = log.settings, log.facts
    admitted = integer(settings, "seqs") or 1
    slots = integer(facts, "state_slots")
    if slots is not None:
        per_request = 1 if settings.get("prefix_caching") is False else SLOTS_PER_REQUEST["extra_buffer"]
        room = max(1, slots // per_request)
        return room, (f"the log has {slots} state slots: planned as {room} sequences",) if room != admitted else ()
    concurrency = facts.get("max_concurrency")
    if log.engine == "vllm" and isinstance(concurrency, float) and admitted > concurrency:
        room = max(1, int(concurrency))
        return room, (f"{admitted} sequences are admitted, and {room} fit at full length: {room} are planned",)
    if settings.get("kv_unified") and admitted > 1:
        return admitted, (f"{admitted} slots share one cache: planned as {admitted} equal parts",)
    return admitted, ()


def request_json(request: Request) -> dict[str, object]:
    told: dict[str, object] = {
        one.name: getattr(request, one.name) for one in fields(request) if one.name not in ("options", "prices")
    }
    told["devices"] = list(request.devices)
    told["options"] = options_json(request.options)
    return told


def _without_paths(plan: EnginePlan) -> str:
    """The launch line without where files lie, which is nobody's business; whole words, for a folder may be called
    `x`, and `.` says nothing."""
    model, command = plan.setup.model, plan.command
    for place in (model.path, model.repo, os.path.dirname(model.path)) if model.path else ():
        if place.strip("./"):
            command = re.sub(rf"(?<![\w./-]){re.escape(place)}(?![\w./-])", "MODEL", command)
    return command
