"""Requests to an engine that serves on this machine: random tokens in, tokens streamed out, the clock beside them.

llama-server, vLLM and SGLang take lists of token numbers at /v1/completions (OpenAI's protocol) and stop early for
nothing where `ignore_eos` is set; Ollama takes text at /api/generate. No proxy is asked: the address is our own.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from ...profiles.errors import BadInput
from ...profiles.frozen import dataclass

MAX_LINE_BYTES = 1 << 20
MAX_ANSWER_BYTES = 1 << 20
LOWEST_TOKEN, HIGHEST_TOKEN = 256, 100_000  # ordinary words of the family's vocabulary
WORDS = ("river", "seven", "light", "copper", "under", "garden", "question", "north", "letter", "paper", "again")

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


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


def is_ready(address: str, path: str) -> bool:
    """Whether it answers 200 there."""
    try:
        with _open(f"{address}{path}", timeout=5) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def served_name(address: str) -> str:
    """What the engine calls its model, for the requests."""
    try:
        with _open(f"{address}/v1/models", timeout=30) as answer:
            told = json.loads(answer.read(MAX_ANSWER_BYTES))
        return str(told["data"][0]["id"])[:500]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise BadInput(f"the engine at {address} does not say which model it serves") from None


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
    return _timed(f"{address}/v1/completions", body, prompt_tokens, limit_s, _openai_event)


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
    return _timed(f"{address}/api/generate", body, prompt_tokens, limit_s, _ollama_event)


@dataclass(frozen=True, slots=True)
class _Event:
    """One line of a stream: whether it brings text, and how many tokens there were, where it says so."""

    has_text: bool = False
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def _timed(url: str, body: Mapping[str, object], prompt_tokens: int, limit_s: float, read: Any) -> Answer:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    first = last = 0.0
    pieces, read_tokens, written_tokens = 0, prompt_tokens, 0
    began = time.perf_counter()
    try:
        with _open(request, timeout=limit_s) as answer:
            for line in _lines(answer, began + limit_s):
                event = read(line)
                if event.has_text:
                    last = time.perf_counter() - began
                    first = first or last
                    pieces += 1
                read_tokens = event.prompt_tokens or read_tokens
                written_tokens = event.output_tokens or written_tokens
    except urllib.error.HTTPError as error:
        told = error.read(2000).decode(errors="replace")
        raise BadInput(
            f"the engine refused a request with status {error.code}: {' '.join(told.split())[:300]}"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"the engine did not answer a request: {str(error)[:200] or type(error).__name__}") from None
    if not pieces:
        raise BadInput("the engine answered a request without a single token")
    return Answer(read_tokens, written_tokens or pieces, first, last)


def _lines(answer: Any, deadline: float) -> Iterator[bytes]:
    while line := answer.readline(MAX_LINE_BYTES):
        if time.perf_counter() > deadline:
            raise ValueError("it took too long")
        if line.strip():
            yield line


def _openai_event(line: bytes) -> _Event:
    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
        return _Event()
    told = _object(line[5:])
    choices = told.get("choices")
    usage = told.get("usage")
    has_choice = isinstance(choices, list) and bool(choices) and isinstance(choices[0], dict)
    counts: Mapping[str, object] = usage if isinstance(usage, dict) else {}
    # A token may be half a character and bring no text yet; the last piece brings only the reason of the end.
    is_token = has_choice and not choices[0].get("finish_reason")
    return _Event(is_token, _count(counts, "prompt_tokens"), _count(counts, "completion_tokens"))


def _ollama_event(line: bytes) -> _Event:
    told = _object(line)
    return _Event(not told.get("done"), _count(told, "prompt_eval_count"), _count(told, "eval_count"))


def _object(line: bytes) -> Mapping[str, Any]:
    told = json.loads(line)
    return told if isinstance(told, dict) else {}


def _count(told: Mapping[str, object], key: str) -> int | None:
    value = told.get(key)
    return value if isinstance(value, int) and 0 < value < 1 << 40 else None


def prompts(depth_tokens: int, requests: int) -> Sequence[tuple[int, int]]:
    """(prompt tokens, seed) of a few requests."""
    return [(depth_tokens, seed + 1) for seed in range(requests)]
