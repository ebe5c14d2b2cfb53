# Triton's own annotations describe its compiler's inside, not what a launch takes (`kernel[grid](..., num_warps=4)`).
# For pyright everything of it is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
