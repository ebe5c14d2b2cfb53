/* Many rows of activations times a matrix, by tiles of GEMM_ROWS rows unpacked once (matmul.h). */
#pragma once
#include "gemv.h"

/* 32 rows x one block as pairs of int16: tile[group of GEMM_VECTORS][step of two columns][vector][row]. */
static void unpack_tile(const Matrix *m, const char *codes, int64_t block, int64_t vectors, int32_t *tile)
{
    const v16i mask = i_set1(0x000F000F);
    const int64_t step_bytes = 16 * m->bits, block_bytes = BLOCK_STEPS * step_bytes;
    for (int64_t v = 0; v < vectors; v++) {
        int32_t *out = tile + v / GEMM_VECTORS * GEMM_VECTORS * 64 * 16 + v % GEMM_VECTORS * 16;
        const char *p = codes + v * 16 * row_bytes_of(m) + block * block_bytes;
        for (int step = 0; step < BLOCK_STEPS; step++, p += step_bytes) {
            v16i w[4];
            for (int64_t line = 0; line < step_bytes; line += 64) __builtin_prefetch(p + 2 * block_bytes + line);
            if (m->bits == 4) {
                const v16i four = i_keep(i_load(p));
                w[0] = i_and(four, mask), w[1] = i_and(w_srl(four, 4), mask);
                w[2] = i_and(w_srl(four, 8), mask), w[3] = w_srl(four, 12);
            } else unpack_step(8, p, w);
            for (int j = 0; j < 4; j++) i_store(out + (BLOCK_STEPS * j + step) * 16 * GEMM_VECTORS, w[j]);
        }
    }
}

/* `count` streams x GEMM_VECTORS * 16 rows over `steps` pairs of columns, then into the float sums. */
INLINE void gemm_part(int zero_kind, int count, int64_t steps, const int32_t *tile, const int16_t *words,
                      const int32_t *word_sums, const v16i *zeros, const v16f *scales, const float *x_scales,
                      float *sums)
{
    v16i acc[GEMM_TOKENS][GEMM_VECTORS];
#pragma GCC unroll 12
    for (int s = 0; s < count; s++)
#pragma GCC unroll 2
        for (int v = 0; v < GEMM_VECTORS; v++)
            acc[s][v] = zero_kind == NO_ZERO     ? i_zero()
                        : zero_kind == SAME_ZERO ? i_set1(word_sums[s])
                                                 : i_mul(i_set1(word_sums[s]), zeros[v]);
    for (int64_t step = 0; step < steps; step++) {
        if (step % 16 == 0) /* a cache line of each activation row that comes next: they stream from L2 */
#pragma GCC unroll 12
            for (int s = 0; s < count; s++) __builtin_prefetch(words + (s + count) * BLOCK + 2 * step);
        v16i w[GEMM_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < GEMM_VECTORS; v++) w[v] = i_load(tile + (step * GEMM_VECTORS + v) * 16);
#pragma GCC unroll 12
        for (int s = 0; s < count; s++) {
            int32_t pair;
            memcpy(&pair, words + s * BLOCK + 2 * step, 4);
            v16i x = i_set1(pair);
#pragma GCC unroll 2
            for (int v = 0; v < GEMM_VECTORS; v++) w_dot(&acc[s][v], w[v], x);
        }
    }
#pragma GCC unroll 12
    for (int s = 0; s < count; s++)
#pragma GCC unroll 2
        for (int v = 0; v < GEMM_VECTORS; v++) {
            float *y = sums + s * GEMM_ROWS + 16 * v;
            f_store(y, f_fma(f_from_i(acc[s][v]), f_mul(scales[v], f_set1(x_scales[s])), f_load(y)));
        }
}

#define GEMM_CASE(count) \
    while (streams - s >= count) { \
        gemm_part(zero_kind, count, steps, tile, words + s * BLOCK, word_sums + s, zeros, scales, x_scales + s, \
                  sums + s * GEMM_ROWS); \
        s += count; \
    }
INLINE void gemm_streams(int zero_kind, int64_t streams, int64_t steps, const int32_t *tile, const int16_t *words,
                         const int32_t *word_sums, const v16i *zeros, const v16f *scales, const float *x_scales,
                         float *sums)
{
    int64_t s = 0;
    GEMM_CASE(GEMM_TOKENS)
#if GEMM_TOKENS > 8
    GEMM_CASE(8)
#endif
#if GEMM_TOKENS > 4
    GEMM_CASE(4)
#endif
    GEMM_CASE(2)
    GEMM_CASE(1)
}

static void gemm_by_zero(int zero_kind, int64_t streams, int64_t steps, const int32_t *tile, const int16_t *words,
                         const int32_t *word_sums, const v16i *zeros, const v16f *scales, const float *x_scales,
                         float *sums)
{
    if (zero_kind == NO_ZERO)
        gemm_streams(NO_ZERO, streams, steps, tile, words, word_sums, zeros, scales, x_scales, sums);
    else if (zero_kind == SAME_ZERO)
        gemm_streams(SAME_ZERO, streams, steps, tile, words, word_sums, zeros, scales, x_scales, sums);
    else gemm_streams(ZEROS, streams, steps, tile, words, word_sums, zeros, scales, x_scales, sums);
}

/* At most GEMM_CHUNK streams at a time, so that the float sums stay in L2. */
#define GEMM_CHUNK 1024
static void gemm_tile(const Matrix *m, int64_t expert, const Rounded *x, int64_t token0, int64_t tokens, int64_t row0,
                      float *scratch)
{
    const int64_t all = x->rows * x->planes, parts = x->parts;
    const int64_t vectors = m->padded_rows - row0 >= GEMM_ROWS ? 2 : 1;
    const char *codes = tile_codes(m, expert, row0);
    int32_t *tile = (int32_t *)scratch;
    float *sums = scratch + 2 * 64 * 16;
    const int64_t groups = matrix_groups(m), at = expert * m->expert_scales + row0 * groups;
    if (vectors < 2) memset(tile, 0, 2 * 64 * 16 * 4); /* both vectors are multiplied, one is stored */
    for (int64_t chunk = 0; chunk < tokens; chunk += GEMM_CHUNK / x->planes) {
        int64_t left = tokens - chunk, count = left < GEMM_CHUNK / x->planes ? left : GEMM_CHUNK / x->planes;
        int64_t first = (token0 + chunk) * x->planes, streams = count * x->planes;
        memset(sums, 0, (size_t)(streams * GEMM_ROWS) * 4);
        for (int64_t block = 0; block < x->blocks; block++) {
            unpack_tile(m, codes, block, vectors, tile);
            for (int64_t part = 0; part < parts; part++) {
                int64_t group = (block * BLOCK + part * (BLOCK / parts)) / m->group_size;
                v16f scales[2] = {f_zero(), f_zero()};
                v16i zeros[2] = {i_zero(), i_zero()};
                for (int64_t v = 0; v < vectors; v++) {
                    const int64_t i = at + (v * groups + group) * 16;
                    scales[v] = load_at(m->scales, m->scale_dtype, i);
                    if (m->zeros) zeros[v] = i_from_f(load_at(m->zeros, m->scale_dtype, i));
                }
                for (int64_t v = 0; v < vectors; v += GEMM_VECTORS)
                    gemm_by_zero(zero_kind_of(m), streams, 64 / parts,
                                 tile + v * 64 * 16 + part * (64 / parts) * GEMM_VECTORS * 16,
                                 x->words + (block * all + first) * BLOCK + part * (BLOCK / parts),
                                 x->sums + (block * parts + part) * all + first, zeros + v, scales + v,
                                 x->scales + block * all + first, sums + 16 * v);
            }
        }
        for (int64_t t = 0; t < count; t++)
            for (int64_t v = 0; v < vectors; v++) {
                const float *y = sums + t * x->planes * GEMM_ROWS + 16 * v;
                v16f sum = f_load(y);
                if (x->planes == 2) sum = f_add(sum, f_load(y + GEMM_ROWS));
                store_outputs(m, token0 + chunk + t, row0 + 16 * v, sum);
            }
    }
}
