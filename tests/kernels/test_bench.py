"""The GPU bench, as far as it goes without a GPU: every kind of kernel through the interpreter, judged before timed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
import torch  # noqa: E402

from qwenfit.kernels import bench  # noqa: E402
from qwenfit.kernels.proof import bench_shapes  # noqa: E402
from qwenfit.kernels.proof.bench_work import Work  # noqa: E402

DRY = ("--dry-run", "--tokens", "2", "--model")


def measured(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "bench.json"
    status = bench.main([*options, "--json", str(path)])
    return status, json.loads(path.read_text(encoding="utf-8"))


def test_every_kind_of_a_mixture_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = measured(tmp_path, *DRY, "qwen3.5-35b-a3b")
    assert status == 0, capsys.readouterr().out
    assert {row["operation"] for row in report["rows"]} == {
        *("quantized_matmul", "expert_matmul", "gated_delta_rule_step", "causal_conv1d_update"),
        *("rms_norm", "add_rms_norm", "gated_rms_norm", "rope", "store_kv", "attention_decode"),
    }
    assert all(row["status"] == "ok" and 0 <= row["error"] <= row["bound"] < 1e-3 for row in report["rows"])
    assert not any("median_s" in row for row in report["rows"])  # an interpreter's times are worth nothing
    assert report["dry_run"] and report["device"] == {"name": "cpu"} and report["versions"]["torch"]
    rivals = next(row["rivals"] for row in report["rows"] if row["operation"] == "quantized_matmul")
    assert rivals["cublas"]["error"] < 1e-3
    assert all("error" in rival or rival["reason"] for rival in rivals.values()) and "marlin" in rivals


def test_a_prompt_takes_the_other_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--dry-run", "--tokens", "70", "--model", "qwen3.5-0.8b", "--only", "delta", "attention", "--no-rivals")
    status, report = measured(tmp_path, *options)
    assert status == 0, capsys.readouterr().out
    operations = {row["operation"] for row in report["rows"]}
    assert {"gated_delta_rule_prefill", "causal_conv1d_prefill", "attention_prefill"} <= operations
    assert not any(row.get("rivals") for row in report["rows"])


def wrong_work(result: Any) -> Work:
    truth = torch.ones(8, dtype=torch.float64)
    return Work("sum", "8", ("any",), 1, 64, 8, 1, lambda i: result(), lambda dtype: truth.to(dtype))


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (lambda: torch.ones(8), "ok"),
        (lambda: torch.full((8,), 1.001), "wrong"),
        (lambda: torch.full((8,), float("nan")), "wrong"),
        (lambda: 1 / 0, "failed"),
    ],
)
def test_what_is_wrong_is_not_timed(result: Any, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Work] = []
    monkeypatch.setattr(bench, "_time", lambda work, *rest: timed.append(work))
    row = bench.measure(partial(wrong_work, result), object(), 0, with_rivals=False)  # type: ignore[arg-type]
    assert row["status"] == status and bool(timed) == (status == "ok")
    assert status in bench.table_line(row) or status == "ok"
    assert status != "failed" or "division by zero" in row["reason"]


def test_a_wrong_kernel_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    makers = [partial(wrong_work, lambda: torch.zeros(8)), partial(wrong_work, lambda: torch.ones(8))]
    monkeypatch.setattr(bench_shapes, "works", lambda *arguments: iter(makers))
    status, report = measured(tmp_path, "--dry-run", "--model", "qwen3.5-0.8b")
    assert status == 1 and [row["status"] for row in report["rows"]] == ["wrong", "ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert "no GPU here; --dry-run" in capsys.readouterr().err


def test_an_unknown_model_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*DRY, "qwen3.5-10b"]) == 2
    assert "qwen3.5-10b" in capsys.readouterr().err
