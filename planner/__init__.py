"""What fits where: memory as each engine allocates it, the search over engines and formats, and advice.

from qwenfit.planner import plan, Request
answer = plan(Request(model="qwen3.5-9b", devices=("rtx3060",), ctx_tokens=262144))
"""

from .kv_pool import kv_pool
from .plan import EnginePlan, Plan
from .request import Options, Request
from .search import plan

__all__ = ["EnginePlan", "Options", "Plan", "Request", "kv_pool", "plan"]
