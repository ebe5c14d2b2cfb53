"""The Triton path offers every operation with its twin's signature, and says why it takes which kernel.

There is no GPU here: the target is a pretended one, and the kernels run in the interpreter on CPU tensors.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels import dispatch, library  # noqa: E402
from qwenfit.kernels.gpu import path as triton_path  # noqa: E402
from qwenfit.kernels.gpu import target  # noqa: E402
from qwenfit.kernels.layout.packing import quantize_rtn  # noqa: E402
from qwenfit.kernels.operations import REFERENCE, Operations  # noqa: E402
from qwenfit.kernels.reference import dense as reference  # noqa: E402


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> Operations:
    monkeypatch.delenv("QWENFIT_MATMUL_PATH", raising=False)
    monkeypatch.setattr(target, "target_of", lambda device: target.target("sm_75"))
    return triton_path.triton_path("cuda")


def test_every_operation_has_the_signature_of_its_twin(turing: Operations) -> None:
    """A host may take more arguments behind them, with defaults; the first have the twin's names and order."""
    for name in dispatch.OPERATIONS[1:]:
        twin, host = (inspect.signature(getattr(operations, name)) for operations in (REFERENCE, turing))
        assert list(host.parameters)[: len(twin.parameters)] == list(twin.parameters), name
        assert all(
            parameter.default is not inspect.Parameter.empty
            for parameter in list(host.parameters.values())[len(twin.parameters) :]
        ), name


def test_turing_says_what_it_has_not(turing: Operations) -> None:
    assert turing.choices["matmul, one row"].startswith("gemv: sm_75 has no tensor cores in Triton")
    assert turing.choices["matmul, 2048 rows"].startswith("unpack: sm_75 has no tensor cores in Triton")
    assert turing.choices["attention of prompts"].startswith("matmul: ")
    assert turing.choices["everything else"].startswith("triton: ")


def test_rdna_3_says_what_it_has_no_registers_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, has_tiles in (("gfx1100", False), ("gfx1201", True)):
        monkeypatch.setattr(target, "target_of", lambda device, name=name: target.target(name))
        words = triton_path.triton_path("cuda").choices["attention of prompts"]
        assert words.startswith("triton: ") and ("over an int8 cache by torch's matmul" in words) != has_tiles


def test_linear_takes_either_kind_of_matrix(turing: Operations) -> None:
    x, weight = torch.randn(2, 128), quantize_rtn(torch.randn(16, 128), 4, 128)
    expected = reference.quantized_matmul(x, weight)
    torch.testing.assert_close(turing.linear(x, weight), expected, rtol=1e-4, atol=1e-4)
    plain = torch.randn(5, 128)
    torch.testing.assert_close(turing.linear(x, plain), x @ plain.T)


def test_the_library_calls_it_on_cuda(turing: Operations) -> None:
    """What the CUDA key of `torch.ops.qwenfit` calls, on CPU tensors: a weight in parts comes together again."""
    library.hosts.cache_clear()
    try:
        x, weight = torch.randn(1, 128), quantize_rtn(torch.randn(16, 128), 4, 32, symmetric=False)
        found = library._run_quantized_matmul("cuda", x, *library._parts(weight), None)
        torch.testing.assert_close(found, reference.quantized_matmul(x, weight), rtol=1e-4, atol=1e-4)
        assert set(library.hosts("cuda")) == set(library.SCHEMAS) - {"plain_expert_matmul"}
    finally:
        library.hosts.cache_clear()


def test_without_triton_it_is_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None)))
    operations = triton_path.triton_path("cuda")
    assert operations.rope is REFERENCE.rope and "pip install triton" in operations.choices["everything"]
