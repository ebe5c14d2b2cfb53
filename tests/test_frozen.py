"""Frozen values behave as `dataclasses.dataclass(frozen=True)` makes them, which is asked side by side."""

import copy
import dataclasses
import pickle
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pytest

from qwenfit.profiles import frozen


@frozen.dataclass(frozen=True, slots=True)
class Point:
    """A point."""

    x: int
    y: int = 2
    tags: Mapping[str, int] = frozen.field(default_factory=dict)
    hidden: list[int] = frozen.field(default_factory=list, repr=False)

    @property
    def total(self) -> int:
        return self.x + self.y


@dataclasses.dataclass(frozen=True, slots=True)
class StandardPoint:
    x: int
    y: int = 2
    tags: Mapping[str, int] = dataclasses.field(default_factory=dict)
    hidden: list[int] = dataclasses.field(default_factory=list, repr=False)


@frozen.dataclass(frozen=True, eq=False)
class Box:
    width: int
    depth: int = 1

    @cached_property
    def area(self) -> int:
        return self.width * self.depth

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError("negative")


@frozen.dataclass(frozen=True, slots=True)
class One:
    only: int


@pytest.mark.parametrize("arguments", [((1,), {}), ((1, 3), {}), ((1,), {"tags": {"a": 1}}), ((), {"x": 1, "y": 4})])
def test_as_the_standard_ones(arguments: Any) -> None:
    given, named = arguments
    ours, theirs = Point(*given, **named), StandardPoint(*given, **named)
    assert (ours.x, ours.y, ours.tags) == (theirs.x, theirs.y, theirs.tags)
    assert repr(ours) == repr(theirs).replace("Standard", "")
    assert ours == Point(*given, **named) and ours != theirs and ours != Point(99)
    assert [one.name for one in frozen.fields(ours)] == [one.name for one in dataclasses.fields(theirs)]
    assert Point.__match_args__ == StandardPoint.__match_args__


@pytest.mark.parametrize("arguments", [((), {}), ((1, 2, {}, [], 4), {}), ((1,), {"z": 1}), ((1,), {"x": 1})])
def test_wrong_arguments_are_refused(arguments: Any) -> None:
    given, named = arguments
    for kind in (Point, StandardPoint):
        with pytest.raises(TypeError):
            kind(*given, **named)


def test_they_do_not_change() -> None:
    for value in (Point(1), Box(1)):
        name = next(iter(value.__dataclass_fields__))  # type: ignore[attr-defined]
        with pytest.raises(AttributeError):
            setattr(value, name, 5)
        with pytest.raises(AttributeError):
            value.other = 5  # type: ignore[union-attr]
        with pytest.raises(AttributeError):
            delattr(value, name)


def test_defaults_are_not_shared() -> None:
    assert Point(1).tags is not Point(1).tags


def test_equal_values_have_equal_hashes() -> None:
    assert hash(One(3)) == hash(One(3)) and One(3) != One(4) and {One(3): "a"}[One(3)] == "a"
    assert Box(1) != Box(1) and len({Box(1), Box(1)}) == 2, "eq=False compares by identity"


def test_cached_properties_and_post_init() -> None:
    box = Box(3, 4)
    assert box.area == 12 and vars(box) == {"width": 3, "depth": 4, "area": 12}
    with pytest.raises(ValueError, match="negative"):
        Box(-1)


@pytest.mark.parametrize("replace", [frozen.replace, dataclasses.replace])
def test_replace(replace: Any) -> None:
    point = Point(1, tags={"a": 1})
    assert replace(point, y=9) == Point(1, 9, {"a": 1})
    assert replace(Box(1), depth=5).depth == 5
    with pytest.raises(TypeError):
        replace(point, z=1)


def test_copies() -> None:
    point = Point(1, 5, {"a": 1})
    assert copy.deepcopy(point) == point == pickle.loads(pickle.dumps(point))
    assert not hasattr(point, "__dict__")
    assert copy.copy(Box(2, 3)).area == 6
    assert point.total == 6 and Point.__doc__ == "A point."
