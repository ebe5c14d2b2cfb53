"""The Typer app of `qwen-plan`: help, completion, and what is wrong with words that `read` left alone."""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import typer

from ..profiles.errors import BadInput
from . import subcommands
from .completion import completer
from .options import OPTIONS, Option, Values
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
    app.command("devices", help="List the devices that have a profile.")(subcommands.devices)
    app.command("models", help="List the models that have a profile.")(subcommands.models)
    app.command("matrix", help="Check a file of device x model x context against requirements, for CI.")(
        subcommands.matrix
    )
    app.command("report", help="Write a capacity report: what a deployment serves, how fast, at what cost.")(
        subcommands.report
    )
    receipt = app.command("receipt", help="Set an engine's boot log beside its plan, part by part.")
    _sign(subcommands.receipt, (*map(_parameter, filter(subcommands.asks, OPTIONS)), *subcommands.receipt_parameters()))
    receipt(subcommands.receipt)
    app.command("calibrate", help="Refit the estimated constants from receipts.")(subcommands.calibrate)
    app.command("verify", help="Run a plan here, and set what it took beside what was planned.")(subcommands.verify)
    app.command("probe", help="Say what this machine is, measure it, and write it as a profile.")(subcommands.probe)
    app.command("serve", help="Serve the planner as a web page and a JSON API, on this machine.")(subcommands.serve)
    app.command("deploy", help="Write the files that start a plan: compose, systemd, Kubernetes, Ray Serve.")(
        subcommands.deploy
    )
    return app


def run(arguments: Sequence[str], answer: Answer) -> int:
    """The exit status of `arguments`. Usage errors are said on stderr, and are 2."""
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        status = build(answer)(list(arguments), prog_name="qwen-plan", standalone_mode=False)
    except typer.Abort:
        return 130
    except usage_error as error:
        path = error.ctx.command_path if getattr(error, "ctx", None) else "qwen-plan"
        say(f"qwen-plan: {clean(error.format_message()).rstrip('.?')}; `{path} --help` shows what there is")
        return 2
    except SystemExit as exit:
        if isinstance(exit.__context__, BrokenPipeError):
            raise exit.__context__ from None
        raise
    return status if isinstance(status, int) else 0


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
