"""Triton's interpreter with a true bfloat16, and inline assembly by its twin: the ground under every kernel test.

Triton 3.9 keeps bfloat16 as bare 16-bit patterns in its interpreter: `+` adds patterns, `tl.dot` multiplies them, a
cast from float32 truncates (triton-lang/triton issue 11584). Here ml_dtypes' bfloat16 (round to nearest even) takes the
place of the patterns: in casts, loads, stores, constants and dots. Nothing of Triton's files is changed, and
`test_interpreter.py` fails if one of the replaced functions no longer does what it should.

Where there is a GPU the kernels are compiled and run on it instead (`pytest -m gpu`), and nothing here applies.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the kernels need torch: pip install 'qwenfit[quant]'")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by @triton.jit when a kernel's module is imported
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes this default


def make_bfloat16_true() -> None:
    """Replace the six functions of the interpreter that see bfloat16 as bits."""
    import ml_dtypes
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter as its_module
    from triton.runtime.autotuner import Autotuner

    interpreter: Any = its_module
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    numpy_dtype = interpreter._get_np_dtype
    fp_to_fp = builder.create_fp_to_fp
    dot = builder.create_dot

    def dtype_of(triton_type: Any) -> Any:
        scalar = triton_type.element_ty if isinstance(triton_type, tl.block_type) else triton_type
        return bfloat16 if scalar == tl.bfloat16 else numpy_dtype(triton_type)

    def cast(_: Any, source: Any, target: Any) -> Any:
        with np.errstate(all="ignore"):
            return handle(source.data.astype(dtype_of(target)), target.scalar)

    def cast_float(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def exact_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, imprecise: Any) -> Any:
        # A product of two bfloat16 is exact in float32, as on a tensor core.
        def widen(operand: Any) -> Any:
            is_bfloat16 = operand.data.dtype == bfloat16
            return handle(operand.data.astype(np.float32), tl.float32) if is_bfloat16 else operand

        return dot(self, widen(a), widen(b), accumulator, precision, imprecise)

    def masked_load(_: Any, pointers: Any, mask: Any, other: Any, *__: Any) -> Any:
        # The C++ side of the interpreter knows plain integers and floats only, so bfloat16 travels as uint16.
        element = pointers.get_element_ty()
        dtype = dtype_of(element)
        raw = np.dtype(np.uint16) if dtype == bfloat16 else dtype
        fill = np.zeros(pointers.data.shape, raw) if other is None else other.data.view(raw)
        return handle(interpreter._interpreter.load(pointers.data, mask.data, fill, raw).view(dtype), element)

    def masked_store(_: Any, pointers: Any, value: Any, mask: Any, *__: Any) -> Any:
        data = value.data.view(np.uint16) if value.data.dtype == bfloat16 else value.data
        return interpreter._interpreter.store(pointers.data, data, mask.data)

    def constant(_: Any, value: float) -> Any:
        return handle(np.array([value], dtype=bfloat16), tl.bfloat16)

    def run_first_configuration(self: Any, *args: Any, **options: Any) -> Any:
        # Without a driver there is nothing to time: the first configuration is as good as any.
        first = self.configs[0]
        if first.pre_hook:
            first.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **options, **first.all_kwargs()})
        return self.fn.run(*args, **options, **first.kwargs)

    interpreter._get_np_dtype = dtype_of
    builder.cast_impl = cast
    builder.create_fp_to_fp = cast_float
    builder.create_dot = exact_dot
    builder.create_masked_load = masked_load
    builder.create_masked_store = masked_store
    builder.get_bf16 = constant
    Autotuner.run = run_first_configuration


ASSEMBLY: dict[str, Callable[..., Any]] = {}  # assembly text -> what it computes, on numpy arrays


def run_assembly_by_its_twin() -> None:
    """`tl.inline_asm_elementwise` calls the function that `assembly` holds for the text, or fails."""
    import numpy as np
    from triton import language
    from triton.runtime import interpreter as its_module

    tl: Any = language
    interpreter: Any = its_module
    patch = interpreter._patch_lang

    def inline_asm(asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any, **_: Any) -> Any:
        results = ASSEMBLY[str(getattr(asm, "value", asm))](*(argument.handle.data for argument in args))
        several = isinstance(dtype, tuple | list)
        tensors = tuple(
            tl.tensor(interpreter.TensorHandle(np.ascontiguousarray(data), kind), tl.block_type(kind, list(data.shape)))
            for data, kind in zip(results if several else (results,), dtype if several else (dtype,), strict=True)
        )
        return tensors if several else tensors[0]

    def patched(function: Any, *args: Any, **options: Any) -> Any:
        scope = patch(function, *args, **options)
        tl.inline_asm_elementwise = inline_asm
        return scope

    interpreter._patch_lang = patched


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        import triton as _triton  # noqa: F401
    except ImportError:
        pass  # macOS and Windows: the kernel tests skip themselves, with this as their reason
    else:
        make_bfloat16_true()
        run_assembly_by_its_twin()


@pytest.fixture
def assembly() -> dict[str, Callable[..., Any]]:
    """Assembly text -> its numpy twin, which the interpreter runs in its place."""
    return ASSEMBLY
