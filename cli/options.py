"""The options of `qwen-plan`, once: the table below makes the Typer app (app.py) and the reader for the plain case.

Importing Typer and building an app with it takes twice as long as the whole answer may. Most calls are plain: known
options, each with its value. `read` takes those; whatever it does not take (help, completion, a subcommand, a word out
of place) goes to Typer, which says what is wrong. Both hand the same texts to `asked`, so both mean the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..planner.request import Options, Prices, Request
from ..planner.tokens import decimal_note, parse_tokens, shown
from ..profiles.errors import BadInput

FORMATS = ("table", "json", "markdown", "github")
BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
MAX_DIGITS = 18
Values = dict[str, str | bool]


class Option(NamedTuple):
    """One option. A switch has no metavar; `off` are the flags that say no to it."""

    name: str
    flags: tuple[str, ...]
    help: str
    metavar: str | None = None
    parse: Callable[[str], object] = str
    off: tuple[str, ...] = ()
    group: str = "request"  # the fields of Request, of its Options or Prices, or what only the output needs
    completes: str | None = None  # a list of names in completion.py


class Asked(NamedTuple):
    """What one call asks for: the request, how to show the answer, and what to say beside it."""

    request: Request
    format: str
    notes: tuple[str, ...]


def parse_devices(text: str) -> tuple[str, ...]:
    return (text,)  # `devices_of` reads counts, commas and files


def parse_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise BadInput(f"{shown(text)} is no whole number")
    return int(text)


def parse_image(text: str) -> int:
    """Tokens, from their number or from an image's size in pixels: 4096, 1920x1080."""
    width, x, height = text.lower().partition("x")
    if not x:
        return parse_tokens(text)
    from ..profiles.vision_tokens import image_tokens

    return image_tokens(parse_count(width), parse_count(height))


def parse_bytes(text: str) -> int:
    """Bytes, from a number and a unit: 32GiB, 64GB."""
    unit = text.lstrip("0123456789. ")
    number = text[: len(text) - len(unit)].strip()
    whole, point, fraction = number.partition(".")
    digits = whole + fraction
    scale = BYTES.get(unit.upper())
    if not scale or not digits.isdigit() or not whole or bool(point) != bool(fraction) or len(digits) > MAX_DIGITS:
        raise BadInput(f"{shown(text)} is no amount of memory: write it like 32GiB or 64GB")
    return int(digits) * scale // 10 ** len(fraction)


def parse_fraction(text: str) -> float:
    whole, point, fraction = text.partition(".")
    digits = whole + fraction
    plain = digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS and bool(point) == bool(fraction)
    if not plain or not 0 < float(text) <= 1:
        raise BadInput(f"{shown(text)} is no share of the memory: give more than 0 and at most 1, such as 0.92")
    return float(text)


def parse_amount(text: str) -> float:
    """A number of dollars, years or watts: more than nothing, at most a billion."""
    whole, point, fraction = text.partition(".")
    digits = whole + fraction
    plain = digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS and bool(point) == bool(fraction)
    if not plain or not 0 < float(text) <= 1e9:
        raise BadInput(f"{shown(text)} is no amount: write a number above 0 with digits and a point, such as 2.5")
    return float(text)


def parse_calibration(text: str) -> object:
    from ..planner.calibration_file import read_calibration

    return read_calibration(text)


def parse_name(text: str) -> str:
    if not text.strip():
        raise BadInput("an empty text names nothing")
    return text


def parse_engine(text: str) -> str:
    """NAME or NAME@VERSION, in whatever case it was typed."""
    name, at, version = parse_name(text).lower().partition("@")
    if at and not version:
        raise BadInput(f"{shown(text)} names no version: write it like vllm@0.32.0, or leave out the @")
    return name + at + version


def parse_format(text: str) -> str:
    if text not in FORMATS:
        raise BadInput(f"{shown(text)} is no format: there are {', '.join(FORMATS)}")
    return text


OPTIONS = (
    Option(
        "model",
        ("--model",),
        "catalog name (9b, qwen3.5-9b, Qwen/Qwen3.5-9B), checkpoint folder, config.json or .gguf [default: qwen3.5-9b]",
        "MODEL",
        parse_name,
        completes="models",
    ),
    Option(
        "devices",
        ("--gpu",),
        "device (rtx3060, m1-16gb), several (2xrtx3090; rtx3090,rtx3060), auto = this machine, or a YAML file "
        "[default: auto]",
        "DEVICE",
        parse_devices,
        completes="devices",
    ),
    Option(
        "ctx_tokens",
        ("--ctx",),
        "tokens per sequence: 262144, 256K (K = 1024), 256k (k = 1000), 1M [default: 32768]",
        "TOKENS",
        parse_tokens,
    ),
    Option("seqs", ("--seqs",), "concurrent sequences [default: 1]", "N", parse_count),
    Option(
        "engine",
        ("--engine",),
        "vllm, sglang, llama.cpp, ollama, mlx, ktransformers, transformers or native, or NAME@VERSION "
        "[default: all that run there]",
        "ENGINE",
        parse_engine,
        completes="engines",
    ),
    Option(
        "weights",
        ("--weights",),
        "bf16, fp8, int8, int4, nvfp4, gptq-int4-official, mlx-4bit, mlx-8bit or a GGUF type such as q4_k_m "
        "[default: the best that fits]",
        "FORMAT",
        parse_name,
        completes="weights",
    ),
    Option(
        "kv_dtype",
        ("--kv-dtype",),
        "type of the KV cache, in the engine's own words [default: the best that fits]",
        "TYPE",
        parse_name,
        completes="kv_dtypes",
    ),
    Option(
        "state_dtype",
        ("--state-dtype",),
        "type of the recurrent state: float32 or bfloat16 [default: float32]",
        "TYPE",
        parse_name,
        completes="state_dtypes",
    ),
    Option("mtp", ("--mtp",), "draft tokens of multi-token prediction [default: 0]", "N", parse_count),
    Option(
        "vision",
        ("--vision",),
        "load the vision tower, or not [default: text only]",
        off=("--text-only",),
    ),
    Option("tp", ("--tp",), "tensor-parallel size [default: chosen]", "N", parse_count),
    Option("pp", ("--pp",), "pipeline-parallel size [default: chosen]", "N", parse_count),
    Option("nodes", ("--nodes",), "boxes like the one that --gpu names [default: 1]", "N", parse_count),
    Option(
        "interconnect",
        ("--interconnect",),
        "between boxes: ib-ndr, 8xib-ndr, roce-200, cx7-200, ethernet-10 ..., or a rate such as 25GB/s or 200Gbit/s "
        "[default: what such boxes are sold with]",
        "LINK",
        parse_name,
        completes="interconnects",
    ),
    Option(
        "dp",
        ("--dp",),
        "data-parallel replicas; those of a mixture share the experts [default: chosen]",
        "N",
        parse_count,
    ),
    Option(
        "ep",
        ("--ep",),
        "ranks that whole experts are dealt out to: tp x dp, or 1 to cut each [default: chosen]",
        "N",
        parse_count,
    ),
    Option(
        "gpu_memory_utilization",
        ("--gpu-memory-utilization",),
        "share of the device that vLLM takes (SGLang: mem-fraction-static) [default: the engine's]",
        "SHARE",
        parse_fraction,
        group="options",
    ),
    Option(
        "max_num_batched_tokens",
        ("--max-num-batched-tokens",),
        "tokens per prefill step of vLLM (SGLang: chunked-prefill-size) [default: the engine's]",
        "TOKENS",
        parse_tokens,
        group="options",
    ),
    Option(
        "ubatch_tokens",
        ("--ubatch",),
        "micro-batch of llama.cpp, in tokens [default: the engine's]",
        "TOKENS",
        parse_tokens,
        group="options",
    ),
    Option(
        "image_tokens",
        ("--image-tokens",),
        "the largest image, in tokens or in pixels (1920x1080) [default: the model's limit]",
        "SIZE",
        parse_image,
        group="options",
    ),
    Option(
        "host_memory_bytes",
        ("--host-ram",),
        "host memory, such as 32GiB: plans that need more do not fit [default: 24 GiB free, or 1.5x the devices]",
        "BYTES",
        parse_bytes,
        group="options",
    ),
    Option(
        "offload_experts",
        ("--offload-experts",),
        "routed experts in host memory, or not [default: where the devices alone leave less than four bits]",
        off=("--no-offload-experts",),
        group="options",
    ),
    Option(
        "prefix_caching",
        ("--prefix-caching",),
        "keep what earlier requests computed, or not [default: yes]",
        off=("--no-prefix-caching",),
        group="options",
    ),
    Option(
        "cuda_graphs",
        ("--cuda-graphs",),
        "capture graphs for decoding, or not [default: yes]",
        off=("--no-cuda-graphs",),
        group="options",
    ),
    Option(
        "calibration",
        ("--calibration",),
        "plan with the constants that `qwen-plan calibrate` wrote there [default: the built-in ones]",
        "FILE",
        parse_calibration,
        group="options",
    ),
    Option(
        "usd_per_kwh",
        ("--usd-per-kwh",),
        "what a kWh costs you [default: 0.18, households in the United States in 2026]",
        "USD",
        parse_amount,
        group="prices",
    ),
    Option(
        "device_usd",
        ("--device-usd",),
        "what the devices cost together [default: energy alone is counted]",
        "USD",
        parse_amount,
        group="prices",
    ),
    Option(
        "years",
        ("--years",),
        "years over which they are paid off, decoding without pause [default: 3]",
        "YEARS",
        parse_amount,
        group="prices",
    ),
    Option(
        "device_watts",
        ("--device-watts",),
        "what the devices draw together while they decode [default: from their board power]",
        "WATTS",
        parse_amount,
        group="prices",
    ),
    Option(
        "api_usd_per_million",
        ("--api-usd-per-million",),
        "what an API takes for a million output tokens [default: a published range]",
        "USD",
        parse_amount,
        group="prices",
    ),
    Option(
        "job_tokens",
        ("--job-tokens",),
        "output tokens of a job, such as 78m: hours, kWh and money that it takes",
        "TOKENS",
        parse_tokens,
        group="prices",
    ),
    Option(
        "format",
        ("--format",),
        f"{', '.join(FORMATS)} [default: table]",
        "FORMAT",
        parse_format,
        group="output",
        completes="formats",
    ),
    Option("json", ("--json",), "the same as --format json", group="output"),
)

BY_FLAG = {flag: option for option in OPTIONS for flag in option.flags + option.off}


def flag_of(name: str) -> str:
    """How an option is typed."""
    return next(option.flags[0] for option in OPTIONS if option.name == name)


def read(arguments: Sequence[str]) -> Values | None:
    """What each option was given, as text; None where it takes Typer to say what these arguments mean."""
    values: Values = {}
    words = iter(arguments)
    for word in words:
        flag, equals, text = word.partition("=")
        option = BY_FLAG.get(flag)
        if option is None:
            return None
        if option.metavar is None:
            if equals:
                return None
            values[option.name] = flag in option.flags
            continue
        if not equals:
            text = next(words, "-")
            if text.startswith("-"):
                return None
        values[option.name] = text
    return values


def asked(values: Values) -> Asked:
    """The request behind these values. Raises BadInput, naming the option."""
    groups: dict[str, dict[str, Any]] = {"request": {}, "options": {}, "prices": {}, "output": {}}
    notes: list[str] = []
    for option in OPTIONS:
        if option.name not in values:
            continue
        value = values[option.name]
        if isinstance(value, str):
            groups[option.group][option.name] = _parsed(option, value)
            note = decimal_note(value) if option.parse is parse_tokens else None
            if note:
                notes.append(f"{option.flags[0]} {note}")
        else:
            groups[option.group][option.name] = value
    groups["request"].setdefault("devices", ("auto",))
    request = Request(**groups["request"], options=Options(**groups["options"]), prices=Prices(**groups["prices"]))
    return Asked(request, _format(groups["output"]), tuple(notes))


def _parsed(option: Option, text: str) -> object:
    try:
        return option.parse(text)
    except BadInput as error:
        raise BadInput(f"{option.flags[0]}: {error}") from None


def _format(output: dict[str, Any]) -> str:
    chosen = output.get("format")
    if not output.get("json"):
        return str(chosen or "table")
    if chosen not in (None, "json"):
        raise BadInput(f"--json and --format {chosen}: choose one")
    return "json"
