"""Boot logs as data: real lines of four engines from April 2025 to October 2026 (tests/data/logs/index.json says where
each was printed), and hostile ones: whatever the bytes, there is a log or one sentence, in bounded time and memory.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner.logs.dialect import PARTS, LoggedPart
from qwenfit.planner.logs.engine_log import DIALECTS, EngineLog, read_log, read_log_file
from qwenfit.profiles.errors import BadInput

LOGS = Path(__file__).parent / "data" / "logs"
INDEX: dict[str, dict[str, Any]] = json.loads((LOGS / "index.json").read_text(encoding="utf-8"))["logs"]
UNITS = {"B": 1, "MiB": 1 << 20, "GiB": 1 << 30}
DERIVED = "requested memory less"


def text_of(name: str) -> str:
    return (LOGS / name).read_text(encoding="utf-8")


def figures(log: EngineLog) -> dict[str, LoggedPart]:
    return {f"{part.place} {part.part}": part for part in log.parts if not part.line.startswith(DERIVED)}


def told_bytes(told: str) -> tuple[float, float]:
    """The sum of "3.79+1584.04 MiB" in bytes, and half a last digit of each."""
    numbers, _, unit = told.partition(" ")
    amounts = numbers.split("+")
    decimals = [max(2 if unit == "GiB" else 0, len(one.partition(".")[2])) for one in amounts]
    return sum(map(float, amounts)) * UNITS[unit], sum(UNITS[unit] / 10**digits / 2 for digits in decimals)


def test_every_log_is_in_the_index() -> None:
    assert {path.name for path in LOGS.glob("*.log")} == set(INDEX)


@pytest.mark.parametrize("name", INDEX)
def test_a_log_says_what_its_lines_say(name: str) -> None:
    told, log = INDEX[name], read_log_file(str(LOGS / name))
    assert log.engine == told["engine"]
    assert log.version == told.get("version")
    if "model" in told:
        assert log.model == told["model"]
    found = figures(log)
    assert set(found) == set(told["parts"])
    for key, amount in told["parts"].items():
        expected, doubt = told_bytes(amount)
        assert found[key].bytes == pytest.approx(expected, abs=1), key
        if not amount.endswith(" B") and log.engine != "ollama":
            assert found[key].resolution_bytes == pytest.approx(doubt, abs=3), key
    for key, value in told.get("facts", {}).items():
        assert log.facts[key] == value, key
    for key, value in told.get("settings", {}).items():
        assert log.settings[key] == value, key
    assert (log.died or "").startswith(told.get("died", "")) and bool(log.died) == ("died" in told)


@pytest.mark.parametrize("name", INDEX)
@pytest.mark.parametrize("wrap", ["journald", "kubectl", "docker json", "colours", "lost escapes", "crlf", "bom"])
def test_what_a_container_or_terminal_adds_changes_nothing(name: str, wrap: str) -> None:
    plain = text_of(name)
    lines = plain.splitlines()
    if wrap == "journald":
        lines = [f"Nov 22 10:10:51 my-host engine[1067]: {line}" for line in lines]
    elif wrap == "kubectl":
        lines = [f"[pod/engine-0/server] 2026-04-10T08:52:19.077546507+08:00 stdout F {line}" for line in lines]
    elif wrap == "docker json":
        lines = [json.dumps({"log": line + "\n", "stream": "stderr", "time": "2026"}) for line in lines]
        lines = [line.replace('{"log": ', '{"log":') for line in lines]
    elif wrap == "colours":
        lines = [f"\x1b[34m{line[:12]}\x1b[0;1;32m{line[12:]}\x1b[0m\x1b[K" for line in lines]
    elif wrap == "lost escapes":
        lines = [f"[34m1.16.671[0m [32mI [0m{line}[0m" for line in lines]
    text = ("\r\n" if wrap == "crlf" else "\n").join(lines)
    wrapped = read_log(("\ufeff" if wrap == "bom" else "") + text, INDEX[name]["engine"])
    expected = read_log(plain, INDEX[name]["engine"])
    assert [(part.part, part.place, part.bytes) for part in wrapped.parts] == [
        (part.part, part.place, part.bytes) for part in expected.parts
    ]
    assert wrapped.died == expected.died


def test_activations_of_vllm_follow_from_its_budget() -> None:
    """78.66 GiB free, 71.27 requested: 14.08 of weights and 59,212,694,937 bytes of cache leave 2.04 GiB, which is the
    1.97 of peak activation and 0.07 of what torch does not know that the same line says."""
    log = read_log_file(str(LOGS / "vllm-2025-09.log"))
    active = next(part for part in log.parts if part.part == "activation")
    assert active.line.startswith(DERIVED)
    assert abs(active.bytes - round((1.97 + 0.07) * (1 << 30))) <= active.resolution_bytes + (1 << 30) // 100


def test_where_the_weights_have_no_line_they_are_in_the_rest() -> None:
    """club-3090 pull request 1139: of 21.67 GiB requested, 4.76 are the cache and 0.2 the estimated graphs; the rest is
    15.25 GiB of weights and what torch does not know of, and 1.66 of peak activation, graphs included."""
    log = read_log_file(str(LOGS / "vllm-2026-09-tp2.log"))
    rest = [part for part in log.parts if part.line.startswith(DERIVED)]
    assert [(part.place, part.part, part.covers) for part in rest] == [
        ("device0", "activation", ("weights",)),
        ("device1", "activation", ("weights",)),
    ]
    assert abs(rest[0].bytes - round((15.25 + 1.66 - 0.2) * (1 << 30))) <= rest[0].resolution_bytes + (1 << 30) // 50


def test_of_several_boots_the_last_complete_one_is_read() -> None:
    first = text_of("vllm-0.32.0-cpu.log")
    second = first.replace("(1.0/23.54)", "(2.0/23.54)")
    died = "\n".join(
        [
            "INFO vLLM API server version 0.32.0",
            "Model loading took 1.0 GiB memory and 1.000000 seconds",
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        ]
    )
    log = read_log(first + second + died)
    assert [part.bytes for part in log.parts] == [2 << 30]
    assert log.notes[0] == "3 boots in the log: number 2, the last complete one, is read"
    assert log.notes[1].startswith("a later boot ended with: No available memory for the cache blocks")
    assert read_log(died + "\n" + first).parts[0].bytes == 1 << 30
    alone = read_log(died)
    assert alone.died and alone.died.startswith("No available memory")


def test_a_death_after_the_server_was_ready_is_told() -> None:
    boot = text_of("llamacpp-b11434-cpu.log")
    late = boot + "ggml_cuda: allocating 512.00 MiB on device 0: cudaMalloc failed: out of memory\n"
    assert read_log(late).died == "allocating 512.00 MiB on device 0: cudaMalloc failed: out of memory"
    at = boot.index("llama_context: n_ctx ")
    early = boot[:at] + "\nE load: allocating 512.00 MiB on device 0: cudaMalloc failed: out of memory\n" + boot[at:]
    assert read_log(early).died is None  # it tried again, and served


def test_a_further_reserve_of_one_context_replaces_and_another_context_adds() -> None:
    boot = text_of("llamacpp-b11434-cpu.log")
    again = "sched_reserve:        CPU compute buffer size =    30.07 MiB\n"
    before = figures(read_log(boot))["device0 activation"].bytes
    assert figures(read_log(boot + again))["device0 activation"].bytes == pytest.approx(before + 10 * (1 << 20), abs=2)
    other = "llama_context: constructing llama_context\n" + again
    expected = before + 30.07 * (1 << 20)
    assert figures(read_log(boot + other))["device0 activation"].bytes == pytest.approx(expected, abs=2)


def test_what_is_left_unaccounted_for_is_the_runtime_once_the_server_was_ready() -> None:
    """The same table is a forecast before loading. 24124 = 1500 + (21483 = ...) + 1141 MiB."""
    figures_mib = "24124 = 1500 + (21483 = 14032 +    6796 +     654) +        1141"
    row = f"common_memory_breakdown_print: |   - CUDA0 (RTX 3090)   | {figures_mib} |\n"
    boot = text_of("llamacpp-b8946-rtx3090.log")
    after = figures(read_log(boot + row))
    assert after["device0 runtime"].bytes == 1141 << 20
    assert after["device0 runtime"].resolution_bytes == 1 << 19
    at = boot.index("load_tensors: offloaded")
    assert "device0 runtime" not in figures(read_log(boot[:at] + row + boot[at:]))


def test_ollamas_engine_of_2025_names_backends_and_buffers() -> None:
    """ml/backend/ggml/ggml.go of 0.9 to 0.11, before sizes were collected per device."""
    log = read_log(
        'time=2025-06-01T10:00:00Z level=INFO source=ggml.go:351 msg="model weights" buffer=CUDA0 size="4.8 GiB"\n'
        'time=2025-06-01T10:00:00Z level=INFO source=ggml.go:351 msg="model weights" buffer=CPU size="525.0 MiB"\n'
        'time=2025-06-01T10:00:01Z level=INFO source=ggml.go:638 msg="compute graph" backend=CUDA0 buffer_type=CUDA0 '
        'size="1.1 GiB"\n'
    )
    assert {key: part.bytes for key, part in figures(log).items()} == {
        "device0 weights": round(4.8 * (1 << 30)),
        "host weights": 525 << 20,
        "device0 activation": round(1.1 * (1 << 30)),
    }


def test_a_quiet_llama_server_is_told_what_to_do() -> None:
    quiet = (
        "0.00.030.827 I srv  llama_server: initializing ...\n0.00.055 I srv    load_model: loading model 'm.gguf'\n"
        "0.00.736.805 I srv  llama_server: model loaded\n"
    )
    with pytest.raises(
        BadInput, match=r"has no line in which llama.cpp says how much memory.*start llama-server with -lv 4"
    ):
        read_log(quiet)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello\nworld\n", "is no boot log of vllm, sglang, ollama, llama.cpp"),
        ("", "is no boot log"),
        ("Model loading took 99999999999999999999 GiB memory and 1.0 seconds", "which no machine has"),
        ("load_tensors:   CPU model buffer size = 9999999999999999999999.00 MiB", "which no machine has"),
    ],
)
def test_what_is_no_boot_log_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        read_log(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_an_unknown_engine_is_refused_and_a_fork_is_read() -> None:
    with pytest.raises(BadInput, match="no boot log of tgi is known"):
        read_log("x", "tgi")
    assert read_log(text_of("sglang-2026-02-tp2.log"), "ktransformers").engine == "ktransformers"


@given(st.binary(max_size=3000))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_log_or_a_sentence(data: bytes) -> None:
    check_bounded(data.decode("utf-8", "replace"))


@given(st.randoms(use_true_random=False), st.sampled_from(sorted(INDEX)))
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_log_is_a_log_or_a_sentence(chance: random.Random, name: str) -> None:
    """Cut anywhere, with pieces repeated, digits changed and lines shuffled."""
    text = text_of(name)
    text = text[chance.randrange(len(text)) :][: chance.randrange(len(text))]
    for _ in range(chance.randrange(6)):
        at = chance.randrange(len(text) + 1)
        piece = chance.choice(
            ["9" * chance.randrange(1, 60), "\n", "-", "|", "GiB", text[at : at + 200], "\x00", "\x1b["]
        )
        text = text[:at] + piece + text[at:]
    check_bounded(text, chance.choice([None, *DIALECTS]))


def check_bounded(text: str, engine: str | None = None) -> None:
    try:
        log = read_log(text, engine)
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return
    for part in log.parts:
        assert part.part in PARTS and 0 <= part.bytes <= 1 << 54 and part.resolution_bytes >= 0
        assert len(part.line) <= 400 and part.line.isprintable()


HOSTILE = (
    "Load weight end." + "x" * 20000,
    "Mamba Cache is allocated. " + "conv_state size: 1GB, " * 1000,
    "Capture a" + " b" * 8000 + " cuda graph end.",
    "load_tensors: " + "CUDA" * 8000 + " model buffer size =",
    "|   - " + "A" * 10 + " (" + "x" * 20000,
    "Free memory on device (" + "1" * 15000 + "/",
    "To serve at least one request with the models's max seq len" + " (" * 10000,
    'msg="kv cache" device=' + "C" * 20000,
    "build: " + "1" * 20000,
    "[" + "1;" * 15000 + "m Model loading took",
    "api_key=" * 4000 + " CUDA error: out of memory",
)


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_no_line_makes_a_pattern_slow(line: str) -> None:
    """60 such lines of 20 kB for every engine: a pattern that went back and forth would take hours."""
    text = "\n".join([line] * 60)
    begun = time.process_time()
    for engine in DIALECTS:
        check_bounded(text, engine)
    assert time.process_time() - begun < 5
