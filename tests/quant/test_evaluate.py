"""Evaluation: every number against transformers' own logits and hidden states, on the small hybrid and a random MoE.

Expected values are computed here from whole logits in float64; both models run in float32. Measured: divergences of
single tokens agree to 1e-5 of their value, perplexities and errors per layer to 2e-8; ten times that and more passes.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the quantizer needs torch: pip install 'qwenfit[quant]'")
transformers = pytest.importorskip("transformers", minversion="5.2", reason="the reference: pip install transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from qwenfit.kernels.layout.packing import dequantize, quantize_rtn  # noqa: E402
from qwenfit.profiles.errors import BadInput  # noqa: E402
from qwenfit.quant import evaluate as evaluate_file  # noqa: E402
from qwenfit.quant.calibration import consecutive_sequences, read_text, read_tokenizer  # noqa: E402
from qwenfit.quant.evaluate import Evaluation, evaluate  # noqa: E402

SMALL_HYBRID = Path(__file__).parent.parent / "data/small_hybrid"


@pytest.fixture(scope="module")
def sequences() -> Any:
    text = read_text(str(SMALL_HYBRID / "heldout.txt"))
    return consecutive_sequences(text, read_tokenizer(str(SMALL_HYBRID)), 160, tokens=5 * 160)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small hybrid with the matrices of its layers rounded to a coarse grid of 7 levels per row."""
    folder = tmp_path_factory.mktemp("rounded")
    tensors = load_file(SMALL_HYBRID / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight") or "in_proj" in name:
            scale = tensor.float().abs().amax(1, keepdim=True) / 3
            tensors[name] = ((tensor.float() / scale).round() * scale).bfloat16()
    write_like(folder, SMALL_HYBRID, tensors)
    return folder


@pytest.fixture(scope="module")
def result(rounded: Path, sequences: Any) -> Evaluation:
    return evaluate(str(rounded), str(SMALL_HYBRID), sequences)


def test_every_number_is_that_of_transformers(result: Evaluation, rounded: Path, sequences: Any) -> None:
    expected = expected_evaluation(rounded, SMALL_HYBRID, sequences)
    assert result.tokens == expected["tokens"] == 5 * 159
    for name in ("perplexity", "reference_perplexity", "embedding_error", "layer_errors"):
        assert getattr(result, name) == pytest.approx(expected[name], rel=1e-6), name
    for name in ("mean_kl", "mean_kl_error", "kl_99", "kl_99_9", "max_kl"):
        assert getattr(result, name) == pytest.approx(expected[name], rel=1e-4), name
    assert result.top1_agreement == pytest.approx(expected["top1_agreement"], abs=1.5 / result.tokens)


def test_error_is_visible_and_ordered(result: Evaluation) -> None:
    assert 0.01 < result.mean_kl < result.kl_99 < result.kl_99_9 <= result.max_kl
    assert result.embedding_error == 0 < min(result.layer_errors)
    assert result.perplexity > result.reference_perplexity
    assert result.top1_agreement < 0.98


def test_a_checkpoint_is_at_no_distance_from_itself(sequences: Any) -> None:
    same = evaluate(str(SMALL_HYBRID), str(SMALL_HYBRID), sequences[:2])
    assert same.mean_kl == same.max_kl == same.mean_kl_error == 0
    assert same.top1_agreement == 1
    assert set(same.layer_errors) == {0.0}
    assert same.perplexity == same.reference_perplexity


def test_passes_chunks_and_blocks_do_not_change_the_answer(
    result: Evaluation, rounded: Path, sequences: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences per pass, chunks that end inside a sequence, logits of 40 tokens at a time, 10 compared at once."""
    monkeypatch.setattr(evaluate_file, "PASS_TOKENS", 400)
    monkeypatch.setattr(evaluate_file, "CHUNK_TOKENS", 128)
    monkeypatch.setattr(evaluate_file, "SCORE_BYTES", 40 * 4 * 2048)
    told: list[tuple[int, int]] = []
    again = evaluate(str(rounded), str(SMALL_HYBRID), sequences, on_layer=lambda *place: told.append(place))
    for name, value in asdict(result).items():
        assert getattr(again, name) == pytest.approx(value, rel=2e-4), name
    layers = len(result.layer_errors)
    assert told == [(done, 3 * layers) for done in range(1, 3 * layers + 1)]


def test_a_quantized_folder_equals_its_weights_written_out(sequences: Any, tmp_path: Path) -> None:
    """int8 per channel (compressed-tensors) in all linears."""
    tensors = load_file(SMALL_HYBRID / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("proj.weight", "proj_qkv.weight", "proj_z.weight")):
            scale = (tensor.float().abs().amax(1, keepdim=True) / 127).bfloat16()
            codes = (tensor.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
            packed[name], packed[name + "_scale"] = codes, scale
            plain[name] = codes.float() * scale.float()
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (tmp_path / "packed").mkdir()
    (tmp_path / "plain").mkdir()
    write_like(tmp_path / "packed", SMALL_HYBRID, packed, quantization_config=quantization)
    write_like(tmp_path / "plain", SMALL_HYBRID, plain)
    between = evaluate(str(tmp_path / "packed"), str(tmp_path / "plain"), sequences[:2])
    assert between.max_kl < 1e-9
    assert max(between.embedding_error, *between.layer_errors) < 1e-5
    from_original = evaluate(str(tmp_path / "packed"), str(SMALL_HYBRID), sequences[:2])
    assert from_original.mean_kl > 1e-6 and from_original.layer_errors[0] > 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_table_is_read_block_by_block(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding and output matrix of 100 words, 5 of them per block, against the whole matrix dequantized."""
    draw = torch.Generator().manual_seed(0)
    table = quantize_rtn(torch.randn(100, 64, generator=draw), 4, 32, symmetric)
    whole = dequantize(table, torch.float32)
    monkeypatch.setattr(evaluate_file, "BLOCK_ROWS", 5)
    hidden, tokens = torch.randn(7, 64, generator=draw), torch.randint(100, (2, 3), generator=draw)
    assert torch.allclose(evaluate_file._logits(hidden, table), hidden @ whole.T, atol=1e-5)
    settings = evaluate_file._Place(torch.device("cpu"), torch.float32)
    assert torch.equal(evaluate_file._embedded(table, tokens, settings), whole[tokens])


def test_mixture_of_experts_is_run_too(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_5_moe")
    tokens = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(3))
    result = evaluate(str(folder), str(folder), tokens)
    expected = expected_evaluation(folder, folder, tokens)
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=1e-4)


def test_other_models_and_other_vocabularies_are_one_sentence(sequences: Any, checkpoint: Callable[..., Path]) -> None:
    other = str(checkpoint("qwen3_5"))
    with pytest.raises(BadInput, match=r"are different models \(hidden_size, .*vocab_size\); give the checkpoint"):
        evaluate(other, str(SMALL_HYBRID), sequences)
    beyond = torch.tensor([[5, 2048]])
    with pytest.raises(BadInput, match=r"token 2048 is not in the vocabulary .* \(2048 tokens\)"):
        evaluate(str(SMALL_HYBRID), str(SMALL_HYBRID), beyond)
    with pytest.raises(ValueError, match="L >= 2"):
        evaluate(str(SMALL_HYBRID), str(SMALL_HYBRID), beyond[:, :1])


def write_like(folder: Path, original: Path, tensors: dict[str, Any], **changes: Any) -> None:
    config = json.loads((original / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    shutil.copy(original / "tokenizer.json", folder)


@torch.no_grad()
def expected_evaluation(folder: Path, reference: Path, tokens: Any) -> dict[str, Any]:
    """All of it from whole logits, and from what every decoder layer of transformers returns."""
    logits, layers = [], []
    for path in (reference, folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        outputs = [model.get_input_embeddings()(tokens)]
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda _, __, out, outputs=outputs: outputs.append(out[0] if isinstance(out, tuple) else out)
            )
        logits.append(model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1).flatten(0, 1))
        layers.append([output.double() for output in outputs])
    theirs, ours = logits
    errors = [((b - a).norm() / a.norm()).item() for a, b in zip(*layers, strict=True)]
    targets = tokens[:, 1:].flatten()
    divergences = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0).sort().values.tolist()
    count = len(divergences)
    mean = sum(divergences) / count
    return {
        "tokens": count,
        "perplexity": torch.nn.functional.nll_loss(ours, targets).exp().item(),
        "reference_perplexity": torch.nn.functional.nll_loss(theirs, targets).exp().item(),
        "mean_kl": mean,
        "mean_kl_error": (sum((value - mean) ** 2 for value in divergences) / count / count) ** 0.5,
        "kl_99": divergences[-(count // 100) - 1],
        "kl_99_9": divergences[-(count // 1000) - 1],
        "max_kl": divergences[-1],
        "top1_agreement": (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item(),
        "embedding_error": errors[0],
        "layer_errors": errors[1:],
    }
