"""The files that this room writes, loaded and run by the engines themselves: slow, and each needs its engine.

    QWENFIT_LLAMA_SERVER   a built llama-server                          bash tests/engines/run quantized-llama.cpp
    QWENFIT_VLLM_PYTHON    an interpreter with vLLM's CPU build          bash tests/engines/run quantized-vllm
    QWENFIT_GPTQ_PYTHON    one with transformers, gptqmodel, optimum     bash tests/engines/run quantized-gptq

The truth is transformers in float32 with the matrices that the codes stand for, so what remains is the engine's own
arithmetic: bf16 in vLLM, activations in 8 bits in llama.cpp's matmul of quantized weights.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from qwenfit.quant import awq_file, compressed_tensors_file, gptq_file
from qwenfit.quant.quantized import Scheme
from qwenfit.quant.source import open_source

pytestmark = pytest.mark.engines
transformers = pytest.importorskip("transformers", reason="transformers is the truth: pip install transformers")

SERVER, VLLM, GPTQ = (os.environ.get(f"QWENFIT_{name}") for name in ("LLAMA_SERVER", "VLLM_PYTHON", "GPTQ_PYTHON"))
VOCABULARY = 512
KEPT_WORDS = ("in_proj_a", "in_proj_b", "conv1d", "mlp.gate.", "shared_expert_gate", "norm", "embed", "head", "mtp")


def is_text_matrix(module: str) -> bool:
    is_kept = any(word in f"{module}." for word in KEPT_WORDS) or module.endswith(("A_log", "dt_bias"))
    return "layers." in module and not is_kept


def tokens(count: int = 40) -> list[int]:
    return torch.randint(2, 250, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def reference(folder: Path, matrices: dict[str, Any]) -> Any:
    """Log-probabilities after every token, float64 [T, vocabulary], with those matrices in place of the source's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if label in matrices:
                parameter.copy_(matrices[label].view(parameter.shape))
        return model(torch.tensor([tokens()])).logits[0].double().log_softmax(-1)


def divergence(expected: Any, found: Any) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@contextmanager
def served(path: Path) -> Iterator[str]:
    """llama-server's address, while it has that file loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(SERVER), "-m", str(path), "--port", str(port), "-c", "256", "-np", "1", "-t", "1", "--no-warmup"]
    with open(path.with_suffix(".log"), "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, path.with_suffix(".log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def llama_cpp(path: Path, lengths: tuple[int, ...]) -> list[tuple[int, Any]]:
    """Log-probabilities of the token after so many of the tokens: (how many, float64 [vocabulary])."""
    found: list[tuple[int, Any]] = []
    with served(path) as address:
        for length in lengths:
            body = {"prompt": tokens()[:length], "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0}
            request = urllib.request.Request(
                f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                probabilities = json.load(answer).get("completion_probabilities")
            if not probabilities:
                continue  # it chose the end of the text, of which it says nothing more
            values = torch.full((VOCABULARY,), float("nan"), dtype=torch.float64)
            for entry in probabilities[0]["top_logprobs"]:
                values[entry["id"]] = entry["logprob"]
            assert not bool(values.isnan().any())
            found.append((length, values))
    assert len(found) > len(lengths) // 2
    return found


# Kind -> the largest divergence: of llama.cpp from the decoded blocks, which is its rounding of activations to 8 bits.
GGUF_LIMITS = {"F32": 1e-5, "BF16": 1e-3, "Q8_0": 2e-2, "Q4_0": 2e-2, "Q4_1": 2e-2, "Q4_K": 2e-2, "Q6_K": 2e-2}


@pytest.mark.skipif(not SERVER, reason="QWENFIT_LLAMA_SERVER names no built llama-server")
@pytest.mark.parametrize("kind", GGUF_LIMITS)
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_llama_cpp_serves_what_the_blocks_stand_for(
    name: str, kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from qwenfit.quant.gguf_file import GgufFile
    from qwenfit.quant.gguf_names import pieces

    folder, path = checkpoint(name, is_wide=True), tmp_path / "model.gguf"
    source = open_source(str(folder))
    file = GgufFile(str(path), source, {piece.name: kind for piece in pieces(source) if piece.is_matrix})
    for piece in file.pieces:
        file.convert(piece)
    file.finish()
    check_served(name, kind, folder, path)


@pytest.mark.skipif(not SERVER, reason="QWENFIT_LLAMA_SERVER names no built llama-server")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_llama_cpp_serves_what_the_solver_made(
    name: str, kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from qwenfit.quant import Recipe, Rule, quantize

    folder = checkpoint(name, is_wide=True)
    rules = (Rule(r"\.3\.mlp.*down_proj$", 8),)
    recipe = Recipe(format="gguf", gguf_type=kind, method="gptq", tokens=512, embeddings=6, modules=rules)
    quantize(str(folder), str(tmp_path / "made"), recipe)
    check_served(name, kind, folder, tmp_path / "made" / "made.gguf")


def stored_matrices(path: Path, folder: Path) -> dict[str, Any]:
    """What the blocks of a GGUF file stand for, under the source's names and in its order, as gguf-py decodes them."""
    import gguf

    from qwenfit.quant.gguf_names import column_order, pieces, row_order

    source = open_source(str(folder))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    matrices: dict[str, Any] = {}
    for piece in pieces(source):
        if not piece.is_matrix or piece.source.startswith("mtp"):
            continue
        tensor = stored[piece.name]
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(piece.shape)
        whole = matrices.setdefault(piece.source, torch.empty(source.shape(piece.source)))
        rows, columns = row_order(piece.source, source.model), column_order(piece.source, source.model)
        if rows is not None:
            whole[rows] = numbers
        elif columns is not None:
            whole[:, columns] = numbers
        else:
            whole[..., slice(None) if piece.rows is None else piece.rows, :] = numbers
    return matrices


def check_served(name: str, kind: str, folder: Path, path: Path) -> None:
    expected, plain = reference(folder, stored_matrices(path, folder)), reference(folder, {})
    found = llama_cpp(path, (16, 20, 24, 28, 32, 36, 40))
    # The median: where two experts are all but equal, 8 bits of an activation choose the other one.
    from_blocks = median(divergence(expected[length - 1], answer) for length, answer in found)
    from_source = median(divergence(plain[length - 1], answer) for length, answer in found)
    print(f"{name} {kind}: KL {from_blocks:.2e} from the blocks, {from_source:.2e} from the source")
    is_rounded_mixture = name == "qwen3_5_moe" and kind.startswith("Q")  # some tokens still meet another expert
    assert from_blocks < GGUF_LIMITS[kind] * (5 if is_rounded_mixture else 1)
    if kind.startswith("Q4"):
        assert from_blocks < 0.2 * from_source


FORMATS = {
    "compressed-tensors int4": (compressed_tensors_file, Scheme(4, 64, True)),
    "compressed-tensors int4 asym": (compressed_tensors_file, Scheme(4, 32, False)),
    "compressed-tensors w8a8": (compressed_tensors_file, Scheme(8, -1, True, activation_bits=8)),
    "gptq": (gptq_file, Scheme(4, 64, True)),
    "awq": (awq_file, Scheme(4, 64, False)),
}
VLLM_CHILD = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompt = sys.argv[1], json.loads(sys.argv[2])
    engine = LLM(folder, max_model_len=128, enforce_eager=True, max_num_seqs=1, dtype="bfloat16", max_logprobs=512)
    asked = SamplingParams(max_tokens=1, temperature=1.0, logprobs=512)
    [answer] = engine.generate({"prompt_token_ids": prompt}, asked)
    found = {token: entry.logprob for token, entry in answer.outputs[0].logprobs[0].items()}
    print("FOUND" + json.dumps(found))
"""
GPTQ_CHILD = """
import json, sys, torch, transformers
folder, prompt = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu").eval()
with torch.no_grad():
    found = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
print("FOUND" + json.dumps({number: value for number, value in enumerate(found.tolist())}))
"""


def asked(python: str, child: str, folder: Path, tmp_path: Path) -> Any:
    """Log-probabilities of the token after the prompt that the engine in a process of its own answers with."""
    script = tmp_path / "child.py"
    script.write_text(child)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [python, str(script), str(folder), json.dumps(tokens())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    found = torch.full((VOCABULARY,), float("nan"), dtype=torch.float64)
    for token, value in json.loads(answer.removeprefix("FOUND")).items():
        found[int(token)] = value
    assert not bool(found.isnan().any())
    return found


def loaded(
    form: str, name: str, make: Any, write: Any, tmp_path: Path, python: str, child: str, head: Scheme | None = None
) -> tuple[Any, Any]:
    """What transformers and the engine answer. head: how a head of its own is quantized; None: it is the embedding."""
    writer, scheme = FORMATS[form]
    folder = make(name, for_kernels=True, **({"tie_word_embeddings": False} if head else {}))
    fake = write(
        folder,
        tmp_path / "quantized",
        writer,
        lambda module: scheme if is_text_matrix(module) else head if module.endswith("lm_head") else None,
    )
    assert head is None or any(module.startswith("lm_head") for module in fake)
    expected = reference(folder, fake)[-1]
    return expected, asked(python, child, tmp_path / "quantized", tmp_path)


@pytest.mark.skipif(not VLLM, reason="QWENFIT_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.parametrize("form", FORMATS)
def test_vllm_serves_it(form: str, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path) -> None:
    expected, found = loaded(form, "qwen3_5", checkpoint, quantized_checkpoint, tmp_path, str(VLLM), VLLM_CHILD)
    print(f"{form}: KL {divergence(expected, found):.2e}, max {(expected - found).abs().max():.3f}")
    assert divergence(expected, found) < (5e-2 if "w8a8" in form else 5e-3)


@pytest.mark.skipif(not VLLM, reason="QWENFIT_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.parametrize(
    ("form", "head"),
    [
        ("compressed-tensors int4", Scheme(4, 64, True)),  # as everything else: one group, found by its name
        ("compressed-tensors int4", Scheme(4, 32, True)),
        ("compressed-tensors int4 asym", Scheme(4, 32, False)),
        ("gptq", Scheme(4, 64, True)),
        ("gptq", Scheme(4, 32, True)),
        ("awq", Scheme(4, 64, False)),
    ],
)  # the CPU build has no kernel for 8 bits
def test_vllm_serves_a_quantized_head(
    form: str, head: Scheme, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path
) -> None:
    told = (tmp_path, str(VLLM), VLLM_CHILD, head)
    expected, found = loaded(form, "qwen3_5", checkpoint, quantized_checkpoint, *told)
    print(f"{form}, head in groups of {head.group_size}: KL {divergence(expected, found):.2e}")
    assert divergence(expected, found) < 5e-3


@pytest.mark.skipif(not GPTQ, reason="QWENFIT_GPTQ_PYTHON names no interpreter with gptqmodel")
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_transformers_with_gptqmodel_loads_it(
    form: str, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path
) -> None:
    expected, found = loaded(form, "qwen3_5", checkpoint, quantized_checkpoint, tmp_path, str(GPTQ), GPTQ_CHILD)
    print(f"{form}: KL {divergence(expected, found):.2e}, max {(expected - found).abs().max():.3f}")
    assert divergence(expected, found) < 5e-3
