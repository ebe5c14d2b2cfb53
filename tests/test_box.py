"""Lists of devices as `--gpu` takes them: counts, commas, files, and sentences for everything else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.profiles import BadInput, QwenfitError, UnknownName, device, devices, devices_of

NAMES = [entry.name for entry in devices()]


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("rtx3090", ["rtx3090"]),
        ("2xrtx3090", ["rtx3090"] * 2),
        ("8xh100-sxm", ["h100-sxm"] * 8),
        ("rtx4090,rtx3060", ["rtx4090", "rtx3060"]),
        ("2xrtx3090,rtx4090", ["rtx3090", "rtx3090", "rtx4090"]),
        (" 2 x RTX 3090 , 4090 ", ["rtx3090", "rtx3090", "rtx4090"]),
        ("2Xrx7900xtx", ["rx7900xtx"] * 2),
        ("2×rtx3090", ["rtx3090"] * 2),
        ("rx7900xtx", ["rx7900xtx"]),
        ("4090", ["rtx4090"]),
        ("2xmax-1550", ["max-1550"] * 2),
    ],
)
def test_lists_of_devices(spec: str, names: list[str]) -> None:
    assert [entry.name for entry in devices_of(spec)] == names


def test_the_devices_of_a_box_are_one_object_per_name() -> None:
    first, second = devices_of("2xrtx3090")
    assert first is second is device("rtx3090")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("0xrtx3090", "between 1 and 1024"),
        ("-1xrtx3090", "between 1 and 1024"),
        ("1025xt4", "between 1 and 1024"),
        ("9" * 5000 + "xt4", "between 1 and 1024"),
        ("600xt4,600xt4", "more than 1024 devices"),
        ("2x", "a device's name must follow the x"),
        ("", "is empty"),
        ("rtx3090,", "has an empty part"),
        (",", "has an empty part"),
        ("t4," * 10**5, "too long"),
    ],
)
def test_bad_lists_say_what_is_wrong(spec: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        devices_of(spec)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("spec", ["xrtx", "3.5xrtx3090", "rtx3090x2", "4*rtx3090", "²xrtx3090", "١xrtx3090", "1e3xt4"])
def test_what_only_looks_like_a_count_is_a_wrong_name(spec: str) -> None:
    with pytest.raises(UnknownName):
        devices_of(spec)


def test_1024_devices_fit_a_box() -> None:
    assert len(devices_of("1000xt4,24xl4")) == 1024


@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet="0123456789xX,- rtxamgb./\\~", max_size=40),
        st.lists(st.sampled_from([*NAMES[:20], "2x", "0x", "x", "gb", "-", " "]), max_size=5).map(",".join),
    )
)
def test_any_text_is_devices_or_a_sentence(spec: str) -> None:
    try:
        found = devices_of(spec)
    except QwenfitError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert 1 <= len(found) <= 1024


@given(st.lists(st.tuples(st.integers(1, 20), st.sampled_from(NAMES)), min_size=1, max_size=8))
def test_counts_and_names_come_back(parts: list[tuple[int, str]]) -> None:
    spec = ",".join(f"{count}x{name}" for count, name in parts)
    assert [entry.name for entry in devices_of(spec)] == [name for count, name in parts for _ in range(count)]


def test_files_and_names_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my, own.yaml").write_text("like: rtx3080\nmemory_gib: 20\n", encoding="utf-8")
    Path("mod.yml").write_text("like: rtx3080\nmemory_gib: 20\n", encoding="utf-8")
    assert [entry.name for entry in devices_of("2xmod.yml,rtx3080")] == ["mod", "mod", "rtx3080"]
    assert devices_of("my, own.yaml")[0].memory_bytes == 20 << 30
