"""The `qwen-quant` line that makes the checkpoint which a plan with weights of our own formats expects."""

from ..profiles.formats import WeightFormat
from ..profiles.model import Model
from .engines.launch import checkpoint_name, shell_line

_FORMATS = {"compressed-tensors": (), "gptq": ("--format", "gptq"), "awq": ("--format", "awq")}
_GROUP_SIZES = (None, 32, 64, 128)  # of `quant/recipe.py`; None is one scale per row


def quantizing_line(model: Model, fmt: WeightFormat) -> str | None:
    """From the model's repository, or the folder where it lies, into the folder that launch lines name; None where
    `qwen-quant` does not make such files: formats of others, embeddings or vision towers of few bits, a GGUF as source.

    compressed-tensors of a mixture of experts are symmetric, as loaders of experts want them: a percent smaller than
    planned where the format has zero points.
    """
    is_ours = fmt.family == "safetensors" and fmt.name.startswith(("int4", "int8")) and fmt.dialect in _FORMATS
    if not is_ours or fmt.group_size not in _GROUP_SIZES or model.quantization or model.repo.lower().endswith(".gguf"):
        return None
    if fmt.embedding_bits != 16 or fmt.vision_bits != 16 or (fmt.lm_head_bits != 16 and model.tie_word_embeddings):
        return None
    words: list[object] = ["qwen-quant", model.repo, checkpoint_name(model, fmt), "--bits", fmt.bits]
    if fmt.name == "int8-w8a8":
        words += ["--activations", 8]
    elif fmt.group_size != 128:
        words += ["--group-size", fmt.group_size or -1]
    words += _FORMATS[fmt.dialect or ""]
    if fmt.dialect == "compressed-tensors" and fmt.bits == 4 and fmt.symmetric and not model.is_moe:
        words.append("--sym")
    if model.is_moe:
        words += ["--shared-experts", fmt.bits]
    for option, bits in (("--lm-head", fmt.lm_head_bits), ("--mtp", fmt.mtp_bits)):
        if bits != 16:
            words += [option, bits]
    return shell_line(words)
