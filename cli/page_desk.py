"""Where the page and the API ask the planner: one at a time, what was asked before from memory."""

from functools import lru_cache

from ..planner import plan
from ..planner.offers import Offers, offers
from ..planner.plan import Plan
from ..planner.request import Request
from .page_guard import AT_ONCE, REPORT_WAIT_S, REPORTS_AT_ONCE, WAIT_S, Turns
from .page_question import AUTO, Question

OFFERS_WANTED = 6


class Desk:
    """Answers questions. `allow_auto`: the machine that it runs on may be asked about."""

    def __init__(self, allow_auto: bool) -> None:
        self.allow_auto = allow_auto
        self.turns, self.reports = Turns(AT_ONCE, WAIT_S), Turns(REPORTS_AT_ONCE, REPORT_WAIT_S)

    def warm(self) -> None:
        """The first question imports every engine, which takes longer than an answer may: asked before anybody asks."""
        self.offers(Question())
        self.plan(Question())

    def plan(self, question: Question) -> Plan:
        """`plan()`'s answer. This machine's memory changes, so questions about it are not remembered."""
        request = question.request(self.allow_auto)
        return plan(request) if AUTO in request.devices else _planned(request)

    def offers(self, question: Question, patience_s: float | None = None) -> Offers:
        return offers(question.request(self.allow_auto), question.device_count, OFFERS_WANTED, patience_s)


@lru_cache(maxsize=512)
def _planned(request: Request) -> Plan:
    return plan(request)
