"""JSON that somebody else wrote is read whole or refused in one sentence."""

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.profiles.errors import BadInput
from qwenfit.profiles.json_file import parse_json_object, read_json_object, short

HOSTILE = {
    "empty": b"",
    "cut short": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[1]",
    "a number": b"7",
    "lists nested 10,000 deep": b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "lists nested 100 deep": b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
    "objects nested 10,000 deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "a million brackets": b"[" * 1_000_000,
    "objects nested 100 deep": b'{"a":' * 100 + b"1" + b"}" * 100,
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a key twice": b'{"a": 1, "a": 2}',
    "a key twice, deep": b'{"a": [{"b": 1, "b": 1}]}',
    "a number of 5,000 digits": b'{"a": 1' + b"0" * 5_000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_one_sentence(tmp_path, name):
    path = tmp_path / "config.json"
    path.write_bytes(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(BadInput, match=r"config\.json") as caught:
        read_json_object(str(path))
    assert time.process_time() - start < 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "kind"), [(b"null", "null"), (b"[]", "list"), (b'"a"', "string"), (b"true", "boolean"), (b"1.5", "number")]
)
def test_what_is_no_object_is_called_as_json_calls_it(data, kind):
    with pytest.raises(BadInput, match=f"^x holds a JSON {kind}, not an object$"):
        parse_json_object(data, "x")


def test_huge_files_are_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    with pytest.raises(BadInput, match="67108864 bytes, more than"):
        read_json_object(str(path))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_json_object(str(tmp_path / "config.json"))
    with pytest.raises(BadInput, match="not a regular file"):
        read_json_object(str(tmp_path))


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())))
def test_good_objects_come_back(value):
    assert parse_json_object(json.dumps(value).encode(), "x") == value


@given(st.binary(max_size=300))
def test_any_bytes_are_an_object_or_refused(data):
    with contextlib.suppress(BadInput):
        assert isinstance(parse_json_object(data, "x"), dict)


@given(st.recursive(st.none() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=50))
def test_short_values_fit_into_a_sentence(value):
    text = short(value)
    assert len(text) <= 60 and text.isprintable()


def test_short_numbers():
    assert short(10**5_000) == short(-(10**5_000)) == "a number of more than 60 digits"
    assert (short(-1), short(True), short("a\nb"), short({})) == ("-1", "True", "'a\\nb'", "an object of 0 fields")
