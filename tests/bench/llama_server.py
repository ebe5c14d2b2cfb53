"""The simulation beside a real server: llama.cpp serving a small synthetic Qwen3.5 on the CPU under a recorded load.

    python tests/bench/llama_server.py --server PATH/TO/llama-server [--save tests/data/llama_server_load.json]

Writes a GGUF of the architecture with random weights (20 million parameters, three layers of Gated DeltaNet and one of
attention), starts llama-server with four slots and one thread, times a few probes (prompts and answers of one stream,
and answers of all four), fits the step time to them, replays the arrivals of tests/data/llama_server_load.json with
streaming requests, and prints measured and simulated percentiles.

Seconds are those that the server works: its own CPU time while a request is under way (one thread runs the model), so
that other work on the machine, which may slow it down several times over, is not measured. While no request is under
way the clock jumps to the next arrival. --wall takes seconds of the wall instead, for a machine that is left alone.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from qwenfit.planner.batching import Limits, simulate
from qwenfit.planner.steps import StepTime
from qwenfit.planner.workload import Load

TRACE = Path(__file__).parent.parent / "data" / "llama_server_load.json"
SLOTS, SLOT_TOKENS = 4, 2048
HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, LINEAR_HEADS, WORDS = 512, 4, 4, 2, 1536, 8, 4096
HEAD_DIM, STATE_DIM, CONV = 256, 128, 4
QUANTILES = (0.5, 0.95)


def tensors() -> dict[str, tuple[int, ...]]:
    """Shapes by name, rows first."""
    keys = LINEAR_HEADS * STATE_DIM
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (WORDS, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        found |= {at + "attn_norm.weight": (HIDDEN,), at + "post_attention_norm.weight": (HIDDEN,)}
        if layer % 4 == 3:
            found |= {
                at + "attn_q.weight": (2 * HEADS * HEAD_DIM, HIDDEN),
                at + "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
                at + "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
                at + "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
                at + "attn_q_norm.weight": (HEAD_DIM,),
                at + "attn_k_norm.weight": (HEAD_DIM,),
            }
        else:
            found |= {
                at + "attn_qkv.weight": (3 * keys, HIDDEN),
                at + "attn_gate.weight": (keys, HIDDEN),
                at + "ssm_conv1d.weight": (3 * keys, CONV),
                at + "ssm_dt.bias": (LINEAR_HEADS,),
                at + "ssm_a": (LINEAR_HEADS,),
                at + "ssm_beta.weight": (LINEAR_HEADS, HIDDEN),
                at + "ssm_alpha.weight": (LINEAR_HEADS, HIDDEN),
                at + "ssm_norm.weight": (STATE_DIM,),
                at + "ssm_out.weight": (HIDDEN, keys),
            }
        found |= {
            at + "ffn_gate.weight": (FFN, HIDDEN),
            at + "ffn_up.weight": (FFN, HIDDEN),
            at + "ffn_down.weight": (HIDDEN, FFN),
        }
    return found


def write_model(path: str) -> None:
    """Q8_0 matrices of random numbers; a vocabulary of made-up words, so that prompts are lists of token numbers."""
    import gguf

    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_name("small synthetic Qwen3.5")
    writer.add_context_length(262144)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(64)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_state_size(STATE_DIM)
    writer.add_ssm_group_count(LINEAR_HEADS)
    writer.add_ssm_time_step_rank(LINEAR_HEADS)
    writer.add_ssm_inner_size(LINEAR_HEADS * STATE_DIM)
    writer.add_full_attention_interval(4)
    words = [chr(256 + byte) for byte in range(256)] + [f"word{place}" for place in range(256, WORDS)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(words)
    writer.add_token_types([1] * (WORDS - 1) + [3])
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    writer.add_eos_token_id(WORDS - 1)
    for name, shape in tensors().items():
        if len(shape) == 2 and "conv1d" not in name:
            blocks = np.empty((shape[0], shape[1] // 32, 34), np.uint8)
            blocks[..., :2] = np.full((1,), 0.0003, np.float16).view(np.uint8)
            blocks[..., 2:] = rng.integers(0, 256, (*blocks.shape[:2], 32), np.uint8)
            writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            values = np.ones(shape, np.float32) if "norm" in name else rng.normal(0, 0.3, shape).astype(np.float32)
            writer.add_tensor(name, -np.abs(values) if name.endswith("ssm_a") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Clock:
    """Seconds that the server has worked, or the wall's; at leisure it can be set forward."""

    def __init__(self, process_id: int, wall: bool) -> None:
        self.clock = time.CLOCK_MONOTONIC if wall else (~process_id << 3) | 2  # Linux: CPU time of another process
        self.wall = wall
        self.lock = threading.Lock()
        self.seconds = 0.0
        self.under_way = 0
        self.last = time.clock_gettime(self.clock)

    def now(self) -> float:
        with self.lock:
            return self._now()

    def _now(self) -> float:
        read = time.clock_gettime(self.clock)
        if self.under_way or self.wall:
            self.seconds += read - self.last
        self.last = read
        return self.seconds

    def begin(self) -> float:
        with self.lock:
            began = self._now()
            self.under_way += 1
            return began

    def end(self) -> float:
        with self.lock:
            ended = self._now()
            self.under_way -= 1
            return ended

    def wait_until(self, seconds: float) -> None:
        while True:
            with self.lock:
                now = self._now()
                if now >= seconds:
                    return
                if not self.under_way and not self.wall:
                    self.seconds = seconds
                    return
            time.sleep(0.0005)


class Server:
    """llama-server on a free port of this machine, until it is left."""

    def __init__(self, binary: str, model: str, log: str, wall: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = ["--model", model, "--ctx-size", SLOTS * SLOT_TOKENS, "--parallel", SLOTS, "--threads", 1]
        words += ["--threads-batch", 1, "--host", "127.0.0.1", "--port", self.port, "--cache-ram", 0, "--no-webui"]
        words += ["--ctx-checkpoints", 0, "--threads-http", 8]
        self.log = open(log, "w")  # noqa: SIM115  (closed by leave)
        self.process = subprocess.Popen([binary, *map(str, words)], stdout=self.log, stderr=subprocess.STDOUT)
        self.clock = Clock(self.process.pid, wall)

    def __enter__(self) -> "Server":
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit(f"llama-server ended with {self.process.returncode}: see {self.log.name}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return self
            except OSError:
                time.sleep(0.1)
        raise SystemExit("llama-server did not come up in a minute")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()

    def ask(self, prompt_tokens: int, output_tokens: int, seed: int = 0) -> tuple[float, float]:
        """(seconds to the first token, seconds to the last), streamed."""
        rng = Random(seed)
        body = {
            "prompt": [rng.randrange(256, WORDS - 1) for _ in range(prompt_tokens)],
            "n_predict": output_tokens,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "temperature": 0,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        began, first = self.clock.begin(), 0.0
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                for line in answer:
                    if line.startswith(b"data:") and not first:
                        first = self.clock.now() - began
        finally:
            ended = self.clock.end()
        return first, ended - began


def probed(server: Server) -> dict[str, Any]:
    """Seconds: of prompts by length and per token behind two contexts (one stream), and per token of all slots."""
    server.ask(64, 8)
    prompts = {length: float(np.median([server.ask(length, 1, k)[0] for k in range(2)])) for length in (16, 256, 1024)}
    tokens = {}
    for context in (16, 1024):
        runs = [server.ask(context, 65, k) for k in range(2)]
        tokens[context] = float(np.median([(last - first) / 64 for first, last in runs]))
    wide = []
    for turn in range(2):
        runs = together(server, [(0.0, 16, 65)] * SLOTS, turn)
        wide += [(last - first) / 64 for first, last in runs]
    return {"prompt_s": prompts, "token_s": tokens, "wide_token_s": float(np.median(wide))}


def fitted(probes: dict[str, Any]) -> StepTime:
    """The step time behind the probes: rows and pairs from the prompts; reads, contexts and seats from the answers."""
    prompts = {int(length): seconds for length, seconds in probes["prompt_s"].items()}
    tokens = {int(context): seconds for context, seconds in probes["token_s"].items()}
    rows = np.array([[length, length * (length + 1) / 2, 1.0] for length in prompts])
    row_s, pair_s, overhead_s = np.linalg.lstsq(rows, np.array(list(prompts.values())), rcond=None)[0]
    row_s, pair_s, overhead_s = float(row_s), max(0.0, float(pair_s)), max(0.0, float(overhead_s))
    context_s = max(0.0, (tokens[1024] - tokens[16]) / (1024 - 16))
    one = tokens[16] - 48 * context_s  # half of the 65 tokens and the 16 of the prompt lie before it
    each = max(0.0, (probes["wide_token_s"] - tokens[16]) / (SLOTS - 1))
    base_s = one - each
    return StepTime(
        dense_read_s=0.0, expert_read_s=0.0, host_read_s=0.0, expert_share=0.0, row_s=row_s, head_row_s=0.0,
        pair_s=pair_s, context_s=context_s, seq_s=each - row_s, overhead_s=base_s,
        prompt_dense_read_s=0.0, prompt_expert_read_s=0.0, prompt_overhead_s=base_s,
        link_s=0.0, link_row_s=0.0,
    )  # fmt: skip


def together(server: Server, asked: list[tuple[float, int, int]], seed: int = 0) -> list[tuple[float, float]]:
    """Every request at its second, each in a thread of its own: (first, last) in their order."""
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(asked)
    began = server.clock.now()

    def one(place: int) -> None:
        _, prompt_tokens, output_tokens = asked[place]
        found[place] = server.ask(prompt_tokens, output_tokens, seed * 1000 + place)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(asked))]
    for thread, (at_s, _, _) in zip(threads, asked, strict=True):
        server.clock.wait_until(began + at_s)
        before = server.clock.under_way
        thread.start()
        while server.clock.under_way == before and thread.is_alive():
            time.sleep(0.0002)
    for thread in threads:
        thread.join()
    return found


def recorded(count: int = 60, rate_per_s: float = 1.5) -> list[dict[str, float]]:
    """A load to record: Poisson arrivals, lognormal prompts and answers."""
    rng, now, found = Random(7), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate_per_s)
        prompt, answer = rng.lognormvariate(5.2, 0.8), rng.lognormvariate(3.9, 0.7)
        found.append(
            {
                "arrival_s": round(now, 3),
                "prompt_tokens": int(min(1500, max(8, prompt))),
                "output_tokens": int(min(400, max(4, answer))),
            }
        )
    return found


def simulated(step: StepTime, requests: list[dict[str, float]]) -> dict[str, list[float]]:
    load = Load(
        [int(one["prompt_tokens"]) for one in requests],
        [0] * len(requests),
        [int(one["output_tokens"]) for one in requests],
        times_s=[one["arrival_s"] for one in requests],
    )
    served = simulate(step, Limits(SLOTS, 2048), load)
    return {
        "ttft_s": [a - b for a, b in zip(served.first_token_s, served.arrival_s, strict=True)],
        "latency_s": [a - b for a, b in zip(served.finish_s, served.arrival_s, strict=True)],
    }


def compared(measured: dict[str, list[float]], expected: dict[str, list[float]]) -> list[tuple[str, float, float]]:
    """(what, measured, simulated) for the percentiles of both."""
    return [
        (f"p{q * 100:.0f} {name}", float(np.quantile(measured[name], q)), float(np.quantile(expected[name], q)))
        for name in ("ttft_s", "latency_s")
        for q in QUANTILES
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--server", required=True, help="the llama-server to start")
    parser.add_argument("--save", help="write trace, probes and what was measured there")
    parser.add_argument("--record", type=float, metavar="RATE", help="a new trace, of that many requests a second")
    parser.add_argument("--wall", action="store_true", help="seconds of the wall, not those that the server works")
    asked = parser.parse_args()
    requests = recorded(rate_per_s=asked.record) if asked.record else json.loads(TRACE.read_text())["requests"]
    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/small.gguf")
        with Server(asked.server, f"{folder}/small.gguf", f"{folder}/log.txt", asked.wall) as server:
            probes = probed(server)
            runs = together(
                server, [(o["arrival_s"], int(o["prompt_tokens"]), int(o["output_tokens"])) for o in requests]
            )
    measured = {"ttft_s": [first for first, _ in runs], "latency_s": [last for _, last in runs]}
    step = fitted(probes)
    print(json.dumps(probes), step, sep="\n", file=sys.stderr)
    rows = compared(measured, simulated(step, requests))
    for what, seen, expected in rows:
        print(f"{what}: measured {seen:.3f}, simulated {expected:.3f}, {expected / seen - 1:+.1%}")
    if asked.save:
        kept = [
            {
                **{k: one[k] for k in ("arrival_s", "prompt_tokens", "output_tokens")},
                "ttft_s": round(a, 4),
                "latency_s": round(b, 4),
            }
            for one, (a, b) in zip(requests, runs, strict=True)
        ]
        head = {
            "engine": "llama.cpp b11434",
            "on": time.strftime("%Y-%m-%d"),
            "slots": SLOTS,
            "probes": probes,
        }
        lines = ",\n".join(json.dumps(one) for one in kept)
        Path(asked.save).write_text(json.dumps(head)[:-1] + ',\n"requests": [\n' + lines + "\n]}\n")
    return 0 if all(abs(expected / seen - 1) <= 0.25 for _, seen, expected in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
