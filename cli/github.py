"""The answer for a GitHub Actions job: annotations on stdout, a job summary, and outputs that later steps can test."""

import os

from ..planner.plan import Plan
from ..profiles.errors import BadInput
from . import phrases
from .markdown import markdown
from .output import clean

MAX_ANNOTATIONS = 9  # of one kind; GitHub shows about ten per step


def github(plan: Plan, notes: tuple[str, ...] = ()) -> str:
    """Appends to $GITHUB_STEP_SUMMARY and $GITHUB_OUTPUT where they are set; returns what stdout gets."""
    summary = markdown(plan, notes)
    lines = [_verdict(plan), *(annotation("notice", note) for note in notes)]
    lines += [annotation("warning", warning) for warning in plan.best.warnings[:MAX_ANNOTATIONS]]
    if not append("GITHUB_STEP_SUMMARY", summary):
        lines.append(summary)
    append("GITHUB_OUTPUT", "".join(f"{name}={clean(value)}\n" for name, value in _outputs(plan).items()))
    return "\n".join(lines).rstrip("\n") + "\n"


def annotation(
    kind: str, message: str, title: str = "qwen-plan", file: str | None = None, line: int | None = None
) -> str:
    """A workflow command, with the escapes that its message and its properties need."""
    properties = {"file": file, "line": line, "title": title}
    told = ",".join(f"{name}={_property(str(value))}" for name, value in properties.items() if value is not None)
    return f"::{kind} {told}::{_message(message)}"


def place(message: str) -> tuple[str | None, int | None]:
    """The file and line that a sentence about a YAML file begins with; (None, None) for any other."""
    where, comma, rest = message.partition(", line ")
    number = rest.partition(":")[0]
    named = bool(comma) and where.lower().endswith((".yaml", ".yml")) and number.isascii() and number.isdigit()
    return (where, int(number)) if named else (None, None)


def _verdict(plan: Plan) -> str:
    speed = plan.best.speed
    rate = f", ~{phrases.between(speed.start.decode_tokens_per_s)} tokens/s" if speed else ""
    said = f"{phrases.verdict(plan)}: {phrases.question(plan)} ({phrases.setup(plan.best)}{rate})"
    if plan.fits:
        return annotation("warning" if plan.best.tight else "notice", said)
    changes = "; ".join(one.change for one in plan.advice if one.fits)
    return annotation("error", f"{said}. What would fit: {changes}" if changes else said)


def _outputs(plan: Plan) -> dict[str, str]:
    best = plan.best
    return {
        "fits": "true" if plan.fits else "false",
        "engine": best.engine,
        "weights": best.weights,
        "kv_dtype": best.kv_dtype,
        "max_ctx_tokens": str(best.limits.max_ctx_tokens),
        "max_seqs": str(best.limits.max_seqs),
        "decode_tokens_per_s": f"{best.speed.start.decode_tokens_per_s.mid:.4g}" if best.speed else "",
        "ttft_s": f"{best.speed.start.ttft_s.mid:.4g}" if best.speed else "",
        "command": best.command,
    }


def append(variable: str, text: str) -> bool:
    """Append to the file that an environment variable of the job names; False where it is not set."""
    path = os.environ.get(variable)
    if not path:
        return False
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise BadInput(f"{variable}: cannot append to {path!r}: {error.strerror}") from error
    return True


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def _message(text: str) -> str:
    """Control characters other than line breaks are escaped as everywhere; % and line breaks in GitHub's own way."""
    lines = [clean(line) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return "%0A".join(line.replace("%", "%25") for line in lines)
