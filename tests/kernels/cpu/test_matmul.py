"""Matmuls of the CPU path against float64, over shapes, groups, instruction sets, threads and what lies around the
buffers."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenfit.kernels.cpu import matmul as module
from qwenfit.kernels.cpu.library import available_isas, cpu_library
from qwenfit.kernels.cpu.matmul import (
    add_matmul,
    dense_linear,
    expert_matmul,
    quantized_matmul,
    quantized_matrix,
    round_operation,
)
from qwenfit.kernels.cpu.operations import KIND, Program, Rounded
from qwenfit.kernels.cpu.packed import packed_matmul, packed_path
from qwenfit.kernels.layout.packing import QuantizedWeight, dequantize, quantize_rtn

FEW = settings(max_examples=60, deadline=None)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
in_c = pytest.mark.skipif(not available_isas(), reason="no C compiler, or a processor without the kernels")
isas = pytest.mark.parametrize("isa", available_isas())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(rows: int, columns: int, bits: int, group: int, symmetric: bool, seed: int = 0) -> QuantizedWeight:
    return quantize_rtn(randn(rows, columns, seed=seed).float(), bits, group, symmetric)


def add_round(program: Program, x: Tensor, weight: QuantizedWeight, planes: int = 0) -> Rounded:
    """x rounded once for all matmuls behind it, by an operation of its own."""
    rounded, rounding = round_operation(program, x, weight, planes)
    program.add(rounding)
    return rounded


def rms_error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_as_good_as_torch(y: Tensor, x: Tensor, matrix: Tensor) -> None:
    """Relative RMS error against float64 no more than 1.5 times that of torch's own matmul in x's dtype.

    Of a few outputs torch may happen to hit one closely that lost its leading digits. So there is an allowance that
    fades with their number: half a float32 ulp of the summed magnitudes, and twice the deviation that activations have
    which are rounded to 15 bits below their largest (`csrc/activations.h`; float32 has a second plane).
    """
    exact = x.double() @ matrix.T
    theirs = rms_error(torch.nn.functional.linear(x, matrix.to(x.dtype)), exact)
    magnitude = exact.norm().clamp_min(1e-30)
    lost_digits = 2**-24 * (x.double().abs() @ matrix.abs().T).norm() / magnitude
    steps = 2**-14 / 12**0.5 * x.double().abs().amax(1) if x.dtype != torch.float32 else torch.zeros(1).double()
    rounding = (steps.square().sum() * matrix.square().sum()).sqrt() / magnitude
    luck = ((lost_digits + 2 * rounding) / exact.numel() ** 0.5).item()
    assert rms_error(y, exact) <= 1.5 * theirs + 1e-7 + luck, (rms_error(y, exact), theirs, luck)


@in_c
@FEW
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 400),
    tokens=st.one_of(st.integers(1, 20), st.integers(21, 300)),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 96, 128, 192, -1]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_error_is_that_of_torch_in_the_same_dtype(rows, columns, tokens, bits, group, symmetric, dtype) -> None:
    weight = weight_of(rows, columns, bits, group, symmetric)
    x = randn(tokens, columns, seed=1).to(dtype)
    assert_as_good_as_torch(quantized_matmul(x, weight), x, dequantize(weight))


@in_c
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_activations_with_outliers_or_a_mean_stay_as_good(dtype: torch.dtype, tokens: int) -> None:
    weight = weight_of(64, 512, 4, 128, False)
    outliers = randn(tokens, 512, seed=2)
    outliers[:, ::97] *= 300
    for x in (outliers, randn(tokens, 512, seed=3) + 20):
        assert_as_good_as_torch(quantized_matmul(x.to(dtype), weight), x.to(dtype), dequantize(weight))


@in_c
def test_rounding_activations_costs_what_the_docstring_says() -> None:
    # bfloat16 has 8 bits and a plane 15, so most of a block is exact; 2.8e-3 is what torch's own bfloat16 matmul loses
    # here.
    weight = weight_of(512, 1024, 4, 128, True)
    for x, limit in (
        (randn(4, 1024, seed=1), 6e-6),
        (randn(4, 1024, seed=1) * (1 + 300 * (randn(1024, seed=4) > 2)), 3e-4),
    ):
        x = x.bfloat16()
        y = torch.empty(4, 512)
        program = Program(cpu_library())
        rounded = add_round(program, x, weight, planes=1)
        add_matmul(program, [quantized_matrix(weight, y)], 4, rounded)
        program.run()
        assert rms_error(y, x.double() @ dequantize(weight).T) < limit


@in_c
@isas
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64), (8, -1)])
def test_a_one_hot_input_picks_the_exact_column(
    monkeypatch, isa: str, dtype: torch.dtype, bits: int, group: int
) -> None:
    monkeypatch.setenv("QWENFIT_CPU_ISA", isa)
    for symmetric in (True, False):
        weight = weight_of(33, 256, bits, group, symmetric)
        exact = dequantize(weight, torch.float32).to(dtype)
        for tokens in (1, 256):  # row by row, and by tiles
            eye = torch.eye(256, dtype=dtype)
            parts = [quantized_matmul(part, weight) for part in eye.split(tokens)]
            assert torch.equal(torch.cat(parts), exact.T)


@in_c
@isas
def test_instruction_sets_and_threads_change_no_bit(monkeypatch, isa: str) -> None:
    weight, x = weight_of(300, 384, 4, 64, False), randn(40, 384).bfloat16()
    monkeypatch.delenv("QWENFIT_CPU_ISA", raising=False)
    expected = [quantized_matmul(x[:tokens], weight) for tokens in (1, 7, 40)]
    monkeypatch.setenv("QWENFIT_CPU_ISA", isa)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for y, tokens in zip(expected, (1, 7, 40), strict=True):
                assert torch.equal(quantized_matmul(x[:tokens], weight), y)
    finally:
        torch.set_num_threads(before)


@in_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_its_neighbours_up_to_a_step_of_drafts(dtype: torch.dtype) -> None:
    # A step that checks drafts must see the logits of a step without.
    weight, x = weight_of(100, 384, 4, 128, True), randn(8, 384).to(dtype)
    alone = torch.cat([quantized_matmul(row[None], weight) for row in x])
    for tokens in range(1, 9):
        assert torch.equal(quantized_matmul(x[:tokens], weight), alone[:tokens])
    dense = randn(70, 384).to(dtype)
    alone = torch.cat([dense_linear(row[None], dense) for row in x])
    for tokens in range(1, 9):
        assert torch.equal(dense_linear(x[:tokens], dense), alone[:tokens])


@in_c
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [256, 1024, 4096])
def test_tasks_of_many_tiles_are_as_tasks_of_one(bits: int, group: int, symmetric: bool, columns: int) -> None:
    # One token and two go through different code, and a thread joins as many tiles as it has (csrc/progress.h).
    weight, x = weight_of(1100, columns, bits, group, symmetric), randn(2, columns).bfloat16()
    both = quantized_matmul(x, weight)
    for token in range(2):
        assert torch.equal(quantized_matmul(x[token][None], weight)[0], both[token])


@in_c
@isas
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("columns", "group"),
    [(1024, 128), (512, 64), (2304, 32), (1024, 256), (2560, 512), (640, -1), (1024, 96), (960, 320)],
)
def test_scales_of_any_type_and_number_meet_their_columns(
    monkeypatch, isa: str, scale_dtype: torch.dtype, symmetric: bool, columns: int, group: int
) -> None:
    # csrc/gemv.h reads bfloat16 by code of its own; a scale is for a part of a block, for one or for several. Groups of
    # 96 and 320 columns end within a block.
    monkeypatch.setenv("QWENFIT_CPU_ISA", isa)
    for bits in (4, 8):
        weight = quantize_rtn(randn(100, columns).float(), bits, group, symmetric, scale_dtype)
        for tokens in (1, 2, 7, 20):
            x = randn(tokens, columns, seed=1).bfloat16()
            assert_as_good_as_torch(quantized_matmul(x, weight), x, dequantize(weight))


READ_AT_THE_END = """
import ctypes, mmap, sys
import torch
from qwenfit.kernels.cpu.matmul import quantized_matmul
from qwenfit.kernels.layout.packing import quantize_rtn
from qwenfit.kernels.layout.tiles import tile
from dataclasses import replace

def at_the_end(tensor):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    copy = torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size).view(tensor.shape)
    copy.copy_(tensor)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    return copy

for columns, group in ((384, 128), (1024, 128), (512, 128), (640, 32), (1024, 512), (640, -1)):
    weight = tile(quantize_rtn(torch.randn(80, columns), 4, group, False))
    lying = [at_the_end(tensor) for tensor in (weight.codes, weight.scales, weight.zeros)]
    guarded = replace(weight, codes=lying[0], scales=lying[1], zeros=lying[2])
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, columns).bfloat16()
        assert torch.equal(quantized_matmul(x, guarded), quantized_matmul(x, weight))
"""


@in_c
def test_nothing_behind_the_last_scale_is_read() -> None:
    # Codes, scales and zero points each end where a page begins that nobody may read.
    subprocess.run([sys.executable, "-c", READ_AT_THE_END], check=True, timeout=120)


@in_c
def test_a_copy_in_tiles_is_kept_while_its_tensors_live_and_are_not_written_to() -> None:
    weight, x = weight_of(40, 512, 4, 64, False), randn(2, 512).float()
    before, y = weight.codes.clone(), quantized_matmul(x, weight)
    first = module.in_tiles(weight)
    assert first.tiled and module.in_tiles(weight).codes is first.codes and torch.equal(weight.codes, before)
    assert torch.equal(quantized_matmul(x, first), y)
    weight.scales.mul_(2)
    assert torch.equal(quantized_matmul(x, weight), 2 * y)
    known = len(module._copies)
    del weight
    assert len(module._copies) == known - 1


@in_c
def test_a_token_for_each_expert_stays_within_its_scratch() -> None:
    # One token for each expert, though the operation has four rows of activations.
    matrices = randn(4, 1100, 512).float()
    stack, x = quantize_rtn(matrices, 4, 32), randn(4, 512, seed=1).bfloat16()
    y = expert_matmul(x, stack, torch.arange(5).int())
    for expert in range(4):
        alone = quantize_rtn(matrices[expert], 4, 32)
        assert torch.equal(y[expert], quantized_matmul(x[expert][None], alone)[0])


@in_c
@pytest.mark.parametrize("tokens", [1, 3, 30])
@pytest.mark.parametrize("rows", [1, 17, 33])
def test_nothing_beside_the_result_is_written(tokens: int, rows: int) -> None:
    weight, x = weight_of(rows, 256, 4, 32, False), randn(tokens, 256).bfloat16()
    room = torch.full((tokens + 2, rows + 20), 7.0, dtype=torch.bfloat16)
    y = room[1:-1, 10 : 10 + rows]
    program = Program(cpu_library())
    add_matmul(program, [quantized_matrix(weight, y)], tokens, add_round(program, x, weight))
    program.run()
    assert torch.equal(y, quantized_matmul(x, weight))
    room[1:-1, 10 : 10 + rows] = 7.0
    assert bool((room == 7.0).all())


@in_c
@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("columns", [256, 2560])
def test_matrices_of_one_operation_do_not_run_into_each_other(tokens: int, columns: int) -> None:
    """Neighbouring tasks are done as one (`progress.h`), up to where another matrix begins."""
    weights = [weight_of(rows, columns, 4, 128, False, seed=rows) for rows in (300, 20, 33, 1, 700)]
    x, outputs, program = randn(tokens, columns).bfloat16(), [], Program(cpu_library())
    rounded = add_round(program, x, weights[0])
    for weight in weights:
        outputs.append(torch.full((tokens, weight.rows), float("nan"), dtype=torch.bfloat16))
    add_matmul(program, [quantized_matrix(*pair) for pair in zip(weights, outputs, strict=True)], tokens, rounded)
    for threads in (1, 2, 3):
        program.run(threads=threads)
        for weight, y in zip(weights, outputs, strict=True):
            assert torch.equal(y, quantized_matmul(x, weight))
            y.fill_(float("nan"))


@in_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [256, 1152, 4096])
def test_a_single_row_is_rounded_by_every_thread_for_itself(dtype: Any, group_size: int, columns: int) -> None:
    """No operation goes before the matmul then, and the bits are those of a row that was rounded once for all. Two such
    matmuls of other rows in turn: what a thread keeps in its scratch is of the operation that is on."""
    weights = [weight_of(rows, columns, 4, group_size, True, seed=rows) for rows in (300, 70, 1500)]
    program, outputs, expected = Program(cpu_library()), [], []
    for seed in (1, 2, 3):
        x = randn(1, columns, seed=seed).to(dtype)
        rounded, rounding = round_operation(program, x, weights[0])
        ys = [torch.zeros(1, weight.rows, dtype=dtype) for weight in weights]
        matrices = [quantized_matrix(*pair) for pair in zip(weights, ys, strict=True)]
        add_matmul(program, matrices, 1, rounded, rounding=rounding)
        before, shared = Program(cpu_library()), [torch.zeros_like(y) for y in ys]
        matrices = [quantized_matrix(*pair) for pair in zip(weights, shared, strict=True)]
        add_matmul(before, matrices, 1, add_round(before, x, weights[0]))
        before.run(threads=2)
        outputs += ys
        expected += shared
    assert [one.kind for one in program.operations] == [KIND["MATMUL"]] * 3
    for threads in (1, 2, 3):
        program.run(threads=threads)
        for y, same in zip(outputs, expected, strict=True):
            assert torch.equal(y, same)
            y.fill_(float("nan"))


@in_c
def test_several_rows_are_rounded_once_for_all_threads() -> None:
    weight, x = weight_of(70, 256, 4, 128, True), randn(3, 256).bfloat16()
    y, program = torch.zeros(3, 70, dtype=torch.bfloat16), Program(cpu_library())
    rounded, rounding = round_operation(program, x, weight)
    add_matmul(program, [quantized_matrix(weight, y)], 3, rounded, rounding=rounding)
    assert [one.kind for one in program.operations] == [KIND["ROUND"], KIND["MATMUL"]]
    program.run(threads=2)
    assert torch.equal(y, quantized_matmul(x, weight))


@in_c
@pytest.mark.parametrize("tokens", [1, 12])
def test_what_is_no_number_spoils_its_own_row_only(tokens: int) -> None:
    weight, x = weight_of(40, 256, 4, 128, True), randn(tokens + 1, 256).bfloat16()
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[0, 200] = bad
        y = quantized_matmul(spoiled, weight)
        assert bool(y[0].isnan().all())
        assert torch.equal(y[1:], quantized_matmul(x, weight)[1:])


@in_c
def test_zeros_tiny_and_huge_inputs() -> None:
    weight = weight_of(40, 256, 4, 128, True)
    assert bool((quantized_matmul(torch.zeros(2, 256), weight) == 0).all())
    for size in (1e-20, 1e30):
        x = (randn(2, 256) * size).float()
        assert_as_good_as_torch(quantized_matmul(x, weight), x, dequantize(weight))


@in_c
def test_bias_leading_dimensions_strides_and_no_rows() -> None:
    weight, x, bias = weight_of(40, 256, 8, 64, False), randn(2, 3, 512).float()[..., ::2], randn(40).float()
    y = quantized_matmul(x, weight, bias)
    assert y.shape == (2, 3, 40)
    exact = x.double() @ dequantize(weight).T + bias
    assert rms_error(y, exact) < 3e-7
    assert quantized_matmul(torch.empty(0, 256), weight).shape == (0, 40)
    assert quantized_matmul(x.double(), weight).dtype == torch.float64


@in_c
def test_columns_in_another_order() -> None:
    weight = weight_of(40, 256, 4, 64, True)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3)).int()
    ordered = QuantizedWeight(weight.codes, weight.scales, None, 4, weight.group_size, 40, 256, order)
    for tokens in (1, 20):
        x = randn(tokens, 256).float()
        assert torch.equal(quantized_matmul(x, ordered), quantized_matmul(x[:, order.long()], weight))


@FEW
@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=6), bits=st.sampled_from([4, 8, 16]))
def test_rows_meet_their_expert(counts: list[int], bits: int) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    matrices = randn(len(counts), 24, 128).float()
    stack = matrices if bits == 16 else quantize_rtn(matrices, bits, 64)
    exact = matrices.double() if isinstance(stack, Tensor) else dequantize(stack)
    x = randn(int(offsets[-1]), 128, seed=1).float()
    y = expert_matmul(x, stack, offsets)
    for expert in range(len(counts)):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        torch.testing.assert_close(y[rows].double(), x[rows].double() @ exact[expert].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(1, 16, 1), (50, 200, 3), (64, 256, 8), (33, 130, 20)])
def test_matrices_of_floats(dtype: torch.dtype, rows: int, columns: int, tokens: int) -> None:
    weight, x = randn(rows, columns).to(dtype), randn(tokens, columns, seed=1).to(dtype)
    assert_as_good_as_torch(dense_linear(x, weight), x, weight.double())


def test_shapes_that_do_not_fit_are_sentences() -> None:
    weight = weight_of(40, 256, 4, 64, True)
    with pytest.raises(ValueError, match="128 features, the weight reads 256"):
        quantized_matmul(torch.zeros(1, 128), weight)
    stack = quantize_rtn(randn(3, 16, 128).float(), 4, 64)
    with pytest.raises(ValueError, match="expert_matmul"):
        quantized_matmul(torch.zeros(1, 128), stack)
    with pytest.raises(ValueError, match="3 experts need 4 offsets"):
        expert_matmul(torch.zeros(2, 128), stack, torch.tensor([0, 2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 128, True), (4, 32, False), (8, -1, True), (8, 64, True)])
def test_torch_alone_is_as_good(monkeypatch, dtype: torch.dtype, bits: int, group: int, symmetric: bool) -> None:
    monkeypatch.setenv("QWENFIT_CPU_PATH", "torch")
    weight, x = weight_of(64, 256, bits, group, symmetric), randn(5, 256).to(dtype)
    y = quantized_matmul(x, weight)
    exact = x.double() @ dequantize(weight).T
    theirs = rms_error(torch.nn.functional.linear(x, dequantize(weight, dtype)), exact)
    assert rms_error(y, exact) <= 1.5 * theirs + 1e-7
    assert torch.equal(y, packed_matmul(x, weight))


def test_torch_packs_what_its_kernels_take_and_forgets_it_with_the_weight() -> None:
    from qwenfit.kernels.cpu import packed as cpu_packed

    weight = weight_of(64, 256, 4, 128, True)
    assert packed_path(torch.bfloat16, weight) == "int4pack"
    assert packed_path(torch.float32, weight) == "dequantize"  # aten's float32 form takes 30 times as long
    assert packed_path(torch.bfloat16, weight_of(64, 256, 8, -1, True)) == "int8pack"
    assert packed_path(torch.bfloat16, weight_of(60, 256, 4, 128, True)) == "dequantize"
    before = len(cpu_packed._packed)
    packed_matmul(randn(1, 256).bfloat16(), weight)
    assert len(cpu_packed._packed) == before + 1
    del weight
    assert len(cpu_packed._packed) == before


def test_float32_takes_two_planes() -> None:
    assert [module.planes_of(dtype) for dtype in DTYPES] == [1, 1, 2]
