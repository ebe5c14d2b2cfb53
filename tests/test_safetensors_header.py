"""The header reader agrees with the safetensors library on good files, and refuses whatever the library refuses."""

import json
import os
import time

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from qwenfit.profiles.errors import BadInput
from qwenfit.profiles.safetensors_header import read_safetensors_header


def _file(folder, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return str(path)


def _entry(dtype: object = "F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path):
    path = str(tmp_path / "a.safetensors")
    arrays = {
        "b.weight": numpy.zeros((3, 5), numpy.float16),
        "a.qweight": numpy.zeros((4, 2), numpy.int32),
        "scalar": numpy.zeros((), numpy.float32),
        "empty": numpy.zeros((0, 7), numpy.float32),
        "flags": numpy.zeros((9,), numpy.bool_),
        "shape": numpy.zeros((2,), numpy.int64),
        "codes": numpy.zeros((3, 3), numpy.uint8),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    header = read_safetensors_header(path)
    found = {tensor.name: (tensor.dtype, tensor.shape, tensor.end - tensor.begin) for tensor in header.tensors}
    words = {"float16": "F16", "int32": "I32", "float32": "F32", "bool": "BOOL", "int64": "I64", "uint8": "U8"}
    assert found == {name: (words[str(array.dtype)], array.shape, array.nbytes) for name, array in arrays.items()}
    assert header.data_start + sum(array.nbytes for array in arrays.values()) == os.path.getsize(path)
    assert [tensor.begin for tensor in header.tensors] == sorted(tensor.begin for tensor in header.tensors)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("BF16", (3, 5), 30), ("F8_E4M3", (128, 128), 16384), ("F8_E8M0", (4,), 4), ("F4", (2, 6), 6), ("I16", (3,), 6)],
)
def test_dtypes_that_numpy_lacks(tmp_path, dtype, shape, size):
    path = _file(tmp_path, {"w": _entry(dtype, shape, (0, size))}, bytes(size))
    deserialize((tmp_path / "x.safetensors").read_bytes())  # the library agrees
    (tensor,) = read_safetensors_header(path).tensors
    assert (tensor.dtype, tensor.shape, tensor.end) == (dtype, shape, size)


HOSTILE = {
    "shorter than its length word": (b"{}", b"", 3),
    "length beyond the file": (b"{}", b"", 1 << 20),
    "length of 2**63": (b"{}", b"", 1 << 63),
    "not JSON": (b"not json", b"", None),
    "not UTF-8": (b'{"\xff": 1}', b"", None),
    "a list": (b"[]", b"", None),
    "nested 10,000 deep": (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", b"", None),
    "NaN": (b'{"a": NaN}', b"", None),
    "metadata that is no object of strings": ({"__metadata__": {"format": 1}}, b"", None),
    "a number for a tensor": ({"w": 3}, b"", None),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None),
    "three offsets": ({"w": _entry(offsets=(0, 4, 8))}, bytes(8), None),
    "unknown dtype": ({"w": _entry("F5")}, bytes(8), None),
    "dtype that is a list": ({"w": _entry(["F32"])}, bytes(8), None),
    "negative size": ({"w": _entry(shape=(-2,))}, bytes(8), None),
    "fractional size": ({"w": _entry(shape=(2.0,))}, bytes(8), None),
    "true for a size": ({"w": _entry(shape=(True,), offsets=(0, 4))}, bytes(4), None),
    "10**18 elements": ({"w": _entry(shape=(10**18,))}, bytes(8), None),
    "10**18 in four dimensions": ({"w": _entry(shape=(10**18,) * 4)}, bytes(8), None),
    "a thousand dimensions": ({"w": _entry(shape=(1,) * 1000, offsets=(0, 4))}, bytes(4), None),
    "offsets beyond the file": ({"w": _entry(offsets=(0, 8))}, bytes(4), None),
    "offsets of 10**30": ({"w": _entry("U8", (0,), (10**30, 10**30))}, b"", None),
    "end before begin": ({"w": _entry(offsets=(8, 0))}, bytes(8), None),
    "negative offsets": ({"w": _entry(offsets=(-8, 0))}, bytes(8), None),
    "size that is not the shape's": ({"w": _entry(shape=(3,))}, bytes(8), None),
    "overlap": ({"v": _entry(), "w": _entry(offsets=(4, 12))}, bytes(12), None),
    "the same bytes twice": ({"v": _entry(), "w": _entry()}, bytes(8), None),
    "gap": ({"v": _entry(), "w": _entry(offsets=(12, 20))}, bytes(20), None),
    "bytes left over": ({"w": _entry()}, bytes(9), None),
    "a tensor twice": (b'{"w": %s, "w": %s}' % ((json.dumps(_entry()).encode(),) * 2), bytes(8), None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_one_sentence(tmp_path, name):
    path = _file(tmp_path, *HOSTILE[name])
    start = time.process_time()
    with pytest.raises(BadInput) as caught:
        read_safetensors_header(path)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert path in message and "\n" not in message and len(message) < 400 + len(path)


def test_names_in_messages_are_harmless(tmp_path):
    path = _file(tmp_path, {"\x1b[2J" + "x" * 10_000: _entry("nope")}, bytes(8))
    with pytest.raises(BadInput) as caught:
        read_safetensors_header(path)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 400 + len(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read_safetensors_header(str(tmp_path / "missing.safetensors"))
    with pytest.raises(BadInput, match="not a regular file"):
        read_safetensors_header(str(tmp_path))
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    with pytest.raises(BadInput, match="cut short"):
        read_safetensors_header(str(empty))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    pipe = str(tmp_path / "pipe.safetensors")
    os.mkfifo(pipe)
    with pytest.raises(BadInput, match="not a regular file"):
        read_safetensors_header(pipe)


_GOOD = json.dumps({"a": _entry("BF16", (2, 3), (0, 12)), "b": _entry("U8", (4,), (12, 16))}).encode()
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "x"]), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.tuples(st.integers(0, len(_GOOD) - 1), st.binary(max_size=3)).map(
            lambda edit: _GOOD[: edit[0]] + edit[1] + _GOOD[edit[0] + 1 :]
        ),
        st.dictionaries(
            st.text(max_size=3),
            st.fixed_dictionaries(
                {
                    "dtype": st.just("U8") | _VALUES,
                    "shape": st.just([4]) | _VALUES,
                    "data_offsets": st.just([0, 4]) | _VALUES,
                }
            ),
            max_size=2,
        ).map(lambda header: json.dumps(header).encode()),
    ),
    data_bytes=st.integers(0, 20),
    error=st.sampled_from([0, 0, 0, 1, -1, 1 << 40]),
)
def test_whatever_is_accepted_the_library_accepts_too(tmp_path, raw, data_bytes, error):
    path = _file(tmp_path, raw, bytes(data_bytes), max(0, len(raw) + error))
    try:
        header = read_safetensors_header(path)
    except BadInput:
        return
    try:
        theirs = deserialize((tmp_path / "x.safetensors").read_bytes())
    except SafetensorError as refused:
        raise AssertionError(f"accepted {raw!r}") from refused
    assert {tensor.name: list(tensor.shape) for tensor in header.tensors} == {
        name: entry["shape"] for name, entry in theirs
    }
