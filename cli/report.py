"""`qwen-plan report WORKLOAD.YAML`: what a deployment serves, as one HTML file, Markdown or JSON.

0 the promises hold, 1 they do not (the report says why), 2 no answer.
"""

import os
import sys
from collections.abc import Sequence
from json import dumps

from ..planner.report import Report, report
from ..planner.whatif import memory, throughput, what_ifs
from ..profiles.errors import BadInput, install_hint
from .output import quietly_closed, say, screen, write
from .report_page import Extras, Page, page
from .report_text import document, markdown, plain_text

ENDINGS = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json"}
NEEDS = f"the HTML report needs jinja2 and matplotlib: {install_hint('report')} (Markdown and JSON need neither)"


def capacity_report(path: str, outputs: Sequence[str], form: str) -> int:
    """The exit status. `outputs` are files, by their endings; `form` is what stdout gets: the answer, or all of it."""
    from ..planner import plan
    from .workload_file import read_workload

    targets = [(name, _kind(name)) for name in outputs]
    if not targets and form == "text":
        targets = [(f"{os.path.splitext(os.path.basename(path))[0]}.html", "html")]
    if any(kind == "html" for _, kind in targets):
        _check_libraries()
    found = report(read_workload(path), plan)
    first = found.kinds[0]
    extras: Extras = (memory(first, plan), throughput(first, found.mean_tokens), what_ifs(found, plan))
    told = page(found, extras)
    for name, kind in targets:
        _save(name, _rendered(kind, found, told, extras))
        say(f"qwen-plan: wrote {name}")
    try:
        write(plain_text(told, screen(sys.stdout).width) if form == "text" else _rendered(form, found, told, extras))
    except BrokenPipeError:
        quietly_closed()
    return 0 if found.holds else 1


def _kind(name: str) -> str:
    ending = os.path.splitext(name)[1].lower()
    if ending not in ENDINGS:
        raise BadInput(f"--output {name}: the ending says what it is: .html, .md or .json")
    return ENDINGS[ending]


def _rendered(kind: str, found: Report, told: Page, extras: Extras) -> str:
    if kind == "json":
        return dumps(document(found, extras), indent=1, allow_nan=False) + "\n"
    if kind == "markdown":
        return markdown(told)
    return html(found, told, extras)


def html(found: Report, told: Page, extras: Extras) -> str:
    """The page, with nothing outside itself."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from .report_charts import charts

    drawn = {name: Markup(svg) for name, svg in charts(found, extras[0], extras[1]).items()}  # made here, not read
    template = files(__package__ or "qwenfit.cli").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(page=told, charts=drawn, source=found.question.source)


def _check_libraries() -> None:
    from importlib.util import find_spec

    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        raise BadInput(NEEDS)


def _save(path: str, text: str) -> None:
    from .matrix import save_file

    save_file(path, text)
