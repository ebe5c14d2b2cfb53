"""The compile matrix: a subset of it kept to its budgets, and proof that it notices a broken one.

The whole of it is `python -m qwenfit.kernels.compile_matrix --check` (`.ci/run` and this file run a part). Everything
runs in processes of its own without TRITON_INTERPRET.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels import compile_matrix  # noqa: E402
from qwenfit.kernels.gpu.target import TARGETS, target  # noqa: E402


def run(*command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, *command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def matrix(*options: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "qwenfit.kernels.compile_matrix", "--check", "--jobs", "2", *options)


# Each way that a kernel becomes machine code, by kernels that take seconds.
@pytest.mark.parametrize(
    ("kernel", "ways"),
    [
        ("kv_store/int8", {"sm_75": "none", "sm_90": "none"}),
        ("attention_decode/16_rows_int8", {"sm_86": "HMMA", "gfx942": "v_mfma_", "gfx1201": "v_wmma_"}),
        ("delta_output", {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}),
    ],
)
def test_a_subset_keeps_its_budgets(kernel: str, ways: dict[str, str]) -> None:
    done = matrix("--target", *ways, "--kernel", kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ways)} compiled, 0 budgets broken" in done.stdout
    for place, way in ways.items():
        assert re.search(rf"^{place} .*; matrix {way}", done.stdout, re.MULTILINE), done.stdout


def test_a_case_that_asks_for_less_is_the_only_one() -> None:
    """Whose reason is written where it is made; of all others half of the bytes of the main loop must come wide."""
    less = {(case.name, place.name) for case, place in compile_matrix.collect(TARGETS) if case.least_wide_share < 0.5}
    assert less == {("attention_decode/16_rows_int8", "gfx1100")}


@pytest.mark.slow
def test_all_of_it_keeps_its_budgets() -> None:
    done = matrix()
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr


def test_a_broken_budget_is_noticed() -> None:
    done = run(str(Path(__file__).with_name("broken_kernels.py")))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["good"] == []
    assert found["empty"][0].endswith("instructions: nothing is left of the kernel")
    assert found["narrow"][0].startswith("reads 0% of its bytes 128 bits at a time")
    assert found["spilling"][0].startswith("spills ")
    assert found["no matrix unit"] == ["has matrix instructions none, wanted HGMMA"]
    assert found["wrong"][0].startswith("does not compile: ") and "no_such_name" in found["wrong"][0]
    assert found["forgotten"][0].endswith("give each argument once, in signature or constants; wrong: y")
    assert found["slow"] == ["does not compile: gave up after 0 s"]
    assert found["dead"] == ["does not compile: the compiler died with status 9"]


def test_unknown_names_are_answered() -> None:
    done = matrix("--kernel", "no_such_kernel", "--module", "rope", "--target", "sm_80")
    assert done.returncode == 2 and "no kernel 'no_such_kernel'" in done.stderr
    done = matrix("--target", "sm_10")
    assert done.returncode == 2 and "no compile target 'sm_10'" in done.stderr
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", "qwenfit.kernels.compile_matrix", "--module", "rope", "--target", "sm_80"]
    interpreted = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert interpreted.returncode == 1 and "unset TRITON_INTERPRET" in interpreted.stdout


def test_every_target_gets_every_kernel_that_it_can_run() -> None:
    names = {where.name: {case.name.split("/")[0] for case, _ in compile_matrix.collect([where])} for where in TARGETS}
    for where in TARGETS:
        if where.matrix_instruction:
            missing = names["sm_80"] - names[where.name]
            assert not missing, f"{where.name} has no {missing}"
        else:
            cases = [case for case, _ in compile_matrix.collect([where])]
            assert not any(case.matrix for case in cases), f"{where.name} has no matrix unit in Triton"


def test_the_golden_file_is_sorted_and_complete() -> None:
    golden = compile_matrix.read_golden()
    text = compile_matrix.GOLDEN.read_text(encoding="utf-8")
    assert text == compile_matrix.golden_text(golden["triton"], golden["rows"])
    known = {(case.name, where.name) for case, where in compile_matrix.collect(TARGETS)}
    assert known == {(kernel, place) for kernel, places in golden["rows"].items() for place in places}


def test_golden_text_has_a_line_per_row(tmp_path: Path) -> None:
    rows: dict[str, dict[str, dict[str, Any]]] = {
        "b": {"gfx942": {"x": 1}, "sm_75": {"x": 2}},
        "a": {"sm_80": {"x": 3}},
    }
    text = compile_matrix.golden_text("3.9.0", rows)
    lines = text.split("\n")
    assert lines.index('"a": {') < lines.index('"b": {') and lines.index('"sm_75": {"x": 2},') < lines.index(
        '"gfx942": {"x": 1}}'
    )
    path = tmp_path / "golden.json"
    path.write_text(text, encoding="utf-8")
    assert compile_matrix.read_golden(path) == {"schema": 1, "triton": "3.9.0", "rows": rows}
    path.write_text(text.replace('"schema": 1', '"schema": 9'), encoding="utf-8")
    with pytest.raises(ValueError, match="schema 9, not 1"):
        compile_matrix.read_golden(path)
    assert compile_matrix.read_golden(tmp_path / "none.json")["rows"] == {}


def test_limits_are_those_of_the_programming_guides() -> None:
    """CUDA C++ Programming Guide, "Maximum amount of shared memory per thread block"; AMD ISA guides, LDS size."""
    shared = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
    shared |= {"gfx942": 64, "gfx950": 160, "gfx1100": 64, "gfx1201": 64}
    assert {where.name: where.shared_bytes // 1024 for where in TARGETS} == shared
    assert {where.name for where in TARGETS if where.warp_threads == 64} == {"gfx942", "gfx950"}
    assert target("sm_90").triton_arch == 90 and target("gfx942").triton_arch == "gfx942"
