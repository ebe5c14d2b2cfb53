"""`qwen-plan verify PLAN.json`: the plan is run here, and what it took set beside what was planned.

0 the plan holds, 1 it does not (or the engine ran out of memory), 2 it could not be tried, 130 interrupted. Whatever
happens, no process is left behind.
"""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import dumps
from time import strftime
from types import FrameType
from typing import Any

from ..planner.plan_file import read_plan
from ..planner.scores import TOTAL, PartScore
from ..planner.verification.verification import RateScore, Verification
from ..profiles.errors import BadInput
from .output import Screen, clean, columns, quietly_closed, say, screen, wrapped, write

GIB, MIB = 1 << 30, 1 << 20
LONGEST_S = 1_000_000


def verify(
    path: str, engine: str | None, calibration: str | None, form: str, output: str | None, receipt: str | None,
    told: Mapping[str, Any],
) -> int:  # fmt: skip
    """The exit status. `engine` None: natively, whichever engine the plan is best for. `output` and `receipt` are files
    for the verification and for a receipt; `told` are fields of `Asked`."""
    from importlib.metadata import version

    from ..planner.calibration_file import read_calibration
    from ..planner.verification.verify import Asked, verify_engine, verify_native

    _check(told, output, receipt)
    natively = engine is None or engine.partition("@")[0] == "native"
    file = read_plan(path, "native" if natively else engine, read_calibration(calibration) if calibration else None)
    asked = Asked(date=strftime("%Y-%m-%d"), qwenfit=version("qwenfit"), machine=_machine(), **told)
    run = verify_native if natively else verify_engine
    try:
        with _stopping():
            found = run(file, asked, lambda text: say(f"qwen-plan: {clean(text)}"))
    except KeyboardInterrupt:
        say("qwen-plan: interrupted: what was started is stopped, and nothing is written")
        return 130
    _save(found, output, receipt)
    try:
        write(
            dumps(found.to_json(), indent=1, allow_nan=False) + "\n"
            if form == "json"
            else _text(found, screen(sys.stdout))
        )
    except BrokenPipeError:
        quietly_closed()
    return 0 if found.holds else 1


def _check(told: Mapping[str, Any], output: str | None, receipt: str | None) -> None:
    """BadInput before anything is started, which may take an hour."""
    if not 0 <= told["tolerance"] < 1:
        raise BadInput(f"--tolerance {told['tolerance']:g}: give a share of at least 0 and less than 1, such as 0.05")
    for name in ("steps", "fill_limit_s", "limit_s", "boot_limit_s"):
        if not 0 < told[name] <= LONGEST_S:
            option = name.removesuffix("_s").replace("_", "-")
            raise BadInput(f"--{option} {told[name]:g}: give more than 0, and at most {LONGEST_S}")
    if receipt and told["layers"]:
        raise BadInput("--receipt and --layers: a receipt is planned anew as a whole model; leave one of them out")
    if told["log"] and os.path.lexists(told["log"]):
        raise BadInput(f"{told['log']} is there already: give --log another name, for a log is never overwritten")
    for path in (told["log"], output, receipt):
        folder = os.path.dirname(path or "") or "."
        if path and not os.access(folder, os.W_OK):
            raise BadInput(f"{path} cannot be written: {folder} is no folder that can be written to")


def _machine() -> Mapping[str, object]:
    from ..profiles.machine import machine_record
    from ..profiles.probe import probe

    return machine_record(probe())


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run as Ctrl-C does, so that what was started is stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(found: Verification, output: str | None, receipt: str | None) -> None:
    from ..planner.receipt_file import text
    from .matrix import save_file

    if output:
        save_file(output, dumps(found.to_json(), indent=1, allow_nan=False) + "\n")
        say(f"qwen-plan: wrote {output}")
    if receipt:
        save_file(receipt, text(found.receipt()))
        say(f"qwen-plan: wrote {receipt}")


def _text(found: Verification, seen: Screen) -> str:
    lines = wrapped(clean(f"{_verdict(found)}: {_what(found)}"), seen.width, rest="  ")
    if found.log.died:
        lines += wrapped(clean(f"It ran out of memory: {found.log.died}"), seen.width, first="  ", rest="    ")
    if found.scores:
        rows = [("", "part", "planned", "measured", "error", "in its interval"), *map(_part, found.scores)]
        lines += ["", *columns(rows, right=(2, 3, 4))]
    if found.rates:
        rows = [("tokens/s", "planned", "measured", "error", "in its interval"), *map(_rate, found.rates)]
        lines += ["", *columns(rows, right=(1, 2, 3))]
    lines.append("")
    if found.peak_bytes:
        lines.append(f"{_size(found.peak_bytes)} of memory in all processes at most")
    for note in (*found.log.notes, *found.notes):
        lines += wrapped(clean(f"note: {note}"), seen.width, rest="  ")
    return "\n".join([*lines, ""])


def _verdict(found: Verification) -> str:
    if found.log.died:
        return "The plan does not hold"
    memory = "memory as planned" if found.memory_within else f"memory is more than {found.tolerance:.0%} off"
    if found.rates_within is None:
        rates = "speed was not planned (the device's bandwidth is not known)"
    else:
        rates = "speed as planned" if found.rates_within else "speed outside its interval"
        rates += ", which does not count here" if found.memory_only and not found.rates_within else ""
    return f"The plan {'holds' if found.holds else 'does not hold'}: {memory}, {rates}"


def _what(found: Verification) -> str:
    plan = found.plan
    return (
        f"{plan.setup.model.name} in {plan.weights}, {plan.engine} {found.log.version or plan.engine_version}, "
        f"{plan.seqs} x {plan.ctx_tokens:,} tokens"
    )


def _part(one: PartScore) -> tuple[str, ...]:
    name = "total" if one.part == TOTAL else one.part.replace("_", " ").replace("+", " + ")
    mark = "=" if one.planned.exact else "~"
    error = f"{round(one.error, 4) + 0:+.1%}"
    within = "yes" if one.within else "no"
    return one.place, name, f"{mark}{_size(one.planned.mid)}", _size(one.measured_bytes), error, within


def _rate(one: RateScore) -> tuple[str, ...]:
    name = f"{one.name.partition('_')[0]} at {one.at_tokens:,} tokens" + (
        f", {one.seqs} at once" if one.seqs > 1 else ""
    )
    measured = f"{'~' if one.is_estimated else ''}{one.measured:.4g}"
    if one.planned is None or one.error is None:
        return name, "not known", measured, "", ""
    planned = f"{one.planned.low:.3g} to {one.planned.high:.3g}"
    return name, planned, measured, f"{one.error:+.1%}", "yes" if one.within else "no"


def _size(amount_bytes: int) -> str:
    return f"{amount_bytes / GIB:.3f} GiB" if amount_bytes >= GIB // 10 else f"{amount_bytes / MIB:.2f} MiB"
