"""Requests to an engine that serves on this machine: random tokens in, tokens streamed out, the clock beside them.

llama-server, vLLM and SGLang take lists of token numbers at /v1/completions (OpenAI's protocol) and stop early for
nothing where `ignore_eos` is set; Ollama takes text at /api/generate. No proxy is asked and no redirection followed:
the address is our own. What comes back is bounded in time and bytes.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse
from random import Random
from typing import Any

from ...profiles.errors import BadInput
from ...profiles.frozen import dataclass

MAX_LINE_BYTES = 1 << 20
MAX_ANSWER_BYTES = 1 << 20
MAX_STREAM_BYTES = 64 << 20
READY_S, NAME_S = 5.0, 30.0
LOWEST_TOKEN, HIGHEST_TOKEN = 256, 100_000  # ordinary words of the family's vocabulary
WORDS = ("river", "seven", "light", "copper", "under", "garden", "question", "north", "letter", "paper", "again")


@dataclass(frozen=True, slots=True)
class Answer:
    """One request. Seconds are from its sending on."""

    prompt_tokens: int
    output_tokens: int
    first_token_s: float
    last_token_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.first_token_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Behind the first token; None where there is only one."""
        rest = self.last_token_s - self.first_token_s
        return (self.output_tokens - 1) / rest if self.output_tokens > 1 and rest > 0 else None

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "first_token_s": self.first_token_s,
            "last_token_s": self.last_token_s,
        }


def is_ready(address: str, path: str, limit_s: float = READY_S) -> bool:
    """Whether it answers 200 there."""
    try:
        return _get(address, path, limit_s)[0] == 200
    except (OSError, ValueError, HTTPException):
        return False


def served_name(address: str) -> str:
    """What the engine calls its model, for the requests."""
    try:
        _, body = _get(address, "/v1/models", NAME_S)
        return str(json.loads(body)["data"][0]["id"])[:500]
    except (OSError, ValueError, HTTPException, KeyError, IndexError, TypeError, RecursionError):
        raise BadInput(f"the engine at {address} does not say which model it serves") from None


def _get(address: str, path: str, limit_s: float) -> tuple[int, bytes]:
    connection = HTTPConnection(_host(address), timeout=max(0.1, limit_s))
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER_BYTES)
    finally:
        connection.close()


def _host(address: str) -> str:
    return address.removeprefix("http://")


def ask_tokens(
    address: str, model: str, prompt_tokens: int, output_tokens: int, vocabulary: int, seed: int, limit_s: float
) -> Answer:
    """A prompt of random tokens, another one for every seed, so that no prefix is known already."""
    draw = Random(seed)
    top = min(HIGHEST_TOKEN, vocabulary)
    bottom = min(LOWEST_TOKEN, top // 2)
    body = {
        "model": model,
        "prompt": [draw.randrange(bottom, top) for _ in range(prompt_tokens)],
        "max_tokens": output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "cache_prompt": False,
    }
    return _timed(address, "/v1/completions", body, prompt_tokens, limit_s, _openai_event)


def ask_words(address: str, model: str, prompt_tokens: int, output_tokens: int, seed: int, limit_s: float) -> Answer:
    """A prompt of about so many tokens in words (Ollama); the answer says how many it was."""
    draw = Random(seed)
    body = {
        "model": model,
        "prompt": " ".join(draw.choice(WORDS) for _ in range(prompt_tokens)),
        "raw": True,
        "stream": True,
        "options": {"num_predict": output_tokens, "temperature": 0},
    }
    return _timed(address, "/api/generate", body, prompt_tokens, limit_s, _ollama_event)


@dataclass(frozen=True, slots=True)
class _Event:
    """One line of a stream: whether it brings a token or ends the answer, and how many tokens there were, where it says
    so."""

    is_token: bool = False
    is_end: bool = False
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def _timed(
    address: str,
    path: str,
    body: Mapping[str, object],
    prompt_tokens: int,
    limit_s: float,
    read: Callable[[bytes], _Event],
) -> Answer:
    first = last = 0.0
    pieces, read_tokens, written_tokens, has_ended = 0, prompt_tokens, 0, False
    connection = HTTPConnection(_host(address), timeout=limit_s)
    began = time.perf_counter()
    try:
        for line in _lines(connection, path, body, began + limit_s):
            event = read(line)
            if event.is_token:
                last = time.perf_counter() - began
                first = first or last
                pieces += 1
            has_ended = has_ended or event.is_end
            read_tokens = event.prompt_tokens or read_tokens
            written_tokens = event.output_tokens or written_tokens
    except BadInput:
        raise
    except (OSError, ValueError, HTTPException, RecursionError) as error:
        reason = "it took too long" if isinstance(error, TimeoutError) else " ".join(str(error).split())[:200]
        raise BadInput(f"the engine did not answer a request: {reason or type(error).__name__}") from None
    finally:
        connection.close()
    if not pieces:
        raise BadInput("the engine answered a request without a single token")
    if not has_ended:
        raise BadInput(f"the engine's answer broke off behind {pieces} pieces")
    return Answer(read_tokens, written_tokens or pieces, first, last)


def _lines(connection: HTTPConnection, path: str, body: Mapping[str, object], deadline: float) -> Iterator[bytes]:
    """Lines of the answer as they come in, empty ones left out. TimeoutError at the deadline, whoever is slow."""
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    socket = connection.sock  # the response takes it away, and its limit must shrink as time goes by
    answer = connection.getresponse()
    if answer.status != 200:
        told = answer.read(2000).decode(errors="replace")
        raise BadInput(f"the engine refused a request with status {answer.status}: {' '.join(told.split())[:300]}")
    waiting, total = b"", 0
    while piece := _piece(answer, socket, deadline):
        total += len(piece)
        *whole, waiting = (waiting + piece).split(b"\n")
        if len(waiting) > MAX_LINE_BYTES or total > MAX_STREAM_BYTES:
            raise ValueError(f"{total:,} bytes came, of which {len(waiting):,} are one line")
        yield from (line for line in whole if line.strip())
    if waiting.strip():
        yield waiting


def _piece(answer: HTTPResponse, socket: Any, deadline: float) -> bytes:
    left = deadline - time.perf_counter()
    if left <= 0:
        raise TimeoutError
    if socket.fileno() >= 0:  # closed where all of the answer has come
        socket.settimeout(left)
    return answer.read1(1 << 16)


def _openai_event(line: bytes) -> _Event:
    if not line.startswith(b"data:"):
        _refuse_error(_object(line) if line.startswith(b"{") else {})
        return _Event()  # a comment, or the name of an event
    if line[5:].strip() == b"[DONE]":
        return _Event(is_end=True)
    told = _object(line[5:])
    _refuse_error(told)
    choices, usage = told.get("choices"), told.get("usage")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    counts: Mapping[str, object] = usage if isinstance(usage, dict) else {}
    # A token may be half a character and bring no text yet. llama-server's last piece brings only the reason of the
    # end, vLLM's and SGLang's the last token too.
    reason = choice.get("finish_reason") if choice else None
    is_token = choice is not None and (not reason or bool(choice.get("text")))
    return _Event(is_token, bool(reason), _count(counts, "prompt_tokens"), _count(counts, "completion_tokens"))


def _ollama_event(line: bytes) -> _Event:
    told = _object(line)
    _refuse_error(told)
    is_end = bool(told.get("done"))
    return _Event(not is_end, is_end, _count(told, "prompt_eval_count"), _count(told, "eval_count"))


def _refuse_error(told: Mapping[str, Any]) -> None:
    """An error in the middle of a stream: all of them have it under this key."""
    error = told.get("error")
    if error:
        sentence = error.get("message", error) if isinstance(error, dict) else error
        raise BadInput(f"the engine broke off an answer: {' '.join(str(sentence).split())[:300]}")


def _object(line: bytes) -> Mapping[str, Any]:
    told = json.loads(line)
    return told if isinstance(told, dict) else {}


def _count(told: Mapping[str, object], key: str) -> int | None:
    value = told.get(key)
    return value if type(value) is int and 0 < value < 1 << 40 else None
