"""What fits where: memory as each engine allocates it, the search over engines and formats, and advice.

from qwenfit.planner import plan, Request
answer = plan(Request(model="qwen3.5-9b", devices=("rtx3060",), ctx_tokens=262144))
"""

from .advice import advise
from .kv_pool import kv_pool
from .plan import EnginePlan, Plan
from .request import Options, Request
from .search import search

__all__ = ["EnginePlan", "Options", "Plan", "Request", "kv_pool", "plan"]


def plan(request: Request) -> Plan:
    """Every engine's best plan for a request, the best first, with advice where it does not fit or only just does.

    Raises UnknownName, BadInput or Unsupported where there is no answer; "does not fit" is an answer.
    """
    return search(request, advise)
