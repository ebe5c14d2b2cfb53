"""How each engine is started for a verification: the planned launch line, on a port of this machine's loopback.

Of the line nothing changes but the program's place, the checkpoint (where one is given) and the address. `RULES` holds
what differs by engine: which word names the model, how it is told its address, when it is ready. Read in llama.cpp
b11434 (common/arg.cpp), vLLM 0.32 (entrypoints/openai/cli_args.py), SGLang 0.5 (server_args.py), Ollama 0.31
(envconfig/config.go).
"""

import os
import shlex
import shutil
import socket
from collections.abc import Mapping, Sequence

from ...profiles.errors import BadInput, Unsupported
from ...profiles.frozen import dataclass, field, replace
from ..plan import EnginePlan

LOOPBACK = "127.0.0.1"
WHERE = "docs/verify.md says how it is installed"


@dataclass(frozen=True, slots=True)
class Rule:
    """One engine. `model_after`: the word behind which its line names the checkpoint."""

    model_after: str
    address_words: tuple[str, ...] = ("--host", "{host}", "--port", "{port}")
    address_variables: Mapping[str, str] = field(default_factory=dict)
    log_words: tuple[str, ...] = ()
    ready_path: str = "/health"
    speaks: str = "tokens"  # or words
    checkpoint: str = "folder"  # what it loads: a folder, a file (.gguf), or neither (a name of its own store)
    by_python: tuple[str, ...] = ()  # the same server where --binary is an interpreter; the model stands behind these


RULES: Mapping[str, Rule] = {
    # Builds of 2026 name their buffers only from verbosity 4 on.
    "llama.cpp": Rule("-m", log_words=("-lv", "4", "--no-webui"), checkpoint="file"),
    # The script of vLLM's CPU packages looks for a package called vllm, which they are not; the module does not.
    "vllm": Rule("serve", by_python=("-m", "vllm.entrypoints.openai.api_server", "--model")),
    "sglang": Rule("--model-path"),
    "ollama": Rule(
        "run",
        address_words=(),
        address_variables={"OLLAMA_HOST": "{host}:{port}"},
        ready_path="/api/version",
        speaks="words",
        checkpoint="name",
    ),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """What is started, and where it will answer."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    model: str  # as the line names it

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"


def rule(engine: str) -> Rule:
    if engine not in RULES:
        raise Unsupported(
            f"{engine} is no server that is started here: plans for {', '.join(RULES)} are verified in the engine, "
            "plans for native without --engine"
        )
    return RULES[engine]


def launch(plan: EnginePlan, checkpoint: str | None, binary: str | None, port: int | None) -> Launch:
    """The plan's launch line for this machine. BadInput where the program or the checkpoint is missing, or the port is
    taken."""
    own = rule(plan.engine)
    environment, words = _split(plan.command)
    words[0] = _program(binary or words[0], plan.engine)
    if own.by_python and os.path.basename(words[0]).startswith("python"):
        words = [words[0], *own.by_python, *words[words.index(own.model_after) + 1 :]]
        own = replace(own, model_after=own.by_python[-1])
    place = words.index(own.model_after) + 1 if own.model_after in words else -1
    if own.checkpoint == "name":
        return _named(plan, own, environment, words, checkpoint, port)
    if place <= 0 or place >= len(words):
        raise Unsupported(f"the launch line names no model behind {own.model_after}: {plan.command[:200]}")
    words[place] = _checkpoint(checkpoint or words[place], own, plan.engine)
    free = _port(port)
    words += [word.format(host=LOOPBACK, port=free) for word in own.address_words]
    return Launch((*words, *own.log_words), environment, free, words[place])


def _named(
    plan: EnginePlan, own: Rule, environment: dict[str, str], words: list[str], checkpoint: str | None, port: int | None
) -> Launch:
    """Ollama: the server's words end at the `&`; the model is a name in its own store."""
    server = words[: words.index("&")] if "&" in words else words
    free = _port(port)
    environment |= {name: value.format(host=LOOPBACK, port=free) for name, value in own.address_variables.items()}
    return Launch(tuple(server), environment, free, checkpoint or words[-1])


def _split(command: str) -> tuple[dict[str, str], list[str]]:
    """NAME=value words in front are the environment."""
    words = shlex.split(command)
    environment: dict[str, str] = {}
    while words and "=" in words[0] and words[0].partition("=")[0].replace("_", "").isalnum():
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if not words:
        raise BadInput("the plan's launch line is empty")
    return environment, words


def _program(name: str, engine: str) -> str:
    found = shutil.which(os.path.expanduser(name))
    if found is None:
        raise BadInput(f"{name} is not on the PATH: give --binary PATH of {engine}'s program ({WHERE})")
    return os.path.abspath(found)


def _checkpoint(path: str, own: Rule, engine: str) -> str:
    path = os.path.expanduser(path)
    exists = os.path.isfile(path) if own.checkpoint == "file" else os.path.isdir(path)
    if exists:
        return os.path.abspath(path)
    if os.path.exists(path):
        raise BadInput(f"{path}: {engine} loads a {'.gguf file' if own.checkpoint == 'file' else 'folder'}")
    if own.checkpoint == "folder" and not path.startswith((".", "/")) and path.count("/") == 1:
        return path  # a repository: the engine finds it in its cache, or on the hub
    raise BadInput(f"there is no {path} here: give --checkpoint, or make it with qwen-quant")


def _port(asked: int | None) -> int:
    """A port that is free now: the one asked for, or any."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, asked or 0))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no port"
            raise BadInput(f"port {asked} cannot be used: {reason}; give another --port, or none") from None
        return int(probe.getsockname()[1])


def words_of(launch_line: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """For a file that others read: the program without its folder, the checkpoint by its name."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    return " ".join([*variables, shlex.join(map(_shown, launch_line))])


def _shown(word: str) -> str:
    """A word that is a path of this machine, whole or behind `--option=`, by its last part."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if os.path.isabs(value) or value.startswith(("~", "./", "../")) or (os.sep in value and os.path.exists(value)):
        value = os.path.basename(os.path.normpath(value))
    return f"{option}{equals}{value}"
