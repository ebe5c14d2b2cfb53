"""The GGUF header reader agrees with llama.cpp's own gguf-py on good files, and refuses bad ones in one sentence."""

import os
import struct
import time

import gguf
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenfit.profiles.errors import BadInput, QwenfitError, Unsupported
from qwenfit.profiles.gguf_header import read_gguf_header

KEYS = {"general.architecture", "a.number", "a.float", "a.flag", "a.words", "a.numbers", "a.long"}


def _written(path, alignment=None):
    """A small file by gguf-py: every kind of value, five tensors of four types."""
    writer = gguf.GGUFWriter(path, "qwen35")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_array("a.words", ["one", "two", "", "vier" * 100])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_int64("a.long", -(2**40))
    writer.add_string("a.template", "x" * 100_000)
    writer.add_tensor("norm", numpy.zeros(5, numpy.float32))
    writer.add_tensor("half", numpy.zeros((3, 4), numpy.float16))
    for name, dtype in (("k", gguf.GGMLQuantizationType.Q4_K), ("q", gguf.GGMLQuantizationType.Q8_0)):
        elements, size = gguf.GGML_QUANT_SIZES[dtype]
        raw = numpy.zeros((2, 256 // elements * size), numpy.uint8)
        writer.add_tensor(name, raw, raw_dtype=dtype)
    writer.add_tensor("deep", numpy.zeros((2, 3, 4, 5), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("alignment", [None, 64])
def test_reads_what_gguf_py_writes(tmp_path, alignment):
    path = _written(tmp_path / "x.gguf", alignment)
    header = read_gguf_header(path, KEYS)
    theirs = gguf.GGUFReader(path)
    assert header.metadata == {
        "general.architecture": "qwen35",
        "a.number": 7,
        "a.float": 0.5,
        "a.flag": True,
        "a.words": 4,
        "a.numbers": (1, 2, 3),
        "a.long": -(2**40),
    }
    ours = {tensor.name: (tensor.shape[::-1], tensor.dtype, tensor.begin, tensor.end) for tensor in header.tensors}
    assert ours == {
        tensor.name: (
            tuple(map(int, tensor.shape)),
            tensor.tensor_type.name,
            int(tensor.data_offset),
            int(tensor.data_offset + tensor.n_bytes),
        )
        for tensor in theirs.tensors
    }


def _string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _key(name, kind, value):
    return _string(name) + struct.pack("<I", kind) + value


def _record(name="w", shape=(32,), kind=0, offset=0):
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _file(keys=(), tensors=(), data=256, version=3, counts=None, magic=b"GGUF"):
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % 32 + data)


def test_the_handmade_file_is_good(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(_file([_key("a.number", 4, struct.pack("<I", 7))], [_record(), _record("v", offset=128)]))
    header = read_gguf_header(str(path), KEYS)
    assert header.metadata == {"a.number": 7}
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in header.tensors] == [
        ("w", (32,), "F32"),
        ("v", (32,), "F32"),
    ]


_ARRAY = 9
HOSTILE = {
    "empty": b"",
    "other magic": _file(magic=b"GGML"),
    "counts beyond the file": _file(counts=(3, 0)),
    "2**60 tensors": _file(counts=(1 << 60, 0)),
    "2**60 keys": _file(counts=(0, 1 << 60)),
    "key longer than the file": _file([struct.pack("<Q", 60_000)]),
    "key of 2**63 bytes": _file([struct.pack("<Q", 1 << 63)]),
    "key that is not UTF-8": _file([_key(b"\xff\xfe", 4, bytes(4))]),
    "key twice": _file([_key("a", 4, bytes(4))] * 2),
    "unknown type": _file([_key("a", 77, bytes(4))]),
    "string beyond the file": _file([_key("a", 8, struct.pack("<Q", 1 << 62))]),
    "wanted string that is huge": _file([_key("a.number", 8, struct.pack("<Q", 1 << 20))], data=1 << 21),
    "array of arrays": _file([_key("a", _ARRAY, struct.pack("<IQ", _ARRAY, 1))]),
    "array beyond the file": _file([_key("a", _ARRAY, struct.pack("<IQ", 4, 1 << 61))]),
    "2**61 strings": _file([_key("a", _ARRAY, struct.pack("<IQ", 8, 1 << 61))]),
    "a million strings in 256 bytes": _file([_key("a", _ARRAY, struct.pack("<IQ", 8, 1_000_000))]),
    "strings of 2**63 bytes": _file([_key("a", _ARRAY, struct.pack("<IQQ", 8, 2, 1 << 63))]),
    "wanted array that is huge": _file([_key("a.numbers", _ARRAY, struct.pack("<IQ", 0, 1 << 16))], data=1 << 17),
    "alignment of 3": _file([_key("general.alignment", 4, struct.pack("<I", 3))]),
    "alignment of 0": _file([_key("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment that is text": _file([_key("general.alignment", 8, _string("32"))]),
    "no dimensions": _file(tensors=[_record(shape=())]),
    "five dimensions": _file(tensors=[_record(shape=(1,) * 5)]),
    "2**32 dimensions": _file(tensors=[_string("w") + struct.pack("<I", (1 << 32) - 1)]),
    "10**18 elements": _file(tensors=[_record(shape=(10**18,))]),
    "10**18 in four dimensions": _file(tensors=[_record(shape=(10**18,) * 4)]),
    "unknown tensor type": _file(tensors=[_record(kind=4)]),  # Q4_2, removed
    "rows of half a block": _file(tensors=[_record(shape=(48,), kind=8)]),
    "offset that is not aligned": _file(tensors=[_record(offset=8)]),
    "offset beyond the file": _file(tensors=[_record(offset=1 << 40)]),
    "data beyond the file": _file(tensors=[_record(shape=(65,))]),
    "overlap": _file(tensors=[_record(), _record("v", offset=96)]),
    "a tensor twice": _file(tensors=[_record(), _record(offset=128)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_one_sentence(tmp_path, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(BadInput) as caught:
        read_gguf_header(str(path), KEYS)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))


def test_big_endian_and_old_versions_are_told_apart(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(Unsupported, match="big-endian"):
        read_gguf_header(str(path), KEYS)
    path.write_bytes(_file(version=1))
    with pytest.raises(Unsupported, match="version 1"):
        read_gguf_header(str(path), KEYS)
    path.write_bytes(_file(version=2))
    assert read_gguf_header(str(path), KEYS).tensors == ()


@pytest.mark.skipif(os.name == "nt", reason="a file of zeros takes real space there")
def test_a_sparse_file_of_many_gigabytes_is_refused_quickly(tmp_path):
    """All zeros after the counts: keys, tensors and strings without a letter, not to be read one by one for ever."""
    path = tmp_path / "x.gguf"
    strings = _key("a.words", _ARRAY, struct.pack("<IQ", 8, 1 << 36))
    for tensors, keys, head in ((0, 60_000, b""), (60_000, 0, b""), (0, 1, strings)):
        with path.open("wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + head)
            file.truncate(1 << 36)
        start = time.process_time()
        with pytest.raises(BadInput):
            read_gguf_header(str(path), KEYS)
        assert time.process_time() - start < 1


def test_a_whole_vocabulary_is_stepped_over_quickly(tmp_path):
    """248,320 tokens and 247,587 merges, as in every file of the family; gguf-py's reader takes 30 s for them."""
    path = tmp_path / "x.gguf"
    keys = [
        _key(name, _ARRAY, struct.pack("<IQ", 8, count) + b"".join(_string(f"Ġtok{i}") for i in range(count)))
        for name, count in (("tokenizer.ggml.tokens", 248_320), ("tokenizer.ggml.merges", 247_587))
    ]
    path.write_bytes(_file([*keys, _key("a.number", 4, struct.pack("<I", 7))], [_record()]))
    start = time.process_time()
    header = read_gguf_header(str(path), KEYS | {"tokenizer.ggml.tokens"})
    assert time.process_time() - start < 1  # 0.15 s on an idle machine
    assert header.metadata == {"tokenizer.ggml.tokens": 248_320, "a.number": 7}


_GOOD = _file(
    [
        _key("general.architecture", 8, _string("qwen35")),
        _key("a.words", _ARRAY, struct.pack("<IQ", 8, 2) + _string("x") + _string("yy")),
        _key("a.numbers", _ARRAY, struct.pack("<IQ3I", 4, 3, 1, 2, 3)),
    ],
    [_record(), _record("v", (16, 2), 1, 128)],
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=120)
    | st.binary(max_size=120).map(lambda tail: b"GGUF\x03\0\0\0" + tail)
    | st.tuples(st.integers(4, len(_GOOD)), st.binary(max_size=9), st.booleans()).map(
        lambda edit: _GOOD[: edit[0]] + edit[1] + (b"" if edit[2] else _GOOD[edit[0] + len(edit[1]) :])
    )
)
def test_any_bytes_are_a_header_or_refused(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    try:
        header = read_gguf_header(str(path), KEYS)
    except QwenfitError as refused:
        assert "\n" not in str(refused)
        return
    for tensor in header.tensors:
        assert 0 < tensor.begin <= tensor.end <= len(data)
