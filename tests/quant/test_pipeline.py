"""`quantize` from end to end on small checkpoints: what is written, that it is the same however it came to be, and that
it loads with the logits of the matrices that its codes stand for."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.quant import Recipe, Rule, quantize
from qwenfit.quant.evaluate import evaluate
from qwenfit.quant.pipeline import Summary

SMALL = Recipe(group_size=32, tokens=256, sequence_tokens=64)
Checkpoint = Callable[..., Path]


def files(folder: str | Path) -> dict[str, bytes]:
    """Everything in a checkpoint but for the model card, which says how long and by what command."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name != "README.md"}


def small(recipe: Recipe = SMALL, **changes: Any) -> Recipe:
    return Recipe(**{**{name: getattr(recipe, name) for name in recipe.__dataclass_fields__}, **changes})


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    target = tmp_path_factory.mktemp("whole") / "int4"
    return quantize(str(checkpoint("qwen3_5")), str(target), SMALL)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_what_is_written_loads_and_generates(checkpoint: Checkpoint, tmp_path: Path, name: str, form: str) -> None:
    # A mixture of random experts is chaotic: a token that goes elsewhere is off by half. So it is measured at 8 bits.
    bits, most = (4, 0.5) if name == "qwen3_5" else (8, 0.15)
    summary = quantize(str(checkpoint(name)), str(tmp_path / "out"), small(format=form, bits=bits, method="gptq"))
    assert summary.bytes < 0.8 * summary.source_bytes
    assert {result.bits for result in summary.results} == {bits}
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    found = evaluate(summary.target, str(checkpoint(name)), tokens)
    assert 1e-4 < found.mean_kl < most and len(found.layer_errors) == 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == form
    assert "qwenfit" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_a_shared_expert_is_solved_by_every_method(checkpoint: Checkpoint, tmp_path: Path, method: str) -> None:
    """AWQ leaves the norm in front of a mixture alone; what reads it is rounded all the same, for its own inputs."""
    told = small(bits=8, method=method, shared_experts=8)
    summary = quantize(str(checkpoint("qwen3_5_moe")), str(tmp_path / "out"), told)
    shared = {one.module.rpartition(".")[2]: one for one in summary.results if "layers.0.mlp.shared_exp" in one.module}
    assert set(shared) == {"gate_proj", "up_proj", "down_proj"}
    for one in shared.values():
        assert one.method == method and (one.error is None if method == "rtn" else one.error and one.error < 1e-3)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    assert 1e-4 < evaluate(summary.target, str(checkpoint("qwen3_5_moe")), tokens).mean_kl < 0.15


def test_what_was_never_written_is_no_result(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room on the disk is taken beforehand: a module that nobody solves would be zeros in a file that loads."""
    monkeypatch.setattr("qwenfit.quant.layer_solver.LayerSolver._experts", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"never written, the first .*mlp.experts.0.*_proj"):
        quantize(str(checkpoint("qwen3_5_moe")), str(tmp_path / "out"), small(method="gptq"))
    assert not (tmp_path / "out").exists()


def test_linears_of_all_layers_are_quantized_and_nothing_else(whole: Summary) -> None:
    leaves = {result.module.partition("layers.")[2].partition(".")[2] for result in whole.results}
    assert leaves == {
        *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert all(result.method == "gptq" and result.error and 0 < result.error < 0.05 for result in whole.results)
    assert not whole.fallbacks


def test_the_same_bytes_whatever_the_number_of_threads(checkpoint: Checkpoint, tmp_path: Path, whole: Summary) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        other = quantize(str(checkpoint("qwen3_5")), str(tmp_path / "other"), SMALL)
    finally:
        torch.set_num_threads(threads)
    assert files(other.target) == files(whole.target)


def test_the_same_bytes_with_activations_in_files(checkpoint: Checkpoint, tmp_path: Path, whole: Summary) -> None:
    from qwenfit.quant import pipeline

    limit = pipeline.PROCESS_BYTES + 4_000_000
    other = quantize(str(checkpoint("qwen3_5")), str(tmp_path / "other"), SMALL, max_ram_bytes=limit)
    assert files(other.target) == files(whole.target)
    with pytest.raises(BadInput, match="are needed beside activations"):
        quantize(str(checkpoint("qwen3_5")), str(tmp_path / "third"), SMALL, max_ram_bytes=1_000_000)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 9, 12])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, whole: Summary, after: int
) -> None:
    seen = []

    def watch(progress: Any) -> None:
        seen.append(progress.module)
        if len(seen) == after:
            raise Stop

    source, target = str(checkpoint("qwen3_5")), str(tmp_path / "out")
    with pytest.raises(Stop):
        quantize(source, target, SMALL, watch=watch)
    assert not os.path.exists(target)
    with pytest.raises(BadInput, match="--resume goes on"):
        quantize(source, target, SMALL)
    with pytest.raises(BadInput, match="begun with another recipe"):
        quantize(source, target, small(seed=1), resume=True)
    done = quantize(source, target, SMALL, resume=True)
    assert files(done.target) == files(whole.target) and len(done.results) == len(whole.results)


KILLED = """
import sys, os, signal
from qwenfit.quant import Recipe, quantize
left = int(sys.argv[3])
def watch(progress):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
quantize(sys.argv[1], sys.argv[2], Recipe(group_size=32, tokens=256, sequence_tokens=64), watch=watch)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path, whole: Summary) -> None:
    source, target = str(checkpoint("qwen3_5")), str(tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, source, target, "7"], check=False)
    assert killed.returncode == -9 and not os.path.exists(target)
    assert files(quantize(source, target, SMALL, resume=True).target) == files(whole.target)


def test_another_source_is_not_gone_on_with(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen3_5"), source)

    def watch(progress: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantize(str(source), str(tmp_path / "out"), SMALL, watch=watch)
    os.utime(source / "config.json", (1, 1))
    with pytest.raises(BadInput, match="begun with another source"):
        quantize(str(source), str(tmp_path / "out"), SMALL, resume=True)


def test_a_source_that_changes_while_it_is_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen3_5"), source)

    def watch(progress: Any) -> None:
        os.utime(source / "model.safetensors", (1, 1))

    with pytest.raises(BadInput, match="source changed while it was read"):
        quantize(str(source), str(tmp_path / "out"), small(method="rtn"), watch=watch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [1, 9, 24])
def test_rounding_that_is_interrupted_goes_on_to_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, after: int
) -> None:
    """Its state goes to the disk while it goes on, so it may be behind; the bytes are the same."""
    source, recipe, seen = str(checkpoint("qwen3_5")), small(method="rtn"), []

    def watch(progress: Any) -> None:
        seen.append(progress.module)
        if len(seen) == after:
            raise Stop

    with pytest.raises(Stop):
        quantize(source, str(tmp_path / "out"), recipe, watch=watch)
    done = quantize(source, str(tmp_path / "out"), recipe, resume=True)
    whole = quantize(source, str(tmp_path / "whole"), recipe)
    assert files(done.target) == files(whole.target) and done.results == whole.results


def test_a_large_head_does_not_count_as_a_whole(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is rounded some rows at a time, so its 65,536 weights do not take 16 bytes each, as those of an expert do."""
    from qwenfit.quant import folder_result, pipeline

    monkeypatch.setattr(folder_result, "BLOCK_BYTES", 4096)
    source, limit = str(checkpoint("qwen3_5_moe")), pipeline.PROCESS_BYTES + 16 * 128 * 128
    quantize(source, str(tmp_path / "out"), small(method="rtn", lm_head=8), max_ram_bytes=limit)
    with pytest.raises(BadInput, match=r"are needed; give that$"):
        quantize(source, str(tmp_path / "less"), small(method="rtn", lm_head=8), max_ram_bytes=limit - 1)


def test_what_a_configuration_cannot_say_is_refused_before_the_work(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = str(checkpoint("qwen3_next"))
    with pytest.raises(ValueError, match="cannot be told apart in AWQ's rules"):
        quantize(source, str(tmp_path / "out"), small(format="awq"), watch=lambda progress: pytest.fail("too late"))
    assert not list(tmp_path.iterdir())


def test_rtn_needs_no_tokenizer_and_says_no_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen3_5"), source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="--method rtn"):
        quantize(str(source), str(tmp_path / "out"), SMALL)
    summary = quantize(str(source), str(tmp_path / "out"), small(bits=8, group_size=-1))
    assert summary.calibration == "none" and all(result.error is None for result in summary.results)
    assert all(result.method == "rtn" and result.bits == 8 for result in summary.results)


def test_rules_choose_bits_by_module_and_fused_ones_follow(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rules = (Rule(r"in_proj_z$", 8), Rule(r"layers\.0\.mlp", 16))
    summary = quantize(str(checkpoint("qwen3_5")), str(tmp_path / "out"), small(modules=rules, method="rtn"))
    bits = {result.module: result.bits for result in summary.results}
    assert {bits[name] for name in bits if "in_proj" in name} == {8}
    assert not any("layers.0.mlp" in name for name in bits)
    assert {bits[name] for name in bits if name.endswith("out_proj")} == {4}


def test_a_full_precision_stream_gives_targets(checkpoint: Checkpoint, tmp_path: Path, whole: Summary) -> None:
    target = str(tmp_path / "out")
    summary = quantize(str(checkpoint("qwen3_5")), target, small(full_precision_targets=False))
    assert files(summary.target) != files(whole.target)
    assert "full_precision_targets: true" in Path(whole.target, "README.md").read_text()  # the default
    assert "full_precision_targets: false" in Path(target, "recipe.yaml").read_text()


def test_experts_without_tokens_are_rounded_and_listed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    summary = quantize(str(checkpoint("qwen3_5_moe")), str(tmp_path / "out"), small(tokens=2, sequence_tokens=2))
    assert summary.fallbacks and all(".experts." in name for name in summary.fallbacks)
    assert summary.fallbacks[0] in (tmp_path / "out" / "README.md").read_text()


def test_a_tied_head_cannot_be_quantized(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_5")
    tied = json.loads((source / "config.json").read_text()).get("tie_word_embeddings")
    recipe = small(lm_head=8, method="rtn")
    if tied:
        with pytest.raises(Unsupported, match="--lm-head"):
            quantize(str(source), str(tmp_path / "out"), recipe)
    else:
        summary = quantize(str(source), str(tmp_path / "out"), recipe)
        assert summary.results[-1].module.endswith("lm_head") and summary.results[-1].bits == 8
