/* y = x W^T for float matrices of few rows of x (lm_head, routers, the small projections of Gated DeltaNet).
 *
 * Lanes are columns, four float sums per row of W and of x (columns 16 i of i = 0, 1, 2, 3 mod 4), joined pairwise:
 * the order does not depend on the number of rows. x must be float32. bfloat16 costs one conversion and one
 * multiply-add per 16 weights, far below what memory takes. */
#pragma once
#include "ahead.h"
#include "matmul.h"

#define DENSE_STREAMS 4
#define DENSE_AHEAD_BYTES (AHEAD_CACHE == 2 ? 8192 : 1024) /* one stream; to be in L2 it must be asked for early */

INLINE void dense_row(int64_t dtype, int group, const Matrix *m, const char *codes, const Rows *x, int64_t first,
                      int64_t row, v16f *sums)
{
    v16f y[DENSE_STREAMS][4];
    const char *w = codes + row * m->columns * element_bytes(dtype);
    for (int s = 0; s < group; s++)
        for (int i = 0; i < 4; i++) y[s][i] = f_zero();
    int64_t column = 0;
    for (; column + 64 <= m->columns; column += 64) {
        for (int64_t line = 0; line < 64 * element_bytes(dtype); line += 64)
            ask_for(w + column * element_bytes(dtype) + line + DENSE_AHEAD_BYTES);
        for (int i = 0; i < 4; i++) {
            v16f weights = load_at(w, dtype, column + 16 * i);
            for (int s = 0; s < group; s++) {
                const float *at = (const float *)x->data + (first + s) * x->stride + column + 16 * i;
                y[s][i] = f_fma(weights, f_load(at), y[s][i]);
            }
        }
    }
    for (int i = 0; column < m->columns; column += 16, i++) {
        int64_t count = m->columns - column < 16 ? m->columns - column : 16;
        v16f weights = load_some(w, dtype, column, count);
        for (int s = 0; s < group; s++)
            y[s][i] = f_fma(weights, load_some(x->data, FLOAT32, (first + s) * x->stride + column, count), y[s][i]);
    }
    for (int s = 0; s < group; s++) sums[16 * s] = f_add(f_add(y[s][0], y[s][1]), f_add(y[s][2], y[s][3]));
}

#define DENSE_CASE(dtype, group) \
    case dtype * 10 + group: \
        for (int64_t r = 0; r < rows; r++) dense_row(dtype, group, m, codes, x, token, row0 + r, sums + r); \
        break
#define DENSE_CASES(dtype) \
    DENSE_CASE(dtype, 1); \
    DENSE_CASE(dtype, 2); \
    DENSE_CASE(dtype, 4)

/* Up to GEMM_ROWS rows from `row0` on, and none from `end` on. */
static void dense_rows(const Matrix *m, int64_t expert, const Rows *x, int64_t token0, int64_t tokens, int64_t row0,
                       int64_t end)
{
    const char *codes = (const char *)m->codes + expert * m->expert_code_bytes;
    const int64_t tile = row0 + GEMM_ROWS < end ? row0 + GEMM_ROWS : end, last = tile < m->rows ? tile : m->rows;
    for (; row0 < last; row0 += 16) {
        int64_t rows = last - row0 < 16 ? last - row0 : 16;
        for (int64_t token = token0; token < token0 + tokens;) {
            int64_t left = token0 + tokens - token;
            int group = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            v16f sums[16 * DENSE_STREAMS];
            for (int i = 0; i < 16 * DENSE_STREAMS; i++) sums[i] = f_zero();
            switch (m->code_dtype * 10 + group) {
                DENSE_CASES(FLOAT32);
                DENSE_CASES(BFLOAT16);
                DENSE_CASES(FLOAT16);
            }
            for (int s = 0; s < group; s++) store_outputs(m, token + s, row0, f_sum16(sums + 16 * s));
            token += group;
        }
    }
}
