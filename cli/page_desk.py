"""Where the page and the API ask the planner: one at a time, what was asked before from memory."""

from functools import lru_cache

from ..planner import plan
from ..planner.candidates import ENGINE_MODULES, engine_module
from ..planner.offers import Offers, offers
from ..planner.plan import Plan
from ..planner.request import Request
from ..planner.weights import weight_table
from ..profiles.device_names import device, devices
from ..profiles.formats import weight_format
from ..profiles.model_catalog import models
from .page_guard import AT_ONCE, REPORT_WAIT_S, REPORTS_AT_ONCE, WAIT_S, Turns
from .page_question import AUTO, DeviceKeys, Question

OFFERS_WANTED = 6
TYPICAL = (  # one device; experts beside it and advice; several boxes
    Question(),
    Question(model="35b-a3b", devices=(DeviceKeys(name="rtx3060", count=2),), ctx_tokens=1_000_000, seqs=64),
    Question(model="35b-a3b", devices=(DeviceKeys(name="rtx3060", count=2),), nodes=2),
)


class Desk:
    """Answers questions. `allow_auto`: the machine that it runs on may be asked about."""

    def __init__(self, allow_auto: bool) -> None:
        self.allow_auto = allow_auto
        self.turns, self.reports = Turns(AT_ONCE, WAIT_S), Turns(REPORTS_AT_ONCE, REPORT_WAIT_S)

    def warm(self) -> None:
        """What is the same for every question, before anybody asks: the engines' code, the devices, and each model's
        weights in every format. The first questions would wait for it longer than for their answers."""
        devices()
        self.offers(Question())
        for asked in TYPICAL:
            self.plan(asked)
        for one in models():
            for engine in ENGINE_MODULES:
                for name in engine_module(engine).weight_formats(one, device("b200")):  # which has every type
                    weight_table(one, weight_format(name))

    def plan(self, question: Question) -> Plan:
        """`plan()`'s answer. This machine's memory changes, so questions about it are not remembered."""
        request = question.request(self.allow_auto)
        return plan(request) if AUTO in request.devices else _planned(request)

    def offers(self, question: Question, patience_s: float | None = None) -> Offers:
        return offers(question.request(self.allow_auto), question.device_count, OFFERS_WANTED, patience_s)


@lru_cache(maxsize=512)
def _planned(request: Request) -> Plan:
    return plan(request)
