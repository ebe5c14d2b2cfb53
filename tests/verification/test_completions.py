"""Requests beside a stand-in server in a thread. The streams are those that llama.cpp b11434, vLLM 0.32, SGLang 0.5 and
Ollama 0.31 send, cut to the fields that are read; what a broken engine sends is made up."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qwenfit.planner.verification import completions
from qwenfit.planner.verification.completions import Answer, ask_tokens, ask_words, is_ready, served_name
from qwenfit.profiles.errors import BadInput

Act = Callable[[BaseHTTPRequestHandler], None]


class StandIn:
    """Answers every request by `act`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.act: Act = lambda handler: None
        self.asked: list[tuple[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, None))
                outer.act(self)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((self.path, json.loads(body)))
                outer.act(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def sends(self, body: bytes, status: int = 200, pause_s: float = 0.0) -> None:
        """A body whose end is the connection's."""

        def act(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.end_headers()
            for line in body.splitlines(keepends=True):
                handler.wfile.write(line)
                handler.wfile.flush()
                time.sleep(pause_s)

        self.act = act

    def ask(self, prompt: int = 5, output: int = 3, limit_s: float = 20.0) -> Answer:
        return ask_tokens(self.address, "m", prompt, output, 2048, 1, limit_s)


@pytest.fixture
def engine() -> Iterator[StandIn]:
    made = StandIn()
    yield made
    made.server.shutdown()
    made.server.server_close()


def sse(*events: dict[str, Any] | str) -> bytes:
    return b"".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n".encode() for one in events)


def piece(text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"text": text, "index": 0, "finish_reason": reason}], **more}


TOLD = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}}
DEAD = {"error": {"message": "engine is dead", "code": 500}}
STREAMS = {
    # the last piece is empty, and the usage comes behind it without a choice
    "llama-server": sse(piece(" a"), piece(""), piece(" c"), piece("", "length"), TOLD, "[DONE]"),
    # the last token comes with the reason of the end
    "vllm": sse(piece(" a"), piece(" b"), piece(" c", "length"), TOLD, "[DONE]"),
    "sglang": b": keep-alive\n\n" + sse(piece(" a", usage=None), piece(" b", usage=None)) + b"\n"
    + sse(piece(" c", "length"), TOLD, "[DONE]"),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_the_engines(name: str, engine: StandIn) -> None:
    engine.sends(STREAMS[name], pause_s=0.01)
    answer = engine.ask()
    assert (answer.prompt_tokens, answer.output_tokens) == (5, 3)
    assert 0 < answer.first_token_s < answer.last_token_s
    rate = answer.decode_tokens_per_s
    assert rate == pytest.approx(2 / (answer.last_token_s - answer.first_token_s))
    path, body = engine.asked[-1]
    assert path == "/v1/completions" and body["stream"] and body["max_tokens"] == 3 and body["ignore_eos"]
    assert len(body["prompt"]) == 5 and all(256 <= token < 2048 for token in body["prompt"])


def test_seconds_of_the_last_token_count(engine: StandIn) -> None:
    """vLLM's last token stands in the piece that ends: without it the rate would be that of two tokens in one gap."""
    engine.sends(STREAMS["vllm"], pause_s=0.05)  # two lines per event, so 0.1 s from token to token
    answer = engine.ask()
    assert answer.last_token_s - answer.first_token_s == pytest.approx(0.2, abs=0.08)


def test_ollama(engine: StandIn) -> None:
    lines = [{"response": " a", "done": False}, {"response": " b", "done": False}]
    end = {"done": True, "done_reason": "length", "prompt_eval_count": 11, "eval_count": 2}
    engine.sends(b"".join(json.dumps(one).encode() + b"\n" for one in [*lines, end]), pause_s=0.01)
    answer = ask_words(engine.address, "qwen3.5:9b", 8, 2, 1, 20.0)
    assert (answer.prompt_tokens, answer.output_tokens) == (11, 2) and answer.decode_tokens_per_s
    path, body = engine.asked[-1]
    assert path == "/api/generate" and body["raw"] and len(body["prompt"].split()) == 8


def test_every_seed_is_another_prompt(engine: StandIn) -> None:
    """A prefix that is known already is not read again, and its time would be no measurement."""
    engine.sends(STREAMS["vllm"])
    for seed in (1, 2, 1):
        ask_tokens(engine.address, "m", 64, 3, 152_000, seed, 20.0)
        ask_tokens(engine.address, "m", 4, 3, 16, seed, 20.0)
    prompts = [body["prompt"] for _, body in engine.asked]
    assert prompts[0] == prompts[4] != prompts[2] and prompts[0][0] != prompts[2][0]
    assert all(0 <= token < 16 for token in prompts[1])  # of a tiny vocabulary too


def test_one_token_has_no_rate(engine: StandIn) -> None:
    engine.sends(sse(piece(" a", "length"), "[DONE]"))
    assert engine.ask().decode_tokens_per_s is None


BROKEN = {
    "refused": (400, b'{"error":\n "too long"}', 'refused a request with status 400: {"error": "too long"}'),
    "an error in the stream": (200, sse(piece(" a"), DEAD), "broke off an answer: engine is dead"),
    "an error instead of a stream": (200, b'{"error": "model not found"}\n', "broke off an answer: model not found"),
    "closed in the middle": (200, sse(piece(" a"), piece(" b")), "broke off behind 2 pieces"),
    "nothing": (200, b"", "without a single token"),
    "no token": (200, sse(piece("", "length"), "[DONE]"), "without a single token"),
    "garbage": (200, b"data: \x00\xff{{{\n", "did not answer a request: "),
    "nested": (200, b"data: " + b"[" * 100_000 + b"\n", "did not answer a request: "),
    "lists and numbers": (200, b"data: [1]\n\ndata: 3\n\ndata: {\"choices\": 7}\n", "without a single token"),
    "a page": (200, b"<html>\n<body>hello\n", "without a single token"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_answers_are_sentences(name: str, engine: StandIn) -> None:
    status, body, sentence = BROKEN[name]
    engine.sends(body, status)
    with pytest.raises(BadInput) as raised:
        engine.ask()
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_a_server_that_hangs(engine: StandIn) -> None:
    engine.act = lambda handler: time.sleep(5)
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"did not answer a request: it took too long"):
        engine.ask(limit_s=0.3)
    assert not is_ready(engine.address, "/health", 0.3) and time.monotonic() - began < 4


def test_a_server_that_drips(engine: StandIn) -> None:
    """Byte after byte, and never a line: no read takes long, and the answer has no end."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.02)

    engine.act = drip
    began = time.monotonic()
    with pytest.raises(BadInput, match="it took too long"):
        engine.ask(limit_s=0.4)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("line", [b"x", sse(piece(" a"))])
def test_endless_answers(line: bytes, engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(completions, "MAX_STREAM_BYTES", 1 << 20)

    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        block = line * (100_000 // len(line))
        for _ in range(50):
            handler.wfile.write(block)

    def act(handler: BaseHTTPRequestHandler) -> None:
        try:
            flood(handler)
        except OSError:  # nobody listens any more
            handler.close_connection = True

    engine.act = act
    with pytest.raises(BadInput, match=r"did not answer a request: [\d,]+ bytes came"):
        engine.ask()


@pytest.mark.parametrize(
    "raw", [b"garbage\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nda"]
)
def test_what_is_no_http(raw: bytes, engine: StandIn) -> None:
    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(raw)
        handler.close_connection = True

    engine.act = act
    with pytest.raises(BadInput, match="did not answer a request: "):
        engine.ask()
    if not raw.startswith(b"HTTP"):
        assert not is_ready(engine.address, "/health")
    with pytest.raises(BadInput, match="does not say which model it serves"):
        served_name(engine.address)


def test_nobody_there() -> None:
    assert not is_ready("http://127.0.0.1:1", "/health")
    with pytest.raises(BadInput, match=r"did not answer a request: .*refused"):
        ask_tokens("http://127.0.0.1:1", "m", 4, 1, 1000, 1, 5.0)


def test_ready_and_its_name(engine: StandIn) -> None:
    engine.sends(b'{"data": [{"id": "qwen"}]}', 200)
    assert is_ready(engine.address, "/health") and served_name(engine.address) == "qwen"
    engine.sends(b"loading", 503)
    assert not is_ready(engine.address, "/health")
    engine.sends(b'{"data": []}')
    with pytest.raises(BadInput, match="does not say which model it serves"):
        served_name(engine.address)


def test_no_proxy_is_asked(engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    engine.sends(STREAMS["vllm"])
    assert engine.ask().output_tokens == 3 and is_ready(engine.address, "/health")


def test_no_redirection_is_followed(engine: StandIn) -> None:
    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "http://192.0.2.1/")
        handler.end_headers()

    engine.act = act
    assert not is_ready(engine.address, "/health")
    with pytest.raises(BadInput, match="refused a request with status 302"):
        engine.ask()
