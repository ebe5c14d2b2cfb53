"""A plan's launch line taken apart: words for every box, the environment, where the weights are, how long they load."""

import os
import shlex
from collections.abc import Mapping

from ...profiles.errors import Unsupported
from ...profiles.formats import checkpoint_bytes
from ...profiles.frozen import dataclass
from ..engines.launch import HEAD_ADDRESS
from ..plan import EnginePlan

MODEL_FLAGS = {"sglang": "--model-path", "llama.cpp": "-m"}
START_S = 600  # from the weights in memory to the first answer: compilation and captured graphs; an estimate
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


@dataclass(frozen=True, slots=True)
class Launch:
    """What runs, box by box."""

    plan: EnginePlan
    environment: Mapping[str, str]  # what stands before the line
    boxes: tuple[tuple[str, ...], ...]  # words of each box; addresses as place holders
    model: str  # as the line names it: what clients ask for
    local: bool  # a file or folder here, and no repository of the hub
    weights_bytes: int  # of the whole checkpoint

    @property
    def name(self) -> str:
        """A DNS label."""
        letters = (c if c in NAME_CHARACTERS else "-" for c in self.plan.setup.model.name.lower())
        return "".join(letters).strip("-")[:40].strip("-") or "model"

    @property
    def vendor(self) -> str:
        return self.plan.setup.devices[0].vendor

    @property
    def box_devices(self) -> int:
        """Accelerators in a box, 0 on a CPU."""
        return 0 if self.vendor == "cpu" else self.plan.setup.box_ranks

    @property
    def folder(self) -> str | None:
        """The folder of an absolute path, which has to be at the same place in a container."""
        if not os.path.isabs(self.model):
            return None
        return os.path.dirname(self.model) if self.model.endswith(".gguf") else self.model

    def startup_s(self, disk_bytes_per_s: float, download_bytes_per_s: float) -> int:
        """Until the first answer: weights from the hub where they lie there, then from the disk, and the rest."""
        seconds = START_S + self.weights_bytes / disk_bytes_per_s
        return int(seconds + (0 if self.local else self.weights_bytes / download_bytes_per_s))


def launch(plan: EnginePlan) -> Launch:
    """Unsupported where several boxes need addresses that no file here can know."""
    told = plan.detail.get("node_commands")
    lines = [str(line) for line in told] if isinstance(told, list) else [plan.command]
    if len(lines) > 1 and plan.engine == "llama.cpp":
        raise Unsupported(
            "llama.cpp over several boxes starts by hand: its RPC servers check nobody, and the first box must know "
            "their addresses; plan with --engine vllm or sglang"
        )
    boxes, environment = [], {}
    for line in lines:
        words = shlex.split(line)
        first = next(place for place, word in enumerate(words) if "=" not in word.partition("/")[0])
        environment = dict(word.split("=", 1) for word in words[:first])
        boxes.append(tuple(words[first:]))
    model = _model(plan.engine, boxes[0])
    local = plan.setup.model.path is not None or model.startswith(("./", "/")) or model.endswith(".gguf")
    size = checkpoint_bytes(plan.setup.model, plan.setup.weights)
    return Launch(plan, environment, tuple(boxes), model, local, size)


def _model(engine: str, words: tuple[str, ...]) -> str:
    flag = MODEL_FLAGS.get(engine)
    return words[words.index(flag) + 1] if flag else words[2]


def placed(words: tuple[str, ...], address: str) -> list[str]:
    """The words with the first box's address in place of its place holder."""
    return [word.replace(HEAD_ADDRESS, address) for word in words]
