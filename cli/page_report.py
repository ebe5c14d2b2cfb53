"""The capacity report of the page: so many users who ask, read and ask again, at the context that was chosen.

The page has no room for a workload of one's own; `qwen-plan report` does.
"""

from json import dumps

from ..planner import plan
from ..planner.money import Tariff
from ..planner.offers import price_list
from ..planner.report import Question, Site, report
from ..planner.request import Request
from ..planner.whatif import memory, throughput, what_ifs
from ..planner.workload import Lengths, Part, Workload, lognormal
from ..profiles.errors import BadInput
from .report import html
from .report_page import Extras, page
from .report_text import document, markdown

MAX_USERS = 64
THINK_S = 30.0


def rendered(request: Request, title: str, kind: str) -> str:
    """Raises what the planner raises, and BadInput where the question is not one of a report."""
    found = report(_question(request, title), plan)
    first = found.kinds[0]
    extras: Extras = (memory(first, plan), throughput(first, found.mean_tokens), what_ifs(found, plan))
    if kind == "json":
        return dumps(document(found, extras), indent=1, allow_nan=False) + "\n"
    told = page(found, extras)
    return markdown(told) if kind == "md" else html(found, told, extras)


def has_html() -> bool:
    """Whether the charts of the HTML report can be drawn here."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def workload(ctx_tokens: int, users: int) -> Workload:
    """Prompts around a sixteenth of the context, one in twenty longer than a quarter of it; answers of up to a
    thousand tokens; half a minute of reading. Prompt and answer together stay within the context."""
    longest = max(1, ctx_tokens * 3 // 4)
    median = max(1, min(longest // 12, 4096))
    prompts = lognormal(1.0, median, min(longest, 4 * median), longest) if longest >= 12 else Part(1.0, 1, longest)
    answers = Part(1.0, 1, max(1, min(ctx_tokens - longest, 1024)))
    return Workload(Lengths((prompts,)), Lengths((answers,)), users=users, think_s=THINK_S)


def _question(request: Request, title: str) -> Question:
    if request.seqs > MAX_USERS:
        raise BadInput(f"{request.seqs:,} users: the page simulates at most {MAX_USERS}; `qwen-plan report` more")
    names = dict.fromkeys(request.devices)
    devices = ",".join(f"{request.devices.count(name)}x{name}" for name in names)
    usd = {one.device.name: float(one.usd) for one in price_list() if one.device.name in names}
    return Question(
        title=title,
        source="qwen-plan serve",
        request=request,
        sites=(Site(devices, 1, None),),
        candidates=(),
        workload=workload(request.ctx_tokens, request.seqs),
        tariff=Tariff(request.prices.usd_per_kwh, tuple(usd.items()), request.prices.years, None),
    )
