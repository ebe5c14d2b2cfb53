"""The loops that see every weight: the scale of a group (and its codes), and GPTQ's walk through a block of columns.

On a CPU they are C (`kernels/cpu/csrc/rounding.h`); elsewhere, and where there is no compiler, plain torch. Both give
the same bits: a product and a sum are rounded separately, sums over a group follow one tree, candidates come in one
order. Both run on the calling thread alone, so that `tasks.py` decides about threads.
"""

import torch
from torch import Tensor

from ..kernels.cpu.library import CpuLibrary, cpu_library
from ..kernels.cpu.operations import DTYPES, operation

LANES = 16
ROUND_GROUPS_MOST = 16384  # columns of a group, as in csrc/operations.h
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Elements of a tile of the torch loop: on a CPU its half dozen temporaries stay in the second-level cache.
TILE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}


def find_scales(
    weight: Tensor,
    importance: Tensor,
    ratios: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    signed_scales: bool,
    scale_dtype: torch.dtype,
    refinements: int,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group with the least sum of importance * (rounded - weight)^2 among the candidates.

    weight: float32 [O, I], contiguous; importance: float32 [I]; ratios: float32 [K]. A symmetric group's step is its
    largest magnitude / 2^(bits - 1), an asymmetric one's its range (0 included) / (2^bits - 1). Candidates are step *
    ratio, rounded to `scale_dtype`, for the zero that the range gives and its two neighbours; the best is then refitted
    to its levels by least squares, `refinements` times at most. signed_scales: a symmetric group whose largest
    magnitude is positive gets a negative step, so that this magnitude lies at the end with one level more. Groups have
    a multiple of 16 columns.

    Returns scales float32 [O, G] and zeros uint8 [O, G].
    """
    rows, columns = weight.shape
    scales = weight.new_empty(rows, columns // group_size)
    zeros = torch.empty(scales.shape, dtype=torch.uint8, device=weight.device)
    library = _library(weight)
    if library:
        library.run_here(
            operation(
                "FIND_SCALES",
                weight=weight.data_ptr(),
                importance=importance.data_ptr(),
                ratios=ratios.data_ptr(),
                ratio_count=len(ratios),
                refinements=refinements,
                rows=rows,
                columns=columns,
                group_size=group_size,
                bits=bits,
                symmetric=symmetric,
                signed_scales=signed_scales,
                scale_dtype=DTYPES[scale_dtype],
                scales=scales.data_ptr(),
                zeros=zeros.data_ptr(),
            )
        )
        return scales, zeros
    step = max(1, TILE_ELEMENTS.get(weight.device.type, 1 << 24) // columns)
    grouped = importance.view(-1, group_size)
    for at in range(0, rows, step):
        part = weight[at : at + step].view(-1, columns // group_size, group_size)
        found = _find_scales(part, grouped, ratios.tolist(), bits, symmetric, signed_scales, scale_dtype, refinements)
        scales[at : at + step], zeros[at : at + step] = found
    return scales, zeros


def can_round_groups(weight: Tensor, group_size: int) -> bool:
    """Whether `round_groups` takes a weight [O, I]: a row-major matrix of floats on a CPU with the C kernels."""
    fits = group_size <= ROUND_GROUPS_MOST and group_size % LANES == 0 and weight.is_contiguous()
    return fits and weight.dtype in FLOATS and _library(weight) is not None


def round_groups(
    weight: Tensor,
    ratios: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    signed_scales: bool,
    scale_dtype: torch.dtype,
    refinements: int,
) -> bool:
    """`find_scales` with equal costs and the nearest codes, in one pass in C; False where weights are NaN or Inf.

    weight: [O, I] as `can_round_groups` wants it, in its own dtype. Written: codes uint8 [O, I], scales float32 [O, G],
    zeros uint8 [O, G], with the bits that `find_scales` and division by its scales would give.
    """
    library = _library(weight)
    if library is None:
        raise ValueError("without the C kernels find_scales does it: ask can_round_groups")
    task = operation(
        "ROUND_GROUPS",
        weight=weight.data_ptr(),
        dtype=DTYPES[weight.dtype],
        ratios=ratios.data_ptr(),
        ratio_count=len(ratios),
        refinements=refinements,
        rows=weight.shape[0],
        columns=weight.shape[1],
        group_size=group_size,
        bits=bits,
        symmetric=symmetric,
        signed_scales=signed_scales,
        scale_dtype=DTYPES[scale_dtype],
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr(),
    )
    library.run_here(task)
    return not task.is_bad


def _find_scales(
    x: Tensor,
    v: Tensor,
    ratios: list[float],
    bits: int,
    symmetric: bool,
    signed_scales: bool,
    dtype: torch.dtype,
    refinements: int,
) -> tuple[Tensor, Tensor]:
    """`find_scales` in torch. x: [R, G, g], v: [G, g]."""
    top, middle = float(2**bits - 1), float(2 ** (bits - 1))
    low, high = x.amin(2).clamp_(max=0), x.amax(2).clamp_(min=0)
    if symmetric:
        largest = torch.maximum(high, -low)
        step = (torch.where(high > -low, -largest, largest) if signed_scales else largest) / middle
        first = last = torch.full_like(step, middle)
    else:
        step = (high - low) / top
        zero = torch.where(step > 0, torch.round(-low / step), 0)
        first, last = (zero - 1).clamp_(min=0), (zero + 1).clamp_(max=top)
    best_scale, best_zero = torch.ones_like(step), first
    best_error = torch.full_like(step, torch.inf)
    for offset in range(1 if symmetric else 3):
        zero = first + offset
        for ratio in ratios:
            scale = (step * ratio).to(dtype).float()
            error = _error(x, v, _levels(x, scale, zero, top), scale)
            better = torch.isfinite(scale) & (scale != 0) & (zero <= last) & (error < best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            best_error = torch.where(better, error, best_error)
    going = torch.isfinite(best_error)
    for _ in range(refinements):
        level = _levels(x, best_scale, best_zero, top)
        weighted = v * level
        square = _tree_sum(weighted * level)
        scale = (_tree_sum(weighted.mul_(x)) / square).to(dtype).float()
        error = _error(x, v, _levels(x, scale, best_zero, top), scale)
        going = going & (square > 0) & torch.isfinite(scale) & (scale != 0) & (error < best_error)
        best_scale, best_error = torch.where(going, scale, best_scale), torch.where(going, error, best_error)
    return best_scale, best_zero.to(torch.uint8)


def _levels(x: Tensor, scale: Tensor, zero: Tensor, top: float) -> Tensor:
    """The levels that x [R, G, g] gets, as the C kernel finds them: by the inverse of the scale [R, G]."""
    return nearest_level(x * (1 / scale).unsqueeze(2), zero.unsqueeze(2), top)


def _error(x: Tensor, v: Tensor, level: Tensor, scale: Tensor) -> Tensor:
    """Sum of v (level scale - x)^2 over each group, [R, G]; `level` is used up."""
    error = level.mul_(scale.unsqueeze(2)).sub_(x)
    return _tree_sum(error.mul_(error).mul_(v))


def _tree_sum(x: Tensor) -> Tensor:
    """Sums over the last dimension in the order of the C kernel: lane by lane, then halves onto halves."""
    lanes = x.unflatten(2, (-1, LANES))
    total = lanes[:, :, 0].clone()
    for part in range(1, lanes.shape[2]):
        total += lanes[:, :, part]
    width = LANES
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total.squeeze(2)


def nearest_level(t: Tensor, zero: Tensor, top: float) -> Tensor:
    """The level next to t (ties to even), as a distance from zero: an integer in -zero ... top - zero, of t's dtype."""
    return torch.minimum(torch.maximum(t, -zero), top - zero).round_()


def solve_columns(
    targets: Tensor,
    weights: Tensor,
    codes: Tensor,
    factor: Tensor,
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
) -> None:
    """Round a block of B columns of R rows, the last column first, and hand each one's error to those before it.

    targets: float32 [B, R], what the columns would be if they were free; scratch afterwards. weights: float32 [B, R],
    the columns as they are; each becomes weight - rounding. codes: uint8 [B, R], written. factor: float32 [B, B] whose
    rows lie side by side: weights[j] * factor[j, k] is added to targets[k], k < j. groups: int64 [B], the group of each
    column. scales, zeros: float32 [G, R]. B is 64 at most, R a multiple of 16; all but `factor` are contiguous.
    """
    library = _library(weights)
    count, rows = weights.shape
    if library:
        library.run_here(
            operation(
                "SOLVE_COLUMNS",
                targets=targets.data_ptr(),
                weights=weights.data_ptr(),
                factor=factor.data_ptr(),
                scales=scales.data_ptr(),
                zeros=zeros.data_ptr(),
                groups=groups.data_ptr(),
                codes=codes.data_ptr(),
                rows=rows,
                columns=count,
                factor_stride=factor.stride(0),
                bits=bits,
            )
        )
        return
    top = float(2**bits - 1)
    spread = torch.empty_like(targets)
    for j, group in zip(range(count - 1, -1, -1), reversed(groups.tolist()), strict=True):
        level = nearest_level(targets[j] / scales[group], zeros[group], top)
        codes[j] = level + zeros[group]
        weights[j] -= level * scales[group]
        torch.mul(factor[j, :j].unsqueeze(1), weights[j], out=spread[:j])
        targets[:j] += spread[:j]


def _library(tensor: Tensor) -> CpuLibrary | None:
    """The C kernels where they can work on this tensor."""
    if tensor.device.type != "cpu":
        return None
    library = cpu_library()
    return library if library.path == "c" else None
