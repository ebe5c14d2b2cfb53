"""The catalog of devices: its figures against published ones, its own consistency, and the compiled form."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenfit.profiles import BadInput, device, devices
from qwenfit.profiles import catalog as catalog_file
from qwenfit.profiles.catalog_build import compile_catalog, expand, usable_by_rule
from qwenfit.profiles.device import Device
from qwenfit.profiles.names import fold

FIELDS = tuple(Device.__dataclass_fields__)
GIB = 1 << 30
NVIDIA = [entry for entry in devices() if entry.vendor == "nvidia"]
AMD = [entry for entry in devices() if entry.vendor == "amd"]

# CUDA programming guide, "technical specifications per compute capability": shared memory per multiprocessor, KiB.
SHARED_KIB = {
    "6.0": 64, "6.1": 96, "7.0": 96, "7.5": 64, "8.0": 164, "8.6": 100, "8.7": 164, "8.9": 100, "9.0": 228,
    "10.0": 228, "10.3": 228, "11.0": 228, "12.0": 100, "12.1": 100,
}  # fmt: skip

# https://developer.nvidia.com/cuda-gpus and LLVM's AMDGPU usage page.
COMPUTE_CAPABILITY = {
    "6.0": "p100", "6.1": "gtx1060 gtx1080ti p40", "7.0": "v100-16gb v100-32gb titan-v",
    "7.5": "t4 rtx2060 rtx2080ti titan-rtx gtx1660ti quadro-rtx8000 rtx2070-laptop",
    "8.0": "a100-40gb a100-80gb a100-pcie-80gb a30",
    "8.6": "rtx3050-8gb rtx3060 rtx3090 rtx3080ti-laptop rtxa2000-12gb rtxa6000 a2 a10 a10g a16 a40",
    "8.7": "jetson-orin-nano-8gb jetson-orin-nx-16gb jetson-agx-orin-64gb",
    "8.9": "rtx4060 rtx4090 rtx4090-laptop rtx2000-ada rtx6000-ada l4 l20 l40 l40s",
    "9.0": "h100-pcie h100-sxm h100-nvl h200-sxm h200-nvl h20 gh200-96gb gh200-144gb",
    "10.0": "b200 gb200", "10.3": "b300 gb300", "11.0": "jetson-thor",
    "12.0": "rtx5050 rtx5060ti-16gb rtx5090 rtx5090-laptop rtx-pro-4000 rtx-pro-6000 rtx-pro-6000-server",
    "12.1": "dgx-spark",
    "gfx906": "mi50-16gb mi50-32gb radeon-vii", "gfx908": "mi100", "gfx90a": "mi210 mi250x",
    "gfx942": "mi300a mi300x mi325x", "gfx950": "mi350x mi355x", "gfx1030": "rx6800xt rx6900xt w6800",
    "gfx1100": "rx7900xt rx7900xtx rx7900gre w7900", "gfx1101": "rx7800xt rx7700xt", "gfx1102": "rx7600xt",
    "gfx1150": "strix-point-32gb", "gfx1151": "strix-halo-128gb", "gfx1200": "rx9060xt-16gb",
    "gfx1201": "rx9070xt rx9070 r9700",
}  # fmt: skip

# Dense tera-operations per second as the vendors publish them (Ampere GA102, Ada, Blackwell, RTX PRO and Hopper
# whitepapers, data sheets of T4, L4, L40S, A100, B200, MI300X, MI355X, R9700; tensor cores, fp32 accumulation).
PUBLISHED_TFLOPS = {
    ("rtx3090", "fp16"): 71.0, ("rtx3090", "int8"): 284, ("rtx4090", "fp16"): 165.2, ("rtx4090", "fp8"): 330.3,
    ("rtx5090", "fp16"): 209.5, ("rtx5090", "fp4"): 1676, ("rtx2080ti", "fp16"): 53.8, ("titan-rtx", "fp16"): 130.5,
    ("rtxa6000", "fp16"): 154.8, ("rtx6000-ada", "fp8"): 728.5, ("rtx-pro-6000", "fp16"): 503.8,
    ("t4", "fp16"): 65, ("t4", "int8"): 130, ("v100-32gb", "fp16"): 125, ("a10", "fp16"): 125, ("a10g", "fp16"): 70,
    ("a40", "fp16"): 149.7, ("a100-80gb", "bf16"): 312, ("a100-80gb", "int8"): 624, ("l4", "fp8"): 242.5,
    ("l40", "fp16"): 181, ("l40s", "fp16"): 362, ("h100-sxm", "bf16"): 989.4, ("h100-sxm", "fp8"): 1979,
    ("h100-pcie", "bf16"): 756, ("h20", "bf16"): 148, ("b200", "fp4"): 9000, ("b200", "bf16"): 2250,
    ("gb300", "fp4"): 15000, ("jetson-agx-orin-64gb", "int8"): 85, ("jetson-orin-nano-8gb", "int8"): 33.5,
    ("rx7900xtx", "fp16"): 122.8, ("rx9070xt", "fp16"): 195, ("rx9070xt", "int8"): 389, ("r9700", "int4"): 766,
    ("mi210", "fp16"): 181, ("mi300x", "bf16"): 1307.4, ("mi300x", "fp8"): 2614.9, ("mi355x", "fp4"): 10066,
    ("mi350x", "bf16"): 2306.9, ("strix-halo-128gb", "bf16"): 59.4, ("arc-b580", "int8"): 233,
}  # fmt: skip

# GB/s as the vendors publish them.
PUBLISHED_GB_PER_S = {
    "rtx3060": 360, "rtx3060-8gb": 240, "rtx3090": 936, "rtx4090": 1008, "rtx5090": 1792, "t4": 320, "a10": 600,
    "a100-40gb": 1555, "a100-80gb": 2039, "a100-pcie-80gb": 1935, "l4": 300, "l40s": 864, "h100-sxm": 3350,
    "h100-nvl": 3938, "h200-sxm": 4800, "b200": 8000, "dgx-spark": 273, "jetson-agx-orin-64gb": 204.8,
    "rx7900xtx": 960, "rx9070xt": 640, "mi300x": 5300, "mi325x": 6000, "mi355x": 8000, "strix-halo-128gb": 256,
    "arc-b580": 456, "m1-16gb": 68.25, "m2-max-96gb": 400, "m3-max-36gb": 300, "m3-max-128gb": 400,
    "m3-ultra-512gb": 819, "m4-max-36gb": 410, "m4-max-128gb": 546, "m5-max-128gb": 614,
    "epyc-genoa-12ch-384gb": 460.8, "desktop-ddr5-2ch-64gb": 89.6,
}  # fmt: skip

# MiB that llama.cpp ("VRAM: N MiB") or Ultralytics ("(NAME, NMiB)") printed on Linux in 2026, and Metal's MB.
OBSERVED_USABLE_MIB = {
    "rtx3060": 11910, "rtx3090": 24126, "rtx4090": 24080, "rtx5090": 32102, "rtx5060ti-16gb": 15825, "t4": 14912,
    "l4": 22563, "l20": 45457, "a100-80gb": 81151, "h100-sxm": 81081, "h200-sxm": 143156, "jetson-thor": 125748,
    "r9700": 32624, "rx9070xt": 16304, "mi50-32gb": 32752, "arc-pro-b70": 32656,
}  # fmt: skip
OBSERVED_METAL_MB = {
    "m1-16gb": 12713.12, "m4-24gb": 19069.67, "m1-max-32gb": 26800.60, "m3-max-36gb": 30150.67,
    "m4-pro-48gb": 40200.90, "m1-max-64gb": 55662.79, "m5-max-128gb": 115448.73, "m3-ultra-512gb": 498216.21,
}  # fmt: skip

# Every size that Apple sold, https://github.com/huggingface/huggingface.js/pull/1937 and Apple's newsroom for M5.
APPLE_GIB = {
    "m1": "8 16", "m1-pro": "16 32", "m1-max": "32 64", "m1-ultra": "64 128", "m2": "8 16 24", "m2-pro": "16 32",
    "m2-max": "32 64 96", "m2-ultra": "64 128 192", "m3": "8 16 24", "m3-pro": "18 36", "m3-max": "36 48 64 96 128",
    "m3-ultra": "96 256 512", "m4": "16 24 32", "m4-pro": "24 48 64", "m4-max": "36 48 64 128", "m5": "16 24 32",
    "m5-pro": "24 48 64", "m5-max": "36 48 64 128",
}  # fmt: skip


def test_there_are_more_than_a_hundred_devices_of_every_kind() -> None:
    assert len({entry.title for entry in devices()}) > 200
    assert {entry.vendor for entry in devices()} == {"nvidia", "amd", "intel", "apple", "cpu"}
    assert {entry.kind for entry in devices()} == {"discrete", "unified", "cpu"}


def test_names_are_unique_and_spell_alike_only_once() -> None:
    names = [entry.name for entry in devices()]
    assert len(set(names)) == len(names)
    assert len({fold(name) for name in names}) == len(names)
    assert all(name == name.lower() and " " not in name for name in names)


def test_aliases_lead_somewhere_and_shadow_nothing() -> None:
    rows, aliases = catalog_file.load(FIELDS)
    folded = {fold(name): name for name in rows}
    for alias, name in aliases.items():
        assert name in rows
        assert folded.get(fold(alias), name) == name
        assert device(alias).name == name


@pytest.mark.parametrize(("capability", "names"), COMPUTE_CAPABILITY.items())
def test_compute_capabilities(capability: str, names: str) -> None:
    assert {device(name).compute_capability for name in names.split()} == {capability}


def test_every_nvidia_device_has_a_compute_capability_and_its_shared_memory() -> None:
    for entry in NVIDIA:
        assert entry.compute_capability is not None, entry.name
        assert entry.shared_memory_per_sm_bytes == SHARED_KIB[entry.compute_capability] << 10, entry.name


def test_every_amd_device_has_a_gfx_target_and_its_lds() -> None:
    for entry in AMD:
        assert entry.compute_capability is not None and entry.compute_capability.startswith("gfx"), entry.name
        assert entry.shared_memory_per_sm_bytes == (160 if entry.compute_capability == "gfx950" else 64) << 10, (
            entry.name
        )


@pytest.mark.parametrize(("key", "tflops"), PUBLISHED_TFLOPS.items())
def test_published_flops(key: tuple[str, str], tflops: float) -> None:
    name, dtype = key
    assert device(name).flops_per_s[dtype] == pytest.approx(tflops * 1e12, rel=0.015)


@pytest.mark.parametrize(("name", "gb_per_s"), PUBLISHED_GB_PER_S.items())
def test_published_bandwidth(name: str, gb_per_s: float) -> None:
    assert device(name).memory_bandwidth_bytes_per_s == pytest.approx(gb_per_s * 1e9, rel=0.001)


@pytest.mark.parametrize(("name", "mib"), OBSERVED_USABLE_MIB.items())
def test_observed_usable_memory(name: str, mib: int) -> None:
    assert device(name).usable_bytes == mib << 20
    assert not str(device(name).usable_source).startswith("rule")


@pytest.mark.parametrize(("name", "megabytes"), OBSERVED_METAL_MB.items())
def test_metals_working_set(name: str, megabytes: float) -> None:
    assert device(name).usable_bytes == pytest.approx(megabytes * 1e6, rel=1e-4)


@pytest.mark.parametrize(("chip", "sizes"), APPLE_GIB.items())
def test_every_memory_size_of_apple(chip: str, sizes: str) -> None:
    found = {entry.memory_bytes // GIB for entry in devices() if entry.name.rpartition("-")[0] == chip}
    assert found == set(map(int, sizes.split()))


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("rtx3060", 12),
        ("rtx3060-8gb", 8),
        ("rtx3080", 10),
        ("a100-40gb", 40),
        ("a100-80gb", 80),
        ("dgx-spark", 128),
        ("strix-halo-128gb", 128),
        ("mi250x", 64),
        ("m1-16gb", 16),
    ],
)
def test_what_is_sold(name: str, gib: int) -> None:
    assert device(name).memory_bytes == gib * GIB


def test_a_spark_says_how_much_of_it_is_safe() -> None:
    # https://docai.hu/en/blog/qwen35-122b-spark: 0.82 ran, 0.88 and more swapped.
    assert device("dgx-spark").safe_fraction == 0.82


def test_figures_are_plausible() -> None:
    for entry in devices():
        assert 0.49 * entry.memory_bytes <= entry.usable_bytes <= entry.memory_bytes, entry.name
        assert entry.kind != "discrete" or entry.usable_bytes >= 0.9 * entry.memory_bytes, entry.name
        assert 15e9 <= entry.memory_bandwidth_bytes_per_s <= 8e12, entry.name
        # Reading all memory once takes longer than a hundredth of a second and less than half a minute.
        assert 0.01 <= entry.memory_bytes / entry.memory_bandwidth_bytes_per_s <= 30 or entry.kind == "cpu", entry.name
        assert 5e10 <= entry.flops_per_s["fp32"] <= 2e14, entry.name
        assert entry.power_w is None or 5 <= entry.power_w <= 1500, entry.name
        if entry.kind == "discrete":
            assert entry.host_link_bytes_per_s and entry.interconnect_bytes_per_s, entry.name
            assert 1.5e10 <= entry.host_link_bytes_per_s <= entry.interconnect_bytes_per_s, entry.name
            assert 20 <= max(entry.flops_per_s.values()) / entry.memory_bandwidth_bytes_per_s <= 2500, entry.name


def test_smaller_types_are_not_slower() -> None:
    for entry in devices():
        for wide, narrow in [("fp32", "fp16"), ("fp16", "fp8"), ("fp16", "int8"), ("fp8", "fp4"), ("int8", "int4")]:
            if wide in entry.flops_per_s and narrow in entry.flops_per_s:
                assert entry.flops_per_s[wide] <= entry.flops_per_s[narrow], (entry.name, wide, narrow)
        assert entry.flops_per_s.get("bf16", 0) <= entry.flops_per_s.get("fp16", math.inf), entry.name


def test_sparse_is_twice_dense() -> None:
    for entry in devices():
        for dtype, sparse in entry.sparse_flops_per_s.items():
            # Blackwell Ultra raised dense fp4 only: 15 dense and 20 sparse PFLOPS (13.1 and 18 in an HGX B300).
            ratio = {"b300": 18 / 13.125, "gb300": 4 / 3}.get(entry.name, 2) if dtype == "fp4" else 2
            assert sparse == pytest.approx(entry.flops_per_s[dtype] * ratio, rel=0.003), (entry.name, dtype)


def test_every_figure_has_a_source() -> None:
    for entry in devices():
        assert entry.source.startswith("https://") and entry.checked == "2026-11-22", entry.name
        assert entry.usable_source, entry.name
        for what, measurement in entry.measured.items():
            assert isinstance(measurement, dict) and measurement["source"].startswith("https://"), (entry.name, what)


def test_bigger_memory_of_the_same_chip_is_never_less_usable() -> None:
    chips: dict[str, list[Device]] = {}
    for entry in devices():
        chip, _, size = entry.name.rpartition("-")
        if size.endswith("gb"):
            chips.setdefault(chip, []).append(entry)
    for sizes in chips.values():
        ordered = sorted(sizes, key=lambda entry: entry.memory_bytes)
        assert [entry.usable_bytes for entry in ordered] == sorted(entry.usable_bytes for entry in ordered)


def test_the_compiled_catalog_is_fresh() -> None:
    """Where this fails: python -m qwenfit.profiles.catalog"""
    assert Path(catalog_file.COMPILED).read_text(encoding="utf-8") == compile_catalog(catalog_file.read_sources())


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "stale", "other fields", "reformatted", "binary"])
def test_a_compiled_catalog_that_cannot_be_used_is_ignored(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(catalog_file.COMPILED).read_text(encoding="utf-8")
    damaged = {
        "empty": "",
        "cut": text[: len(text) // 2],
        "stale": text.replace('"fingerprint": "', '"fingerprint": "0', 1).replace('"RTX', '"XTR'),
        "other fields": text.replace('"fields": ["name", ', '"fields": [', 1),
        "reformatted": text.replace("\n", " "),
        "binary": "\x00\x01",
    }
    copy = tmp_path / "devices.json"
    if damage in damaged:
        copy.write_text(damaged[damage], encoding="utf-8")
    expected = catalog_file.load(FIELDS)
    monkeypatch.setattr(catalog_file, "COMPILED", str(copy))
    assert catalog_file.load(FIELDS) == expected


def test_an_edited_yaml_file_counts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*catalog_file.FILES, "devices.json"):
        (tmp_path / name).write_bytes((Path(catalog_file.FOLDER) / name).read_bytes())
    monkeypatch.setattr(catalog_file, "FOLDER", str(tmp_path))
    monkeypatch.setattr(catalog_file, "COMPILED", str(tmp_path / "devices.json"))
    assert "rtx9999" not in catalog_file.load(FIELDS).rows
    with open(tmp_path / "nvidia.yaml", "a", encoding="utf-8") as file:
        file.write(NEW_CARD)
    rows = catalog_file.load(FIELDS).rows
    assert Device(*yaml.safe_load(rows["rtx9999"])).flops_per_s["fp4"] == 16 * 10**14


NEW_CARD = """
  - name: rtx9999
    title: GeForce RTX 9999
    family: geforce-50
    memory_gib: 48
    memory_bandwidth_bytes_per_s: 1792000000000
    flops_per_s: {fp32: 100000000000000}
    power_w: 600
    source: https://example.org/rtx9999
"""


def test_line_ends_of_windows_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in catalog_file.FILES:
        text = (Path(catalog_file.FOLDER) / name).read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / name).write_bytes(text)
    before = catalog_file.fingerprint(catalog_file.read_sources())
    monkeypatch.setattr(catalog_file, "FOLDER", str(tmp_path))
    assert catalog_file.fingerprint(catalog_file.read_sources()) == before


def test_families_and_links_are_all_used() -> None:
    for name in catalog_file.FILES:
        document = yaml.safe_load((Path(catalog_file.FOLDER) / name).read_text(encoding="utf-8"))
        families, links = document.get("families", {}), document.get("links", {})
        entries = [*document["devices"], *families.values(), document.get("defaults", {})]
        assert set(families) == {entry["family"] for entry in document["devices"] if "family" in entry}, name
        assert set(links) == {entry["interconnect"] for entry in entries if entry.get("interconnect")}, name


BOX: dict[str, Any] = {
    "name": "box", "title": "Box", "vendor": "cpu", "architecture": "z", "kind": "cpu", "usable_gib": 6,
    "memory_gib": 8, "memory_bandwidth_bytes_per_s": 10**10, "source": "https://example.org", "checked": "2026-11-22",
}  # fmt: skip


def compiled(text: str) -> str:
    return compile_catalog(
        {name: text.encode() if name == "cpu.yaml" else b"devices: []" for name in catalog_file.FILES}
    )


def test_a_device_wins_over_its_family_and_the_family_over_the_defaults() -> None:
    document = {
        "defaults": BOX | {"power_w": 1, "note": "default"},
        "families": {"f": {"power_w": 2, "flops_per_fp32": {"fp16": 2}, "sparse_per_dense": {"fp16": 2, "fp8": 2}}},
        "devices": [
            {"family": "f", "name": "a", "flops_per_s": {"fp32": 10**10}},
            {"family": "f", "name": "b", "flops_per_s": {"fp32": 10**10, "fp16": 10**11}, "power_w": 3},
            {"name": "c"},
        ],
    }
    (a, _), (b, _), (c, _) = expand(document, "t.yaml")
    assert (a["power_w"], a["note"]) == (2, "default")
    assert a["flops_per_s"] == {"fp32": 10**10, "fp16": 2 * 10**10}
    assert a["sparse_flops_per_s"] == {"fp16": 4 * 10**10}
    assert (b["power_w"], b["flops_per_s"]["fp16"], b["sparse_flops_per_s"]["fp16"]) == (3, 10**11, 2 * 10**11)
    assert c["power_w"] == 1


def test_a_list_of_sizes_makes_one_device_each() -> None:
    entries = [entry for entry, _ in expand({"devices": [BOX | {"memory_gib": [8, 16]}]}, "t.yaml")]
    assert [(entry["name"], entry["title"], entry["memory_gib"]) for entry in entries] == [
        ("box-8gb", "Box 8 GB", 8),
        ("box-16gb", "Box 16 GB", 16),
    ]


def test_usable_rules_take_the_first_step_that_reaches() -> None:
    steps: list[Any] = [{"up_to_gib": 8, "fraction": 0.5}, {"up_to_gib": 16, "reserve_mib": 1024}, {"fraction": 0.75}]
    assert [usable_by_rule(gib * GIB, steps) / GIB for gib in (4, 8, 9, 16, 17, 64)] == [2, 4, 8, 15, 12.75, 48]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("devices:\n- {name: a, family: nope}\n", "cpu.yaml, a: there is no family 'nope'"),
        ("device: []\n", "cpu.yaml: unknown part 'device'"),
        (f"devices:\n- {BOX}\n- {BOX}\n", "cpu.yaml: the name box occurs twice"),
        (f"devices:\n- {BOX | {'aliases': ['x']}}\n- {BOX | {'name': 'b', 'aliases': ['x']}}\n", "same alias x"),
        (f"devices:\n- {BOX | {'aliases': ['b']}}\n- {BOX | {'name': 'b'}}\n", "the alias b of box is the name"),
        (
            f"devices:\n- {BOX | {'memory_bandwidth_bytes_per_s': 90}}\n",
            "cpu.yaml, box: memory_bandwidth_bytes_per_s is 90",
        ),
        (f"devices:\n- {BOX | {'powerw': 9}}\n", "cpu.yaml, box: unknown key 'powerw'; did you mean power_w?"),
        (f"devices:\n- {BOX | {'usable_gib': 9}}\n", "cpu.yaml, box: usable memory is more than the memory"),
    ],
)
def test_a_mistake_in_the_catalog_names_file_device_and_field(text: str, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        compiled(text)
    assert sentence in str(caught.value)


def test_the_catalog_is_small_enough_to_read_on_every_call() -> None:
    total_bytes = sum(os.path.getsize(os.path.join(catalog_file.FOLDER, name)) for name in catalog_file.FILES)
    assert total_bytes < 250_000 and os.path.getsize(catalog_file.COMPILED) < 400_000
