"""compressed-tensors as it is written here, read by the kernels' conversions, the runtime, and transformers."""

import json
import re
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenfit.kernels.layout.checkpoint import DTYPES
from qwenfit.kernels.layout.compressed_tensors_layout import from_int_quantized, from_pack_quantized
from qwenfit.kernels.layout.packing import dequantize
from qwenfit.profiles.storage import int8_per_channel, packed_integers, storage_bytes
from qwenfit.quant import compressed_tensors_file as form
from qwenfit.quant.quantized import Scheme
from qwenfit.quant.shards import Entry

SCHEMES = {
    "int4 g128": Scheme(4, 128, True),
    "int4 g32 asym": Scheme(4, 32, False),
    "int4 channel asym": Scheme(4, -1, False),
    "int8 g64": Scheme(8, 64, True),
    "int8 channel": Scheme(8, -1, True),
    "int8 g128 asym": Scheme(8, 128, False),
    "w8a8": Scheme(8, -1, True, activation_bits=8),
}


def is_text_matrix(module: str) -> bool:
    kept = ("in_proj_a", "in_proj_b", "conv1d", "mlp.gate", "shared_expert_gate", "norm", "embed", "lm_head", "mtp")
    name = module.rpartition(".")[2]
    is_kept = any(word in module if word in ("mtp", "embed", "norm") else name == word.split(".")[-1] for word in kept)
    return "layers." in module and not is_kept and not name.startswith(("A_log", "dt_bias"))


def tensors_of(weight: Any, scheme: Scheme) -> dict[str, Any]:
    return form.module_tensors(weight, scheme.activation_bits)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(48, 256), (20, 128)])
def test_the_kernels_read_what_was_written(name: str, shape: tuple[int, int], rounded: Any) -> None:
    """To the bit; 20 rows do not fill the words that zero points are packed in."""
    scheme = SCHEMES[name]
    weight = rounded(torch.randn(shape, generator=torch.Generator().manual_seed(0)), scheme, form.SCALE_DTYPE)
    tensors = tensors_of(weight, scheme)
    read = from_int_quantized if scheme.activation_bits else from_pack_quantized
    assert torch.equal(dequantize(read(**tensors), torch.float32), weight.dequantize())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(48, 256), (20, 128)])
def test_entries_are_what_is_written_and_what_the_planner_counts(
    name: str, shape: tuple[int, int], rounded: Any
) -> None:
    scheme = SCHEMES[name]
    described = form.module_entries(*shape, scheme)
    tensors = tensors_of(rounded(torch.randn(shape), scheme, form.SCALE_DTYPE), scheme)
    assert {key: (DTYPES[dtype], size) for key, (dtype, size) in described.items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
    }
    group = scheme.group_size if scheme.group_size > 0 else shape[1]
    storage = int8_per_channel() if scheme.activation_bits else packed_integers(scheme.bits, group, scheme.symmetric)
    assert sum(Entry(key, *entry).bytes for key, entry in described.items()) == storage_bytes(shape, storage)


def test_what_the_format_has_not(rounded: Any) -> None:
    with pytest.raises(ValueError, match="W8A8"):
        form.module_entries(8, 128, Scheme(8, 64, True, activation_bits=8))
    with pytest.raises(ValueError, match="are fused by engines and need one scheme"):
        form.quantization_config(
            {"model.layers.0.mlp.up_proj": SCHEMES["int4 g128"], "model.layers.0.mlp.gate_proj": SCHEMES["w8a8"]}, []
        )


def mixed(module: str) -> Scheme | None:
    """8 bits for some layers' projections, one DeltaNet layer's output kept, the rest in 4."""
    if not is_text_matrix(module):
        return None
    if "layers.1.linear_attn.out_proj" in module:
        return None
    if "layers.0.linear_attn.in_proj" in module or "layers.3.self_attn.o_proj" in module:
        return Scheme(8, 128, True)
    return Scheme(4, 32, True)


def uniform(scheme: Scheme) -> Callable[[str], Scheme | None]:
    return lambda module: scheme if is_text_matrix(module) else None


CHECKPOINTS = {name: uniform(scheme) for name, scheme in SCHEMES.items()} | {"mixed": mixed}


def tokens(count: int = 40) -> Any:
    return torch.randint(2, 250, (1, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["int4 g128", "int4 g32 asym", "int8 channel", "w8a8", "mixed"])
@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_5_moe"])
def test_the_runtime_loads_it(
    name: str, architecture: str, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path
) -> None:
    """Every matrix that the runtime holds stands for the numbers that this room's codes stand for."""
    from qwenfit.kernels.layout.checkpoint import open_checkpoint
    from qwenfit.kernels.layout.packing import QuantizedWeight

    folder = tmp_path / "quantized"
    fake = quantized_checkpoint(checkpoint(architecture), folder, form, CHECKPOINTS[name])
    found = open_checkpoint(str(folder))
    assert fake
    for label, matrix in fake.items():
        bare = label.removeprefix("model.").removesuffix(".weight")
        if matrix.dim() == 2:
            weight = found.matrix(bare, *matrix.shape)
            assert isinstance(weight, QuantizedWeight) and torch.equal(dequantize(weight, torch.float32), matrix)
        elif bare.endswith("down_proj"):
            stack = found.stack(bare, *matrix.shape)
            assert isinstance(stack, QuantizedWeight) and torch.equal(dequantize(stack, torch.float32), matrix)


def unpacks_while_loading(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["dequantize"]


def load_both(source: Path, folder: Path, fake: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' models in float32: of the source with the matrices that our codes stand for, and of our folder."""
    transformers = pytest.importorskip("transformers", reason="the loader under test: pip install transformers")
    pytest.importorskip("compressed_tensors", reason="transformers reads the format with it: pip install it")
    truth = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for label, parameter in truth.named_parameters():
            if label in fake:
                matrix = fake.pop(label)
                parameter.copy_(matrix.bfloat16() if unpacks_while_loading(folder) else matrix)
    assert not [label for label in fake if "mtp" not in label]
    return truth, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "w8a8"])
def test_transformers_computes_our_fake_quant_logits(
    name: str, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path
) -> None:
    """Float32 on the CPU, without any flag, to the bit.

    Zero points are a case of their own: transformers unpacks them while it loads, in the dtype of the scales, so there
    it is the logits of our codes rounded to bf16 (float32 with compressed-tensors 0.17 and without `dequantize`).
    """
    source, folder = checkpoint("qwen3_5"), tmp_path / "quantized"
    fake = quantized_checkpoint(source, folder, form, CHECKPOINTS[name])
    truth, model = load_both(source, folder, fake)
    assert unpacks_while_loading(folder) == ("asym" in name)
    with torch.no_grad():
        expected, found = truth(tokens()).logits, model(tokens()).logits
    assert torch.equal(found, expected), (found - expected).abs().max()


def test_transformers_loads_experts(checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path) -> None:
    """Experts in 4 bits, everything else in 8, without any flag: our codes' logits, rounded to bf16, to the bit."""

    def scheme_of(module: str) -> Scheme | None:
        bits = 4 if ".experts." in module else 8
        return Scheme(bits, 128, True) if is_text_matrix(module) else None

    source, folder = checkpoint("qwen3_5_moe"), tmp_path / "quantized"
    truth, model = load_both(source, folder, quantized_checkpoint(source, folder, form, scheme_of))
    model.float()  # transformers 5.23 leaves experts in the dtype of their scales, whatever is asked for
    with torch.no_grad():
        expected, found = truth(tokens()).logits, model(tokens()).logits
    assert torch.equal(found, expected), (found - expected).abs().max()


def test_transformers_rounds_activations(checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path) -> None:
    """W8A8: the weights are ours to the bit, and what is computed is near to weights alone, but not the same."""
    source, folder = checkpoint("qwen3_5"), tmp_path / "quantized"
    truth, model = load_both(source, folder, quantized_checkpoint(source, folder, form, CHECKPOINTS["w8a8"]))
    with torch.no_grad():
        expected, found = truth(tokens()).logits, model(tokens()).logits
    parameters = dict(truth.named_parameters())
    for label, parameter in model.named_parameters():
        if label in parameters:
            assert torch.equal(parameter, parameters[label]), label
    assert 0.001 < (found - expected).norm() / expected.norm() < 0.25


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_is_named(bits: int) -> None:
    """SGLang 0.5.23 `get_lm_head_scheme` and vLLM 0.32 `find_matched_target` ask targets for `language_model.lm_head`;
    it is no Linear, so a group of that class alone would leave it unquantized, and its codes unread."""
    schemes = {"model.layers.0.mlp.down_proj": Scheme(4, 32, True), "model.layers.1.mlp.down_proj": Scheme(4, 32, True)}
    groups = form.quantization_config({**schemes, "lm_head": Scheme(bits, 32, True)}, [])["config_groups"].values()
    [found] = [
        group["weights"]["num_bits"]
        for group in groups
        for target in group["targets"]
        if target.startswith("re:") and re.match(target.removeprefix("re:"), "language_model.lm_head")
    ]
    assert found == bits
    plain = form.quantization_config(schemes, ["lm_head"])
    assert [group["targets"] for group in plain["config_groups"].values()] == [["Linear"]]


def test_config_is_what_loaders_take(checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path) -> None:
    """Groups that name modules before the one that names a class; one group per scheme; sizes that add up."""
    folder = tmp_path / "quantized"
    quantized_checkpoint(checkpoint("qwen3_5_moe"), folder, form, mixed)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((checkpoint("qwen3_5_moe") / "config.json").read_text())
    groups = list(quantization["config_groups"].values())
    assert [group["targets"] == ["Linear"] for group in groups] == [False, True]
    assert groups[0]["weights"]["num_bits"] == 8 and groups[1]["weights"]["num_bits"] == 4
    assert groups[1]["weights"]["strategy"] == "group" and groups[1]["weights"]["group_size"] == 32
    assert quantization["format"] == "pack-quantized" and quantization["quantization_status"] == "compressed"
    assert r"re:.*layers\.(1)\.linear_attn\.out_proj$" in quantization["ignore"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    from safetensors.torch import load_file

    tensors = load_file(folder / "model-00001-of-00001.safetensors")
    assert index["metadata"]["total_size"] == sum(prod(t.shape) * t.element_size() for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert "torch" in sys.modules
