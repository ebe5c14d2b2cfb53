/* Up to GEMV_TOKENS rows of activations times a matrix, tile by tile of it, as fast as its bytes come (matmul.h). */
#pragma once
#include "ahead.h"
#include "matmul.h"

/* Scales are asked for as many blocks before they are used as codes are, or some more. */
#define SCALES_AHEAD_BLOCKS 8

/* A step of a block in 16 rows: w[j] holds columns 32 j + 2 step and the next one, as pairs of int16; of int4 those of
 * odd j stay where they are in their byte, 16 times too large: two shifts less, `sum_of_part` makes up for it. */
INLINE void unpack_step(int bits, const char *p, v16i *w)
{
    if (bits == 4) {
        const v16i even = i_set1(0x000F000F), odd = i_set1(0x00F000F0);
        const v16i low = i_keep(i_load(p)), high = w_srl(low, 8); /* GCC would read the line for every use of it */
        w[0] = i_and(low, even), w[1] = i_and(low, odd), w[2] = i_and(high, even), w[3] = i_and(high, odd);
        return;
    }
    for (int line = 0; line < 2; line++) {
        const v16i bytes = i_keep(i_load(p + 64 * line));
        w[2 * line] = w_sra(w_sll(bytes, 8), 8), w[2 * line + 1] = w_sra(bytes, 8);
    }
}

/* What the four sums of a block come to for the columns of one part of it. */
INLINE v16i sum_of_part(int bits, int parts, int part, const v16i *sums)
{
    v16i even = i_zero(), odd = i_zero();
    for (int j = 4 / parts * part; j < 4 / parts * (part + 1); j++)
        if (j % 2) odd = i_add(odd, sums[j]);
        else even = i_add(even, sums[j]);
    return i_add(even, bits == 4 ? i_sra(odd, 4) : odd);
}

/* 16 scales or zero points: bfloat16 is asked for by itself, for it is what files have, and no question at all is asked
 * between two blocks then. */
INLINE v16f scales_at(int dtype, const void *scales, int64_t other, int64_t i)
{
    return dtype == BFLOAT16 ? bf16_load((const uint16_t *)scales + i) : load_at(scales, other, i);
}

/* 16 rows of W from the tile `codes` on, whose scales begin at `at`, times `group` streams of activations from `first`
 * on: y[stream]. Four sums a stream: one would be 5 cycles from product to product. The codes of a matrix are one
 * stream of neighbouring lines, tile after tile, asked for AHEAD_BYTES before they are used. */
INLINE void gemv_tile(int bits, int zero_kind, int parts, int group, int dtype, const Matrix *m, const Rounded *x,
                      int64_t first, const char *codes, int64_t at, v16f *y)
{
    const int64_t blocks = x->blocks, streams = x->rows * x->planes, step_bytes = 16 * bits;
    const int64_t group_parts = m->group_size / (BLOCK / parts), other = m->scale_dtype;
    const int64_t ahead = 16 * parts * SCALES_AHEAD_BLOCKS, scale_bytes = dtype == BFLOAT16 ? 2 : element_bytes(other);
    const char *scales = m->scales, *zeros = m->zeros;
    const int16_t *words = x->words + first * BLOCK;
    const int32_t *minus = x->sums + first;
    const float *units = x->scales + first;
    v16f total[GEMV_GROUP];
#pragma GCC unroll 4
    for (int s = 0; s < group; s++) total[s] = f_zero();
    for (int64_t block = 0, left = group_parts; block < blocks; block++) {
        v16i sums[GEMV_GROUP][4];
#pragma GCC unroll 4
        for (int s = 0; s < group; s++)
            for (int j = 0; j < 4; j++) sums[s][j] = i_zero();
#pragma GCC unroll 2
        for (int step = 0; step < BLOCK_STEPS; step++, codes += step_bytes) {
            v16i w[4];
            unpack_step(bits, codes, w);
            for (int64_t line = 0; line < step_bytes; line += 64) ask_for(codes + AHEAD_BYTES + line);
#pragma GCC unroll 4
            for (int s = 0; s < group; s++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    int32_t pair;
                    memcpy(&pair, words + s * BLOCK + 32 * j + 2 * step, 4);
                    w_dot(&sums[s][j], w[j], i_set1(pair));
                }
        }
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            const v16f scale = scales_at(dtype, scales, other, at);
            const v16i zero = zero_kind == ZEROS ? i_from_f(scales_at(dtype, zeros, other, at)) : i_zero();
            ask_for(scales + (at + ahead) * scale_bytes);
            if (zero_kind == ZEROS) ask_for(zeros + (at + ahead) * scale_bytes);
#pragma GCC unroll 4
            for (int s = 0; s < group; s++) {
                v16i sum = sum_of_part(bits, parts, part, sums[s]);
                if (zero_kind == SAME_ZERO) sum = i_add(sum, i_set1(minus[part * streams + s]));
                if (zero_kind == ZEROS) sum = i_add(sum, i_mul(i_set1(minus[part * streams + s]), zero));
                total[s] = f_fma(f_from_i(sum), f_mul(scale, f_set1(units[s])), total[s]);
            }
            if (--left == 0) at += 16, left = group_parts;
        }
        words += streams * BLOCK, minus += streams * parts, units += streams;
    }
#pragma GCC unroll 4
    for (int s = 0; s < group; s++) y[s] = total[s];
}

#define GEMV_CASE(bits, zero_kind, parts, group) \
    case bits * 1000 + zero_kind * 100 + parts * 10 + group: \
        gemv_tile(bits, zero_kind, parts, group, dtype, m, x, first, codes, at, y); \
        break
#if GEMV_GROUP > 1
#define GEMV_CASES(bits, zero_kind, parts) \
    GEMV_CASE(bits, zero_kind, parts, 1); \
    GEMV_CASE(bits, zero_kind, parts, 2); \
    GEMV_CASE(bits, zero_kind, parts, 4)
#else
#define GEMV_CASES(bits, zero_kind, parts) GEMV_CASE(bits, zero_kind, parts, 1)
#endif

INLINE void gemv_streams(int dtype, const Matrix *m, const Rounded *x, int64_t first, int group, const char *codes,
                         int64_t at, v16f *y)
{
    switch (m->bits * 1000 + zero_kind_of(m) * 100 + x->parts * 10 + group) {
        GEMV_CASES(4, SAME_ZERO, 1);
        GEMV_CASES(4, SAME_ZERO, 2);
        GEMV_CASES(4, SAME_ZERO, 4);
        GEMV_CASES(4, ZEROS, 1);
        GEMV_CASES(4, ZEROS, 2);
        GEMV_CASES(4, ZEROS, 4);
        GEMV_CASES(8, NO_ZERO, 1);
        GEMV_CASES(8, NO_ZERO, 2);
        GEMV_CASES(8, NO_ZERO, 4);
        GEMV_CASES(8, ZEROS, 1);
        GEMV_CASES(8, ZEROS, 2);
        GEMV_CASES(8, ZEROS, 4);
    }
}
static void gemv_bfloat16(const Matrix *m, const Rounded *x, int64_t first, int group, const char *codes, int64_t at,
                          v16f *y)
{
    gemv_streams(BFLOAT16, m, x, first, group, codes, at, y);
}
static void gemv_other(const Matrix *m, const Rounded *x, int64_t first, int group, const char *codes, int64_t at,
                       v16f *y)
{
    gemv_streams(FLOAT32, m, x, first, group, codes, at, y);
}

/* Rows first ... first + count - 1 of W, a multiple of 16 of them. */
static void gemv_task(const Matrix *m, int64_t expert, const Rounded *x, int64_t token0, int64_t tokens, int64_t first,
                      int64_t count)
{
    const int64_t streams = tokens * x->planes, row_scales = matrix_groups(m);
    const char *codes = tile_codes(m, expert, first);
    int64_t at = expert * m->expert_scales + first * row_scales;
    for (int64_t line = 0; line < AHEAD_BYTES; line += 64) ask_for(codes + line);
    for (int64_t row = first; row < first + count; row += 16) {
        v16f y[2 * GEMV_TOKENS];
        for (int64_t s = 0; s < streams;) {
            const int64_t left = streams - s;
            const int group = left >= 4 && GEMV_GROUP >= 4 ? 4 : left >= 2 && GEMV_GROUP >= 2 ? 2 : 1;
            (m->scale_dtype == BFLOAT16 ? gemv_bfloat16 : gemv_other)(m, x, token0 * x->planes + s, group, codes, at, y + s);
            s += group;
        }
        for (int64_t t = 0; t < tokens; t++)
            store_outputs(m, token0 + t, row, x->planes == 1 ? y[t] : f_add(y[2 * t], y[2 * t + 1]));
        codes += 16 * row_bytes_of(m), at += 16 * row_scales;
    }
}
