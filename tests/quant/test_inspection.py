"""What a checkpoint holds, module by module, told from headers; sums are those of the files."""

from math import prod
from pathlib import Path
from typing import Any

import pytest

from qwenfit.profiles.errors import BadInput
from qwenfit.quant import awq_file, compressed_tensors_file, gptq_file
from qwenfit.quant.inspection import inspect
from qwenfit.quant.quantized import Scheme
from qwenfit.quant.source import open_source

FORMS = {
    "pack-quantized": (compressed_tensors_file, Scheme(4, 32, False)),
    "int-quantized": (compressed_tensors_file, Scheme(8, -1, True, activation_bits=8)),
    "gptq": (gptq_file, Scheme(8, 64, True)),
    "awq": (awq_file, Scheme(4, 128, False)),
}
QUANTIZED = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "out_proj")


@pytest.mark.parametrize("name", FORMS)
def test_modules_of_every_format(name: str, checkpoint: Any, quantized_checkpoint: Any, tmp_path: Path) -> None:
    form, scheme = FORMS[name]
    source = open_source(str(checkpoint("qwen3_5")))
    folder = tmp_path / "quantized"

    def scheme_of(module: str) -> Scheme | None:
        return scheme if module.endswith(QUANTIZED) and "mtp" not in module else None

    fake = quantized_checkpoint(Path(source.folder), folder, form, scheme_of)
    found = inspect(str(folder))
    assert found.weights == sum(prod(source.shape(name)) for name in source.names())
    assert found.bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors")) - header_bytes(folder)
    assert found.bits_per_weight == 8 * found.bytes / found.weights
    quantized = {module.name: module for module in found.modules if module.is_quantized}
    assert set(quantized) == {label.removesuffix(".weight") for label in fake}
    for label, matrix in fake.items():
        module = quantized[label.removesuffix(".weight")]
        assert module.shape == tuple(matrix.shape) and (module.form, module.bits) == (name, scheme.bits)
        assert module.group_size == (matrix.shape[1] if scheme.group_size == -1 else scheme.group_size)
        assert module.layer == int(label.split("layers.")[1].split(".")[0])
        described = form.module_entries(*matrix.shape, scheme)
        assert module.bytes == sum(entry_bytes(*entry) for entry in described.values())
    assert (
        found.quantized_bits_per_weight is not None and scheme.bits < found.quantized_bits_per_weight < scheme.bits + 2
    )
    roles = {module.role for module in found.modules}
    assert {"mlp.up_proj", "linear_attn.out_proj", "linear_attn.A_log", "norm", "embedding"} <= roles
    assert "other" not in roles and {module.part for module in found.modules} == {"text", "mtp"}


def test_a_checkpoint_that_is_not_quantized(checkpoint: Any) -> None:
    found = inspect(str(checkpoint("qwen3_5_moe")))
    assert found.quantized_bits_per_weight is None and not any(module.is_quantized for module in found.modules)
    [stack] = [m for m in found.modules if m.name == "model.layers.2.mlp.experts.gate_up_proj"]
    assert (stack.role, stack.layer, stack.shape, stack.bits) == ("experts.gate_up_proj", 2, (8, 256, 128), 16)


def test_a_gguf_file(checkpoint: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="GGUF files are written with it: pip install gguf")
    from qwenfit.quant.gguf_file import GgufFile

    source = open_source(str(checkpoint("qwen3_5", is_wide=True)))
    file = GgufFile(
        str(tmp_path / "model.gguf"), source, {"blk.0.ffn_up.weight": "Q4_K", "blk.1.ffn_up.weight": "Q8_0"}
    )
    for piece in file.pieces:
        file.convert(piece)
    file.finish()
    found = inspect(str(tmp_path))
    assert found.path.endswith("model.gguf") and found.bytes == file.total_bytes
    assert found.weights == sum(prod(source.shape(name)) for name in source.names())
    modules = {module.name: module for module in found.modules}
    assert (modules["blk.0.ffn_up.weight"].form, modules["blk.0.ffn_up.weight"].bits) == ("Q4_K", 4)
    assert modules["blk.1.ffn_up.weight"].bits == 8 and modules["blk.1.ffn_up.weight"].group_size == 32
    assert modules["blk.2.ffn_up.weight"].bits == 16 and modules["blk.2.ffn_up.weight"].group_size is None
    assert modules["blk.0.ffn_up.weight"].role == "mlp.up_proj"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds neither safetensors nor GGUF files; give a checkpoint"):
        inspect(str(tmp_path))


def header_bytes(folder: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


def entry_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * {"BF16": 2, "F16": 2, "I32": 4, "I64": 8, "I8": 1}[dtype]
