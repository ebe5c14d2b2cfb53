"""The command: generates from a folder, says how fast and in how much memory, and refuses in one sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwenfit.kernels import run
from qwenfit.kernels.runtime.generate import generate
from qwenfit.kernels.runtime.loading import load
from qwenfit.kernels.runtime.memory import Settings, allocate
from qwenfit.profiles.model_catalog import model as catalog_model

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of random weights with the names and shapes that the catalog's rules give the tiny dense model."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    tensors = {
        name: (torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5).to(dtypes[tensor.dtype])
        for name, tensor in catalog_model(str(DATA / "tiny_qwen3_5.json")).expanded()
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text((DATA / "tiny_qwen3_5.json").read_text())
    return str(path)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    status = run.main([*words, "--device", "cpu"])
    printed = capsys.readouterr()
    return status, json.loads(printed.out) if printed.out.startswith("{") else printed.out, printed.err


def test_a_process_of_its_own(folder: str) -> None:
    """Two prompts, drafts, an int8 cache: exit 0, JSON on stdout, nothing on stderr, memory as it was planned."""
    words = [folder, "--prompt-tokens", "3,4,5", "--prompt-tokens", "6", "--ctx", "100", "--seqs", "3", "--tokens", "5"]
    words += [
        "--kv-dtype",
        "int8",
        "--state-dtype",
        "bfloat16",
        "--prefill-chunk",
        "2",
        "--mtp",
        "2",
        "--ignore-stop",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "qwenfit.kernels.run", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [len(text) for text in report["tokens"]] == [5, 5]
    memory = report["memory"]
    # 2 layers (one of them predicts) x 2 heads x 128 tokens x (64 + 4) bytes, keys and values, 3 sequences; 3 slots
    # each
    assert memory["kv_cache"] == {"planned": 2 * 2 * 128 * 68 * 2 * 3, "allocated": 2 * 2 * 128 * 68 * 2 * 3}
    assert memory["recurrent_state"]["planned"] == memory["recurrent_state"]["allocated"] > 0
    # dt_bias is float32 in the runtime and bf16 in the file: 2 bytes x 4 heads x 3 layers
    assert memory["weights"]["allocated"] == memory["weights"]["planned"] + 24
    assert memory["peak"]["allocated"] > 50e6
    assert report["speed"]["decode_tokens"] == 8 and report["speed"]["drafted"] > 0
    assert report["speed"]["prefill_tokens_per_s"] > 0 < report["speed"]["decode_tokens_per_s"]
    assert report["operations"]["matmul"].startswith(("C kernels", "torch packed matmul"))


def test_tokens_are_those_of_generate(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompt-tokens", "3,4,5,6", "--tokens", "6", "--ctx", "64", "--dtype", "float32", "--ignore-stop")
    status, report, _ = answer(capsys, folder, *words, "--json")
    model = load(folder, dtype=torch.float32)
    found = generate(
        model, allocate(model.configuration, Settings(64), torch.float32, "cpu"), [[3, 4, 5, 6]], 6, stop_tokens=()
    )
    assert status == 0 and report["tokens"] == [list(found.tokens[0])]
    drawn = answer(
        capsys, folder, *words, "--json", "--temperature", "2", "--top-k", "40", "--top-p", "0.9", "--seed", "3"
    )[1]
    assert drawn["tokens"] != report["tokens"] and drawn["sampling"]["top_k"] == 40


def test_on_the_screen(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = answer(capsys, folder, "--prompt-tokens", "3,4,5", "--tokens", "3", "--ctx", "64")
    assert status == 0
    for word in (
        "planned",
        "allocated",
        "weights",
        "kv cache",
        "recurrent state",
        "scratch",
        "peak",
        "prefill",
        "decode",
    ):
        assert word in text
    assert "[0] " in text


def test_without_a_prompt_it_measures(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As many random tokens as fit, for every sequence; the line that the planner prints has no prompt."""
    words = ("--ctx", "64", "--seqs", "2", "--kv-dtype", "bf16", "--state-dtype", "float32", "--prefill-chunk", "512")
    status, report, _ = answer(capsys, folder, *words, "--tokens", "1", "--json")
    assert status == 0 and report["speed"]["prefill_tokens"] == 2 * 63


def test_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--random", "int4", "--prompt-tokens", "1,2", "--tokens", "2", "--ctx", "64", "--json")
    status, report, _ = answer(capsys, str(DATA / "tiny_qwen3_5_moe.json"), *words)
    assert status == 0 and report["architecture"] == "qwen3_5_moe" and report["memory"]["weights"]["planned"] is None


def test_text_with_a_tokenizer(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer of words beside the weights: text in, text out."""
    tokenizers = pytest.importorskip("tokenizers", reason="--prompt needs tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{number}": number for number in range(512)}, unk_token="w0")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = Path(folder, "tokenizer.json")
    made.save(str(path))
    try:
        words = (folder, "--tokens", "4", "--ctx", "64", "--ignore-stop", "--json")
        by_text = answer(capsys, *words, "--prompt", "w3 w4 w5")[1]
        by_tokens = answer(capsys, *words, "--prompt-tokens", "3,4,5")[1]
    finally:
        path.unlink()
    assert by_text["tokens"] == by_tokens["tokens"]
    assert by_text["text"] == [" ".join(f"w{token}" for token in by_text["tokens"][0])]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--prompt", "hello"), "tokenizer.json is missing; or give token ids with --prompt-tokens"),
        (("--prompt-tokens", "1,x"), "--prompt-tokens '1,x': give token ids with commas between them"),
        (("--prompt-tokens", "512"), "prompt 0 has a token outside 0 ... 511"),
        (("--ctx", "0"), "ctx_tokens is 0: give 1 or more"),
        (("--kv-dtype", "fp8"), "the native runtime has no fp8 cache: give bf16 or int8"),
        (("--state-dtype", "int8"), "the recurrent state is no int8"),
        (("--mtp", "9"), "9 draft tokens: give 0 to 7"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--prompt-tokens", "1", "--prompt-tokens", "2", "--seqs", "1"), "2 prompts for 1 sequences: give --seqs 2"),
    ],
)
def test_an_error_is_a_sentence(
    folder: str, words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, error = answer(capsys, folder, *words)
    assert status == 2 and not out and sentence in error and error.count("\n") == 1


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = answer(capsys, str(tmp_path / "nowhere"), "--prompt-tokens", "1")
    assert status == 2 and not out and "cannot be listed" in error and error.count("\n") == 1
