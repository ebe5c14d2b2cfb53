"""Launch lines of real plans as they are started: nothing changes but program, checkpoint and address."""

import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from qwenfit.planner import Request, plan
from qwenfit.planner.plan import EnginePlan
from qwenfit.planner.verification import servers
from qwenfit.planner.verification.servers import launch, words_of
from qwenfit.profiles.errors import BadInput, Unsupported


def planned(engine: str, device: str = "rtx3090", model: str = "qwen3.5-9b", **asked: object) -> EnginePlan:
    return plan(Request(model, (device,), 4096, engine=engine, **asked)).best  # type: ignore[arg-type]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with empty programs of the engines' names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("llama-server", "vllm", "python", "ollama"):
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    (tmp_path / "my model.gguf").write_text("")
    return str(tmp_path / "my model.gguf")


def test_llama_cpp(programs: Path, gguf: str) -> None:
    one = planned("llama.cpp")
    made = launch(one, gguf, None, None)
    line = shlex.split(one.command)
    assert line[:2] == ["llama-server", "-m"] and not made.environment
    assert made.words[:3] == (str(programs / "llama-server"), "-m", gguf)
    assert made.words[3 : len(line)] == tuple(line[3:])
    behind = ("--host", "127.0.0.1", "--port", str(made.port), "-lv", "4", "--no-webui")
    assert made.words[len(line) :] == behind
    assert made.address == f"http://127.0.0.1:{made.port}" and made.model == gguf


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_folder_or_a_repository(engine: str, programs: Path, tmp_path: Path) -> None:
    one = planned(engine, weights="bf16")
    line = shlex.split(one.command)
    place = line.index("Qwen/Qwen3.5-9B")
    found = launch(one, None, None, 5555 if engine == "vllm" else None)
    assert Path(found.words[0]).parent == programs
    assert found.words[1 : len(line)] == tuple(line[1:])  # the repository as planned: the engine finds it in its cache
    assert found.words[len(line) :] == ("--host", "127.0.0.1", "--port", str(found.port))
    assert found.port == 5555 or engine == "sglang"
    own = launch(one, str(tmp_path), None, None)
    assert own.words[place] == str(tmp_path) == own.model and own.words[place + 1 : len(line)] == tuple(
        line[place + 1 :]
    )


def test_vllm_on_a_cpu_by_its_interpreter(programs: Path, tmp_path: Path) -> None:
    """NAME=value words in front are the environment; `--binary python` starts the same server as a module."""
    one = planned("vllm", "epyc-rome-8ch-128gb", "qwen3.5-0.8b")
    assert one.command.startswith("VLLM_CPU_KVCACHE_SPACE=")
    line = shlex.split(one.command)
    made = launch(one, str(tmp_path), str(programs / "python"), None)
    assert made.environment == {"VLLM_CPU_KVCACHE_SPACE": line[0].partition("=")[2]}
    start = (str(programs / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path))
    assert made.words[:5] == start and line[1:3] == ["vllm", "serve"]
    assert made.words[5:-4] == tuple(line[4:])
    plain = launch(one, str(tmp_path), None, None)
    assert plain.words[:3] == (str(programs / "vllm"), "serve", str(tmp_path))


def test_ollama(programs: Path) -> None:
    """Its settings are variables, its model a name of its own store, and the line's other commands are not started."""
    one = planned("ollama")
    made = launch(one, None, None, None)
    assert made.words == (str(programs / "ollama"), "serve")
    assert made.environment["OLLAMA_HOST"] == f"127.0.0.1:{made.port}"
    assert made.environment["OLLAMA_CONTEXT_LENGTH"] == "4096" and made.model == shlex.split(one.command)[-1]
    assert launch(one, "mine:9b", None, None).model == "mine:9b"


@pytest.mark.parametrize("engine", ["transformers", "native", "mlx"])
def test_no_servers_of_ours(engine: str) -> None:
    one = planned(engine, "m1-16gb" if engine == "mlx" else "rtx3090", "qwen3.5-4b")
    with pytest.raises(Unsupported, match=f"{engine} is no server that is started here: plans for llama.cpp, vllm"):
        launch(one, None, None, None)


def test_what_is_missing(programs: Path, gguf: str, tmp_path: Path) -> None:
    one = planned("llama.cpp")
    with pytest.raises(BadInput, match=r"there is no Qwen3\.5-9B-\S+\.gguf here: give --checkpoint"):
        launch(one, None, None, None)
    with pytest.raises(BadInput, match=r"llama\.cpp loads a \.gguf file$"):
        launch(one, str(tmp_path), None, None)
    with pytest.raises(BadInput, match=r"vllm loads a folder$"):
        launch(planned("vllm"), gguf, None, None)
    with pytest.raises(BadInput, match=r"there is no \./nowhere here"):
        launch(planned("vllm"), "./nowhere", None, None)
    (programs / "llama-server").unlink()
    sentence = r"^llama-server is not on the PATH: give --binary PATH of llama\.cpp's program \(docs/verify\.md"
    with pytest.raises(BadInput, match=sentence):
        launch(one, gguf, None, None)


def test_ports(programs: Path, gguf: str) -> None:
    one = planned("llama.cpp")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(
            BadInput, match=rf"^port {number} cannot be used: Address already in use; give another --port"
        ):
            launch(one, gguf, None, number)
    assert launch(one, gguf, None, number).port == number
    for wrong in (-1, 65536, 10**30):
        with pytest.raises(BadInput, match=rf"^port {wrong} cannot be used: "):
            launch(one, gguf, None, wrong)


def test_every_server_has_a_rule_for_its_line() -> None:
    """The word that names the model stands in every line that is planned."""
    for engine, rule in servers.RULES.items():
        assert rule.model_after in shlex.split(planned(engine).command), engine


def test_lines_for_others_have_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "m.json").write_text("{}")
    words = [sys.executable, "-m", str(tmp_path / "secret" / "m.gguf"), f"--mmproj={tmp_path}/v.gguf", "~/me/x"]
    words += ["./a/b", "mine/m.json", "Qwen/Qwen3.5-9B", "--ts", "20,21", "a word"]
    found = words_of(words, {"VLLM_CPU_KVCACHE_SPACE": "4", "X": "a b"})
    program = os.path.basename(sys.executable)
    behind = "-m m.gguf --mmproj=v.gguf x b m.json Qwen/Qwen3.5-9B --ts 20,21 'a word'"
    assert found == f"VLLM_CPU_KVCACHE_SPACE=4 X='a b' {program} {behind}"
