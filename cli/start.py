"""Where the installed command begins: as little as possible before the answer, and nothing after it."""

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn


def qwen_plan() -> NoReturn:
    """A process that lives for a tenth of a second collects no garbage and takes nothing apart before it exits."""
    gc.disable()
    try:
        from .plan import main
    except Exception as error:  # uncaught it would leave with 1, which means "does not fit"
        if os.environ.get("QWENFIT_DEBUG") == "1":
            raise
        sys.exit(_broken(error))
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads it: main has said so
            stream.flush()
    os._exit(status)


def _broken(error: Exception) -> int:
    sys.stderr.write(
        f"qwen-plan: this installation is broken ({type(error).__name__}: {error}): install qwenfit again\n"
    )
    return 2
