"""What stands behind `qwen-plan NAME`: the arguments of every subcommand, checked as far as a word can be and handed to
its own file, which is imported only then.
"""

from collections.abc import Sequence
from inspect import Parameter
from typing import Annotated, Any

import typer

from ..profiles.errors import BadInput
from .options import FORMATS, Option, Values

REPORTS = ("text", "html", "markdown", "json")
CATALOG_FORMATS = tuple(form for form in FORMATS if form != "github")

Wanted = Annotated[str, typer.Argument(metavar="[WORD]", help="only those with this in their name", show_default=False)]
Form = Annotated[str, typer.Option("--format", metavar="FORMAT", help=f"{', '.join(CATALOG_FORMATS)}")]
Json = Annotated[bool, typer.Option("--json", help="the same as --format json")]


def devices(wanted: Wanted = "", form: Form = "table", json: Json = False) -> None:
    from .catalogs import list_devices

    list_devices(wanted, one_format(form, json, CATALOG_FORMATS, "a catalog"))


def models(wanted: Wanted = "", form: Form = "table", json: Json = False) -> None:
    from .catalogs import list_models

    list_models(wanted, one_format(form, json, CATALOG_FORMATS, "a catalog"))


def matrix(
    file: Annotated[str, typer.Argument(metavar="MATRIX.YAML", help="rows of device x model x context x sequences")],
    against: Annotated[str, typer.Option("--against", metavar="OLD.JSON", help="fail only on what got worse")] = "",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="share by which memory may grow and speed fall before it is worse")
    ] = 0.01,
    save: Annotated[str, typer.Option("--save-json", metavar="FILE", help="write the JSON there too")] = "",
    comment: Annotated[
        str, typer.Option("--save-markdown", metavar="FILE", help="write Markdown there too, for a comment")
    ] = "",
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help=", ".join(FORMATS))] = "table",
    json: Json = False,
) -> None:
    from .matrix import matrix

    chosen = one_format(form, json, FORMATS, "a matrix")
    raise typer.Exit(matrix(file, chosen, against or None, tolerance, save or None, comment or None))


def report(
    file: Annotated[str, typer.Argument(metavar="WORKLOAD.YAML", help="what is served, on what, what is promised")],
    output: Annotated[
        list[str] | None,
        typer.Option("--output", metavar="FILE", help=".html, .md or .json, also several [default: WORKLOAD.html]"),
    ] = None,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help=f"of stdout: {', '.join(REPORTS)}")] = "text",
    json: Json = False,
) -> None:
    from .report import capacity_report

    if json and form not in ("text", "json"):
        raise BadInput(f"--json and --format {form}: choose one")
    if form not in REPORTS:
        raise BadInput(f"--format {form}: a report has {', '.join(REPORTS)}")
    raise typer.Exit(capacity_report(file, output or [], "json" if json else form))


def asks(option: Option) -> bool:
    """Whether it says what was started; the rest is about prices and renderings."""
    return option.group in ("request", "options")


def receipt_parameters() -> tuple[Parameter, ...]:
    """What `receipt` takes beside the options of a plan."""
    told: tuple[tuple[str, object, Any], ...] = (
        ("log", str, typer.Argument(..., metavar="LOG", help="boot log of an engine; - reads standard input")),
        ("plan", str, typer.Option("", "--plan", metavar="PLAN.json", help="what `qwen-plan --json` wrote of it")),
        ("tolerance", float, typer.Option(0.05, "--tolerance", help="share by which totals may be off")),
        ("output", str, typer.Option("", "--output", metavar="RECEIPT.json", help="write the receipt there")),
        ("date", str, typer.Option("", "--date", metavar="DATE", help="of the boot [default: today]")),
        (
            "source",
            str,
            typer.Option("", "--source", metavar="LINK", help="where the log stands, or a name of the run"),
        ),
        ("json", bool, typer.Option(False, "--json", help="the receipt as JSON on stdout")),
    )
    return tuple(
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind) for name, kind, default in told
    )


def receipt(context: typer.Context, log: str, tolerance: float, json: bool, **given: Any) -> None:
    from .options import asked
    from .receipt import show_receipt

    own = {name: given.pop(name) or None for name in ("plan", "output", "date", "source")}
    values: Values = {name: value for name, value in given.items() if value is not None}
    form = "json" if json else "text"
    raise typer.Exit(show_receipt(log, asked(values).request, values.keys(), tolerance=tolerance, form=form, **own))


def calibrate(
    receipts: Annotated[list[str], typer.Argument(metavar="RECEIPTS", help="folders of receipts, or files")],
    output: Annotated[str, typer.Option("--output", metavar="FILE.yaml", help="write the constants there")] = "",
    json: Json = False,
) -> None:
    from .calibrate import calibrate

    raise typer.Exit(calibrate(receipts, output or None, "json" if json else "text"))


def deploy(
    file: Annotated[str, typer.Argument(metavar="PLAN.json", help="what `qwen-plan ... --json` wrote")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write, empty or not there yet")],
    engine: Annotated[str, typer.Option("--engine", metavar="ENGINE", help="which of the plans [default: best]")] = "",
    calibration: Annotated[
        str, typer.Option("--calibration", metavar="FILE.yaml", help="that the plan was made with")
    ] = "",
    disk: Annotated[
        str, typer.Option("--disk", metavar="RATE", help="at which weights are read, such as 3GB/s [default: 1GB/s]")
    ] = "",
    download: Annotated[
        str, typer.Option("--download", metavar="RATE", help="at which they are downloaded [default: 1Gbit/s]")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a bundle made before")] = False,
    force: Annotated[bool, typer.Option("--force", help="write it though the plan does not fit")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be written")] = False,
    json: Annotated[bool, typer.Option("--json", help="what was written, as JSON")] = False,
) -> None:
    from .deploy import deploy

    raise typer.Exit(
        deploy(
            file, out, engine or None, calibration or None, disk or None, download or None,
            overwrite, force, dry_run, json,
        )
    )  # fmt: skip


def verify(
    plan: Annotated[str, typer.Argument(metavar="PLAN.json", help="what `qwen-plan ... --json` wrote")],
    engine: Annotated[
        str,
        typer.Option(
            "--engine", metavar="NAME", help="run it in llama.cpp, vllm, sglang or ollama [default: natively]"
        ),
    ] = "",
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="DIR", help="the weights [default: drawn, or as the plan says]")
    ] = "",
    layers: Annotated[int, typer.Option("--layers", help="natively: run the first of them only")] = 0,
    steps: Annotated[int, typer.Option("--steps", help="natively: tokens to decode")] = 32,
    fill_limit: Annotated[
        float, typer.Option("--fill-limit", metavar="SECONDS", help="natively: for reading the context's tokens")
    ] = 120.0,
    limit: Annotated[
        float, typer.Option("--limit", metavar="SECONDS", help="for a native run, or one request to an engine")
    ] = 3600.0,
    boot_limit: Annotated[
        float, typer.Option("--boot-limit", metavar="SECONDS", help="until an engine must be ready")
    ] = 1800.0,
    binary: Annotated[str, typer.Option("--binary", metavar="PATH", help="the engine's program")] = "",
    port: Annotated[int, typer.Option("--port", help="of loopback, for an engine [default: one that is free]")] = 0,
    requests: Annotated[int, typer.Option("--requests", min=1, max=1000, help="to an engine, in turn")] = 3,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="of a request to an engine")] = 512,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1, help="of a request to an engine")] = 64,
    tolerance: Annotated[float, typer.Option("--tolerance", help="share by which memory may be off")] = 0.05,
    memory_only: Annotated[bool, typer.Option("--memory-only", help="tell speeds and do not judge them")] = False,
    calibration: Annotated[str, typer.Option("--calibration", metavar="FILE", help="that the plan was made with")] = "",
    log: Annotated[str, typer.Option("--log", metavar="FILE", help="keep the engine's log there")] = "",
    output: Annotated[str, typer.Option("--output", metavar="FILE.json", help="write the verification there")] = "",
    receipt: Annotated[str, typer.Option("--receipt", metavar="FILE.json", help="write a receipt there")] = "",
    json: Json = False,
) -> None:
    from .verify import verify

    told = {
        "checkpoint": checkpoint or None,
        "layers": layers or None,
        "steps": steps,
        "fill_limit_s": fill_limit,
        "limit_s": limit,
        "boot_limit_s": boot_limit,
        "binary": binary or None,
        "port": port or None,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "tolerance": tolerance,
        "memory_only": memory_only,
        "log": log or None,
    }
    form = "json" if json else "text"
    raise typer.Exit(verify(plan, engine or None, calibration or None, form, output or None, receipt or None, told))


def probe(
    measure: Annotated[
        bool, typer.Option("--measure", help="measure bandwidths and matmuls too, in some seconds")
    ] = False,
    output: Annotated[
        str, typer.Option("--output", metavar="FILE.yaml", help="write the profile that `--gpu FILE.yaml` takes")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace that file where it is there already")] = False,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="table, json")] = "table",
    json: Json = False,
) -> None:
    from .probe import probe_machine

    chosen = one_format(form, json, ("table", "json"), "a machine")
    raise typer.Exit(probe_machine(measure, output or None, overwrite, chosen))


def serve(
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any that is free")] = 8035,
    allow_auto: Annotated[
        bool, typer.Option("--allow-auto", help="offer this machine as a device: whoever opens the page learns of it")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="another name under which the page may be asked for"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="say the address as JSON")] = False,
) -> None:
    from .serve import serve

    serve(host, port, allow_auto, allow_host or [], json)


def one_format(form: str, json: bool, known: Sequence[str], what: str) -> str:
    if form not in known:
        raise BadInput(f"--format {form}: {what} has {', '.join(known)}")
    if json and form not in ("table", "json"):
        raise BadInput(f"--json and --format {form}: choose one")
    return "json" if json else form
