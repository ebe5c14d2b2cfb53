"""The capacity report of the page: so many users who ask, read and ask again, at the context that was chosen.

It is `qwen-plan report` itself, in a process of its own: a simulation takes seconds, and can be ended when it takes too
many. The page has no room for a workload of one's own; the file that it asks with is there to be taken and changed.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from anyio import fail_after, run_process

from ..planner.offers import price_list
from ..planner.request import Request
from ..profiles.errors import BadInput, Unsupported
from .phrases import counted

PLAIN = Request()
FIXED = (  # of the question, under the names that the file has for them
    *("engine", "weights", "kv_dtype", "state_dtype", "mtp"),
    *("tp", "pp", "dp", "ep", "nodes", "interconnect"),
)
MAX_USERS = 64
THINK_S = 30
IMAGE_TOKENS, IMAGE_SHARE = 768, 0.1  # one of 1024 x 768 with every tenth prompt
LIMIT_S = 120.0
SAYS, BUG = "qwen-plan: ", "a bug in qwenfit"
COMMAND = (sys.executable, "-m", "qwenfit.cli.plan", "report", "workload.yaml", "--output")


def workload(request: Request) -> str:
    """The file for `qwen-plan report`: prompts around a twelfth of what the context leaves for them, a few four times
    as long; where images were asked for, one with every tenth; answers of up to a thousand tokens; half a minute of
    reading. Raises BadInput where no report can be."""
    from yaml import safe_dump

    if request.seqs > MAX_USERS:
        raise BadInput(f"{request.seqs:,} users: the page simulates at most {MAX_USERS}; `qwen-plan report` more")
    if request.ctx_tokens < 16:
        raise BadInput(f"a context of {request.ctx_tokens} tokens has no room for a prompt and an answer")
    image_tokens = min(IMAGE_TOKENS, request.ctx_tokens // 4) if request.vision else 0
    longest = (request.ctx_tokens - image_tokens) * 3 // 4
    median = max(1, min(longest // 12, 4096))
    names = list(dict.fromkeys(request.devices))
    asked = {name: getattr(request, name) for name in FIXED if getattr(request, name) != getattr(PLAIN, name)}
    keys = {
        "title": f"{request.model} for {counted(request.seqs, 'user')}",
        "model": request.model,
        **asked,
        "ctx_tokens": request.ctx_tokens,
        "deployment": {
            "devices": ",".join(f"{request.devices.count(name)}x{name}" for name in names),
            "replicas": 1,
        },
        "workload": {
            "users": request.seqs,
            "think_s": THINK_S,
            "prompt_tokens": {"median_tokens": median, "p95_tokens": 4 * median, "max_tokens": longest},
            "output_tokens": {"min_tokens": 1, "max_tokens": min(request.ctx_tokens - image_tokens - longest, 1024)},
            **({"images": {"size": image_tokens, "share": IMAGE_SHARE}} if image_tokens else {}),
        },
        "money": {"device_price_usd": {one.device.name: one.usd for one in price_list() if one.device.name in names}},
    }
    return safe_dump(keys, sort_keys=False)


async def report(request: Request, kind: str) -> str:
    """The report as html, md or json. Raises BadInput with the command's sentence, Unsupported after two minutes."""
    asked = workload(request)
    with TemporaryDirectory() as folder:
        (Path(folder) / "workload.yaml").write_text(asked, encoding="utf-8")
        try:
            with fail_after(LIMIT_S):
                done = await run_process((*COMMAND, f"report.{kind}"), cwd=folder, check=False)
        except TimeoutError:
            raise Unsupported(
                f"the simulation took more than {LIMIT_S:.0f} s: take the workload as a file, and `qwen-plan report` it"
            ) from None
        if done.returncode not in (0, 1):
            raise _refused(done.stderr.decode(errors="replace"))
        return (Path(folder) / f"report.{kind}").read_text(encoding="utf-8")


def _refused(said: str) -> Exception:
    """The command's sentence, where it is one about the question; what else it said is for the server's log."""
    last = said.strip().rpartition("\n")[2]
    if not last.startswith(SAYS) or BUG in last:
        return RuntimeError(said)
    return BadInput(last.removeprefix(SAYS))


def has_html() -> bool:
    """Whether the charts of the HTML report can be drawn here."""
    return find_spec("matplotlib") is not None
