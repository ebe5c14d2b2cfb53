"""Which kernel multiplies, and in which configuration, by target and number of rows.

There is no GPU where this was written: configurations were chosen from compiled code (no spills, 128-bit loads, fewest
instructions per weight: `compile_matrix.py` shows them), and the borders between kernels are estimates, made as
follows. `QWENFIT_MATMUL_PATH` and the argument `path` override them.

gemv or tiles. A device can issue only so many instructions while its memory delivers an int4 weight; where gemv's
5 to 11 (1 to 4 rows) are within 70 % of that, it is bound by memory, and wins by needing fewer launches (its programs
are small, so K is rarely split). Elsewhere the tensor cores do it in 2.5. `ISSUE` is float32 FLOP/s / (4 * bandwidth):
two FLOP per lane and instruction, two weights per byte; doubled where half of the lanes do integers only (sm_75,
sm_80), halved where the vendor counts two instructions at once (ROCm). It is the median over the catalog's devices of a
target.

tiles or unpacking. Unpacking costs 4.5 bytes of traffic per weight (codes in, matrix out and in again); the vendor's
matmul saves time per row where the tiles are slower. With tiles at 60 % of the vendor's FLOP/s (45 % on sm_100, whose
listing shows 6 instructions per weight and 128 rows; 25 % on ROCm, whose tiles have 32 rows) the two are even at
4.5 / bandwidth * FLOP/s / 2 / (1 / share - 1) rows: `UNPACK_ROWS`, to the next multiple of 32, from the same devices.
`tests/kernels/test_matmul_paths.py` computes both tables from the catalog.
"""

import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from .target import KIB, Target

PATHS = ("gemv", "tiles", "unpack")
GEMV_ROWS = 4  # rows of x per program
MOST_GEMV_ROWS = 16  # more are unpacked where there are no tiles: 4 passes over the codes, 2 bytes per weight
ROWS_PER_EXPERT_TO_UNPACK = 4
LEAST_SPLIT_BLOCKS = 4
WARPS_PER_PROCESSOR = 8
MOST_SPLITS = 16

ISSUE = {  # instructions of all lanes that the device can issue per int4 weight that its memory delivers
    "sm_75": 10.8,
    "sm_80": 5.5,
    "sm_86": 9.4,
    "sm_89": 18.0,
    "sm_90": 3.8,
    "sm_100": 2.4,
    "sm_120": 12.4,
    "gfx942": 3.6,
    "gfx950": 2.4,
    "gfx1100": 8.5,
    "gfx1201": 9.4,
}
UNPACK_ROWS = {  # rows of x from which unpacking and the vendor's matmul are estimated to be faster
    "sm_80": 608,
    "sm_86": 288,
    "sm_89": 512,
    "sm_90": 704,
    "sm_100": 544,
    "sm_120": 352,
    "gfx942": 160,
    "gfx950": 224,
    "gfx1100": 96,
    "gfx1201": 224,
}
_GEMV_INSTRUCTIONS = (5.0, 6.5, 9.0, 11.0)  # per weight, with 1, 2, 3 and 4 rows
_ISSUE_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class TileConfiguration:
    """A program of `matmul_tiles_kernel`: rows of x, rows of the weight, which of them is the left operand."""

    rows: int
    columns: int
    weight_first: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class GemvConfiguration:
    """A program of `gemv_kernel`: rows of x, rows of the weight, blocks of 128 columns per turn."""

    rows: int
    columns: int
    blocks: int
    num_warps: int = 1


def has_tiles(target: Target, dtype: torch.dtype) -> bool:
    """Whether Triton has a matrix unit for this type there; float32 would be rounded to 11 bits by it."""
    return target.matrix_instruction is not None and dtype in (torch.bfloat16, torch.float16)


def choose_path(target: Target, dtype: torch.dtype, rows: int) -> tuple[str, str]:
    """(one of PATHS, the sentence that says why) for a matmul of that many rows of x in `dtype`."""
    forced = os.environ.get("QWENFIT_MATMUL_PATH")
    if not forced:
        return _estimated_path(target, dtype, rows)
    if forced not in PATHS:
        raise ValueError(f"QWENFIT_MATMUL_PATH is {forced!r}: one of {', '.join(PATHS)}, or unset it")
    return forced, "QWENFIT_MATMUL_PATH says so"


@lru_cache(maxsize=4096)
def _estimated_path(target: Target, dtype: torch.dtype, rows: int) -> tuple[str, str]:
    if not has_tiles(target, dtype):
        why = f"{target.name} has no tensor cores in Triton" if target.matrix_instruction is None else "x is float32"
        if rows <= MOST_GEMV_ROWS:
            return "gemv", f"{why}, and {rows} rows are few"
        return "unpack", f"{why}, and {rows} rows are many: the weight is unpacked for the vendor's matmul"
    if rows <= GEMV_ROWS and gemv_is_bound_by_memory(target, rows):
        return "gemv", f"estimated: {target.name} issues gemv's instructions faster than its memory delivers weights"
    if rows < UNPACK_ROWS[target.name]:
        return "tiles", f"estimated: fewer than {UNPACK_ROWS[target.name]} rows do not pay for unpacking the weight"
    return "unpack", f"estimated: from {UNPACK_ROWS[target.name]} rows on unpacking and the vendor's matmul are faster"


def choose_expert_path(target: Target, dtype: torch.dtype, rows: int, experts: int) -> tuple[str, str]:
    """(one of PATHS, the sentence that says why) for that many rows over that many experts."""
    if not has_tiles(target, dtype):
        why = f"{target.name} has no tensor cores in Triton" if target.matrix_instruction is None else "x is float32"
        if rows < ROWS_PER_EXPERT_TO_UNPACK * experts:
            return "gemv", f"{why}: row by row"
        return "unpack", f"{why}, and {rows} rows are many: expert by expert through the vendor's matmul"
    if rows <= experts // 4 and gemv_is_bound_by_memory(target, 1):
        return "gemv", f"{rows} rows are mostly of different experts: row by row"
    return "tiles", f"{rows} rows over {experts} experts, in tiles of one expert each"


def gemv_is_bound_by_memory(target: Target, rows: int) -> bool:
    """By the estimate above; 1 to 4 rows."""
    return _GEMV_INSTRUCTIONS[rows - 1] <= _ISSUE_SHARE * ISSUE[target.name]


def gemv_configuration(rows: int, bits: int) -> GemvConfiguration:
    """The same for every target: four 128-bit loads per thread and turn, or two where more rows' sums need
    registers."""
    rows = min(rows, GEMV_ROWS)
    if bits == 4:
        return GemvConfiguration(rows, 16 if rows <= 2 else 8, 2)
    return GemvConfiguration(rows, 8 if rows <= 2 else 4, 2)


def tile_configuration(target: Target, rows: int, bits: int, group: int) -> TileConfiguration:
    """For `rows` rows of x (of one expert, on average); group: columns per scale, 0 for one scale per row.

    Sums of small groups and of bytes need registers (on sm_100 tensor memory) that large tiles have not.
    """
    if target.backend == "hip":
        if target.warp_threads == 64:
            columns = 128 if bits == 16 else 256  # plain weights of 256 rows would fill the LDS
            tile = (16, columns, True, 4, 2) if rows <= 16 else (32, columns, True, 8, 2)
        else:
            few = rows <= 16 or (target.name == "gfx1100" and (bits == 8 or group % 128))
            tile = (16 if few else 32, 128, True, 4, 2)
        return TileConfiguration(*tile)
    stages = {4: 4, 8: 3, 16: 2}[bits]
    if rows <= 8:
        return TileConfiguration(16, 64, False, 2, max(3, stages))
    if rows <= 16:
        return TileConfiguration(16, 128, False, 4, stages)
    if rows <= 32 or (target.name == "sm_100" and group % 128):
        return TileConfiguration(32, 128, target.name == "sm_90", 4, stages)
    if bits == 16 and rows > 64 and target.shared_bytes > 128 * KIB:
        return TileConfiguration(128, 128, True, 8, 2)
    if bits != 4 or group % 128:
        return TileConfiguration(64, 64, True, 4, 3)
    if rows <= 64:
        return TileConfiguration(64, 128, True, 4, 3)
    return TileConfiguration(128, 128, True, 8, 3)


@lru_cache(maxsize=4096)
def splits_for(programs: int, num_warps: int, blocks: int, rows: int, processors: int) -> int:
    """Into how many parts K is cut: the power of two, up to 16, with the least estimated time.

    Memory is as busy as warps ask it to be, fully so with 8 of these kernels' per processor: one has 2 to 6 KB on their
    way, and latency times bandwidth is 10 to 20 KB per processor. Against that stands the traffic of the sums, 8 bytes
    * splits * rows per row of the weight, beside 64 bytes per block of codes. No part has fewer than 4 blocks.
    """

    def estimate(splits: int) -> float:
        traffic = 1.0 + (splits * rows / (8 * blocks) if splits > 1 else 0.0)
        return traffic / min(1.0, programs * splits * num_warps / (WARPS_PER_PROCESSOR * processors))

    possible = [splits for splits in (1, 2, 4, 8, MOST_SPLITS) if splits == 1 or blocks >= splits * LEAST_SPLIT_BLOCKS]
    return min(possible, key=estimate)
