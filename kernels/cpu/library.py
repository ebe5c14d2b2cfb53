"""The C kernels of the CPU path: compiled once by this machine's compiler, kept in the user's cache, loaded by ctypes.

`csrc/` holds one program text for every instruction set (its essay: csrc/lanes.h, csrc/matmul.h, csrc/progress.h). What
runs them and knows the processor is one small library; `isa.c`, compiled with the flags of the best set that the
processor has, is another, and other sets are compiled when they are asked for. They lie in $XDG_CACHE_HOME/qwenfit (or
~/.cache/qwenfit) under names with a hash of the sources, the compiler's version and the flags; two processes that
build at once each write their own file and rename it into place.

Without a compiler (or on a processor with none of the sets) `cpu_library()` answers path "torch" and why.

    QWENFIT_CPU_PATH=torch      use torch's packed matmuls even so
    QWENFIT_CPU_ISA=avx2        a set below the best (zen4, avx512vnni, avx512, avx2; neon), for tests and comparisons
    CC                          the compiler, where it is none of cc, gcc, clang
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).with_name("csrc")
COMPILERS = ("cc", "gcc", "clang")
# -ffp-contract=off: only the fusions in the text, so that every instruction set rounds alike.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=default")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512")
# Best first. zen4 has the instructions of avx512vnni and asks memory as AMD's cores want it (csrc/ahead.h); so does
# avx2, for the AMD cores before it.
ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "zen4": (*_AVX512, "-mavx512vnni", "-DAHEAD_INTO_L2"),
        "avx512vnni": (*_AVX512, "-mavx512vnni"),
        "avx512": _AVX512,
        "avx2": ("-mavx2", "-mfma", "-mf16c", "-DAHEAD_INTO_L2"),
    },
    "aarch64": {"neon": ()},
}
ISA_TITLES = {
    "zen4": "AVX-512 VNNI of AMD",
    "avx512vnni": "AVX-512 VNNI",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "neon": "NEON",
}
HOST_SOURCES = {
    "x86_64": ("pool.c", "layout.c", "processor_x86.c"),
    "aarch64": ("pool.c", "layout.c", "processor_arm.c"),
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True, slots=True, eq=False)
class CpuLibrary:
    """How this machine computes quantized matmuls.

    path: "c" or "torch". isa: the instruction set, None for torch. reason: one clause that says which and why.
    host: the loaded library that runs kernels, None for torch. kernels: where those of `isa` lie.
    """

    path: str
    isa: str | None
    reason: str
    host: Any = None
    kernels: int | None = None

    def run(self, operations: Any, count: int, threads: int) -> None:
        """Run `count` operations, a ctypes array of pointers to the structures of `operations.py`."""
        self.host.qwenfit_run(self.kernels, operations, count, threads)

    def run_here(self, operation: Any) -> None:
        """Run one operation that needs no scratch on the calling thread, whatever other threads run meanwhile."""
        self.host.qwenfit_run_here(self.kernels, ctypes.addressof(operation))


class _NoLibrary(Exception):
    """Why there are no C kernels here."""


def cpu_library() -> CpuLibrary:
    """The C kernels for this process (compiled on first use), or torch with the reason."""
    return _library(os.environ.get("QWENFIT_CPU_PATH", ""), os.environ.get("QWENFIT_CPU_ISA", ""))


@functools.lru_cache(maxsize=8)
def _library(path: str, isa: str) -> CpuLibrary:
    if path not in ("", "c", "torch"):
        raise ValueError(f"QWENFIT_CPU_PATH={path}: it is c or torch, or unset for the best that there is")
    if path == "torch":
        return CpuLibrary("torch", None, "torch packed matmul: QWENFIT_CPU_PATH=torch")
    try:
        host, remark = _host()
        known, available = ISA_FLAGS[_machine()], _offered(host)
        if isa and isa not in available:
            raise ValueError(
                f"QWENFIT_CPU_ISA={isa}: this processor offers {', '.join(available) or 'none of ' + ', '.join(known)}"
            )
        if not available:
            raise _NoLibrary(f"the processor has none of {', '.join(known)}")
        chosen = isa or available[0]
        kernels = _kernels(chosen)
    except _NoLibrary as why:
        if path == "c":
            raise ValueError(f"QWENFIT_CPU_PATH=c, but there are no C kernels: {why}") from None
        return CpuLibrary("torch", None, f"torch packed matmul: {why}")
    forced = ", by QWENFIT_CPU_ISA" if isa else ""
    return CpuLibrary("c", chosen, f"C kernels, {ISA_TITLES[chosen]}{forced}{remark}", host, kernels)


def available_isas() -> tuple[str, ...]:
    """The instruction sets that can be chosen on this machine, best first; () without the C kernels."""
    try:
        host, _ = _host()
    except _NoLibrary:
        return ()
    return _offered(host)


def _offered(host: Any) -> tuple[str, ...]:
    return tuple(name for name in ISA_FLAGS[_machine()] if host.qwenfit_has(name.encode()))


def _machine() -> str:
    machine = platform.machine().lower()
    return MACHINES.get(machine, machine)


@functools.lru_cache(maxsize=1)
def _host() -> tuple[Any, str]:
    """What runs kernels and knows the processor, and a remark on where it lies."""
    if os.name != "posix":
        raise _NoLibrary("the C kernels need POSIX threads")
    machine = _machine()
    if machine not in ISA_FLAGS:
        raise _NoLibrary(f"no C kernels for {machine}, only for {' and '.join(ISA_FLAGS)}")
    library, remark = _loaded("host", [(source, ()) for source in HOST_SOURCES[machine]])
    host = declare(library)
    host.qwenfit_borrow(openmp_of_torch())
    return host, remark


def openmp_of_torch() -> int | None:
    """Where `GOMP_parallel` of the OpenMP runtime lies that torch runs its loops on; None where it cannot be told."""
    import torch

    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None  # not Linux
    runtimes = {
        line.split(maxsplit=5)[5] for line in lines if re.search(r"/lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$", line)
    }
    of_torch = {path for path in runtimes if Path(torch.__file__).parent in Path(path).parents} or runtimes
    if len(of_torch) != 1:
        return None
    entry = getattr(ctypes.CDLL(of_torch.pop()), "GOMP_parallel", None)
    return ctypes.cast(entry, ctypes.c_void_p).value if entry else None


@functools.cache
def _kernels(isa: str) -> int:
    """Where the kernels of an instruction set lie."""
    library, _ = _loaded(isa, [("isa.c", ISA_FLAGS[_machine()][isa])])
    return ctypes.addressof(ctypes.c_char.in_dll(library, "qwenfit_kernels"))


def _loaded(name: str, jobs: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[Any, str]:
    """A library of sources, each with flags of its own: from the cache, or built into it."""
    compiler = find_compiler()
    recipe = repr((_output((*compiler, "--version")), FLAGS, jobs)).encode()
    sources = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256(b"\0".join([recipe, *(path.name.encode() + b"\0" + path.read_bytes() for path in sources)]))
    folder, remark = cache_folder()
    target = folder / f"cpu-{name}-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        build(compiler, jobs, target)
    try:
        return ctypes.CDLL(str(target)), remark
    except OSError as error:
        raise _NoLibrary(f"{target} does not load: {error}") from None


def find_compiler() -> tuple[str, ...]:
    """The C compiler's command; `_NoLibrary` with what was looked for otherwise."""
    if os.environ.get("CC"):
        command = shlex.split(os.environ["CC"])
        if shutil.which(command[0]):
            return tuple(command)
        raise _NoLibrary(f"CC={os.environ['CC']} is no command")
    for name in COMPILERS:
        if shutil.which(name):
            return (name,)
    raise _NoLibrary(f"no compiler found ({', '.join(COMPILERS)})")


def cache_folder() -> tuple[Path, str]:
    """The user's own cache folder, and a remark for the reason: a folder for this process alone where it cannot be
    used."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "qwenfit"
    try:
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        state = folder.stat()
        if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{folder} can be written by others")  # what is loaded from there runs as this user
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:
        return _private_folder(), f" (built for this process: {error})"
    return folder, ""


@functools.lru_cache(maxsize=1)
def _private_folder() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="qwenfit-"))  # 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def build(compiler: Sequence[str], jobs: Sequence[tuple[str, tuple[str, ...]]], target: Path) -> None:
    """Compile sources of `csrc/`, each with flags of its own, all at once, and rename the library to `target`."""
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
        folder = Path(scratch)
        _run_all(
            [
                (*compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(folder / f"{source}.o"))
                for source, flags in jobs
            ]
        )
        objects = [str(folder / f"{source}.o") for source, _ in jobs]
        library = folder / target.name
        _run_all([(*compiler, "-shared", "-o", str(library), *objects, "-lpthread", "-lm")])
        os.chmod(library, 0o700)
        os.replace(library, target)


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    running = [
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    errors = [process.communicate()[1] for process in running]
    for process, error, command in zip(running, errors, commands, strict=True):
        if process.returncode:
            lines = (
                [line for line in error.splitlines() if "error" in line.lower()] or error.splitlines() or ["no message"]
            )
            raise _NoLibrary(f"{command[0]} failed on {Path(command[-3]).name}: {lines[0][:200]}")


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _NoLibrary(f"{' '.join(command)} failed")
    return done.stdout


def declare(handle: Any) -> Any:
    """Argument types of the library's functions, and a check that both sides mean the same structures."""
    from .operations import check_layout

    handle.qwenfit_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    handle.qwenfit_run.restype = None
    handle.qwenfit_run_here.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    handle.qwenfit_run_here.restype = None
    handle.qwenfit_borrow.argtypes = (ctypes.c_void_p,)
    handle.qwenfit_borrow.restype = None
    handle.qwenfit_has.argtypes = (ctypes.c_char_p,)
    handle.qwenfit_has.restype = ctypes.c_int64
    check_layout(handle)
    return handle
