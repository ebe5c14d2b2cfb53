"""Hand-made answers for the renderings (real classes, invented bytes), and the command itself."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from json import loads
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from qwenfit.planner.engines.engine import Allocation, DeviceShare, Setup
from qwenfit.planner.memory import Memory, estimated, exactly
from qwenfit.planner.nearest import Case
from qwenfit.planner.plan import Advice, EnginePlan, Plan, Skipped
from qwenfit.planner.request import Options, Prices, Request
from qwenfit.planner.speed import Interval, Rates, Speed
from qwenfit.profiles.device import Device

GIB = 1 << 30
SCREEN_VARIABLES = (
    "COLUMNS",
    "NO_COLOR",
    "FORCE_COLOR",
    "TERM",
    "QWENFIT_DEBUG",
    "GITHUB_STEP_SUMMARY",
    "GITHUB_OUTPUT",
)


class Run(NamedTuple):
    """What one call of the command came to."""

    status: int
    stdout: str
    stderr: str
    cpu_s: float


def made_device(**changes: Any) -> Device:
    facts: dict[str, Any] = {
        "name": "rtx3060",
        "title": "NVIDIA GeForce RTX 3060",
        "vendor": "nvidia",
        "architecture": "ampere",
        "kind": "discrete",
        "memory_bytes": 12 * GIB,
        "usable_bytes": 12 * GIB - 384 * (1 << 20),
        "memory_bandwidth_bytes_per_s": 360_000_000_000,
        "flops_per_s": {"bf16": 51_000_000_000_000},
        "source": "invented",
        "checked": "2026-11-22",
    }
    return Device(**{**facts, **changes})


class MadeEstimate:
    """Weights and a cache of 32 KiB per token and sequence."""

    def __init__(self, devices: tuple[Device, ...], weights_bytes: int, command: str, **told: Any) -> None:
        self.devices, self.weights_bytes, self.line, self.told = devices, weights_bytes, command, told

    def memory(self, ctx_tokens: int, seqs: int) -> Memory:
        return Memory(
            weights=exactly(self.weights_bytes),
            kv_cache=exactly(17408 * ctx_tokens * seqs),
            recurrent_state=exactly(52_690_944 * seqs),
            activation=estimated(0.40 * GIB, 0.50 * GIB, 0.62 * GIB),
            runtime=estimated(0.20 * GIB, 0.31 * GIB, 0.45 * GIB),
        )

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        total_bytes = self.memory(ctx_tokens, seqs).total.mid
        return max(total_bytes - device.usable_bytes for device in self.devices)

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self.allocate(ctx_tokens, seqs).is_sure

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        memory = self.memory(ctx_tokens, seqs)
        shares = tuple(DeviceShare(device, device.usable_bytes, memory) for device in self.devices)
        missing = self.shortfall_bytes(ctx_tokens, seqs)
        reasons = (f"{missing / GIB:.2f} GiB short on {self.devices[0].name}",) if missing > 0 else ()
        return Allocation(
            shares, self.told.get("host", Memory()), reasons, self.told.get("warnings", ()), {"cells": ctx_tokens}
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        return self.line.format(ctx=ctx_tokens, seqs=seqs)


def made_engine_plan(
    engine: str, weights: str, weights_bytes: int, device: Device, request: Request, **told: Any
) -> EnginePlan:
    devices = (device,) * told.pop("count", 1)
    fmt: Any = SimpleNamespace(name=weights, divergence=0.05)
    model: Any = made_model()
    kv_dtype = told.pop("kv_dtype", "q8_0")
    command = told.pop("command", "llama-server -m model.gguf -c {ctx} -np {seqs} -ctk q8_0 -ctv q8_0 -ngl 99")
    setup = Setup(model, fmt, devices, "b11434", kv_dtype, "float32", 1, len(devices), 0, False, Options())
    estimate = MadeEstimate(devices, weights_bytes, command, **told)
    prices = Prices(usd_per_kwh=0.3, device_usd=280, device_watts=120, api_usd_per_million=2, job_tokens=78_000_000)
    made = EnginePlan(engine, setup, estimate, request.ctx_tokens, request.seqs, prices=prices)
    vars(made)["speed"] = made_speed(request)
    return made


def made_speed(request: Request) -> Speed:
    def rates(ctx_tokens: int, decode: float, bound_by: str) -> Rates:
        prompt = Interval(1000, 2000, 4000)
        return Rates(ctx_tokens, Interval(decode / 2, decode, decode * 2), prompt, Interval(0.5, 1, 2), bound_by)

    case = Case(
        *(
            "lb-1",
            "https://example.org/b",
            "llama.cpp",
            "cuda",
            "rtx4090",
            "rtx4090",
            "ada",
            "qwen3.5-9b",
            "q4_k_m",
        ),
        *("4", 4_700_000_000, 1_008_000_000_000, 1, 0, False, 16384, 79.93),
    )
    start, full = rates(2048, 42.0, "weight reads"), rates(request.ctx_tokens, 17.0, "kv reads")
    return Speed(start, full, request.seqs, "llama.cpp was measured on other devices", case)


def made_model() -> Any:
    return SimpleNamespace(name="qwen3.5-9b", native_context_tokens=262144)


def made_plan(ctx_tokens: int = 262144, *, advice: tuple[Advice, ...] = (), **told: Any) -> Plan:
    """Two plans that fit at 262,144 tokens, one that does not, and an engine that was skipped."""
    request = told.pop("request", None) or Request(devices=("rtx3060",), ctx_tokens=ctx_tokens)
    device = told.pop("device", None) or made_device()
    count = told.get("count", 1)
    plans = (
        made_engine_plan("llama.cpp", "q4_k_m", int(5.16 * GIB), device, request, **told),
        made_engine_plan("ollama", "q4_0", int(5.0 * GIB), device, request, command="ollama serve", count=count),
        made_engine_plan("vllm", "int4", int(9.05 * GIB), device, request, kv_dtype="fp8", command="vllm serve x"),
    )
    answer = Plan(request, made_model(), (device,) * count, plans, (Skipped("mlx", "MLX runs on Apple silicon only"),))
    vars(answer)["advice"] = advice
    return answer


@pytest.fixture
def fitting() -> Plan:
    return made_plan()


@pytest.fixture
def failing() -> Plan:
    advice = (
        Advice("KV cache in q4_0", True, "saves 4.00 GiB: 0.40 GiB to spare", 4 * GIB),
        Advice("text only (no vision tower)", False, "saves 0.85 GiB: still 2.75 GiB short", GIB),
    )
    return made_plan(600_000, advice=advice)


@pytest.fixture
def qwen_plan() -> Callable[..., Run]:
    """Runs the command in a process of its own, and says how much CPU time it took."""

    def run(*arguments: str, env: Mapping[str, str] | None = None, cwd: str | Path | None = None) -> Run:
        clean = {name: value for name, value in os.environ.items() if name not in SCREEN_VARIABLES}
        before = _children_cpu_s()
        done = subprocess.run(
            [sys.executable, "-m", "qwenfit.cli.plan", *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env={**clean, "PYTHONIOENCODING": "utf-8", **(env or {})},
            cwd=cwd,
            timeout=60,
        )
        spent_s = _children_cpu_s() - before
        return Run(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), spent_s)

    return run


@pytest.fixture
def page() -> Callable[..., Any]:
    """Makes a client of the page's application, in this process."""
    for library in ("fastapi", "limits", "jinja2", "httpx2"):
        pytest.importorskip(library, reason=f"not installed: {library} (tests/requirements.txt has it)")
    from fastapi.testclient import TestClient

    from qwenfit.cli.page import app

    def client(*, raises: bool = True, **told: Any) -> Any:
        return TestClient(app(**told), base_url="http://127.0.0.1:8035", raise_server_exceptions=raises)

    return client


def _children_cpu_s() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


@pytest.fixture
def made() -> SimpleNamespace:
    """The makers of these answers, for a test that wants another one."""
    return SimpleNamespace(plan=made_plan, device=made_device)


class MadeNvml:
    """NVML with these cards, each a mapping of what differs from an idle H100; errors are pynvml's own.

    `broken`: function -> the error's number; it raises for every device.
    """

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, *cards: Mapping[str, Any], broken: Mapping[str, int] | None = None) -> None:
        self.cards, self.broken = [{**IDLE_H100, **card} for card in cards], dict(broken or {})
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.called.add(name)
            if name in self.broken:
                raise nvml_error(self.broken[name])
            return self._answer(name, *arguments)

        return call

    def _answer(self, name: str, *arguments: Any) -> Any:
        whole = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlSystemGetDriverVersion": b"580.95.05",
            "nvmlSystemGetCudaDriverVersion": 13000,
            "nvmlSystemGetProcessName": "/home/anna/secret/python3 --token=x",
            "nvmlDeviceGetCount": len(self.cards),
        }
        if name in whole:
            return whole[name]
        if name == "nvmlDeviceGetHandleByIndex":
            return self.cards[arguments[0]]
        card = arguments[0]
        if name == "nvmlDeviceGetMigDeviceHandleByIndex":
            parts = card.get("parts", ())
            if arguments[1] >= len(parts):
                raise nvml_error(6)
            return {**card, **parts[arguments[1]]}
        if name in ("nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo"):
            found = card[name][arguments[1]]
        else:
            found = card[name]
        if isinstance(found, Exception):
            raise found
        return found


def nvml_error(number: int) -> Exception:
    """The error of that number, as pynvml raises it: 3 not supported, 4 no permission, 6 not found, 999 unknown."""
    import pynvml

    return pynvml.NVMLError(number)


# As nvidia-smi -q shows an H100 SXM that nobody uses; figures that vary were chosen.
IDLE_H100: dict[str, Any] = {
    "nvmlDeviceGetName": b"NVIDIA H100 80GB HBM3",
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=81559 << 20, used=600 << 20, free=80959 << 20),
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetClockInfo": {1: 345, 2: 2619},
    "nvmlDeviceGetMaxClockInfo": {1: 1980, 2: 2619},
    "nvmlDeviceGetMemoryBusWidth": 5120,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetUUID": "GPU-5e37f1a2-0000-4444-8888-aaaaaaaaaaaa",
    "nvmlDeviceGetCurrPcieLinkGeneration": 5,
    "nvmlDeviceGetCurrPcieLinkWidth": 16,
    "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetComputeRunningProcesses": [],
    "nvmlDeviceGetGraphicsRunningProcesses": [],
    "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceGetMaxMigDeviceCount": 7,
    "nvmlDeviceGetAttributes": SimpleNamespace(gpuInstanceSliceCount=1),
}


@pytest.fixture
def made_nvml() -> type[MadeNvml]:
    return MadeNvml


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], str]:
    """Lays out the /proc and /sys of a machine of tests/data/machines and gives their root."""

    def lay(name: str) -> str:
        told = loads((Path(__file__).parent / "data" / "machines" / f"{name}.json").read_text(encoding="utf-8"))
        for path, text in told["files"].items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return lay


@pytest.fixture
def interruptible() -> Callable[[], None]:
    """For `preexec_fn`: a process that may be interrupted, also where whoever runs the tests ignores Ctrl-C (a job in
    the background, nohup), which its children would inherit."""

    def restore() -> None:
        for name in ("SIGINT", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_DFL)

    return restore
