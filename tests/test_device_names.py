"""Look-ups of devices: names, spellings, aliases, and sentences for everything else."""

import subprocess
import sys

import pytest

from qwenfit.profiles import UnknownName, device, devices

NAMES = [entry.name for entry in devices()]


def test_a_look_up_returns_one_object_per_name() -> None:
    assert device("rtx3060") is device("RTX 3060") is device("nvidia geforce rtx 3060")
    assert device("rtx3060") in devices()
    assert devices() is devices()


def test_every_name_finds_its_device() -> None:
    for entry in devices():
        assert device(entry.name) is entry
        assert device(entry.name.upper().replace("-", " ")) is entry


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("4090", "rtx4090"),
        ("1080ti", "gtx1080ti"),
        ("7900 XTX", "rx7900xtx"),
        ("5070 Ti", "rtx5070ti"),
        ("a100-80g", "a100-80gb"),
        ("A100 80GB", "a100-80gb"),
        ("RTX 5080 16GB", "rtx5080"),
        ("rtx 3090 24 gb", "rtx3090"),
        ("rtx3060-12gb", "rtx3060"),
        ("H200", "h200-sxm"),
        ("dgx spark", "dgx-spark"),
        ("Strix_Halo 128GB", "strix-halo-128gb"),
        ("a6000", "rtxa6000"),
        # What NVML, ROCm and Metal call them.
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "rtx4060-laptop"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA GB10", "dgx-spark"),
        ("NVIDIA Thor", "jetson-thor"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("AMD Radeon RX 7900 XTX", "rx7900xtx"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Radeon AI PRO R9700", "r9700"),
        ("Intel(R) Arc(TM) B580 Graphics", "arc-b580"),
    ],
)
def test_sensible_spellings(typed: str, name: str) -> None:
    assert device(typed).name == name


@pytest.mark.parametrize(
    ("typed", "which"),
    [
        ("h100", "h100-pcie, h100-sxm or h100-nvl"),
        ("H100 80GB", "h100-pcie, h100-sxm or h100-nvl"),
        ("a100", "a100-40gb or a100-80gb"),
        ("m1", "m1-8gb or m1-16gb"),
        ("Apple M2 Max", "m2-max-32gb, m2-max-64gb or m2-max-96gb"),
        ("4060 ti", "rtx4060ti-8gb or rtx4060ti-16gb"),
        ("a770", "arc-a770-8gb or arc-a770-16gb"),
        ("strix-halo", "strix-halo-32gb, strix-halo-64gb, strix-halo-96gb or strix-halo-128gb"),
    ],
)
def test_a_name_of_several_devices_asks_which(typed: str, which: str) -> None:
    with pytest.raises(UnknownName, match="say which, " + which):
        device(typed)


def test_an_unknown_name_gets_three_similar_ones_and_the_command_that_lists_all() -> None:
    with pytest.raises(UnknownName) as caught:
        device("rtx3061")
    assert str(caught.value) == (
        "no device is called 'rtx3061'; did you mean rtx3060, rtx3060ti or rtx5060? `qwen-plan devices` lists all"
    )


@pytest.mark.parametrize("word", ["cpu", "amd", "Apple"])
def test_a_kind_of_device_gets_the_command_that_lists_its_own(word: str) -> None:
    with pytest.raises(UnknownName, match=f"no device is called '{word}'; `qwen-plan devices {word.lower()}` lists"):
        device(word)


def test_a_wrong_size_is_named() -> None:
    with pytest.raises(UnknownName, match=r"rtx4080 has 16 GB, not 24; .*`like: rtx4080`"):
        device("rtx4080-24gb")


@pytest.mark.parametrize("typed", ["", " ", "zzz", "-", "gb", "x" * 10**6, "\0", "rtx\n3060x", "🙂"])
def test_nonsense_is_one_short_line(typed: str) -> None:
    with pytest.raises(UnknownName) as caught:
        device(typed)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_look_up_imports_no_yaml_and_no_pydantic() -> None:
    script = (
        "import sys; before = set(sys.modules); from qwenfit.profiles import device; device('rtx3060'); "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"yaml", "pydantic", "difflib", "pathlib", "importlib.resources", "hashlib"} & set(done.stdout.split())
