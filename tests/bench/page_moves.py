"""How long the page's answers take over HTTP while a slider moves: the answer, the devices that would do, the API.

    python tests/bench/page_moves.py [--places 81] [--only 397b]

Starts `qwen-plan serve`, walks the context slider up and down again for each question as one browser does (an answer,
then looks through the devices that would do until they are complete), and prints milliseconds; `first` is what
nobody had asked about before. Budget: 100 for each.
"""

import argparse
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from qwenfit.cli.page_question import CONTEXTS, Question, from_query

QUESTIONS = (
    "model=9b&gpu=rtx3060&n=1",
    "model=27b&gpu=rtx4090&n=1&seqs=2",
    "model=35b-a3b&gpu=rtx3090&n=2",
    "model=122b-a10b&gpu=h100-sxm&n=4&seqs=8",
    "model=397b&gpu=rtx3090&n=2",
    "model=397b&gpu=h100-sxm&n=8&seqs=16&mtp=2",
    "model=397b&gpu=a100-80gb&n=8&nodes=2",
    "model=397b&gpu=dgx-spark&n=1&nodes=8",
    "model=397b&gpu=b200&n=32&nodes=4&seqs=256",
    "model=397b&gpu=rtx3090&n=8&gpu=rtx4090&n=8&seqs=4&vision=on",
    "model=27b&gpu=rtx3060&n=32&nodes=2&seqs=256&mtp=2",
    "model=122b-a10b&gpu=rtx3090&n=8&gpu=rtx4090&n=8&nodes=2&seqs=256&mtp=2",
    "model=397b&gpu=a100-80gb&n=8&seqs=64",
)
RATE_S = 1 / 110  # between two requests at least: the server takes 120 a second from one address


class Client:
    """One connection, as a browser keeps it."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
        self.asked_s = 0.0

    def took_s(self, path: str, body: str | None = None) -> tuple[float, str]:
        time.sleep(max(0.0, self.asked_s + RATE_S - time.perf_counter()))
        self.asked_s = began_s = time.perf_counter()
        headers = {"Content-Type": "application/json"} if body else {}
        self.connection.request("POST" if body else "GET", path, body, headers)
        answer = self.connection.getresponse()
        text = answer.read().decode()
        if answer.status != 200:
            raise SystemExit(f"{path}: {answer.status} {text[:300]}")
        return time.perf_counter() - began_s, text


def walk(client: Client, question: str, places: int) -> Iterator[tuple[str, float]]:
    """(what was asked, seconds) of every request of a walk up the slider and down again."""
    step = max(1, (len(CONTEXTS) - 1) // max(1, places - 1))
    up = CONTEXTS[::step]
    for tokens in (*up, *up[::-1]):
        asked = f"{question}&ctx={tokens}"
        yield "answer", client.took_s(f"/answer?{asked}")[0]
        for _ in range(200):
            spent_s, told = client.took_s(f"/offers?{asked}")
            yield "offers", spent_s
            if "Looking on" not in told:
                break
        yield "api", client.took_s("/api/plan", body(from_query(pairs(asked))))[0]


def pairs(text: str) -> list[tuple[str, str]]:
    from urllib.parse import parse_qsl

    return parse_qsl(text)


def body(question: Question) -> str:
    return json.dumps(question.model_dump(mode="json"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds of the page's answers while a slider moves.")
    parser.add_argument("--places", type=int, default=len(CONTEXTS), help="of the slider, of 81")
    parser.add_argument("--only", default="", help="questions with this in them")
    asked = parser.parse_args()
    command = [sys.executable, "-m", "qwenfit.cli.plan", "serve", "--port", "0"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout
    try:
        client = Client(started.stdout.readline().strip())
        client.took_s("/")  # the page itself: the server has started once it is there
        print(f"{'question':64} {'what':7} {'asked':>6} {'median':>7} {'95 %':>6} {'slowest':>8} {'first':>6}")
        for question in QUESTIONS:
            if asked.only in question:
                tell(question, list(walk(client, question, asked.places)))
    finally:
        started.terminate()
        started.wait(20)


def tell(question: str, found: list[tuple[str, float]]) -> None:
    for what in ("answer", "offers", "api"):
        in_turn = [1000 * spent_s for kind, spent_s in found if kind == what]
        took = sorted(in_turn)
        middle, late = took[len(took) // 2], took[int(len(took) * 0.95)]
        print(
            f"{question:64} {what:7} {len(took):6} {middle:7.0f} {late:6.0f} {took[-1]:8.0f} {in_turn[0]:6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
