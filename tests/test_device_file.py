"""A user's own YAML file: what it may hold, and one sentence with file and field for everything else."""

import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenfit.profiles import BadInput, QwenfitError, device
from qwenfit.profiles.device_file import LIMIT_BYTES, parse_yaml, read_device

GIB = 1 << 30
GOOD = """\
vendor: nvidia
architecture: ampere
kind: discrete
memory_gib: 20
memory_bandwidth_bytes_per_s: 760300000000
"""


@pytest.fixture
def read(tmp_path: Path):
    def from_text(text: str | bytes, name: str = "mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return device(str(path))

    return from_text


def test_the_least_a_file_needs(read) -> None:
    mine = read(GOOD, "My Card.yaml")
    assert (mine.name, mine.title, mine.vendor, mine.kind) == ("my-card", "my-card", "nvidia", "discrete")
    assert mine.memory_bytes == 20 * GIB
    assert mine.usable_bytes == int(0.97 * 20 * GIB)
    assert mine.usable_source.startswith("rule: 97%")
    assert mine.path.endswith("My Card.yaml") and mine.source == mine.path


def test_every_key(read) -> None:
    mine = read(
        GOOD.replace("memory_gib: 20", "memory_bytes: 21474836480")
        + """\
name: my-3080
title: My RTX 3080 20 GB
usable_mib: 19970
flops_per_s: {fp32: 29770000000000, fp16: 59540000000000}
sparse_flops_per_s: {fp16: 119080000000000}
compute_capability: "8.6"
shared_memory_per_sm_bytes: 102400
interconnect: pcie4-x16
interconnect_bytes_per_s: 63015000000
host_link_bytes_per_s: 31508000000
power_w: 320
safe_fraction: 0.95
measured: {memory_bandwidth_bytes_per_s: {value: 700000000000, by: bandwidthTest, on: 2026-11-22, source: mine}}
source: https://example.org
usable_source: nvidia-smi
flops_source: a whitepaper
checked: 2026-11-21
note: on loan
"""
    )
    assert (mine.name, mine.usable_bytes, mine.usable_source) == ("my-3080", 19970 << 20, "nvidia-smi")
    assert mine.flops_per_s == {"fp32": 29770000000000, "fp16": 59540000000000}
    assert mine.measured["memory_bandwidth_bytes_per_s"]["on"] == "2026-11-22"
    assert (mine.compute_capability, mine.power_w, mine.checked, mine.safe_fraction) == ("8.6", 320, "2026-11-21", 0.95)


def test_like_changes_a_device_of_the_catalog(read) -> None:
    base, mine = device("rtx3080"), read("like: RTX 3080\nmemory_gib: 20\npower_w: 250\n")
    assert (mine.name, mine.memory_bytes, mine.power_w) == ("mine", 20 * GIB, 250)
    assert mine.usable_bytes == pytest.approx(2 * base.usable_bytes, abs=8)
    assert mine.usable_source == "rule: the share of rtx3080"
    assert mine.memory_bandwidth_bytes_per_s == base.memory_bandwidth_bytes_per_s
    assert mine.compute_capability == "8.6" and "rtx3080" in mine.source


def test_a_file_is_read_again_only_when_it_changed(read, tmp_path: Path) -> None:
    first = read(GOOD)
    assert device(str(tmp_path / "mine.yaml")) is first
    assert read(GOOD + "power_w: 7\n").power_w == 7


def test_fractions_of_a_gib_and_line_ends_and_a_byte_order_mark(read) -> None:
    assert read(GOOD.replace("20", "11.76", 1)).memory_bytes == int(11.76 * GIB)
    assert read("\ufeff" + GOOD.replace("\n", "\r\n")).memory_bytes == 20 * GIB


def test_words_of_yaml_1_1_are_words(read) -> None:
    assert read(GOOD + "note: no\n").note == "no"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", "holds a list of 2, not `key: value` lines"),
        ("hello\n", "holds 'hello'"),
        ("12: 3\n", "not `key: value` lines"),
        (b"\x80\x81\x82", "not a text file"),
        (b"\x00\x01", "not a text file"),
        ("vendor: nvidia".encode("utf-16"), "not a text file"),
        ("a: [1\n", "not YAML that qwenfit reads, line 2"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases (*name) are not allowed"),
        (GOOD + "kind: cpu\n", "line 6: the key 'kind' occurs twice"),
        ("? [a, b]\n: c\n", "a key must be a plain word"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("- " * 9000, "nested too deeply"),
        ("[" * 9000, "is too large for the file of a device"),
        ("{a: " * 5000, "is too large for the file of a device"),
        ("#" * LIMIT_BYTES + "\n", "is too large for the file of a device"),
        (GOOD.replace("20", "9" * 5000, 1), "a number or a date that cannot be read"),
        (GOOD + "memory_byte: 3\n", "unknown key 'memory_byte'; did you mean memory_bytes?"),
        (GOOD + "memory: 12 GB\n", "unknown key 'memory'; did you mean memory_gib?"),
        (GOOD + "zzz: 3\n", "unknown key 'zzz'"),
        (GOOD + "path: /etc\n", "unknown key 'path'"),
        (GOOD.replace("20", "20 GB", 1), "memory_gib must be a number greater than 0 without a unit, not '20 GB'"),
        (GOOD.replace("20", "-3", 1), "memory_gib must be a number greater than 0"),
        (GOOD.replace("20", "0", 1), "memory_gib must be a number greater than 0"),
        (GOOD.replace("20", ".nan", 1), "memory_gib must be a number greater than 0"),
        (GOOD.replace("20", ".inf", 1), "memory_gib must be a number greater than 0"),
        (GOOD.replace("20", "true", 1), "memory_gib must be a number greater than 0"),
        (GOOD.replace("20", "[8, 16]", 1), "memory_gib must be a number greater than 0"),
        (GOOD.replace("20", "1:30", 1), "memory_gib must be a number greater than 0"),
        (GOOD.replace("20", "1000000", 1), "memory_bytes is 1073741824000000, and must be at most"),
        (GOOD.replace("20", "0.001", 1), "memory_bytes is 1073741, and must be at least"),
        (GOOD.replace("memory_gib: 20", "memory_bytes: 12 GB"), "memory_bytes must be a whole number of bytes"),
        (GOOD + "memory_bytes: 3\n", "memory_gib says again what another key says"),
        (GOOD.replace("memory_gib: 20\n", ""), "memory_bytes is missing; write memory_gib: 24"),
        (GOOD.replace("760300000000", "760"), "at least 1000000000 bytes per second (936 GB/s is 936000000000)"),
        (GOOD.replace("760300000000", "760 GB/s"), "written out and without a unit, not '760 GB/s'"),
        (GOOD.replace("760300000000", "7.6e11"), "memory_bandwidth_bytes_per_s must be a whole number"),
        (GOOD.replace("760300000000", "true"), "memory_bandwidth_bytes_per_s must be a whole number"),
        (GOOD + "usable_gib: 21\n", "usable memory is more than the memory"),
        (GOOD + "compute_capability: 8.6\n", 'compute_capability must be text, not 8.6; write it in quotes: "8.6"'),
        (GOOD + "compute_capability: sm86\n", "compute_capability must be like"),
        (GOOD + "flops_per_s: {fp33: 1000000000}\n", "flops_per_s.fp33 must be fp32, fp16"),
        (GOOD + "flops_per_s: {fp16: 35.6}\n", "flops_per_s.fp16 must be a whole number of operations per second"),
        (GOOD + "flops_per_s: 35\n", "flops_per_s must be `key: value` pairs"),
        (GOOD + "measured: {x: 7}\n", "measured.x must be `key: value` pairs"),
        (GOOD + "measured: {x: {value: 7, by: me, on: 2026-11-22}}\n", "measured.x.source is missing"),
        (GOOD + "power_w: 0\n", "power_w is 0, and must be at least 1 watts"),
        (GOOD + "safe_fraction: 82\n", "safe_fraction is 82, and must be at most 1.0"),
        (GOOD + "checked: yesterday\n", "checked must be a date like 2026-11-22"),
        (GOOD + "name: My GPU\n", "name must be lower-case letters"),
        (GOOD + "title: ''\n", "title is empty"),
        (GOOD + 'note: "\\e[31m"\n', "note must be one line without control characters"),
        (GOOD.replace("discrete", "gpu"), "kind must be discrete, unified or cpu, not 'gpu'"),
        (GOOD.replace("nvidia", "{a: {b: {c: 1}}}"), "vendor must be nvidia, amd, intel, apple or cpu"),
        ("vendor: nvidia\n", "architecture is missing"),
        ("like: rtx3081\n", "like: no device is called 'rtx3081'; did you mean"),
        ("like: h100\n", "like: there are several 'h100'"),
        ("like: 4090\n", "like must be the name of a device of the catalog, not 4090"),
        ("like: ./mine.yaml\n", "like must be the name of a device of the catalog"),
        ("like: rtx3060\nusable_gib: 13\n", "usable memory is more than the memory"),
    ],
)
def test_bad_files_are_one_sentence_with_file_and_field(read, text: str | bytes, sentence: str) -> None:
    started = time.process_time()
    with pytest.raises(BadInput) as caught:
        read(text)
    assert "mine.yaml" in str(caught.value)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", ["[" * 9000, "[" * 100, "? " * 16000, '"\n' * 8000, "&a " * 9000, "k: 1\n" * 6000])
def test_hostile_text_takes_less_than_a_second(read, text: str) -> None:
    started = time.process_time()
    with pytest.raises(BadInput):
        read(text)
    assert time.process_time() - started < 1


def test_what_is_not_a_file(tmp_path: Path) -> None:
    for path, sentence in [
        (tmp_path / "none.yaml", "there is no file"),
        (tmp_path / "none" / "x", "there is no file"),
        (tmp_path, "is a folder"),
        ("/\0.yaml", "cannot be read: it is not a valid path"),
        ("/" + "a" * 5000 + ".yaml", "cannot be read"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            device(str(path))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFO in the file system and no /dev/zero")
def test_files_that_never_end_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name, sentence in [("fifo", "not a regular file"), ("zero", "not a regular file"), ("loop", "cannot be read")]:
        with pytest.raises(BadInput, match=sentence):
            device(str(tmp_path / f"{name}.yaml"))


def test_names_with_control_characters_are_shown_harmlessly() -> None:
    with pytest.raises(BadInput) as caught:
        device("\x1b[31m/evil.yaml")
    assert str(caught.value).isprintable()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
)
KEYS = st.sampled_from(
    [
        "name",
        "like",
        "vendor",
        "kind",
        "architecture",
        "memory_gib",
        "memory_bytes",
        "usable_gib",
        "usable_bytes",
        "measured",
        "power_w",
        "checked",
        "x",
        "memory_bandwidth_bytes_per_s",
        "flops_per_s",
        "compute_capability",
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_values_are_a_device_or_a_sentence(tmp_path: Path, values: dict[str, object]) -> None:
    import yaml

    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", newline="")
    try:
        mine = read_device(str(path), device)
    except QwenfitError as error:
        assert "any.yaml" in str(error) and "\n" not in str(error)
    else:
        assert 0 < mine.usable_bytes <= mine.memory_bytes


@given(st.binary(max_size=200))
def test_any_bytes_are_a_mapping_or_a_sentence(data: bytes) -> None:
    try:
        assert isinstance(parse_yaml(data, "any.yaml"), dict)
    except BadInput as error:
        assert str(error).startswith("any.yaml: ") and "\n" not in str(error)
