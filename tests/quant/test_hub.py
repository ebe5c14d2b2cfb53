"""Repositories: from the cache, from a hub (a stand-in on this machine), or a sentence.

huggingface_hub reads its environment when it is imported, so every question is asked in a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="the hub's client: pip install huggingface_hub")

REPO, COMMIT = "made/tiny", "a" * 40
ASK = """
import json, sys
from qwenfit.profiles.errors import QwenfitError
from qwenfit.profiles.checkpoint import stored_tensors
from qwenfit.quant.hub import hub_folder
try:
    folder = hub_folder(*sys.argv[1:])
    print(json.dumps([folder, len(stored_tensors(folder))]))
except QwenfitError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as a download needs, of one repository in a folder."""

    folder: Path
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer(is_head=False)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, is_head: bool) -> None:
        server: Any = self.server
        path = self.path.split("?")[0]
        server.asked.append(path)
        name = path.rpartition("/")[2]
        files = sorted(file.name for file in server.folder.iterdir())
        if f"api/models/{REPO}/" in path and not path.endswith("nothing"):
            siblings = [{"rfilename": file} for file in files]
            entries = [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in files]
            body: Any = entries if "/tree/" in path else {"id": REPO, "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(body).encode(), is_head)
        elif f"/{REPO}/resolve/" in path and name in files:
            self.send(200, (server.folder / name).read_bytes(), is_head)
        else:
            missing = "RevisionNotFound" if f"api/models/{REPO}/" in path else "RepoNotFound"
            self.send(404, b"{}", is_head, missing)

    def send(self, status: int, body: bytes, is_head: bool, error: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        if error:
            headers["X-Error-Code"] = error
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body)


@pytest.fixture
def hub(checkpoint: Any, tmp_path: Path) -> Iterator[Hub]:
    """Beside the checkpoint, the repository holds what must not be fetched: a pickle and code."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for file in checkpoint("qwen3_5").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    (folder / "modeling.py").write_text("raise SystemExit")
    server = Hub(("127.0.0.1", 0), Handler)
    server.folder, server.asked = folder, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(tmp_path: Path, endpoint: str, *words: str, **more: str) -> list[Any]:
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **more}
    command = [sys.executable, "-c", ASK, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_download_then_cache(hub: Hub, tmp_path: Path) -> None:
    """Weights, tokenizer and template come; the second time nothing is asked for."""
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    folder, count = ask(tmp_path, endpoint, REPO)
    assert count == 70 and folder.startswith(str(tmp_path / "home")) and COMMIT in folder
    fetched = {path.name for path in Path(folder).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= fetched
    assert not [name for name in fetched if name.endswith((".bin", ".py"))]
    hub.asked.clear()
    assert ask(tmp_path, endpoint, REPO) == [folder, 70] and not hub.asked
    assert ask(tmp_path, "http://127.0.0.1:9", REPO, HF_HUB_OFFLINE="1") == [folder, 70]
    # What is lost from the cache is fetched anew.
    os.unlink(Path(folder) / "model.safetensors")
    assert ask(tmp_path, endpoint, REPO) == [folder, 70] and hub.asked


def test_offline_is_one_sentence(tmp_path: Path) -> None:
    kind, sentence = ask(tmp_path, "http://127.0.0.1:9", REPO, HF_HUB_OFFLINE="1")
    assert kind == "BadInput" and "is not complete in" in sentence and "HF_HUB_OFFLINE is set: unset it" in sentence
    kind, sentence = ask(tmp_path, "http://127.0.0.1:9", REPO)
    assert (kind, sentence) == (
        "BadInput",
        "made/tiny is not in the cache, and http://127.0.0.1:9 cannot be reached: go online, or give a folder",
    )


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    kind, sentence = ask(tmp_path, endpoint, "made/nothing")
    assert kind == "UnknownName" and "neither a folder here nor a repository on the hub" in sentence
    kind, sentence = ask(tmp_path, endpoint, REPO, "nothing")
    assert kind == "UnknownName" and "made/tiny has no revision 'nothing'" in sentence


def test_catalog_names_are_repositories(tmp_path: Path) -> None:
    _, sentence = ask(tmp_path, "http://127.0.0.1:9", "9b")
    assert sentence.startswith("Qwen/Qwen3.5-9B is not in the cache")
