"""`qwen-quant`: a smaller checkpoint; `inspect`: what is in one; `eval`: how far one is from another.

0 done; 1 answered, and the answer is no (`eval --max-kl`); 2 it could not be done; 130 interrupted, and resumable.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..profiles.errors import BadInput, QwenfitError, install_hint
from .error_chart import check_chart, draw_errors
from .options import parse_bytes
from .output import clean, quietly_closed, say, write
from .quant_page import ProgressLine, does_not_fit_page, dry_run_page, eval_page, inspect_page, summary_page

if TYPE_CHECKING:
    from ..quant.fit import Fitted, Goal
    from ..quant.recipe import Recipe

HELP = """Quantize a Qwen3.5 checkpoint: layer by layer, on the machine you have, into files that load everywhere.

\b
  qwen-quant --bits 4                        Qwen/Qwen3.5-9B from the cache or the hub, into ./Qwen3.5-9B-int4
  qwen-quant SRC DST --bits 4 --group-size 128 --method gptq --format compressed-tensors
  qwen-quant SRC DST --fit rtx3060 --ctx 128K  4 bits where they do not hurt, 8 where there is room
  qwen-quant inspect DIR                     what is in a checkpoint, module by module
  qwen-quant eval DIR --reference SRC        perplexity, KL divergence and error by layer
"""
EPILOG = "Exit status: 0 done, 1 the answer is no, 2 not done, 130 interrupted (--resume goes on)."
DEFAULT_SOURCE = "Qwen/Qwen3.5-9B"
DEFAULT_GROUP_SIZE = 128
CONTEXT = {"help_option_names": ["-h", "--help"]}

Source = Annotated[str, typer.Argument(metavar="[SRC]", help="a folder, or a repository on the hub", show_default=True)]
Target = Annotated[str, typer.Argument(metavar="[DST]", help="the folder to make [default: ./NAME-intBITS]")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status. Whatever goes wrong is one sentence on stderr; QWENFIT_DEBUG=1 adds the traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[..., int | None]] = {"inspect": _inspect, "eval": _eval}
    command = commands.get(given[0]) if given else None
    try:
        return _run(
            command or _quantize, given[1:] if command else given, f"qwen-quant {given[0]}" if command else None
        )
    except QwenfitError as error:
        return _failed(str(error))
    except BrokenPipeError:
        quietly_closed()
        return 0
    except KeyboardInterrupt:
        say("qwen-quant: interrupted; the same command with --resume goes on")
        return 130
    except ImportError as error:
        if error.name not in ("torch", "safetensors", "numpy"):
            raise
        return _failed(f"this needs {error.name}: {install_hint('quant')}")
    except ValueError as error:
        return _failed(str(error))
    except (MemoryError, RuntimeError) as error:
        return _failed(f"{type(error).__name__}: {error}")
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        bug = f"{type(error).__name__}: {error}"
        return _failed(f"{bug} (a bug in qwenfit: QWENFIT_DEBUG=1 shows where; please report it)")


def _run(function: Callable[..., int | None], arguments: list[str], name: str | None) -> int:
    app = typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings=CONTEXT,
    )
    app.command(help=HELP if name is None else None, epilog=EPILOG if name is None else None)(function)
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        status = app(arguments, prog_name=name or "qwen-quant", standalone_mode=False)
    except usage_error as error:
        say(f"qwen-quant: {clean(error.format_message()).rstrip('.')}; `qwen-quant --help` shows what there is")
        return 2
    except typer.Abort:
        status = 130
    if status == 130:  # what Typer makes of Ctrl-C, by version
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0


def _quantize(
    source: Source = DEFAULT_SOURCE,
    target: Target = "",
    bits: Annotated[int, typer.Option(metavar="4|8", help="of a code (6 in a GGUF file)")] = 4,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="columns per scale: 32, 64, 128, -1 for a row [default: 128]")
    ] = None,
    symmetric: Annotated[bool | None, typer.Option("--sym/--asym", help="default: asymmetric where it loads")] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="gptq (4 bits), rtn (8 bits)")] = None,
    format: Annotated[
        str, typer.Option(metavar="NAME", help="compressed-tensors, gptq, awq, gguf")
    ] = "compressed-tensors",
    gguf_type: Annotated[str | None, typer.Option(metavar="TYPE", help="q4_0, q4_1, q4_k, q6_k, q8_0")] = None,
    activations: Annotated[int | None, typer.Option(metavar="8", help="W8A8: engines round activations, too")] = None,
    lm_head: Annotated[int, typer.Option(metavar="BITS", help="4, 8, or 16 to keep it")] = 16,
    embeddings: Annotated[int, typer.Option(metavar="BITS", help="of a GGUF file: 4, 6, 8, or 16 to keep them")] = 16,
    shared_experts: Annotated[int, typer.Option(metavar="BITS", help="4, 8, or 16 to keep them")] = 16,
    mtp: Annotated[int, typer.Option(metavar="BITS", help="the prediction layer: 4, 8, or 16 to keep it")] = 16,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="YAML: the options, and rules by module")] = None,
    calibration: Annotated[str | None, typer.Option(metavar="FILE", help="text, JSONL or Parquet")] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="of calibration text")] = 8192,
    gptaq: Annotated[
        bool | None,
        typer.Option("--gptaq/--no-gptaq", help="aim at the full-precision outputs [default: dense, up to 4B]"),
    ] = None,
    fit: Annotated[str | None, typer.Option(metavar="DEVICE", help="mix 4 and 8 bits so that it fits there")] = None,
    ctx: Annotated[str, typer.Option(metavar="TOKENS", help="of --fit: per sequence; 131072, 128K")] = "32768",
    seqs: Annotated[int, typer.Option(metavar="N", help="of --fit: concurrent sequences")] = 1,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="of --fit [default: the planner's choice]")] = None,
    seed: Annotated[int, typer.Option(metavar="N")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1")] = "cpu",
    max_ram: Annotated[str | None, typer.Option(metavar="SIZE", help="activations go to files above it: 4GiB")] = None,
    workers: Annotated[str | None, typer.Option(metavar="ADDRESS", help="solve on Ray: auto, ray://HOST:PORT")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the target")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say sizes")] = False,
    json: Json = False,
) -> int:
    from ..planner.tokens import parse_tokens
    from ..quant import quantize
    from ..quant.fit import Goal, plan_of
    from ..quant.pipeline import sizes
    from ..quant.recipe import GGUF_TYPES, Recipe, read_recipe

    _check_device(device)
    asked = Recipe(
        bits=bits,
        group_size=DEFAULT_GROUP_SIZE if group_size is None else group_size,
        symmetric=symmetric,
        method=method,
        format=format,
        gguf_type=gguf_type.upper() if gguf_type else None,
        activation_bits=activations,
        lm_head=lm_head,
        embeddings=embeddings,
        shared_experts=shared_experts,
        mtp=mtp,
        calibration=calibration,
        tokens=tokens,
        seed=seed,
        full_precision_targets=gptaq,
    )
    if recipe:
        asked = read_recipe(recipe, asked)
    kind = (asked.gguf_type or GGUF_TYPES[asked.bits]) if asked.format == "gguf" else f"int{asked.bits}"
    if asked.format == "gguf" and group_size is not None:
        say(f"qwen-quant: a {kind.lower()} file has groups of its own, so --group-size {group_size} changes nothing")
    where = target or f"./{os.path.basename(source.rstrip('/'))}-{kind}"
    line = ProgressLine(sys.stderr)
    fitted = None
    if fit:
        fitted = _fitted(source, where, asked, Goal(fit, parse_tokens(ctx), seqs, engine), device, line)
        if fitted.recipe is None:
            write(does_not_fit_page(fitted, json))
            return 1
        asked = fitted.recipe
    if dry_run:
        write(dry_run_page(sizes(source, asked), json, fitted))
        return 0
    line.begin()
    try:
        summary = quantize(
            source,
            where,
            asked,
            overwrite=overwrite,
            resume=resume,
            device=device,
            max_ram_bytes=parse_bytes(max_ram) if max_ram else None,
            workers=workers,
            command=" ".join(["qwen-quant", *sys.argv[1:]]),
            watch=line.show,
        )
    finally:
        line.close()
    if fitted:
        _forget_sensitivities(where)
        fitted = replace(fitted, plan=plan_of(where, fitted))
    write(summary_page(summary, json, fitted))
    return 0


def _fitted(source: str, where: str, asked: "Recipe", goal: "Goal", device: str, line: ProgressLine) -> "Fitted":
    """Sensitivities stay beside the target until it is complete: another call with --resume does not measure again."""
    from ..quant.fit import fit

    try:
        return fit(source, asked, goal, device=device, memory=_sensitivities(where), watch=line.show_sensitivity)
    finally:
        line.close()


def _sensitivities(where: str) -> str:
    folder, name = os.path.split(os.path.abspath(where))
    return os.path.join(folder, f".{name}.sensitivities.json")


def _forget_sensitivities(where: str) -> None:
    with suppress(OSError):
        os.unlink(_sensitivities(where))


def _inspect(folder: Annotated[str, typer.Argument(metavar="DIR", help="a checkpoint")], json: Json = False) -> None:
    """What is in a checkpoint, module by module: format, bits, group size, bytes."""
    from ..quant.inspection import inspect

    write(inspect_page(inspect(folder), json))


def _eval(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a checkpoint")],
    reference: Annotated[str, typer.Option(metavar="DIR", help="the checkpoint that it was made from")],
    text: Annotated[str | None, typer.Option(metavar="FILE", help="default: the text that ships")] = None,
    tokens: Annotated[int, typer.Option(metavar="N")] = 2048,
    sequence: Annotated[int, typer.Option(metavar="N", help="tokens of a sequence")] = 512,
    device: Annotated[str, typer.Option(metavar="NAME")] = "cpu",
    max_kl: Annotated[float | None, typer.Option(metavar="NATS", help="exit 1 where the mean KL is above it")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="error by layer as .svg, .png or .pdf")] = None,
    json: Json = False,
) -> int:
    """Perplexity, KL divergence, top-1 agreement and error by layer of a checkpoint against its reference."""
    from ..quant.calibration import consecutive_sequences, read_text, read_tokenizer
    from ..quant.evaluate import evaluate

    _check_device(device)
    for path in (folder, reference):
        _check_checkpoint(path)
    if plot:
        check_chart(plot)
    sequences = consecutive_sequences(read_text(text), read_tokenizer(reference), sequence, tokens)
    found = evaluate(folder, reference, sequences, device=device)
    if plot:
        draw_errors(found, os.path.basename(os.path.abspath(folder)), plot)
    write(eval_page(found, json))
    return 1 if max_kl is not None and found.mean_kl > max_kl else 0


def _check_checkpoint(path: str) -> None:
    """A folder that `eval` can run: it has no GGUF kernels."""
    if not os.path.isdir(path) or not os.path.exists(os.path.join(path, "config.json")):
        raise BadInput(
            f"{path} is no folder of config.json and safetensors, which eval takes (of GGUF files llama.cpp's own "
            "llama-perplexity says the divergence)"
        )


def _check_device(name: str) -> None:
    from ..quant.devices import check_device

    check_device(name)


def _failed(message: str) -> int:
    if os.environ.get("QWENFIT_DEBUG") == "1":
        from traceback import print_exc

        print_exc()
    say(f"qwen-quant: {clean(message)}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
