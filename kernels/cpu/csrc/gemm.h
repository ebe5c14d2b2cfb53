/* Many rows of activations times a matrix, by tiles of TILE_ROWS rows unpacked once (matmul.h). */
#pragma once
#include "matmul.h"

/* 32 rows x one block as pairs of int16: tile[group of GEMM_VECTORS][step of two columns][vector][row]. */
static void unpack_tile(const Matrix *m, const char *codes, int64_t blocks, int64_t block, int64_t row0,
                        int64_t vectors, int32_t *tile)
{
    const v16i mask = i_set1(0x000F000F);
    for (int64_t v = 0; v < vectors; v++) {
        int32_t *out = tile + v / GEMM_VECTORS * GEMM_VECTORS * 64 * 16 + v % GEMM_VECTORS * 16;
        const int64_t step = 16 * GEMM_VECTORS;
        v16i t[16];
        if (m->bits == 4) {
            const char *p = codes + ((row0 + 16 * v) * blocks + block) * 64;
            for (int r = 0; r < 16; r++)
                t[r] = i_load(p + r * blocks * 64), __builtin_prefetch(p + r * blocks * 64 + 128);
            transpose16(t);
            for (int d = 0; d < 16; d++) {
                i_store(out + d * step, i_and(t[d], mask));
                i_store(out + (16 + d) * step, i_and(w_srl(t[d], 4), mask));
                i_store(out + (32 + d) * step, i_and(w_srl(t[d], 8), mask));
                i_store(out + (48 + d) * step, w_srl(t[d], 12));
            }
        } else {
            const char *p = codes + ((row0 + 16 * v) * blocks + block) * 128;
            for (int i = 0; i < 4; i++) {
                for (int r = 0; r < 16; r++) t[r] = w_load_bytes((const int8_t *)p + r * blocks * 128 + 32 * i);
                transpose16(t);
                for (int d = 0; d < 16; d++) i_store(out + (16 * i + d) * step, t[d]);
            }
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
            for (int v = 0; v < GEMM_VECTORS; v++) acc[s][v] = w_dot(acc[s][v], w[v], x);
        }
    }
#pragma GCC unroll 12
    for (int s = 0; s < count; s++)
#pragma GCC unroll 2
        for (int v = 0; v < GEMM_VECTORS; v++) {
            float *y = sums + s * TILE_ROWS + 16 * v;
            f_store(y, f_fma(f_from_i(acc[s][v]), f_mul(scales[v], f_set1(x_scales[s])), f_load(y)));
        }
}

#define GEMM_CASE(count) \
    while (streams - s >= count) { \
        gemm_part(zero_kind, count, steps, tile, words + s * BLOCK, word_sums + s, zeros, scales, x_scales + s, \
                  sums + s * TILE_ROWS); \
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

/* Scales and zero points of TILE_ROWS rows as lanes: [chunks of 16 groups][row], zeros behind all scales. */
static void tile_scales(const Matrix *m, int64_t at, int64_t end, int64_t vectors, float *table)
{
    const int64_t groups = matrix_groups(m), chunks = chunks_of(groups);
    int32_t *zeros = (int32_t *)table + chunks * 16 * TILE_ROWS;
    for (int64_t v = 0; v < vectors; v++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            v16i scale[16], zero[16];
            for (int64_t r = 0; r < 16; r++) {
                const int64_t i = at + (16 * v + r) * groups + 16 * chunk;
                scale[r] = i_bits(load_scales(m->scales, m->scale_dtype, i, end));
                if (m->zeros) zero[r] = i_from_f(load_scales(m->zeros, m->scale_dtype, i, end));
            }
            transpose16(scale);
            if (m->zeros) transpose16(zero);
            for (int64_t g = 0; g < 16; g++) {
                const int64_t to = (16 * chunk + g) * TILE_ROWS + 16 * v;
                i_store((int32_t *)table + to, scale[g]);
                if (m->zeros) i_store(zeros + to, zero[g]);
            }
        }
}
INLINE int64_t tile_scale_words(const Matrix *m) { return 2 * chunks_of(matrix_groups(m)) * 16 * TILE_ROWS; }

/* At most GEMM_CHUNK streams at a time, so that the float sums stay in L2. */
#define GEMM_CHUNK 1024
static void gemm_tile(const Matrix *m, int64_t expert, const Rounded *x, int64_t token0, int64_t tokens, int64_t row0,
                      float *scratch)
{
    const int64_t all = x->rows * x->planes, parts = x->parts;
    const int64_t vectors = m->padded_rows - row0 >= TILE_ROWS ? 2 : 1;
    const char *codes = (const char *)m->codes + expert * m->expert_code_bytes;
    int32_t *tile = (int32_t *)scratch;
    float *table = scratch + 2 * 64 * 16, *sums = table + tile_scale_words(m);
    const int32_t *zero_table = (int32_t *)table + tile_scale_words(m) / 2;
    const int64_t scale_at = expert * m->expert_scales, groups = matrix_groups(m);
    tile_scales(m, scale_at + row0 * groups, scale_at + m->padded_rows * groups, vectors, table);
    if (vectors < 2) memset(tile, 0, 2 * 64 * 16 * 4); /* both vectors are multiplied, one is stored */
    for (int64_t chunk = 0; chunk < tokens; chunk += GEMM_CHUNK / x->planes) {
        int64_t left = tokens - chunk, count = left < GEMM_CHUNK / x->planes ? left : GEMM_CHUNK / x->planes;
        int64_t first = (token0 + chunk) * x->planes, streams = count * x->planes;
        memset(sums, 0, (size_t)(streams * TILE_ROWS) * 4);
        for (int64_t block = 0; block < x->blocks; block++) {
            unpack_tile(m, codes, x->blocks, block, row0, vectors, tile);
            for (int64_t part = 0; part < parts; part++) {
                int64_t group = (block * BLOCK + part * (BLOCK / parts)) / m->group_size;
                v16f scales[2] = {f_load(table + group * TILE_ROWS), f_zero()};
                v16i zeros[2] = {i_zero(), i_zero()};
                if (m->zeros) zeros[0] = i_load(zero_table + group * TILE_ROWS);
                if (vectors == 2) {
                    scales[1] = f_load(table + group * TILE_ROWS + 16);
                    if (m->zeros) zeros[1] = i_load(zero_table + group * TILE_ROWS + 16);
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
                const float *y = sums + t * x->planes * TILE_ROWS + 16 * v;
                v16f sum = f_load(y);
                if (x->planes == 2) sum = f_add(sum, f_load(y + TILE_ROWS));
                store_outputs(m, token0 + chunk + t, row0 + 16 * v, sum);
            }
    }
}
