"""The Typer app of `qwen-plan`: help, completion, subcommands, and what is wrong with words that `read` left alone."""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from ..profiles.errors import BadInput
from .completion import completer
from .options import FORMATS, OPTIONS, Option, Values
from .output import clean, say, write

Answer = Callable[[Values], int]

HELP = """Does it fit? The memory of a Qwen3.5 model as each engine allocates it, the best plan, and how to launch it.

\b
  qwen-plan --gpu rtx3060 --ctx 262144
  qwen-plan --model 35b-a3b --gpu 2xrtx3090 --seqs 4 --engine vllm
  qwen-plan --gpu m1-16gb --json
"""
EPILOG = "Exit status: 0 it fits, 1 it does not fit, 2 no answer."
CONTEXT = {"help_option_names": ["-h", "--help"]}
REPORTS = ("text", "html", "markdown", "json")
RECEIPT_FORMATS = ("text", "json")
CATALOG_FORMATS = tuple(form for form in FORMATS if form != "github")

Wanted = Annotated[str, typer.Argument(metavar="[WORD]", help="only those with this in their name", show_default=False)]
Form = Annotated[str, typer.Option("--format", metavar="FORMAT", help=f"{', '.join(CATALOG_FORMATS)}")]
Json = Annotated[bool, typer.Option("--json", help="the same as --format json")]


def build(answer: Answer) -> typer.Typer:
    """The app. `answer` gets the texts that were given, under the names of options.py, and returns the exit status."""
    app = typer.Typer(
        name="qwen-plan",
        help=HELP,
        epilog=EPILOG,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=CONTEXT,
    )

    def plan(context: typer.Context, version: bool, **given: Any) -> None:
        values: Values = {name: value for name, value in given.items() if value is not None}
        if context.invoked_subcommand is None:
            raise typer.Exit(answer(values))
        if values:
            raise BadInput(f"options of a plan do not go with `{context.invoked_subcommand}`: put its own behind it")

    _sign(plan, (*map(_parameter, OPTIONS), _version()))
    app.callback(invoke_without_command=True)(plan)
    app.command("devices", help="List the devices that have a profile.")(_devices)
    app.command("models", help="List the models that have a profile.")(_models)
    app.command("matrix", help="Check a file of device x model x context against requirements, for CI.")(_matrix)
    app.command("report", help="Write a capacity report: what a deployment serves, how fast, at what cost.")(_report)
    receipt = app.command("receipt", help="Set an engine's boot log beside its plan, part by part.")
    _sign(_receipt, (*map(_parameter, filter(_asks, OPTIONS)), *_receipt_parameters()))
    receipt(_receipt)
    app.command("calibrate", help="Refit the estimated constants from receipts.")(_calibrate)
    app.command("verify", help="Run a plan here, and set what it took beside what was planned.")(_verify)
    app.command("probe", help="Say what this machine is, measure it, and write it as a profile.")(_probe)
    app.command("serve", help="Serve the planner as a web page and a JSON API, on this machine.")(_serve)
    return app


def run(arguments: Sequence[str], answer: Answer) -> int:
    """The exit status of `arguments`. Usage errors are said on stderr, and are 2."""
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        status = build(answer)(list(arguments), prog_name="qwen-plan", standalone_mode=False)
    except typer.Abort:
        return 130
    except usage_error as error:
        say(f"qwen-plan: {clean(error.format_message()).rstrip('.')}; `qwen-plan --help` shows what there is")
        return 2
    except SystemExit as exit:
        if isinstance(exit.__context__, BrokenPipeError):
            raise exit.__context__ from None
        raise
    return status if isinstance(status, int) else 0


def _devices(wanted: Wanted = "", form: Form = "table", json: Json = False) -> None:
    from .catalogs import list_devices

    list_devices(wanted, _one_format(form, json, CATALOG_FORMATS, "a catalog"))


def _models(wanted: Wanted = "", form: Form = "table", json: Json = False) -> None:
    from .catalogs import list_models

    list_models(wanted, _one_format(form, json, CATALOG_FORMATS, "a catalog"))


def _matrix(
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

    chosen = _one_format(form, json, FORMATS, "a matrix")
    raise typer.Exit(matrix(file, chosen, against or None, tolerance, save or None, comment or None))


def _report(
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


def _asks(option: Option) -> bool:
    """Whether it says what was started; the rest is about prices and renderings."""
    return option.group in ("request", "options")


def _receipt_parameters() -> tuple[Parameter, ...]:
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


def _receipt(context: typer.Context, log: str, tolerance: float, json: bool, **given: Any) -> None:
    from .options import asked
    from .receipt import show_receipt

    own = {name: given.pop(name) or None for name in ("plan", "output", "date", "source")}
    values: Values = {name: value for name, value in given.items() if value is not None}
    form = "json" if json else "text"
    raise typer.Exit(show_receipt(log, asked(values).request, values.keys(), tolerance=tolerance, form=form, **own))


def _calibrate(
    receipts: Annotated[list[str], typer.Argument(metavar="RECEIPTS", help="folders of receipts, or files")],
    output: Annotated[str, typer.Option("--output", metavar="FILE.yaml", help="write the constants there")] = "",
    json: Json = False,
) -> None:
    from .calibrate import calibrate

    raise typer.Exit(calibrate(receipts, output or None, "json" if json else "text"))


def _verify(
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


def _probe(
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

    chosen = _one_format(form, json, ("table", "json"), "a machine")
    raise typer.Exit(probe_machine(measure, output or None, overwrite, chosen))


def _serve(
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


def _one_format(form: str, json: bool, known: Sequence[str], what: str) -> str:
    if form not in known:
        raise BadInput(f"--format {form}: {what} has {', '.join(known)}")
    if json and form not in ("table", "json"):
        raise BadInput(f"--json and --format {form}: choose one")
    return "json" if json else form


def _sign(function: Callable[..., None], parameters: Sequence[Parameter]) -> None:
    """Typer reads a function's parameters from its signature and its annotations: these come from the table."""
    context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    signature = Signature([context, *parameters])
    vars(function)["__signature__"] = signature
    function.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}


def _parameter(option: Option) -> Parameter:
    switch = option.metavar is None
    flags = option.flags if not option.off else (f"{'/'.join((*option.flags, *option.off))}",)
    default = typer.Option(
        None,
        *flags,
        help=option.help,
        metavar=option.metavar,
        show_default=False,
        autocompletion=completer(option.completes) if option.completes else None,
    )
    return Parameter(
        option.name, Parameter.KEYWORD_ONLY, default=default, annotation=bool | None if switch else str | None
    )


def _version() -> Parameter:
    default = typer.Option(False, "--version", help="show the version", callback=_say_version, is_eager=True)
    return Parameter("version", Parameter.KEYWORD_ONLY, default=default, annotation=bool)


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        write(f"qwenfit {version('qwenfit')}\n")
        raise typer.Exit
