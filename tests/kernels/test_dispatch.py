"""The choice of a path has a reason that a person can read, and importing it costs nothing that a machine may lack."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenfit.kernels import dispatch
from qwenfit.kernels.dispatch import OPERATIONS, Choice, choose
from qwenfit.kernels.gpu import target
from qwenfit.kernels.operations import Operations


def pretend(monkeypatch: pytest.MonkeyPatch, name: str) -> torch.device:
    """A device whose target is `name`, and Triton installed."""
    monkeypatch.setattr(target, "target_of", lambda device: target.target(name))
    monkeypatch.setattr(dispatch, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: object())))
    return torch.device("cuda")


def test_the_processor_says_which_kernels_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENFIT_CPU_PATH", "torch")
    assert choose("quantized_matmul", "cpu") == Choice("torch", "torch packed matmul: QWENFIT_CPU_PATH=torch")
    monkeypatch.delenv("QWENFIT_CPU_PATH")
    assert choose("rms_norm", torch.device("cpu")).path in ("c", "torch")


def test_measuring_and_other_devices_take_the_twins() -> None:
    assert choose("quantized_matmul", "cpu", torch.float64).path == "reference"
    path, reason = (lambda choice: (choice.path, choice.reason))(choose("rope", "mps"))
    assert path == "reference" and "mps" in reason


def test_without_triton_a_gpu_takes_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None)))
    choice = choose("rms_norm", "cuda")
    assert choice.path == "reference" and "pip install triton" in choice.reason


@pytest.mark.parametrize(
    ("where", "operation", "arguments", "path", "words"),
    (
        ("sm_75", "quantized_matmul", {"rows": 1}, "gemv", "no tensor cores"),
        ("sm_75", "quantized_matmul", {"rows": 64}, "unpack", "vendor's matmul"),
        ("sm_75", "attention_prefill", {}, "matmul", "no tensor cores"),
        ("sm_75", "attention_decode", {}, "triton", "sm_75"),
        ("sm_90", "quantized_matmul", {"rows": 8}, "tiles", "estimated"),
        ("sm_90", "quantized_matmul", {"rows": 8, "dtype": torch.float32}, "gemv", "float32"),
        ("sm_90", "attention_prefill", {"dtype": torch.float32}, "matmul", "float32"),
        ("gfx942", "expert_matmul", {"rows": 8, "experts": 256}, "tiles", "256 experts"),
    ),
)
def test_a_gpu_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch, where: str, operation: str, arguments: dict[str, Any], path: str, words: str
) -> None:
    choice = choose(operation, pretend(monkeypatch, where), **arguments)
    assert choice.path == path and words in choice.reason


def test_unknown_operations_are_refused() -> None:
    with pytest.raises(ValueError, match="one of quantized_matmul, expert_matmul"):
        choose("softmax", "cpu")


def test_the_names_are_those_of_the_operations() -> None:
    assert {*OPERATIONS, "linear", "decode", "arrange", "choices"} - {"quantized_matmul"} == set(
        Operations.__dataclass_fields__
    )


def test_importing_it_imports_no_kernels() -> None:
    script = "import sys; import qwenfit.kernels.dispatch; print(any(m.startswith('triton') for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
