"""The matmul kernels as the compile matrix sees them, in the configurations of `matmul_paths.py`."""

from .compile_case import CompileCase
from .gemv import gemv_kernel
from .matmul_paths import gemv_configuration, tile_configuration
from .matmul_tiles import matmul_tiles_kernel
from .target import Target

_SIZES = {
    "M": "i32",
    "N": "i32",
    "K": "i32",
    "x_stride": "i32",
    "padded_rows": "i32",
    "blocks": "i32",
    "blocks_per_split": "i32",
}
_ALIGNED_SIZES = ("N", "K", "x_stride", "padded_rows")
_EXPERTS = 256  # of the 35B's; 397B's 512 differ in one constant


def float_type(target: Target) -> str:
    """bfloat16; float16 where the device has no bfloat16."""
    return "*fp16" if target.capability == 75 else "*bf16"


def gemv_case(
    target: Target, rows: int, bits: int, group: int = 128, asymmetric: bool = False, experts: bool = False
) -> CompileCase:
    """`gemv_kernel` for that many rows of x; bits 16: experts that are not quantized."""
    use, group = gemv_configuration(rows, bits), 0 if bits == 16 else group
    signature, constants = _arguments(target, bits, asymmetric, experts, "*i32" if bits == 4 else "*i8")
    constants |= {
        "BITS": bits,
        "GROUP": group,
        "ROWS": use.rows,
        "BN": use.columns,
        "BLOCKS": use.blocks,
        "PARTIAL": False,
        "WHOLE": True,
    }
    return CompileCase(
        name=f"{_kind(bits)}_{'experts_gemv' if experts else 'gemv'}/m{rows}{_storage(group, asymmetric)}",
        kernel=gemv_kernel,
        signature=signature,
        constants=constants,
        aligned=_aligned(signature),
        num_warps=use.num_warps,
        # Three or four rows of x, 32 bits at a time through the cache, are more loads than the codes' 128-bit ones.
        wide_loads=rows <= 2,
        weights_per_iteration=use.columns * use.blocks * 128,
    )


def tiles_case(
    target: Target, rows: int, bits: int, group: int = 128, asymmetric: bool = False, experts: bool = False
) -> CompileCase:
    """`matmul_tiles_kernel` for that many rows of x; up to 64 rows K is split."""
    group = 0 if bits == 16 else group
    use = tile_configuration(target, rows, bits, group)
    partial = not experts and rows <= 64
    signature, constants = _arguments(target, bits, asymmetric, experts, "*u16" if bits == 4 else "*i8", partial)
    emulated = target.backend == "hip" and signature["x"] == "*bf16"
    constants |= {
        "BITS": bits,
        "GROUP": group,
        "BM": use.rows,
        "BN": use.columns,
        "WEIGHT_FIRST": use.weight_first,
        "PARTIAL": partial,
        "WHOLE_BLOCKS": True,
        "EMULATED": emulated,
        "ASSEMBLY": target.backend == "cuda",
    }
    return CompileCase(
        name=f"{_kind(bits)}_{'experts_tiles' if experts else 'tiles'}/m{rows}{_storage(group, asymmetric)}",
        kernel=matmul_tiles_kernel,
        signature=signature,
        constants=constants,
        aligned=_aligned(signature),
        num_warps=use.num_warps,
        num_stages=use.num_stages,
        matrix=target.matrix_instruction or False if use.weight_first else "HMMA",
        weights_per_iteration=use.columns * 128,
    )


def _arguments(
    target: Target, bits: int, asymmetric: bool, experts: bool, codes: str, partial: bool = False
) -> tuple[dict[str, str], dict[str, object]]:
    kind = float_type(target)
    signature = {"x": kind, "codes": kind if bits == 16 else codes, "out": "*fp32" if partial else kind, **_SIZES}
    constants: dict[str, object] = {
        "bias": None,
        "EXPERTS": _EXPERTS if experts else 0,
        "EXPERT_SLOTS": _EXPERTS if experts else 1,
    }
    given = {"scales": (bits != 16, kind), "zeros": (asymmetric, kind), "offsets": (experts, "*i32")}
    for name, (is_given, pointer) in given.items():
        if is_given:
            signature[name] = pointer
        else:
            constants[name] = None
    return signature, constants


def _aligned(signature: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name, kind in signature.items() if kind[0] == "*" or name in _ALIGNED_SIZES)


def _kind(bits: int) -> str:
    return "bf16" if bits == 16 else f"w{bits}a16"


def _storage(group: int, asymmetric: bool) -> str:
    return ("" if group in (0, 128) else f"_g{group}") + ("_zeros" if asymmetric else "")
