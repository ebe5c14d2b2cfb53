"""The house holds: imports go down only, everything is packaged, and a plain call imports nothing slow."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "profiles": set(),
    "kernels": {"profiles"},
    "planner": {"profiles"},
    "quant": {"profiles", "kernels", "planner"},
    "cli": {"profiles", "kernels", "planner", "quant"},
}
# Inside kernels: what is stored, what is true, what is fast, what runs, what proves it. `cpu` makes one program of a
# whole step of the runtime's model, so it stands above; only `operations.py` reaches up to it, inside a function.
KERNEL_FLOORS = {
    "layout": set(),
    "reference": {"layout"},
    "gpu": {"layout"},
    "runtime": {"layout", "reference"},
    "cpu": {"layout", "reference", "runtime"},
    "proof": {"layout", "reference", "gpu", "runtime", "cpu"},
}
HEAVY = {"torch", "triton", "numpy", "safetensors", "transformers"}  # only kernels and quant may know them
EDGE = {"typer", "pydantic", "yaml", "pynvml"}  # only behind a function that needs them
# `re` and `inspect` come with dataclasses; these would come with nothing that a plain answer needs.
SLOW = HEAVY | EDGE | {"click", "rich", "difflib", "pathlib", "tempfile", "subprocess", "email", "importlib.metadata"}
SLOW |= {"importlib.resources", "shutil", "logging", "asyncio", "socket", "urllib.request", "argparse", "textwrap"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, as absolute dotted names, and whether it does so when it is itself imported."""
    package = ("qwenfit", *file.relative_to(ROOT).parent.parts)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {id(node) for outer in ast.walk(tree) if _delays(outer) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        at_once = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*above, *filter(None, [node.module])))
            yield name, at_once
            if not node.module:
                yield from ((f"{name}.{alias.name}", at_once) for alias in node.names)


def _delays(node: ast.AST) -> bool:
    """Functions run later, and what stands behind TYPE_CHECKING never runs."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down_only(room: str) -> None:
    for file in sources(room):
        for name, _ in imports(file):
            first, *rest = name.split(".")
            assert first not in FLOORS, f"{file} imports {name}: write it as a relative import"
            if first == "qwenfit" and rest:
                assert rest[0] in FLOORS[room] | {room}, f"{file} imports {name}: {room} stands below {rest[0]}"


@pytest.mark.parametrize("room", KERNEL_FLOORS)
def test_imports_inside_kernels_go_down_only(room: str) -> None:
    assert set(KERNEL_FLOORS) == {folder.name for folder in (ROOT / "kernels").iterdir() if any(folder.glob("*.py"))}
    for file in sources(f"kernels/{room}"):
        for name, at_once in imports(file):
            first, *rest = name.split(".")
            if at_once and first == "qwenfit" and rest[:1] == ["kernels"] and rest[1] in KERNEL_FLOORS:
                assert rest[1] in KERNEL_FLOORS[room] | {room}, f"{file} imports {name}: {room} stands below {rest[1]}"


@pytest.mark.parametrize("room", FLOORS)
def test_imports_inside_are_relative(room: str) -> None:
    for file in sources(room):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "qwenfit" for name in named), f"{file}: import it relatively"


@pytest.mark.parametrize("room", ["profiles", "planner", "cli"])
def test_no_torch_upstairs(room: str) -> None:
    for file in sources(room):
        for name, _ in imports(file):
            assert name.split(".")[0] not in HEAVY, f"{file} imports {name}: only kernels and quant may"


def test_nothing_slow_is_imported_at_once() -> None:
    """From the front doors and the engines, through imports at module level only, no slow package is ever reached."""
    modules = {_name(file): file for room in FLOORS for file in sources(room)}
    doors = {"qwenfit.cli.start", "qwenfit.cli.catalogs", "qwenfit.cli.completion", "qwenfit.cli.github"}
    doors |= {"qwenfit.profiles", "qwenfit.planner", *(name for name in modules if ".engines." in name)}
    reached: set[str] = set()
    ahead = sorted(doors | {"qwenfit.cli.plan", "qwenfit.cli.table"})
    while ahead:
        name = ahead.pop()
        if name in reached:
            continue
        reached.add(name)
        for imported, at_once in imports(modules[name]):
            if at_once:
                assert imported.split(".")[0] not in EDGE, (
                    f"{modules[name]} imports {imported}: do it where it is needed"
                )
                ahead += [module for module in (imported, imported.rpartition(".")[0]) if module in modules]
    assert "qwenfit.planner.search" in reached


def _name(file: Path) -> str:
    return ".".join(("qwenfit", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_a_plain_call_imports_nothing_slow() -> None:
    script = (
        "import sys; before = set(sys.modules); from qwenfit.cli.plan import main; "
        "status = main(['--gpu', 'rtx3060', '--ctx', '262144']); "
        "sys.stderr.write(' '.join(set(sys.modules) - before)); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert "rtx3060" in done.stdout
    loaded = set(done.stderr.split())
    assert not loaded & SLOW, sorted(loaded & SLOW)
    assert "qwenfit.planner.search" in loaded


def test_every_folder_is_packaged() -> None:
    """A folder that pyproject.toml forgets works in an editable install and is missing from the wheel."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {file.parent for room in FLOORS for file in [*sources(room), ROOT / room / "py.typed"]}
    packages = {".".join(("qwenfit", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(setup["packages"]) == packages
    assert setup["package-dir"] == {f"qwenfit.{room}": room for room in FLOORS}


def test_package_data_alone_says_what_is_packaged() -> None:
    """True, the default, lets a folder of C sources pass for a package that `packages` forgot: a warning per build."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert setup["include-package-data"] is False


def test_every_data_file_is_packaged() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    for room in FLOORS:
        patterns = [*package_data.get("*", []), *package_data.get(f"qwenfit.{room}", [])]
        for file in (ROOT / room).rglob("*"):
            if file.is_dir() or file.suffix in (".py", ".pyc"):
                continue
            inside = file.relative_to(ROOT / room).as_posix()
            assert any(fnmatch(inside, pattern) and inside.count("/") == pattern.count("/") for pattern in patterns), (
                f"{file} is missing from package-data"
            )


def test_rooms_are_laid_out_as_packaging_needs() -> None:
    for room in FLOORS:
        assert (ROOT / room / "py.typed").exists()
    # With the repository's root on sys.path it would hide the `kernels` distribution from transformers.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # Without it importlib.resources cannot read data under an editable install.
    assert (ROOT / "profiles" / "__init__.py").exists()
    # Either of these puts the root on sys.path, and then `planner` and `kernels` leak as top-level names.
    assert not (ROOT / "tests" / "__init__.py").exists() and not (ROOT / "conftest.py").exists()
    assert not [
        file for room in FLOORS for file in sources(room) if file.stem in ("utils", "util", "common", "helpers")
    ]


def test_the_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]["qwen-plan"] == "qwenfit.cli.start:qwen_plan"
    assert not {word.split(">")[0] for word in project["dependencies"]} & HEAVY


def test_nothing_names_the_place_where_it_was_written() -> None:
    private = ["/".join(("", "work", "")), "/".join(("shared", "facts")), "/".join(("shared", "data")), "pypi" + ".org"]
    files = [file for room in (*FLOORS, "tests", ".ci", ".github", "docs") for file in (ROOT / room).rglob("*")]
    files += list(ROOT.glob("*.md")) + list(ROOT.glob("*.toml")) + list(ROOT.glob(".*.yaml"))
    for file in files:
        if file.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".jsonl", "") and file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            assert not [word for word in private if word in text], file
