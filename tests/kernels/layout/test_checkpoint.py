"""Folders written here, tensor by tensor as the formats say, and read module by module: the matrices are exactly those
that the integers stand for.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwenfit.kernels.layout.checkpoint import open_checkpoint
from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize

ROWS, COLUMNS = 48, 256
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq"},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "mixed-precision"},
}


def packed(codes: Tensor, bits: int, dimension: int) -> Tensor:
    runs = codes.long().movedim(dimension, -1).unflatten(-1, (-1, 32 // bits))
    words = (runs << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, dimension).contiguous()


def quantized(
    method: str, bits: int = 4, group: int = 128, symmetric: bool = False, seed: int = 0, rows: int = ROWS
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a random matrix [rows, COLUMNS] in a format, and the matrix in float64."""
    generator = torch.Generator().manual_seed(seed)
    size, middle = group if group > 0 else COLUMNS, 2 ** (bits - 1)
    q = torch.randint(0, 2**bits, (rows, COLUMNS), generator=generator)
    z = torch.randint(1, 2**bits, (rows, COLUMNS // size), generator=generator)
    z = torch.full_like(z, middle) if symmetric else z
    scales = (torch.rand(z.shape, generator=generator) + 0.1).half()
    matrix = (q - z.repeat_interleave(size, 1)).double() * scales.double().repeat_interleave(size, 1)
    if method == "compressed-tensors":
        shape = torch.tensor([rows, COLUMNS])
        tensors = {"weight_packed": packed(q, bits, 1), "weight_scale": scales, "weight_shape": shape}
        return tensors | ({} if symmetric else {"weight_zero_point": packed(z, bits, 0)}), matrix
    if method == "int":
        tensors = {"weight": (q - 128).to(torch.int8), "weight_scale": scales}
        return tensors | ({} if symmetric else {"weight_zero_point": (z - 128).to(torch.int8)}), matrix
    if method == "awq":
        inputs, zeros = (x.T.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1) for x in (q, z))
        return {"qweight": packed(inputs, 4, 1), "qzeros": packed(zeros, 4, 1), "scales": scales.T.contiguous()}, matrix
    stored_zeros = z - 1 if method == "gptq" else z
    return {
        "qweight": packed(q.T, bits, 0),
        "qzeros": packed(stored_zeros.T, bits, 1),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(COLUMNS) // size).int(),
    }, matrix


def folder_of(path: Path, tensors: dict[str, Tensor], method: str | None = None, **extra: Any) -> str:
    """A folder with these tensors in one file."""
    config = {} if method is None else {"quantization_config": {**METHODS[method], **extra}}
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return str(path)


def named(module: str, tensors: dict[str, Tensor], prefix: str = "model.language_model.") -> dict[str, Tensor]:
    return {f"{prefix}{module}.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_plain_tensors_come_as_they_are_whatever_the_prefix(tmp_path: Path, dtype: torch.dtype, prefix: str) -> None:
    matrix, vector, stack = torch.randn(5, 7).to(dtype), torch.randn(3), torch.randn(4, 5, 7).to(dtype)
    tensors = {
        prefix + "layers.0.mlp.gate_proj.weight": matrix,
        prefix + "layers.0.linear_attn.A_log": vector,
        prefix + "layers.0.mlp.experts.gate_up_proj": stack,
        "lm_head.weight": matrix + 1,
        "mtp.fc.weight": matrix + 2,
    }
    checkpoint = open_checkpoint(folder_of(tmp_path, tensors))
    for name, expected in (("layers.0.mlp.gate_proj", matrix), ("lm_head", matrix + 1), ("mtp.fc", matrix + 2)):
        found = checkpoint.matrix(name, 5, 7)
        assert isinstance(found, Tensor) and found.dtype == dtype and torch.equal(found, expected)
    assert torch.equal(checkpoint.tensor("layers.0.linear_attn.A_log", (3,)), vector)
    experts = checkpoint.stack("layers.0.mlp.experts.gate_up_proj", 4, 5, 7)
    assert isinstance(experts, Tensor) and torch.equal(experts, stack)
    assert checkpoint.has("layers.0.mlp.gate_proj") and checkpoint.has("layers.0.mlp.experts.gate_up_proj")
    assert not checkpoint.has("layers.0.mlp.gate") and not checkpoint.has("layers.0.mlp.experts.gate_proj")
    assert set(checkpoint.names) >= {"lm_head.weight", "layers.0.linear_attn.A_log"}


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    matrices = [torch.randn(4, 6) for _ in range(3)]
    shards = [f"model.safetensors-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    for number, (shard, matrix) in enumerate(zip(shards, matrices, strict=True)):
        save_file({f"model.layers.{number}.mlp.up_proj.weight": matrix}, tmp_path / shard)
    weight_map = {f"model.layers.{number}.mlp.up_proj.weight": shard for number, shard in enumerate(shards)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    for number, matrix in enumerate(matrices):
        found = checkpoint.matrix(f"layers.{number}.mlp.up_proj", 4, 6)
        assert isinstance(found, Tensor) and torch.equal(found, matrix)


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_modules_are_the_matrices_that_they_stand_for(tmp_path: Path, method: str, symmetric: bool) -> None:
    """Groups of 32, 64, 128 and a row, 4 and 8 bits, side by side in one folder whose config names one of them."""
    expected, tensors = {}, {}
    for seed, (bits, group) in enumerate([(4, 32), (4, 64), (4, 128), (4, -1), (8, 128), (8, -1)]):
        if method == "awq" and bits == 8:
            continue
        module = f"layers.{seed}.mlp.down_proj"
        stored, expected[module] = quantized(method, bits, group, symmetric, seed)
        tensors |= named(module, stored)
    checkpoint = open_checkpoint(folder_of(tmp_path, tensors, method))
    for module, matrix in expected.items():
        assert checkpoint.has(module)
        weight = checkpoint.matrix(module, ROWS, COLUMNS)
        assert isinstance(weight, QuantizedWeight)
        assert (weight.zeros is None) == symmetric
        assert torch.equal(dequantize(weight), matrix)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_weights_of_w8a8_are_the_matrices_that_they_stand_for(tmp_path: Path, symmetric: bool) -> None:
    stored, matrix = quantized("int", 8, -1, symmetric)
    folder = folder_of(tmp_path, named("layers.0.mlp.up_proj", stored), "compressed-tensors", format="int-quantized")
    weight = open_checkpoint(folder).matrix("layers.0.mlp.up_proj", ROWS, COLUMNS)
    assert isinstance(weight, QuantizedWeight) and weight.bits == 8
    assert torch.equal(dequantize(weight), matrix)


def test_act_order_and_a_short_last_group(tmp_path: Path) -> None:
    """192 columns in groups of 128 and 64, by config.json; and the same shuffled by g_idx, which needs no config."""
    q, z = torch.randint(0, 16, (ROWS, 192)), torch.randint(1, 16, (2, ROWS))
    scales, straight = torch.rand(2, ROWS).half(), torch.arange(192).int() // 128
    shuffled = straight[torch.randperm(192)]
    tensors = {}
    for module, g_idx in (("a", None), ("b", shuffled)):
        stored = {"qweight": packed(q.T, 4, 0), "qzeros": packed(z - 1, 4, 1), "scales": scales}
        tensors |= named(f"layers.0.mlp.{module}", stored | ({} if g_idx is None else {"g_idx": g_idx}))
    checkpoint = open_checkpoint(folder_of(tmp_path, tensors, "gptq"))
    for module, g_idx in (("a", straight), ("b", shuffled)):
        weight = checkpoint.matrix(f"layers.0.mlp.{module}", ROWS, 192)
        assert isinstance(weight, QuantizedWeight) and weight.group_size == 128
        matrix = (q.double() - z.double().T[:, g_idx.long()]) * scales.double().T[:, g_idx.long()]
        assert torch.equal(dequantize(weight), matrix)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_experts_one_by_one_become_a_stack(tmp_path: Path, method: str) -> None:
    tensors, matrices = {}, []
    for expert in range(5):
        stored, matrix = quantized(method, 4, 64, symmetric=method == "compressed-tensors" or expert == 2, seed=expert)
        matrices.append(matrix)
        tensors |= named(f"layers.1.mlp.experts.{expert}.up_proj", stored)
    checkpoint = open_checkpoint(folder_of(tmp_path, tensors, method))
    assert checkpoint.has("layers.1.mlp.experts.up_proj")
    stack = checkpoint.stack("layers.1.mlp.experts.up_proj", 5, ROWS, COLUMNS)
    assert isinstance(stack, QuantizedWeight)
    assert torch.equal(dequantize(stack), torch.stack(matrices))
    with pytest.raises(ValueError, match=r"experts\.5\.up_proj of .* is missing"):
        checkpoint.stack("layers.1.mlp.experts.up_proj", 6, ROWS, COLUMNS)
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj of .* is 48 x 256, but config\.json makes it 48 x 128"):
        checkpoint.stack("layers.1.mlp.experts.up_proj", 5, ROWS, 128)


def test_plain_experts_one_by_one_become_a_stack(tmp_path: Path) -> None:
    matrices = torch.randn(3, 6, 10).bfloat16()
    tensors = {f"mtp.layers.0.mlp.experts.{i}.down_proj.weight": matrix for i, matrix in enumerate(matrices)}
    checkpoint = open_checkpoint(folder_of(tmp_path, tensors))
    stack = checkpoint.stack("mtp.layers.0.mlp.experts.down_proj", 3, 6, 10)
    assert isinstance(stack, Tensor) and torch.equal(stack, matrices)


def test_experts_that_are_not_stored_alike_are_refused(tmp_path: Path) -> None:
    stored, _ = quantized("gptq")
    plain = {"weight": torch.randn(ROWS, COLUMNS).half()}
    for number, (first, second) in enumerate([(stored, plain), (plain, stored)]):
        tensors = named("mlp.experts.0.up_proj", first) | named("mlp.experts.1.up_proj", second)
        (tmp_path / str(number)).mkdir()
        checkpoint = open_checkpoint(folder_of(tmp_path / str(number), tensors, "gptq"))
        with pytest.raises(ValueError, match="expert 1 is not stored as expert 0 is"):
            checkpoint.stack("mlp.experts.up_proj", 2, ROWS, COLUMNS)


def test_biases_of_zeros_are_ignored_and_others_refused(tmp_path: Path) -> None:
    stored, _ = quantized("gptq")
    tensors = named("a", stored | {"bias": torch.zeros(ROWS)}) | named("b", stored | {"bias": torch.ones(ROWS)})
    checkpoint = open_checkpoint(folder_of(tmp_path, tensors, "gptq"))
    checkpoint.matrix("a", ROWS, COLUMNS)
    with pytest.raises(ValueError, match=r"b\.bias of .* is not zero"):
        checkpoint.matrix("b", ROWS, COLUMNS)


def test_what_is_missing_or_other_than_configured_is_refused_by_name(tmp_path: Path) -> None:
    stored, _ = quantized("gptq")
    tensors = {
        **named("cut", {name: tensor for name, tensor in stored.items() if name != "scales"}),
        **named("whole", stored),
        **named("fake", {"weight": torch.randn(4, 8), "weight_scale": torch.ones(4, 1)}),
        **named("plain", {"weight": torch.randn(4, 8)}),
        **named("float8", {"weight": torch.randn(4, 8).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1)}),
        **named("float4", {"weight_packed": torch.zeros(4, 8).byte(), "weight_scale": torch.ones(4, 1)}),
    }
    checkpoint = open_checkpoint(folder_of(tmp_path, tensors, "gptq"))
    for module, rows, columns, message in (
        ("none", 4, 8, "none of .* is missing"),
        ("cut", ROWS, COLUMNS, "cut of .* has qweight and no scales"),
        ("whole", COLUMNS, ROWS, r"whole of .* is 48 x 256, but config\.json makes it 256 x 48"),
        ("fake", 4, 8, "fake of .* has scales beside plain weights"),
        ("plain", 8, 4, r"plain\.weight of .* is '\[4, 8\]', but config\.json makes it \[8, 4\]"),
        ("float8", 4, 8, r"float8\.weight of .* is stored as F8_E4M3"),
        ("float4", 4, 8, "float4 of .* has weight_packed and no weight_shape"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.matrix(module, rows, columns)
    with pytest.raises(ValueError, match=r"none of .* is missing"):
        checkpoint.tensor("none", (1,))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ([], "quantization_config is a list of 0, not an object"),
        ({"quant_method": "fp8"}, "quant_method 'fp8' is not compressed-tensors, gptq, awq"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ weights of version 'gemv' are packed otherwise"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not gptq or gptq_v2"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "transform_config rotates"),
    ],
)
def test_quantizations_that_would_be_misread_are_refused(tmp_path: Path, quantization: Any, message: str) -> None:
    save_file({"a.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    for config in ({"quantization_config": quantization}, {"text_config": {"quantization_config": quantization}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            open_checkpoint(str(tmp_path))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        open_checkpoint(str(tmp_path / "none"))
    folder = folder_of(tmp_path, {"model.norm.weight": torch.ones(64), "language_model.norm.weight": torch.ones(64)})
    with pytest.raises(ValueError, match=r"holds 'norm\.weight' twice"):
        open_checkpoint(folder)
    folder_of(tmp_path, {"model.norm.weight": torch.ones(64)})
    checkpoint, file = open_checkpoint(folder), tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is cut short: it ends inside a tensor"):
        checkpoint.tensor("norm.weight", (64,))
    with pytest.raises(ValueError, match="is cut short"):
        open_checkpoint(folder)


MEASURE = """
import re, sys
import torch
from qwenfit.kernels.layout.checkpoint import open_checkpoint
from qwenfit.kernels.runtime.heap import weights_in_pages
torch.set_num_threads(1)
def peak_bytes():  # addresses, not resident pages: what else is on the machine does not change those
    return int(re.search(r"VmPeak:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
checkpoint = open_checkpoint(sys.argv[1])
checkpoint.matrix("layers.0.a", 4096, 4096)  # what torch itself needs the first time
before = peak_bytes()
with weights_in_pages():  # as the runtime loads: holes in malloc's heap come and go from run to run
    kept = [checkpoint.matrix(f"layers.{i}.{name}", 4096, 4096) for i in range(17) for name in ("ab" if i < 2 else "a")]
weights = sum(k.bytes if hasattr(k, "bytes") else k.numel() * k.element_size() for k in kept)
print(peak_bytes() - before, weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_loading_takes_the_weights_and_about_one_module(tmp_path: Path) -> None:
    """16 GPTQ matrices of 8.5 MiB, two plain ones of 32, after one more that is measured away.

    Measured 223 to 226 MiB for 208 MiB of weights (315 in one run of malloc's own way). A file that is mapped counts as
    well, as long as it is.
    """
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (512, 4096), dtype=torch.int32)
    zeros = torch.randint(-(1 << 31), (1 << 31) - 1, (32, 512), dtype=torch.int32)
    tensors = {}
    for layer in range(17):
        stored = {"qweight": words + layer, "qzeros": zeros, "scales": torch.rand(32, 4096).half()}
        tensors |= named(f"layers.{layer}.a", stored)
        if layer < 2:
            tensors |= named(f"layers.{layer}.b", {"weight": torch.zeros(4096, 4096, dtype=torch.bfloat16)})
    folder = folder_of(tmp_path, tensors, "gptq")
    run = subprocess.run([sys.executable, "-c", MEASURE, folder], capture_output=True, text=True, check=True)
    grown, weights = map(int, run.stdout.split())
    assert grown > 190 << 20  # else the measurement has failed
    assert grown < weights + (32 << 20), f"{grown >> 20} MiB for {weights >> 20} MiB of weights"
