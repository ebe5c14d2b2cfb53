/* y = x W^T for int4 ("P16") and int8 weights: integer dot products, one float per group and output.
 *
 * A task is a tile of 32 rows of W, or several. Up to GEMV_TOKENS rows of activations go row by row of W, as codes lie
 * in memory (gemv.h, block.h):
 *     lanes are columns; per block of 128 (one register of int4 codes) four shifts and masks, four int16 dot
 *     products per activation row, one conversion and one fused multiply-add by scale(weight) * scale(activation);
 *     a sum over lanes per row. About 6 + 6 instructions per 64 bytes, where memory takes as long as 25 would:
 *     meant to be limited by the read bandwidth; docs/cpu.md has what it reaches. A row's result does not depend
 *     on how many rows there are (a draft is checked by the same sums that decode without drafts).
 * More go through a tile (gemm.h):
 *     32 rows x 128 columns are unpacked and transposed once into int16 pairs (8 KiB, stays in L1); lanes are rows
 *     of W, an activation pair is broadcast from memory; GEMM_TOKENS x GEMM_VECTORS sums stay in registers; per
 *     group one conversion and multiply-add into float sums [rows of x][32] (L2). Unpacking costs about a quarter
 *     of the products of 16 rows.
 * Zero points are subtracted as integers (sums of the activations' words times zero), so nothing cancels in floats.
 * Largest sum: int8 code 128 * 32768 * 128 columns = 2^29. A row's scales are neighbours ([rows][groups]): they come
 * with the codes, as one more stream; a column of rows apart, each in a page of its own, they were a fifth of the time
 * of groups of 32. */
#pragma once
#include "activations.h"

#define TILE_ROWS 32
#define GEMV_TOKENS 8

INLINE int64_t matrix_groups(const Matrix *m) { return (m->columns + m->group_size - 1) / m->group_size; }
/* Scales come in registers of 16 neighbours. */
INLINE int64_t chunks_of(int64_t scales) { return (scales + 15) / 16; }

/* What a dot product starts from, so that codes stand around their zero: the activations' sums times minus the zero
 * point. */
enum { NO_ZERO, SAME_ZERO, ZEROS };
INLINE int zero_kind_of(const Matrix *m) { return m->zeros ? ZEROS : m->bits == 4 ? SAME_ZERO : NO_ZERO; }

/* Sixteen scales (or zero points) from `at` on, nothing read behind `end`. */
INLINE v16f load_scales(const void *scales, int64_t dtype, int64_t at, int64_t end)
{
    return at + 16 <= end ? load_at(scales, dtype, at) : load_some(scales, dtype, at, end - at);
}

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
