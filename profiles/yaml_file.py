"""YAML from files that somebody else wrote: bounded, plain, checked by a pydantic model, every complaint with its line.

`read_yaml` gives a `Document`: plain values, and the line on which each key and list entry stands. `checked` validates
it; the first thing that is wrong becomes one sentence with file and line.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from .errors import BadInput
from .json_file import short
from .names import did_you_mean

LIMIT_BYTES = 128 << 10  # PyYAML reads about 100 KB a second
LIMIT_BRACKETS = 5000  # and takes seconds for thousands of open ones
LIMIT_OPEN = 50
Path = tuple[str | int, ...]
T = TypeVar("T", bound=BaseModel)


class PlainLoader(yaml.SafeLoader):
    """YAML without what confuses or attacks: aliases (a bomb of nine lines), duplicate keys, types of YAML 1.1."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"the key {short(key.value)} occurs twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# As in the core schema of YAML 1.2: `on`, `no`, 1:30, 012 and 2026-11-22 are text.
PlainLoader.yaml_implicit_resolvers = {}
for _type, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_pattern})$"), _first)


class Document(NamedTuple):
    """A YAML file: its values, the line of every key and entry by its path, and the name to call it by."""

    values: dict[str, Any]
    lines: Mapping[Path, int]
    where: str

    def line(self, path: Path) -> int:
        """The line of `path`, or of the nearest thing above it that has one."""
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, 1)

    def error(self, path: Path, sentence: str) -> BadInput:
        return BadInput(f"{self.where}, line {self.line(path)}: {sentence}")

    def checked(self, kind: type[T]) -> T:
        """The values as a `kind`. BadInput, with file and line, for the first that is wrong."""
        try:
            return kind.model_validate(self.values)
        except ValidationError as error:
            found = cast("list[dict[str, Any]]", error.errors(include_url=False))
            # A misspelt key is also a missing one: the misspelling is what to tell.
            first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
            path = tuple(part for part in first["loc"] if part != "[key]")
            raise self.error(self._known(path), _sentence(self._known(path), first, kind)) from None

    def _known(self, path: Path) -> Path:
        """The path without what pydantic adds to it (the branch of a union)."""
        kept: Path = ()
        for part in path:
            if (*kept, part) in self.lines or part == path[-1]:
                kept = (*kept, part)
        return kept


def read_yaml(path: str, limit_bytes: int = LIMIT_BYTES) -> Document:
    """The mapping in a YAML file. BadInput, naming file and line, for anything else; 10 MB are refused unread."""
    where = path[:300] if path.isprintable() else ascii(path[:300])
    data = _bytes(path, where, limit_bytes)
    loader = None
    try:
        loader = PlainLoader(data.decode("utf-8-sig"))
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else None
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not a text file (byte {error.start} is not UTF-8)") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(str(error.problem).split())[:200]
        raise BadInput(f"{where}, line {line}: not YAML that qwenfit reads: {problem}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: not a text file: {' '.join(str(error).split())[:100]}") from None
    except RecursionError:
        raise BadInput(f"{where}: nested too deeply to be read") from None
    except (ValueError, OverflowError):
        raise BadInput(f"{where}: holds a number that cannot be read") from None
    finally:
        if loader:
            loader.dispose()
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        what = "is empty" if values is None else f"holds {short(values)}"
        raise BadInput(f"{where} {what}: it needs `key: value` lines")
    lines: dict[Path, int] = {}
    _note_lines(node, (), lines)
    return Document(values, lines, where)


def _bytes(path: str, where: str, limit_bytes: int) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for a writer, and a device never ends
            raise BadInput(f"{where} is not a regular file: give a YAML file")
        if status.st_size > limit_bytes:
            raise BadInput(f"{where} has {status.st_size:,} bytes, more than the {limit_bytes:,} that qwenfit reads")
        with open(path, "rb") as file:
            data = file.read(limit_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a valid path"
        raise BadInput(f"{where} cannot be read: {reason}") from None
    opened = data.count(b"[") + data.count(b"{")
    if opened - data.count(b"]") - data.count(b"}") > LIMIT_OPEN or opened > LIMIT_BRACKETS:
        raise BadInput(f"{where} has {opened} brackets, more than qwenfit reads, or leaves them open")
    return data


def _note_lines(node: yaml.Node | None, path: Path, lines: dict[Path, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*path, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            lines[(*path, place)] = value.start_mark.line + 1
            _note_lines(value, (*path, place), lines)


def _sentence(path: Path, first: dict[str, Any], kind: type[BaseModel]) -> str:
    """What is wrong, in our words."""
    field = ".".join(str(part) for part in path) or "the file"
    problem, value, context = first["type"], first.get("input"), first.get("ctx", {})
    if problem == "sentence":
        return f"{field}: {context['says']}" if path else str(context["says"])
    if problem == "missing":
        return f"{field} is missing"
    if problem == "extra_forbidden":
        hint = did_you_mean(str(path[-1]), _keys(kind, path[:-1]), 1) or "it is not a key here; "
        return f"unknown key {short(path[-1])}: {hint}there are {', '.join(_keys(kind, path[:-1]))}"
    if problem in ("int_type", "int_from_float", "int_parsing"):
        return f"{field} must be a whole number, not {short(value)}"
    if problem in ("float_type", "float_parsing", "finite_number"):
        return f"{field} must be a finite number, not {short(value)}"
    for bound, words in (("gt", "more than"), ("ge", "at least"), ("le", "at most"), ("lt", "less than")):
        if bound in context:
            return f"{field} is {short(value)}, and must be {words} {context[bound]}"
    if problem == "literal_error":
        return f"{field} must be {context['expected'].replace(chr(39), '')}, not {short(value)}"
    if problem in ("dict_type", "model_type"):
        return f"{field} must be `key: value` pairs, not {short(value)}"
    if problem == "too_short":
        return f"{field} is empty"
    wanted = {"string_type": "text", "bool_type": "true or false", "list_type": "a list"}.get(problem)
    if wanted:
        return f"{field} must be {wanted}, not {short(value)}"
    return f"{field} cannot be {short(value)}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _keys(kind: type[BaseModel], path: Path) -> list[str]:
    """The keys that the model at `path` below `kind` knows."""
    for part in path:
        if isinstance(part, int) or part not in kind.model_fields:
            continue
        inner = next(_models(kind.model_fields[part].annotation), None)
        kind = inner or kind
    return [one.alias or name for name, one in kind.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)
