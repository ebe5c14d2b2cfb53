"""A plan's launch line taken apart: words for every box, the environment, where the weights are, how long they load."""

import os
import re
import shlex
from collections.abc import Callable, Mapping

from ...profiles.formats import checkpoint_bytes
from ...profiles.frozen import dataclass
from ..plan import EnginePlan

MODEL_FLAGS = {"sglang": "--model-path", "llama.cpp": "-m"}
START_S = 600  # from the weights in memory to the first answer: compilation and captured graphs; an estimate
ADDRESS = re.compile(r"<(HEAD_NODE_IP|NODE_\d{1,3}_IP)>")  # as `node_address` writes them
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
    def calls_boxes(self) -> bool:
        """llama.cpp: the first box calls the others, which wait and get their share of the weights from it. Boxes of
        other engines read their own, and call the first."""
        return len(self.boxes) > 1 and self.plan.engine == "llama.cpp"

    def shares_network(self, node: int) -> bool:
        """Whether a box's engine is on the network of its host, where the other boxes reach it."""
        return len(self.boxes) > 1 and (node > 0 or not self.calls_boxes)

    @property
    def folder(self) -> str | None:
        """The folder of an absolute path, which has to be at the same place in a container."""
        if not os.path.isabs(self.model):
            return None
        return os.path.dirname(self.model) if self.model.lower().endswith(".gguf") else self.model

    def startup_s(self, disk_bytes_per_s: float, download_bytes_per_s: float) -> int:
        """Until the first answer: weights from the hub where they lie there, then from the disk, to boxes that have
        none, and the rest."""
        seconds = START_S + self.weights_bytes / disk_bytes_per_s
        link = self.plan.setup.interconnect
        if self.calls_boxes and link:
            seconds += self.weights_bytes / link.bytes_per_s
        return int(seconds + (0 if self.local else self.weights_bytes / download_bytes_per_s))


def launch(plan: EnginePlan) -> Launch:
    told = plan.detail.get("node_commands")
    lines = [str(line) for line in told] if isinstance(told, list) else [plan.command]
    boxes, environment = [], {}
    for line in lines:
        words = shlex.split(line)
        first = next(place for place, word in enumerate(words) if "=" not in word.partition("/")[0])
        environment = dict(word.split("=", 1) for word in words[:first])
        boxes.append(tuple(words[first:]))
    model = _model(plan.engine, boxes[0])
    local = plan.setup.model.path is not None or model.startswith(("./", "/")) or model.lower().endswith(".gguf")
    size = checkpoint_bytes(plan.setup.model, plan.setup.weights)
    return Launch(plan, environment, tuple(boxes), model, local, size)


def _model(engine: str, words: tuple[str, ...]) -> str:
    flag = MODEL_FLAGS.get(engine)
    return words[words.index(flag) + 1] if flag else words[2]


def placed(word: str, address: Callable[[str], str]) -> str:
    """The word with addresses in place of their place holders: `address` of a variable's name, HEAD_NODE_IP."""
    return ADDRESS.sub(lambda found: address(found[1]), word)
