"""The small hybrid under tests/data/small_hybrid: it is a Qwen3.5, its weights mean something, and it loads everywhere.

Also its training script, with a handful of tiny steps: stopped and resumed it comes to the same weights.
"""

import json
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from math import exp, log
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the quantizer needs torch: pip install 'qwenfit[quant]'")
pytest.importorskip("tokenizers", reason="the text needs tokenizers: pip install 'qwenfit[quant]'")
from safetensors.torch import load_file  # noqa: E402

from qwenfit.quant.calibration import consecutive_sequences, read_text, read_tokenizer  # noqa: E402
from qwenfit.quant.evaluate import evaluate  # noqa: E402

TESTS = Path(__file__).parent.parent
SMALL_HYBRID = TESTS / "data/small_hybrid"
PERPLEXITY_LIMIT = 62  # README.md of the folder has what was measured
TOKENS, LENGTH = 2048, 256


@pytest.fixture(scope="module")
def tensors() -> Any:
    return load_file(SMALL_HYBRID / "model.safetensors")


def test_it_is_a_hybrid_of_three_to_ten_million_parameters(tensors: Any) -> None:
    config = json.loads((SMALL_HYBRID / "config.json").read_text("utf-8"))
    assert config["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * (config["num_hidden_layers"] // 4)
    assert 3_000_000 < sum(tensor.numel() for tensor in tensors.values()) < 10_000_000
    assert (SMALL_HYBRID / "model.safetensors").stat().st_size < 20 << 20
    wide = {name.rpartition("linear_attn.")[2] for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {"A_log", "norm.weight"}  # as in the released Qwen3.5 checkpoints
    linears = [tensor for name, tensor in tensors.items() if name.endswith("proj.weight") or "in_proj_qkv" in name]
    assert linears and all(tensor.shape[1] % 256 == 0 for tensor in linears)  # whole groups of 128, blocks of Q4_K


def test_it_has_learned(tensors: Any) -> None:
    """Perplexity of unseen text is far below what word frequencies give, a limit no untrained weights come near."""
    text, tokenizer = read_text(str(SMALL_HYBRID / "heldout.txt")), read_tokenizer(str(SMALL_HYBRID))
    counts = Counter(tokenizer.encode(text.data.decode()).ids)
    total = sum(counts.values())
    unigram = exp(-sum(count / total * log(count / total) for count in counts.values()))
    sequences = consecutive_sequences(text, tokenizer, LENGTH, tokens=TOKENS)
    perplexity = evaluate(str(SMALL_HYBRID), str(SMALL_HYBRID), sequences).perplexity
    assert perplexity < PERPLEXITY_LIMIT < unigram / 3, (perplexity, unigram)


def test_its_weights_are_not_noise(tensors: Any) -> None:
    """The largest singular value of a matrix of independent entries is near sigma (sqrt(O) + sqrt(I)) (Marchenko and
    Pastur); what training wrote stands out of that."""
    gains = []
    for name, tensor in tensors.items():
        if name.endswith("proj.weight") or "in_proj_qkv" in name:
            matrix = tensor.float()
            edge = matrix.std() * (matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5)
            gains.append((torch.linalg.matrix_norm(matrix, 2) / edge).item())
    gains.sort()
    assert gains[len(gains) // 2] > 1.5


def test_transformers_and_the_runtime_agree_on_it() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.2", reason="pip install transformers")
    from qwenfit.kernels.runtime.generate import chunks
    from qwenfit.kernels.runtime.loading import load
    from qwenfit.kernels.runtime.memory import Settings, allocate
    from qwenfit.kernels.runtime.model import forward, logits, prefill_step

    text, tokenizer = read_text(str(SMALL_HYBRID / "heldout.txt")), read_tokenizer(str(SMALL_HYBRID))
    tokens = consecutive_sequences(text, tokenizer, 100, tokens=100)
    reference = transformers.AutoModelForCausalLM.from_pretrained(SMALL_HYBRID, dtype=torch.float32)
    model = load(str(SMALL_HYBRID), dtype=torch.float32)
    buffers = allocate(model.configuration, Settings(ctx_tokens=128), torch.float32, "cpu")
    with torch.inference_mode():
        expected = reference(input_ids=tokens, use_cache=False).logits[0]
        for ((sequence, start, length),) in chunks([100], 64):
            step = prefill_step(model, buffers, [sequence], [start], [length])
            found = logits(model, forward(model, tokens[0, start : start + length], step, buffers))
            assert torch.allclose(found, expected[start : start + length], atol=2e-3)


def test_training_resumed_is_training_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", minversion="5.2", reason="pip install transformers")
    spec = spec_from_file_location("train_small_hybrid", TESTS / "train_small_hybrid.py")
    assert spec and spec.loader
    script: Any = module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, value in {"CONTEXT_TOKENS": 64, "BATCH": 1, "SAVE_STEPS": 2, "CHECK_STEPS": 100}.items():
        monkeypatch.setattr(script, name, value)
    changes = {"hidden_size": 128, "intermediate_size": 128}
    monkeypatch.setattr(script, "CONFIG", {**script.CONFIG, **changes})
    tokens = torch.randint(2048, (3000,), generator=torch.Generator().manual_seed(0))
    weights = []
    for name, stops in (("whole", (4,)), ("resumed", (2, 4))):
        folder = tmp_path / name
        folder.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            with monkeypatch.context() as patch:
                patch.setattr(script, "rate_at", lambda *_: 1e-3)
                script.train(folder, tokens, tokens[:600], stop)
        weights.append(load_file(folder / "model.safetensors"))
    whole, resumed = weights
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
