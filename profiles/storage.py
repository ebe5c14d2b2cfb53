"""How one tensor lies in memory, and the bytes that takes: dtypes, GGML blocks, packed integers, FP8, NVFP4.

A matrix is [rows, columns] = [out, in]; dimensions before those count matrices (experts). Rows are packed on their
own, so a last block that is not full still costs a whole one.
"""

from functools import lru_cache
from math import prod

from .frozen import dataclass, replace
from .ggml import GGML_TYPES
from .model import DTYPE_BITS

WHOLE_ROW = 1 << 60
"""`group_columns` of a scale per output channel."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Codes in blocks along the columns, and what a quantizer adds: scales, zero points, an index, scalars."""

    name: str
    bits: int  # of one code
    block_elements: int
    block_bytes: int
    group_columns: int = 0  # 0: no scales beside the blocks
    group_rows: int = 1
    scale_bytes: int = 0  # everything kept per group but packed zero points
    zero_bits: int = 0  # per group, packed along the rows into 32-bit words
    column_bytes: int = 0  # per column of a matrix: GPTQ's g_idx
    matrix_bytes: int = 0  # per matrix: weight_shape, global scales
    matrices: int = 1  # matrices of the released file that this tensor holds side by side (gate and up: 2)
    ragged: str = (
        "block"  # where columns are no multiple of the group: a last short "block", one group per "row", "keep"
    )


def storage_bytes(shape: tuple[int, ...], storage: Storage) -> int:
    """Bytes of one tensor of `shape` ([..., rows, columns]), with all that lies beside its codes.

    Pure arithmetic, no rounding to pages or alignment.
    """
    columns = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    total = rows * -(-columns // storage.block_elements) * storage.block_bytes
    if storage.group_columns:
        matrices = storage.matrices
        matrix_rows = rows // matrices
        groups = -(-columns // storage.group_columns)
        beside = -(-matrix_rows // storage.group_rows) * groups * storage.scale_bytes
        beside += -(-matrix_rows * storage.zero_bits // 32) * groups * 4
        total += matrices * (beside + columns * storage.column_bytes + storage.matrix_bytes)
    return total * prod(shape[:-2])


@lru_cache(maxsize=1024)
def fitted(storage: Storage, columns: int, matrices: int, kept: Storage) -> Storage:
    """The storage of a tensor with that many columns and matrices side by side; `kept` where it cannot be quantized."""
    if storage.group_columns and columns % storage.group_columns:
        if storage.ragged == "keep":
            return kept
        if storage.ragged == "row":
            storage = replace(storage, group_columns=WHOLE_ROW)
    return replace(storage, matrices=matrices) if matrices > 1 and storage.group_columns else storage


@lru_cache(maxsize=128)
def plain(dtype: str) -> Storage:
    """A dtype of safetensors or a block type of GGML; `KeyError` for a word of neither."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        elements, block_bytes = GGML_TYPES[dtype]
        return Storage(dtype, block_bytes * 8 // elements, elements, block_bytes)
    elements = 1 if bits % 8 == 0 else 8 // (bits & -bits)
    return Storage(dtype, bits, elements, bits * elements // 8)


def packed_integers(bits: int, group_size: int, symmetric: bool) -> Storage:
    """compressed-tensors `pack-quantized` (0.17, `compressors/pack_quantized/`): weight_packed int32 along the columns,
    weight_scale bf16, weight_shape int64 [2], and weight_zero_point int32 packed along the rows where asymmetric.

    Of a group that does not divide the columns it only warns, but kernels refuse that: here one scale per row instead.
    """
    return Storage(
        f"int{bits}",
        bits,
        block_elements=32 // bits,
        block_bytes=4,
        group_columns=group_size,
        scale_bytes=2,
        zero_bits=0 if symmetric else bits,
        matrix_bytes=16,
        ragged="row",
    )


def int8_per_channel() -> Storage:
    """compressed-tensors `int-quantized` (W8A8): weight int8, weight_scale bf16 per row; activations are scaled at
    run time."""
    return Storage("int8-w8a8", 8, 1, 1, group_columns=WHOLE_ROW, scale_bytes=2)


def gptq(bits: int, group_size: int) -> Storage:
    """GPTQ v1: qweight and qzeros int32, scales fp16, g_idx int32; zero points are stored for symmetric codes too."""
    return Storage(
        f"gptq-int{bits}",
        bits,
        block_elements=32 // bits,
        block_bytes=4,
        group_columns=group_size,
        scale_bytes=2,
        zero_bits=bits,
        column_bytes=4,
        ragged="row",
    )


def awq(bits: int, group_size: int) -> Storage:
    """AWQ GEMM: qweight and qzeros int32 packed along the rows, scales fp16."""
    return Storage(
        f"awq-int{bits}",
        bits,
        block_elements=32 // bits,
        block_bytes=4,
        group_columns=group_size,
        scale_bytes=2,
        zero_bits=bits,
        ragged="row",
    )


def fp8_blocks() -> Storage:
    """Qwen's FP8 releases: weight e4m3, weight_scale_inv bf16 per 128 x 128 block."""
    return Storage("fp8", 8, 1, 1, group_columns=128, group_rows=128, scale_bytes=2)


def fp8_per_tensor() -> Storage:
    """ModelOpt FP8: weight e4m3, weight_scale and input_scale F32 scalars."""
    return Storage("fp8-tensor", 8, 1, 1, group_columns=WHOLE_ROW, group_rows=WHOLE_ROW, matrix_bytes=8)


def nvfp4(scalars: int) -> Storage:
    """ModelOpt NVFP4: two e2m1 codes per byte, an e4m3 scale per 16, and F32 scalars (weight_scale_2, input_scale)."""
    return Storage("nvfp4", 4, 2, 1, group_columns=16, scale_bytes=1, matrix_bytes=4 * scalars)


def mlx_affine(bits: int, group_size: int) -> Storage:
    """MLX: codes packed in 32-bit words along the columns, bf16 scale and bias per group; other matrices stay as they
    are."""
    return Storage(
        f"mlx-{bits}bit",
        bits,
        block_elements=32,
        block_bytes=4 * bits,
        group_columns=group_size,
        scale_bytes=4,
        ragged="keep",
    )
