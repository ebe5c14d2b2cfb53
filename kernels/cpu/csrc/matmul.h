/* y = x W^T for int4 and int8 weights in tiles of 16 rows (kernels/layout/tiles.py): integer dot products, one float per
 * group and output.
 *
 * Lanes are rows of W, and a pair of activations is broadcast from memory: no sum over lanes, and scales come 16 rows
 * at a time, in the order in which they are used. A block of 128 columns of a tile is 16 steps; in each, one line of
 * int4 codes (two of int8) becomes four registers of int16 pairs.
 * Up to GEMV_TOKENS rows of activations go tile by tile, as codes lie in memory (gemv.h): 5 instructions to unpack 64
 * bytes and 4 dot products per activation row, 1.6 ns on a Zen 4 core, where memory takes 2 to 2.7. A row's result does
 * not depend on how many rows there are (a draft is checked by the same sums that decode without drafts).
 * More go by two tiles at once (gemm.h): 32 rows x 128 columns are unpacked once (8 KiB, stays in L1);
 * GEMM_TOKENS x GEMM_VECTORS sums stay in registers; per group one conversion and multiply-add into float sums
 * [rows of x][32] (L2).
 * Zero points are subtracted as integers (sums of the activations' words times zero), so nothing cancels in floats.
 * Largest sum: int8 code 128 * 32768 * 128 columns = 2^29; so is that of int4 codes times 16. */
#pragma once
#include "activations.h"

#define GEMM_ROWS 32
#define GEMV_TOKENS 8
#define BLOCK_STEPS 16 /* of two columns in each quarter of a block */

INLINE int64_t matrix_groups(const Matrix *m) { return (m->columns + m->group_size - 1) / m->group_size; }
INLINE int64_t row_bytes_of(const Matrix *m) { return m->columns * m->bits / 8; }
/* Where the codes of the tile lie that `row`, a multiple of 16, begins. */
INLINE const char *tile_codes(const Matrix *m, int64_t expert, int64_t row)
{
    return (const char *)m->codes + expert * m->expert_code_bytes + row * row_bytes_of(m);
}

/* What is added to a sum, so that codes stand around their zero: the activations' sum times minus the zero point. */
enum { NO_ZERO, SAME_ZERO, ZEROS };
INLINE int zero_kind_of(const Matrix *m) { return m->zeros ? ZEROS : m->bits == 4 ? SAME_ZERO : NO_ZERO; }

/* y of one row of x, 16 rows of W: bias, then the tensor's type; rows past the matrix are padding. */
INLINE void store_outputs(const Matrix *m, int64_t token, int64_t row0, v16f y)
{
    int64_t left = m->rows - row0;
    if (left <= 0) return;
    if (m->bias) {
        Rows bias = {(void *)m->bias, m->y.dtype, 0};
        y = f_add(y, row_load(&bias, 0, row0, m->rows));
    }
    int64_t at = token * m->y.stride + row0;
    if (left >= 16) store_at(m->y.data, m->y.dtype, at, y);
    else store_some(m->y.data, m->y.dtype, at, y, left);
}
