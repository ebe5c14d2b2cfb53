"""The capacity report as Markdown, as JSON, and the answer alone for a terminal."""

from ..planner.report import Kind, Report, plain, sources
from ..planner.speed import drafts
from .markdown import escaped, grid
from .output import clean, wrapped
from .report_page import Extras, Page


def markdown(told: Page) -> str:
    lines = [f"# {escaped(told.title)}", "", f"**{told.verdict}.** {escaped(told.answer[0])}", ""]
    lines += [*(f"- {escaped(sentence)}" for sentence in told.answer[1:]), ""]
    for section in told.sections:
        lines += [f"## {escaped(section.title)}", ""]
        for sentence in section.says:
            lines += [escaped(sentence), ""]
        for table in section.tables:
            lines += [*grid(table.titles, table.rows, table.right), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def document(found: Report, extras: Extras) -> dict[str, object]:
    """The report as JSON: base units, every figure of the page."""
    memory, widths, what_ifs = extras
    return {
        "schema": 1,
        "title": found.question.title,
        "workload": plain(found.question.workload),
        "model": found.model,
        "mean_request_tokens": found.mean_tokens,
        "holds": found.holds,
        "failures": list(found.failures),
        "cautious_failures": list(found.slow_failures),
        "tokens_per_s": found.tokens_per_s,
        "replicas": [_kind_json(kind, found.mean_tokens) for kind in found.kinds],
        "load": plain(found.load),
        "candidates": plain(found.candidates),
        "cost": plain(found.bill),
        "memory": plain(memory),
        "throughput": plain(widths),
        "what_if": plain(what_ifs),
        "assumptions": [{"what": what, "value": value, "source": source} for what, value, source in sources(found)],
    }


def _kind_json(kind: Kind, mean_tokens: int) -> dict[str, object]:
    one = kind.replica
    return {
        "devices": one.devices,
        "replicas": kind.replicas,
        "share_of_load": kind.share,
        "engine": one.plan.engine,
        "engine_version": one.plan.engine_version,
        "weights": one.plan.weights,
        "kv_dtype": one.plan.kv_dtype,
        "limits": plain(one.limits),
        "reuse_tokens": one.reuse_tokens,
        "step_time": plain(one.step),
        "drafts": drafts(one.plan, mean_tokens).to_json() if one.plan.mtp else None,
        "measured": plain(kind.measured),
        "cautious": plain(kind.slow),
        "fewest": plain(kind.fewest),
        "fewest_cautious": plain(kind.fewest_slow),
        "breaks_first": plain(kind.breaking),
        "command": one.command,
    }


def plain_text(told: Page, width: int) -> str:
    """The answer for a terminal."""
    lines = wrapped(f"{told.verdict}: {clean(told.answer[0])}", width, rest="  ")
    for sentence in told.answer[1:]:
        lines += wrapped(clean(sentence), width, first="  - ", rest="    ")
    return "\n".join([*lines, ""])
