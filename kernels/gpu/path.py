"""All operations of the Triton path as one value, with the reason of each choice."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import choose_of_triton
from ..layout.packing import QuantizedWeight
from ..operations import REFERENCE, Operations

_PROMPT_ROWS = 2048  # of a chunk, as GPU_CHUNK_TOKENS of `runtime/memory.py`: only for the words of `choices`


def triton_path(device: torch.device | str) -> Operations:
    """The operations for a CUDA or ROCm device (for a CPU in the interpreter); the twins where Triton is not installed.

    ValueError for a GPU that is older than the kernels (compute capability 7.5).
    """
    rest = choose_of_triton("rms_norm", device)
    if rest.path == "reference":
        return replace(REFERENCE, choices={"everything": rest.reason})
    from .attention_decode import attention_decode
    from .attention_prefill import attention_prefill, configuration
    from .conv import causal_conv1d_prefill, causal_conv1d_update
    from .delta_decode import gated_delta_rule_step
    from .delta_prefill import gated_delta_rule_prefill
    from .experts import expert_matmul
    from .kv_store import store_kv
    from .matmul import quantized_matmul
    from .norm import add_rms_norm, gated_rms_norm, rms_norm
    from .rope import rope
    from .target import target_of

    def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
        return quantized_matmul(x, weight) if isinstance(weight, QuantizedWeight) else F.linear(x, weight)

    one, many = (choose_of_triton("quantized_matmul", device, rows=rows) for rows in (1, _PROMPT_ROWS))
    attention = choose_of_triton("attention_prefill", device)
    prompts = f"{attention.path}: {attention.reason}"
    where = target_of(device)
    if attention.path == "triton" and not configuration(where, torch.bfloat16, int8=True).rows:
        prompts += f"; over an int8 cache by torch's matmul: {where.name} has no registers for it"
    choices = {
        "matmul, one row": f"{one.path}: {one.reason}",
        f"matmul, {_PROMPT_ROWS} rows": f"{many.path}: {many.reason}",
        "attention of prompts": prompts,
        "everything else": f"{rest.path}: {rest.reason}",
    }
    return Operations(
        linear=linear,
        expert_matmul=expert_matmul,
        causal_conv1d_prefill=causal_conv1d_prefill,
        causal_conv1d_update=causal_conv1d_update,
        gated_delta_rule_prefill=gated_delta_rule_prefill,
        gated_delta_rule_step=gated_delta_rule_step,
        gated_rms_norm=gated_rms_norm,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rope=rope,
        store_kv=store_kv,
        attention_prefill=attention_prefill,
        attention_decode=attention_decode,
        choices=choices,
    )
