"""All operations of the CPU path as one value, with the reason of each choice."""

from functools import partial

from torch import Tensor

from ..layout.packing import QuantizedWeight
from ..layout.tiles import tile
from ..operations import Operations
from .attention import attention_decode, attention_prefill, store_kv
from .decode import decode
from .delta import gated_delta_rule_prefill, gated_delta_rule_step
from .huge_pages import HugePages
from .library import cpu_library
from .matmul import dense_linear, expert_matmul, quantized_matmul
from .norm import add_rms_norm, causal_conv1d_prefill, causal_conv1d_update, gated_rms_norm, rms_norm, rope


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """x [..., K] times a matrix of either kind [N, K] -> [..., N]."""
    return quantized_matmul(x, weight) if isinstance(weight, QuantizedWeight) else dense_linear(x, weight)


def cpu_path() -> Operations:
    """The operations for CPU tensors: C kernels where there is a compiler, torch where there is none."""
    library = cpu_library()
    in_c = library.path == "c"
    choices = {
        "matmul": library.reason,
        "decode step": "one program in C" if in_c else "operations one by one",
        "prompt": "int16 activations x unpacked weights and the delta rule in C; attention by torch's matmul"
        if in_c
        else "torch",
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
        decode=decode if in_c else None,
        arrange=partial(tile, room=HugePages().room) if in_c else None,
        choices=choices,
    )
