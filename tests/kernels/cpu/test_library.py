"""How the C kernels come to be: compiler, cache, instruction set, and torch where there is none of it, with the
reason."""

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qwenfit.kernels.cpu import library as module
from qwenfit.kernels.cpu.library import available_isas, cache_folder, cpu_library, find_compiler, openmp_of_torch

needs_compiler = pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Nothing remembered before or after."""
    for name in ("CC", "QWENFIT_CPU_PATH", "QWENFIT_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    caches = (module._library, module._host, module._kernels, module._private_folder)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def write_compiler(folder: Path, body: str) -> Path:
    """A stand-in for a compiler, in Python: `arguments` are its own, `out` what follows -o."""
    script = folder / "cc"
    text = "import sys, time\narguments = sys.argv[1:]\n"
    text += "out = arguments[arguments.index('-o') + 1] if '-o' in arguments else None\n"
    script.write_text(f"#!{sys.executable}\n{text}{textwrap.dedent(body)}")
    script.chmod(0o755)
    return script


@needs_compiler
def test_the_best_instruction_set_is_chosen_and_named() -> None:
    library = cpu_library()
    assert library.path == "c"
    assert library.isa == available_isas()[0]
    assert library.reason.startswith("C kernels, ")


@needs_compiler
@pytest.mark.parametrize("isa", available_isas())
def test_each_instruction_set_can_be_asked_for(fresh: pytest.MonkeyPatch, isa: str) -> None:
    fresh.setenv("QWENFIT_CPU_ISA", isa)
    assert cpu_library().isa == isa
    assert "by QWENFIT_CPU_ISA" in cpu_library().reason


@needs_compiler
def test_an_instruction_set_that_is_not_there_is_an_error_with_those_that_are(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("QWENFIT_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=f"sse9.*{available_isas()[0]}"):
        cpu_library()


def test_torch_can_be_asked_for(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("QWENFIT_CPU_PATH", "torch")
    assert (cpu_library().path, cpu_library().isa) == ("torch", None)
    fresh.setenv("QWENFIT_CPU_PATH", "magic")
    with pytest.raises(ValueError, match="c or torch"):
        cpu_library()


def test_without_a_compiler_torch_computes_and_says_what_was_looked_for(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh.setenv("PATH", str(tmp_path))
    assert cpu_library().path == "torch"
    assert cpu_library().reason == "torch packed matmul: no compiler found (cc, gcc, clang)"
    fresh.setenv("QWENFIT_CPU_PATH", "c")
    with pytest.raises(ValueError, match="no compiler found"):
        cpu_library()


def test_a_compiler_that_fails_is_quoted(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = write_compiler(tmp_path, "if out: sys.exit('lanes.h:3: error: no such unit')")
    fresh.setenv("CC", str(compiler))
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cpu_library().path == "torch"
    assert "error: no such unit" in cpu_library().reason


def test_what_a_compiler_made_that_does_not_load_is_said(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = write_compiler(tmp_path, "print('cc 1')\nif out: open(out, 'w').write('no library')")
    fresh.setenv("CC", str(compiler))
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cpu_library().path == "torch"
    assert "does not load" in cpu_library().reason


def test_the_cache_is_the_users_own(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, remark = cache_folder()
    assert (folder, remark) == (tmp_path / "qwenfit", "")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_cache_that_others_may_write_is_not_loaded_from(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "qwenfit").mkdir()
    (tmp_path / "qwenfit").chmod(0o777)
    folder, remark = cache_folder()
    assert folder != tmp_path / "qwenfit" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "can be written by others" in remark


def test_a_cache_that_cannot_be_written_gives_way_to_a_private_folder(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made below a file, not even by root
    folder, remark = cache_folder()
    assert folder.is_dir() and "built for this process" in remark


def test_two_builds_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    body = "time.sleep(0.05)\nwith open(out, 'w') as file:\n"
    body += "    for _ in range(50): file.write('x' * 100); time.sleep(0.002)"
    compiler = write_compiler(tmp_path, body)
    target = tmp_path / "kernels.so"
    code = "from pathlib import Path; from qwenfit.kernels.cpu.library import build; "
    code += f"build([{str(compiler)!r}], [('pool.c', ())], Path({str(target)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert target.read_text() == "x" * 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cc", "kernels.so"]


@needs_compiler
def test_only_the_set_that_runs_is_compiled_with_its_flags(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler is this machine's, behind a stand-in that writes down what it is asked for; one set takes it 10 to
    20 s, where the files in csrc/ are as they are."""
    body = f"""
        import subprocess
        open({str(tmp_path / "log")!r}, "a").write(" ".join(arguments) + "\\n")
        sys.exit(subprocess.run([*{find_compiler()!r}, *arguments]).returncode)
    """
    fresh.setenv("CC", str(write_compiler(tmp_path, body)))
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chosen = available_isas()[-1]
    fresh.setenv("QWENFIT_CPU_ISA", chosen)
    assert cpu_library().isa == chosen
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if " -c " in line and "isa.c" in line]
    assert len(lines) == 1 and "-ffp-contract=off" in lines[0]
    flags = next(sets[chosen] for sets in module.ISA_FLAGS.values() if chosen in sets)
    assert set(flags) <= set(lines[0].split())
    names = sorted(path.name[:8] for path in (tmp_path / "cache" / "qwenfit").iterdir())
    assert names == sorted(["cpu-host", f"cpu-{chosen}"[:8]])


@pytest.mark.parametrize(
    "maps",
    [
        "7f00-7f10 r-xp 00000000 fe:00 12 /opt/lib/libgomp.so.1\n7f20-7f30 r-xp 00000000 fe:00 13 /opt/lib/libiomp5.so",
        "7f00-7f10 r-xp 00000000 fe:00 12 /opt/lib/libompression.so\n7f20-7f30 rw-p 00000000 00:00 0",
        OSError("no /proc"),
    ],
    ids=["two, and torch's cannot be told", "none", "not Linux"],
)
def test_threads_are_borrowed_only_where_it_is_clear_whose_they_are(
    monkeypatch: pytest.MonkeyPatch, maps: str | OSError
) -> None:
    def read_text(path: Path, **_: object) -> str:
        if isinstance(maps, OSError):
            raise maps
        return maps

    monkeypatch.setattr(Path, "read_text", read_text)
    assert openmp_of_torch() is None


@needs_compiler
def test_a_forked_child_computes_with_workers_of_its_own() -> None:
    code = """
        import os, torch
        from qwenfit.kernels.layout.packing import quantize_rtn
        from qwenfit.kernels.cpu.matmul import quantized_matmul
        torch.set_num_threads(3)
        weight, x = quantize_rtn(torch.randn(512, 256), 4, 128), torch.randn(2, 256)
        y = quantized_matmul(x, weight)
        child = os.fork()
        same = torch.equal(quantized_matmul(x, weight), y)
        if child == 0:
            os._exit(0 if same else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=dict(os.environ), timeout=120, check=False)
    assert done.returncode == 0
