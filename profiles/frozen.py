"""`dataclass(frozen=True)` as this house uses it, made four times as fast: for what a plain `qwen-plan` imports.

The standard module costs 10 ms to import (inspect, ast, tokenize) and 0.6 ms per class, most of it in compiling methods
one by one. With forty classes that is a third of the time that a whole answer may take. Here one function is compiled
per class, `__init__`, and the rest is shared. Same decorator, same names: frozen, slots, eq, repr, `fields`, `replace`,
`field(default_factory=...)`; no inheritance, nothing mutable. `dataclasses.replace` takes these values too.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


class Field:
    """One field of a value. The names are those that `dataclasses` looks for."""

    __slots__ = ("_field_type", "default", "default_factory", "init", "name", "repr")

    def __init__(self, default: Any = ..., default_factory: Any = ..., repr: bool = True) -> None:
        self.name, self.repr = "", repr
        self.default, self.default_factory = default, default_factory
        self.init, self._field_type = True, None


def field(*, default_factory: Callable[[], T], repr: bool = True) -> T:
    """A field whose default is made anew for every value."""
    return Field(default_factory=default_factory, repr=repr)  # type: ignore[return-value]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(*, frozen: bool, slots: bool = False, eq: bool = True, repr: bool = True) -> Callable[[type[T]], type[T]]:
    """Values that do not change. `eq=False`: compared by identity. Without `slots`, `cached_property` works."""
    assert frozen, "mutable values are no values"

    def decorate(cls: type[T]) -> type[T]:
        body = dict(vars(cls))
        named = {name: _field(name, body.get(name, ...)) for name in getattr(cls, "__annotations__", {})}
        body["__dataclass_fields__"] = named
        body["__match_args__"] = tuple(named)
        body["__setattr__"], body["__delattr__"] = _refuse_change, _refuse_change
        if eq:
            body["_values"] = staticmethod(attrgetter(*named))
            body["__eq__"], body["__hash__"] = _equal, _hash
        if repr:
            body.setdefault("__repr__", _repr)
        for name in ("__dict__", "__weakref__"):
            body.pop(name, None)
        if slots:
            body["__slots__"] = tuple(named)
            body["__reduce__"] = _reduce
        for name, one in named.items():
            if slots or one.default_factory is not ...:
                body.pop(name, None)
        made = type(cls)(cls.__name__, cls.__bases__, body)
        made.__init__ = _init(made, named, slots)  # type: ignore[misc]
        return made

    return decorate


def fields(value: Any) -> tuple[Field, ...]:
    return tuple(value.__dataclass_fields__.values())


def replace(value: T, **changes: Any) -> T:
    """The same value with some fields changed."""
    for name in value.__dataclass_fields__:  # type: ignore[attr-defined]
        if name not in changes:
            changes[name] = getattr(value, name)
    return type(value)(**changes)


def _field(name: str, default: Any) -> Field:
    made = default if isinstance(default, Field) else Field(default)
    made.name = name
    return made


def _init(cls: type, named: dict[str, Field], slots: bool) -> Callable[..., None]:
    """`__init__` with real parameters. It sets slots through their descriptors and other fields in `__dict__`."""
    names: dict[str, Any] = {"_MADE": object()}
    parameters, lines = ["self"], [] if slots else ["_own = self.__dict__"]
    for name, one in named.items():
        value = name
        if one.default_factory is not ...:
            names[f"_make_{name}"] = one.default_factory
            parameters.append(f"{name}=_MADE")
            value = f"_make_{name}() if {name} is _MADE else {name}"
        elif one.default is not ...:
            names[f"_default_{name}"] = one.default
            parameters.append(f"{name}=_default_{name}")
        else:
            parameters.append(name)
        if slots:
            names[f"_set_{name}"] = vars(cls)[name].__set__
            lines.append(f"_set_{name}(self, {value})")
        else:
            lines.append(f"_own['{name}'] = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    source = f"def __init__({', '.join(parameters)}):\n    " + "\n    ".join(lines or ["pass"])
    exec(source, names)
    names["__init__"].__qualname__ = f"{cls.__qualname__}.__init__"
    return names["__init__"]


def _refuse_change(self: Any, name: str, *_value: object) -> None:
    raise AttributeError(f"{type(self).__name__} values do not change: cannot set {name}; use replace()")


def _equal(self: Any, other: Any) -> bool:
    if other.__class__ is not self.__class__:
        return NotImplemented
    return self._values(self) == self._values(other)


def _hash(self: Any) -> int:
    return hash(self._values(self))


def _repr(self: Any) -> str:
    told = ", ".join(f"{name}={getattr(self, name)!r}" for name, one in self.__dataclass_fields__.items() if one.repr)
    return f"{type(self).__qualname__}({told})"


def _reduce(self: Any) -> tuple[type, tuple[object, ...]]:
    return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)
