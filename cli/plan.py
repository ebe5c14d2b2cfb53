"""`qwen-plan`: does it fit, and how is it launched. 0 it fits, 1 it does not, 2 no answer."""

import os
import sys
from collections.abc import Sequence

from ..planner.plan import Plan
from ..profiles.errors import QwenfitError
from .options import Asked, Values, asked, read
from .output import clean, quietly_closed, say, screen, write

COMPLETION = "_QWEN_PLAN_COMPLETE"  # set by the shell when it asks what could stand at the cursor


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status. Whatever goes wrong is one sentence on stderr; QWENFIT_DEBUG=1 adds the traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        values = None if COMPLETION in os.environ else read(given)
        if values is not None:
            return answer(values)
        from .app import run

        return run(given, answer)
    except QwenfitError as error:
        return _failed(str(error), given)
    except BrokenPipeError:
        quietly_closed()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        bug = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _failed(f"{bug} (a bug in qwenfit: QWENFIT_DEBUG=1 shows where; please report it)", given)


def answer(values: Values) -> int:
    """Plan what was asked for, and show it."""
    from ..planner import plan

    question = asked(values)
    found = plan(question.request)
    status = 0 if found.fits else 1
    try:
        write(_rendered(found, question))
    except BrokenPipeError:
        quietly_closed()
    return status


def _rendered(plan: Plan, question: Asked) -> str:
    if question.format == "json":
        from json import dumps

        for note in question.notes:
            say(f"qwen-plan: {note}")
        return dumps(plan.to_json(), indent=2, allow_nan=False) + "\n"
    if question.format == "markdown":
        from .markdown import markdown

        return markdown(plan, question.notes)
    if question.format == "github":
        from .github import github

        return github(plan, question.notes)
    from .table import table

    return table(plan, screen(sys.stdout), question.notes)


def _failed(message: str, arguments: Sequence[str]) -> int:
    if os.environ.get("QWENFIT_DEBUG") == "1":
        from traceback import print_exc

        print_exc()
    if "github" in arguments or "--format=github" in arguments:
        from .github import annotation, place

        say(annotation("error", message, "qwen-plan", *place(message)))
    else:
        say(f"qwen-plan: {clean(message)}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
