"""Spellings that are one name, and what is near to a wrong one."""

import pytest

from qwenfit.profiles.names import did_you_mean, fold, join_or, nearest, quote

KNOWN = ["rtx3060", "rtx3060ti", "rtx3070", "a100-40gb", "a100-80gb", "jetson-orin-nano-8gb"]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("NVIDIA GeForce RTX 3060", "rtx3060"),
        ("rtx_3060", "rtx3060"),
        ("GeForce(R) RTX(TM) 3060", "rtx3060"),
        ("geforcertx3060", "rtx3060"),
        ("A100 80G", "a100-80gb"),
        ("a100-80GiB", "a100-80gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("Apple M2 Max 96 GB", "m2-max-96gb"),
        ("RTX 4060 Laptop GPU", "rtx4060-laptop"),
    ],
)
def test_spellings_of_one_name_fold_alike(typed: str, name: str) -> None:
    assert fold(typed) == fold(name)


@pytest.mark.parametrize(("one", "other"), [("rtx3060", "rtx3060ti"), ("m1-8gb", "m1-pro-8gb"), ("a100", "a100-80g")])
def test_different_names_stay_different(one: str, other: str) -> None:
    assert fold(one) != fold(other)


def test_fillers_alone_are_kept() -> None:
    assert fold("nvidia") == "nvidia"


def test_nearest_names_come_with_the_most_similar_first() -> None:
    assert nearest("rtx3061", KNOWN) == ["rtx3060", "rtx3060ti", "rtx3070"]


def test_a_part_of_a_name_finds_it() -> None:
    assert nearest("orin", KNOWN) == ["jetson-orin-nano-8gb"]
    assert nearest("zz", KNOWN) == []


def test_did_you_mean_is_a_clause_or_nothing() -> None:
    assert did_you_mean("a100-80bg", ["a100-40gb", "a100-80gb"]) == "did you mean a100-80gb or a100-40gb? "
    assert did_you_mean("", KNOWN) == ""


def test_lists_read_as_sentences() -> None:
    assert [join_or(list(names)) for names in ("a", "ab", "abc")] == ["a", "a or b", "a, b or c"]


def test_quoted_names_fit_on_one_line() -> None:
    assert quote("a\nb\x1b[31m") == "'a\\nb\\x1b[31m'"
    assert len(quote("x" * 10**6)) <= 81
