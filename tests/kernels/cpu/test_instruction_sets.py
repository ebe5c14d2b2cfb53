"""Every instruction set computes the same bits: sums are exact integers, and floats are added in one order everywhere.

`checksums.c` runs the kernels on fixed numbers. It is compiled for each set that this processor has, and for
AArch64's NEON where a cross compiler and an emulator are installed (Debian: gcc-aarch64-linux-gnu, qemu-user-static).
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from qwenfit.kernels.cpu.library import ISA_FLAGS, SOURCES, available_isas, find_compiler

HERE = Path(__file__).parent
FLAGS = ("-O2", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", f"-I{SOURCES}")
native = [(isa, flags) for flags_of in ISA_FLAGS.values() for isa, flags in flags_of.items() if isa in available_isas()]


def checksums(
    compiler: str, isa: str, flags: tuple[str, ...], folder: Path, emulator: tuple[str, ...] = ()
) -> list[str]:
    program = folder / isa
    command = (compiler, *FLAGS, *flags, f"-DISA={isa}", str(HERE / "checksums.c"), "-o", str(program), "-lm")
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run((*emulator, str(program)), check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if not native:
        pytest.skip("no C compiler, or a processor without the kernels")
    isa, flags = native[-1]
    lines = checksums(find_compiler()[0], isa, flags, tmp_path_factory.mktemp("native"))
    assert len(lines) == 170 and len({line.split()[-1] for line in lines}) > 160
    return lines


@pytest.mark.parametrize(("isa", "flags"), native[:-1])
def test_sets_of_this_processor_agree_to_the_bit(
    isa: str, flags: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    assert checksums(find_compiler()[0], isa, flags, tmp_path) == expected


def test_neon_agrees_to_the_bit(expected: list[str], tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip("NEON is checked where aarch64-linux-gnu-gcc and qemu-aarch64-static are installed")
    assert checksums(compiler, "neon", ("-static",), tmp_path, (emulator,)) == expected
