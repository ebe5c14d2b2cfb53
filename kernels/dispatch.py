"""Who computes an operation, and why, in words: the choice that the launch itself makes, for people to read.

    device                      path
    CUDA, ROCm                  "gemv", "tiles", "unpack" (matmuls), "triton" (the rest), "matmul" (attention of prompts
                                on torch's matmul, where Triton has no matrix unit)
    CPU                         "c": the C kernels of `csrc/`; "torch" where there is no compiler
    anything else, or no        "reference": the twins in plain torch
    Triton; float64 anywhere

Importing this file imports neither Triton nor the C library; asking about a device imports what that device needs.
"""

import importlib.util
from dataclasses import dataclass

import torch

MATMULS = ("quantized_matmul", "expert_matmul")
OPERATIONS = (
    *MATMULS,
    "causal_conv1d_prefill",
    "causal_conv1d_update",
    "gated_delta_rule_prefill",
    "gated_delta_rule_step",
    "gated_rms_norm",
    "rms_norm",
    "add_rms_norm",
    "rope",
    "store_kv",
    "attention_prefill",
    "attention_decode",
)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which path an operation takes, and the sentence that says why."""

    path: str
    reason: str


def choose(
    operation: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1,
    experts: int = 0,
) -> Choice:
    """The path of `operation` (one of OPERATIONS) on a device for x in `dtype`.

    rows: of x, for matmuls. experts: how many matrices are in the stack, for expert_matmul.
    ValueError for an operation that there is not, or a GPU older than the kernels.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"there is no operation {operation!r}: one of {', '.join(OPERATIONS)}")
    device = torch.device(device)
    if dtype == torch.float64:
        return Choice("reference", "float64 is for measuring errors: the twins in plain torch compute it")
    if device.type == "cpu":
        from .cpu.library import cpu_library

        library = cpu_library()
        return Choice(library.path, library.reason)
    if device.type != "cuda":
        return Choice("reference", f"there are no kernels for {device.type}: the twins in plain torch")
    return choose_of_triton(operation, device, dtype, rows, experts)


def choose_of_triton(
    operation: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1,
    experts: int = 0,
) -> Choice:
    """The same on the Triton path; a CPU stands for the interpreter there."""
    if importlib.util.find_spec("triton") is None:
        return Choice("reference", "Triton is not installed (pip install triton): the twins in plain torch")
    from .gpu.target import target_of

    where = target_of(device)
    if operation in MATMULS:
        from .gpu.matmul_paths import choose_expert_path, choose_path

        if operation == "expert_matmul":
            return Choice(*choose_expert_path(where, dtype, rows, experts))
        return Choice(*choose_path(where, dtype, rows))
    if operation == "attention_prefill" and (where.matrix_instruction is None or dtype == torch.float32):
        why = f"{where.name} has no tensor cores in Triton" if where.matrix_instruction is None else "x is float32"
        return Choice("matmul", f"{why}: scores by torch's matmul, sequence by sequence")
    return Choice("triton", f"Triton's kernels for {where.name}")
