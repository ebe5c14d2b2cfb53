"""`qwen-plan verify` in a process of its own. Engines are small scripts that print a log and serve /health and
/v1/completions, and natively it is a model of 4 layers: what llama.cpp and vLLM really do is asked by the mark
`engines` (tests/engines/test_verify.py)."""

import importlib.util
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwenfit.cli.plan import main
from qwenfit.planner import Request, plan
from qwenfit.planner.documents import digest
from qwenfit.planner.plan_file import read_plan
from qwenfit.planner.receipt_file import read_receipt
from qwenfit.planner.scores import at_boot

DATA = Path(__file__).parent / "data"
TINY = str(DATA / "tiny_qwen3_5.json")
MIB = 1 << 20
BOX = """
name: my-box
vendor: cpu
kind: cpu
architecture: x86_64
memory_gib: 16
memory_bandwidth_bytes_per_s: 18000000000
flops_per_s: {fp32: 100000000000}
"""
# What llama-server b11434 prints of its buffers (tests/data/logs/llamacpp-b11434-cpu.log), with the figures of a plan.
LOG = """0.00.043 I cmn  common_param: common_params_print_info: build 0 (unknown) with GNU 12.2.0 for Linux x86_64
0.00.055 I srv    load_model: loading model '/home/ada/secrets/model.gguf'
0.00.363 I load_tensors:   CPU_Mapped model buffer size = {weights:8.2f} MiB
0.00.366 I llama_context: constructing llama_context
0.00.366 I llama_context: n_seq_max             = 1
0.00.366 I llama_context: n_ctx                 = 1024
0.00.377 I llama_kv_cache:        CPU KV buffer size = {kv_cache:8.2f} MiB
0.00.380 I llama_memory_recurrent:        CPU RS buffer size = {recurrent_state:8.2f} MiB
0.00.408 I sched_reserve:        CPU compute buffer size = {activation:8.2f} MiB
0.00.800 I srv  llama_server: listening on http://127.0.0.1:8080
"""
FAKE = """#!{python}
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

mode, folder = {mode!r}, os.path.dirname(os.path.abspath(__file__))
print(open(os.path.join(folder, "boot.log")).read(), flush=True)
with open(os.path.join(folder, "pids"), "w") as file:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    file.write(f"{{os.getpid()}} {{child.pid}}")
if mode == "dies":
    sys.exit("error: unknown model architecture of /home/ada/secrets/model.gguf")
if mode == "memory":
    print("ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate CPU buffer of size 1234567890", flush=True)
    sys.exit(1)
if mode == "killed":
    os.kill(os.getpid(), 9)
if mode == "hangs":
    time.sleep(120)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"data": [{{"id": "fake"}}]}}')

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mode == "silent":
            time.sleep(120)
        if mode == "dies late":
            print("ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate CPU buffer of size 99", flush=True)
            os._exit(1)
        if mode == "refuses":
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{{"error": {{"message": "prompt too long"}}}}')
            return
        self.send_response(200)
        self.end_headers()
        for number in range(asked["max_tokens"]):
            piece = {{"choices": [{{"text": " a", "finish_reason": None}}]}}
            self.wfile.write(b"data: " + json.dumps(piece).encode() + b"\\n\\n")
            time.sleep(0.001)
        usage = {{"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}}
        self.wfile.write(b"data: " + json.dumps({{"choices": [], "usage": usage}}).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str

    @property
    def sentence(self) -> str:
        """The last line on stderr."""
        return self.stderr.strip().splitlines()[-1]


class Bench:
    """A folder with a device, a plan for llama.cpp, its checkpoint, and a program that stands for the engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "box.yaml").write_text(BOX)
        self.gguf = made_gguf(folder / "model.gguf")
        self.plan = self.planned("plan.json", str(self.gguf), "llama.cpp")
        memory = at_boot(read_plan(str(self.plan)).plan, "device0")
        assert memory
        self.memory = memory

    def planned(self, name: str, model: str, engine: str, **more: Any) -> Path:
        box = (str(self.folder / "box.yaml"),)
        found = plan(Request(model, box, **{"ctx_tokens": 1024, **more}, engine=engine))
        path = self.folder / name
        path.write_text(json.dumps(found.to_json()))
        return path

    def engine(self, mode: str, **changed: float) -> str:
        """The program. `changed`: parts by which its log differs from the plan."""
        parts = {name: changed.get(name, 1) * part.mid / MIB for name, part in self.memory.parts.items()}
        text = LOG.format(**parts)
        (self.folder / "boot.log").write_text(text if mode not in ("dies", "memory", "killed") else text[:200])
        program = self.folder / "llama-server"
        program.write_text(FAKE.format(python=sys.executable, mode=mode))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return str(program)

    def words(self, *more: str, plan: Path | None = None) -> list[str]:
        start = [sys.executable, "-m", "qwenfit.cli.plan", "verify", str(plan or self.plan)]
        return [*start, *more]

    def verify(self, *more: str, plan: Path | None = None) -> Done:
        done = subprocess.run(
            self.words(*more, plan=plan), capture_output=True, text=True, timeout=120, cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def refused(self, capsys: pytest.CaptureFixture[str], *more: str, plan: Path | None = None) -> str:
        """The sentence, without a process of its own: nothing is started."""
        status = main(["verify", str(plan or self.plan), *more])
        out, err = capsys.readouterr()
        assert (status, out) == (2, "") and len(err.splitlines()) == 1, (status, out, err)
        return err

    def in_engine(self, mode: str, *more: str, **changed: float) -> Done:
        words = ("--engine", "llama.cpp", "--binary", self.engine(mode, **changed), "--memory-only", *more)
        return self.verify(*words, "--output-tokens", "4", "--prompt-tokens", "16")

    def nobody_is_left(self) -> bool:
        """Of the engine and its child, which leave their numbers in a file."""
        return all(is_gone(int(pid)) for pid in (self.folder / "pids").read_text().split())


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def made_gguf(path: Path) -> Path:
    """The model of tests/bench/llama_server.py, 22 MB."""
    pytest.importorskip("gguf", reason="gguf writes the checkpoint")
    spec = importlib.util.spec_from_file_location("bench_llama_server", Path(__file__).parent / "bench/llama_server.py")
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.write_model(str(path))
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("secretfolder"))


linux = pytest.mark.skipif(sys.platform != "linux", reason="what is left behind is read from /proc")


@linux
def test_an_engine_that_does_as_planned(bench: Bench) -> None:
    """0, with its verification, its receipt and its log; nobody is left, and no file says whose machine this is."""
    out, receipt, log = (bench.folder / name for name in ("v.json", "r.json", "kept.log"))
    for path in (out, receipt, log):
        path.unlink(missing_ok=True)
    done = bench.in_engine("serves", "--output", str(out), "--receipt", str(receipt), "--log", str(log))
    assert done.status == 0, done
    assert done.stdout.startswith("The plan holds: memory as planned") and "3 requests of 16 tokens" in done.stdout
    assert "decode at 18 tokens" in done.stdout and bench.nobody_is_left()
    told, made = json.loads(out.read_text()), read_receipt(str(receipt))
    assert told["holds"] and told["kind"] == "verification" and told["schema"] == 1
    assert told["plan_sha256"] == json.loads(bench.plan.read_text())["sha256"]
    assert told["command"].startswith("llama-server -m model.gguf -c 1024 -np 1")
    assert told["weights_from"] == "checkpoint"
    assert {one["part"] for one in told["scores"]} >= {"weights", "kv_cache", "recurrent_state", "activation", "total"}
    assert made.log.engine == "llama.cpp" and made.scores and told["plan_sha256"][:12] in (made.source or "")
    assert "listening on" in log.read_text()
    for path in (out, receipt):
        text = path.read_text()
        for word in ("/home", "/ada", "secrets", str(bench.folder), f'"{socket.gethostname()}"', "8080"):
            assert word not in text, word


@linux
def test_json_is_the_verification(bench: Bench) -> None:
    done = bench.in_engine("serves", "--json")
    assert done.status == 0 and json.loads(done.stdout)["engine"] == "llama.cpp"
    assert all(line.startswith("qwen-plan: ") for line in done.stderr.splitlines())


@linux
@pytest.mark.parametrize("part", ["weights", "kv_cache", "activation"])
def test_an_engine_that_takes_more(part: str, bench: Bench) -> None:
    done = bench.in_engine("serves", **{part: 1.5})
    assert done.status == 1 and done.stdout.startswith("The plan does not hold: memory is more than 5% off")


FAILING = {
    # mode -> status, what the last line says
    "dies": (2, "llama.cpp ended by itself with status 1; it said last: error: unknown model architecture of PATH"),
    "memory": (1, "It ran out of memory: failed to allocate"),
    "killed": (1, "It ran out of memory: it was killed (signal 9), as Linux does where memory runs out"),
    "hangs": (2, "the engine was not ready after 1 s and was stopped: give a longer --boot-limit; it said last: "),
    "silent": (2, "the engine did not answer a request: it took too long"),
    "dies late": (1, "It ran out of memory: failed to allocate"),
    "refuses": (2, 'the engine refused a request with status 400: {"error": {"message": "prompt too long"}}'),
}


@linux
@pytest.mark.parametrize("mode", FAILING)
def test_engines_that_fail(mode: str, bench: Bench) -> None:
    status, sentence = FAILING[mode]
    limits = ("--boot-limit", "1" if mode == "hangs" else "60", "--limit", "1")
    receipt = bench.folder / f"{mode}.json"
    done = bench.in_engine(mode, *limits, "--receipt", str(receipt))
    assert done.status == status, done
    assert sentence in (done.stdout if status == 1 else done.sentence).replace("\n    ", " ")
    assert bench.nobody_is_left() and receipt.exists() == (status == 1)
    if status == 1:
        assert read_receipt(str(receipt)).log.died
    else:
        assert done.stdout == ""


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("mode", ["hangs", "silent"])
def test_interrupted(mode: str, number: signal.Signals, bench: Bench, interruptible: Callable[[], None]) -> None:
    """While the engine boots, and while it answers: 130, one sentence, nobody left."""
    (bench.folder / "pids").unlink(missing_ok=True)
    words = bench.words("--engine", "llama.cpp", "--binary", bench.engine(mode), "--output", "never.json")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    asked = subprocess.Popen(words, cwd=bench.folder, preexec_fn=interruptible, **pipes)
    try:
        marks = {"hangs": "starts", "silent": "is ready"}
        assert asked.stderr
        while marks[mode] not in (line := asked.stderr.readline()):
            assert line
        until(lambda: (bench.folder / "pids").exists() and len((bench.folder / "pids").read_text().split()) == 2)
        asked.send_signal(number)
        out, err = asked.communicate(timeout=40)
    finally:
        asked.kill()
    assert (asked.returncode, out) == (130, "") and not (bench.folder / "never.json").exists()
    assert err == "qwen-plan: interrupted: what was started is stopped, and nothing is written\n"
    assert bench.nobody_is_left()


def until(holds: Callable[[], object], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


def test_a_port_in_use(bench: Bench, taken: int) -> None:
    done = bench.in_engine("serves", "--port", str(taken))
    assert done.status == 2
    assert (
        done.sentence == f"qwen-plan: port {taken} cannot be used: Address already in use; give another --port, or none"
    )


def test_plans_that_cannot_be_tried(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """An edited plan, a stale one, one for another engine, another checkpoint: 2, and a sentence each."""
    document = json.loads(bench.plan.read_text())
    edited = bench.folder / "edited.json"
    edited.write_text(json.dumps({**document, "request": {**document["request"], "ctx_tokens": 2048}}))
    stale = bench.folder / "stale.json"
    entry = document["plans"][0]
    share = entry["devices"][0]
    memory = {**share["memory"], "kv_cache_bytes": share["memory"]["kv_cache_bytes"] + 1}
    old = {**document, "plans": [{**entry, "devices": [{**share, "memory": memory}]}]}
    stale.write_text(json.dumps({**old, "sha256": digest(old)}))
    other = bench.planned("other.json", "qwen3.5-0.8b", "llama.cpp", weights="q8_0")
    for path, more, sentence in (
        (edited, (), "was changed after it was made: its sha256 is of something else"),
        (stale, (), "is out of date: it plans 2,097,153 kv cache bytes"),
        (bench.plan, ("--engine", "vllm"), "has no plan for 'vllm', but for llama.cpp: give --engine llama.cpp"),
        (bench.plan, ("--engine", "mlx"), "has no plan for 'mlx'"),
        (bench.folder / "no.json", (), "no.json"),
        (other, ("--checkpoint", str(bench.gguf)), "does not match the plan: its hidden_size is 512, planned was 1024"),
        (other, (), "there is no Qwen3.5-0.8B-Q8_0.gguf here: give --checkpoint, or make it with qwen-quant"),
        (bench.plan, ("--checkpoint", str(bench.folder)), "llama.cpp loads a .gguf file"),
        (bench.plan, ("--layers", "4"), "--layers is for the native runtime: llama.cpp loads whole models"),
    ):
        asked = () if "--engine" in more else ("--engine", "llama.cpp")
        assert sentence in bench.refused(capsys, *asked, "--binary", bench.engine("serves"), *more, plan=path)
    assert "has no plan for 'native', but for llama.cpp: give --engine llama.cpp" in bench.refused(capsys)


def test_options_are_checked_before_anything_starts(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    kept = bench.folder / "precious.log"
    kept.write_text("mine")
    for more, sentence in (
        (("--tolerance", "1"), "--tolerance 1: give a share of at least 0 and less than 1, such as 0.05"),
        (("--tolerance", "nan"), "--tolerance nan: give a share"),
        (("--limit", "0"), "--limit 0: give more than 0"),
        (("--boot-limit", "nan"), "--boot-limit nan: give more than 0"),
        (("--steps", "0"), "--steps 0: give more than 0"),
        (("--log", str(kept)), "precious.log is there already: give --log another name"),
        (("--output", "nowhere/v.json"), "nowhere/v.json cannot be written: nowhere is no folder"),
        (("--binary", "/nowhere/llama-server"), "/nowhere/llama-server is not on the PATH: give --binary PATH"),
        (("--port", "70000"), "port 70000 cannot be used: "),
    ):
        words = ("--engine", "llama.cpp", "--binary", bench.engine("serves"), *more)
        assert sentence in bench.refused(capsys, *words)
    assert kept.read_text() == "mine"


def test_a_native_run(bench: Bench) -> None:
    """The tiny model drawn and run: exact parts are exact. A verdict of no is an answer, for a machine of tests is as
    slow as it is."""
    pytest.importorskip("torch", reason="the native runtime needs torch")
    path = bench.planned("native.json", TINY, "native", ctx_tokens=256, weights="int4")
    receipt = bench.folder / "native.receipt.json"
    words = ("--steps", "4", "--memory-only", "--json", "--receipt", str(receipt))
    done = bench.verify(*words, plan=path)
    told = json.loads(done.stdout)
    assert done.status == (0 if told["holds"] else 1)
    errors = {one["part"]: one for one in told["scores"]}
    assert all(errors[part]["within"] for part in ("weights", "kv_cache", "recurrent_state"))
    assert errors["kv_cache"]["measured_bytes"] == errors["kv_cache"]["planned_bytes"]["mid"] == 2 * 2 * 256 * 64 * 2
    assert abs(errors["total"]["error"]) < 0.25
    assert [one["at_tokens"] for one in told["rates"]] == [252, 252] and told["weights_from"] == "synthetic"
    assert "drawn at random" in " ".join(told["notes"])
    made = read_receipt(str(receipt))
    assert made.log.engine == "native" and made.request.engine == "native@0.1"
    text = receipt.read_text() + done.stdout
    assert str(bench.folder) not in text and str(DATA) not in text and socket.gethostname() not in text


def test_native_runs_that_cannot_be(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, find = bench.planned("n.json", TINY, "native", ctx_tokens=256, weights="int4"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    assert "a native run needs torch: pip install" in bench.refused(capsys, plan=path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True if name == "torch" else find(name, *rest))
    for more, sentence in (
        (("--steps", "300"), "a context of 256 tokens has no room for 300 steps: give --steps"),
        (("--port", "80"), "--binary and --port are for an engine"),
        (("--checkpoint", str(bench.gguf)), "the native runtime loads folders of safetensors"),
        (
            ("--layers", "4", "--receipt", "r.json"),
            "--receipt and --layers: a receipt is planned anew as a whole model",
        ),
        (("--layers", "3"), "3 layers of tiny_qwen3_5: give a multiple of 4, up to 4"),
    ):
        assert sentence in bench.refused(capsys, *more, plan=path)
