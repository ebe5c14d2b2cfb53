/* y = x W^T for int4 ("P16") and int8 weights: integer dot products, one float per group and output.
 *
 * A task is a tile of 32 rows of W, or several. Up to GEMV_TOKENS rows of activations go row by row of W, as codes lie in memory:
 *     lanes are columns; per block of 128 (one register of int4 codes) four shifts and masks, four int16 dot
 *     products per activation row, one conversion and one fused multiply-add by scale(weight) * scale(activation);
 *     a sum over lanes per row. About 6 + 6 instructions per 64 bytes, where memory takes as long as 25 would:
 *     meant to be limited by the read bandwidth; docs/cpu.md has what it reaches. A row's result does not depend
 *     on how many rows there are (a draft is checked by the same sums that decode without drafts).
 * More go through a tile:
 *     32 rows x 128 columns are unpacked and transposed once into int16 pairs (8 KiB, stays in L1); lanes are rows
 *     of W, an activation pair is broadcast from memory; GEMM_TOKENS x GEMM_VECTORS sums stay in registers; per
 *     group one conversion and multiply-add into float sums [rows of x][32] (L2). Unpacking costs about a quarter
 *     of the products of 16 rows.
 * Zero points are subtracted as integers (sums of the activations' words times zero), so nothing cancels in floats.
 * Largest sum: int8 code 128 * 32768 * 128 columns = 2^29. */
#pragma once
#include "activations.h"

#define TILE_ROWS 32
#define GEMV_TOKENS 8
#define GEMV_GROUP 4
#define PANEL_BLOCKS 32
#define GEMV_MOST_ROWS 64
/* Words of the tables for a group of 128 columns at most: one stream's factors and zeros for GEMV_MOST_ROWS (128), or
 * GEMV_GROUP streams' factors and the zeros for 16 rows (80). */
#define GEMV_TABLE_ROWS (2 * GEMV_MOST_ROWS)
/* Rows of up to so many bytes are read 64 at a time in place of 16: runs of 4 rows would be shorter than a page, and
 * two streams in one page are more than the processor's prefetcher follows (docs/cpu.md). */
#define SHORT_ROW_BYTES 1024

INLINE int64_t matrix_groups(const Matrix *m) { return (m->columns + m->group_size - 1) / m->group_size; }
/* Scales and zero points of so many rows, float32 at most. */
INLINE int64_t scale_words(int64_t groups, int64_t rows) { return 2 * groups * rows; }

/* What a dot product starts from, so that codes stand around their zero: the activations' sums times minus the zero
 * point. */
enum { NO_ZERO, SAME_ZERO, ZEROS };
INLINE int zero_kind_of(const Matrix *m) { return m->zeros ? ZEROS : m->bits == 4 ? SAME_ZERO : NO_ZERO; }
INLINE v16i dot_start(int zero_kind, const int32_t *lanes, const int32_t *zero)
{
    if (zero_kind == NO_ZERO) return i_zero();
    return zero_kind == SAME_ZERO ? i_load(lanes) : i_mul(i_load(lanes), i_set1(*zero));
}

INLINE void unpack_block(int bits, const char *p, v16i *w)
{
    const v16i mask = i_set1(0x000F000F);
    if (bits == 4) {
        v16i four = i_keep(i_load(p)); /* GCC would read the line four times, and the load buffers would be full */
        w[0] = i_and(four, mask), w[1] = i_and(w_srl(four, 4), mask);
        w[2] = i_and(w_srl(four, 8), mask), w[3] = w_srl(four, 12);
    } else {
        for (int i = 0; i < 4; i++) w[i] = w_load_bytes((const int8_t *)p + 32 * i);
    }
}

/* Where the codes lie that are wanted AHEAD_BYTES after those of `row`, in the order in which gemv_rows reads a run of
 * `run` rows: row after row of a panel, panel after panel, and then the first panel of the run that lies `rows` rows on
 * (past the last ones a prefetch asks for nothing that faults). */
#define AHEAD_BYTES 1024
INLINE const char *codes_ahead(const char *codes, int64_t row_bytes, int64_t panel_bytes, int64_t panel, int64_t row,
                               int64_t run, int64_t rows)
{
    const int64_t width = row_bytes < panel_bytes ? row_bytes : panel_bytes, steps = (AHEAD_BYTES + width - 1) / width;
    const int64_t ahead = row + (steps < run ? steps : run), next = panel + panel_bytes;
    if (ahead < run) return codes + ahead * row_bytes + panel;
    return codes + (ahead - run) * row_bytes + (next < row_bytes ? next : rows * row_bytes);
}

/* `rows` rows of W (16, or GEMV_MOST_ROWS) in `runs` runs that are read side by side (of 16 rows 0, 4, 8 and 12, then
 * 1, 5, 9 and 13, ...), times `group` rows of activations: sums[rows s + row] are the lanes of one product. Columns go
 * in panels, so that the activations of one (and the tables beside them) stay in L1 while the rows pass. factors
 * [block][part][stream][row], zeros [block][part][row].
 *
 * This loop must leave memory no time to wait; a line takes 6 to 7 ns to come, and 3 to 5 to be multiplied:
 * Each run is a stream of neighbouring lines, which the processor's own prefetchers follow, and its lines are asked for
 * a row or 1 KiB before they are used (one stream must ask for 4 KiB, and is slower). With a row of activations of one
 * plane a line of it is read once for all runs. Two chains of products per line: one would be 20 cycles long, and the
 * lines that wait for it fill the scheduler. Two sums in turn where a block has several groups, for the same reason. */
INLINE void gemv_rows(int bits, int zero_kind, int parts, int group, int runs, int64_t rows, const char *codes,
                      const Rounded *x, int64_t first, const float *factors, const int32_t *zeros, v16f *sums)
{
    const int64_t streams = x->rows * x->planes, blocks = x->blocks, block_bytes = bits == 4 ? 64 : 128;
    const int64_t panel_blocks = PANEL_BLOCKS / group, run = rows / runs;
    const int64_t row_bytes = blocks * block_bytes, panel_bytes = panel_blocks * block_bytes;
    for (int i = 0; i < rows * group; i++) sums[i] = f_zero();
    for (int64_t begin = 0; begin < blocks; begin += panel_blocks) {
        const int64_t end = begin + panel_blocks < blocks ? begin + panel_blocks : blocks;
        for (int64_t row = 0; row < run; row++) {
            const char *p = codes + row * row_bytes + begin * block_bytes;
            const char *ahead = codes_ahead(codes, row_bytes, panel_bytes, begin * block_bytes, row, run, rows);
            const int16_t *words = x->words + (begin * streams + first) * BLOCK;
            const int32_t *lanes = x->lanes + (begin * streams + first) * parts * 16,
                          *zero = zeros + begin * parts * rows + row;
            const float *factor = factors + begin * parts * group * rows + row;
            v16f y[4][GEMV_GROUP][2];
            for (int r = 0; r < runs; r++)
                for (int s = 0; s < group; s++) y[r][s][0] = sums[rows * s + row + r * run], y[r][s][1] = f_zero();
            for (int64_t block = begin; block < end; block++) {
                v16i held[4];
                if (runs == 4)
                    for (int i = 0; i < 4; i++) held[i] = i_keep(i_load(words + 32 * i));
#pragma GCC unroll 4
                for (int r = 0; r < runs; r++) {
                    v16i w[4];
                    unpack_block(bits, p + r * run * row_bytes, w);
                    for (int64_t line = 0; line < block_bytes; line += 64)
                        __builtin_prefetch(ahead + r * run * row_bytes + line);
                    for (int s = 0; s < group; s++)
                        for (int part = 0; part < parts; part++) {
                            v16i chains[2] = {
                                dot_start(zero_kind, lanes + (s * parts + part) * 16, zero + part * rows + r * run),
                                i_zero()};
                            for (int i = 4 / parts * part; i < 4 / parts * (part + 1); i++)
                                chains[parts < 4 && i % 2] =
                                    w_dot(chains[parts < 4 && i % 2], w[i],
                                          runs == 4 ? held[i] : i_load(words + s * BLOCK + 32 * i));
                            v16i sum = parts < 4 ? i_add(chains[0], chains[1]) : chains[0];
                            const v16f scale = f_set1(factor[(part * group + s) * rows + r * run]);
                            y[r][s][part % 2] = f_fma(f_from_i(sum), scale, y[r][s][part % 2]);
                        }
                }
                p += block_bytes, ahead += block_bytes;
                words += streams * BLOCK, lanes += streams * parts * 16;
                zero += parts * rows, factor += parts * group * rows;
            }
            for (int r = 0; r < runs; r++)
                for (int s = 0; s < group; s++)
                    sums[rows * s + row + r * run] = parts > 1 ? f_add(y[r][s][0], y[r][s][1]) : y[r][s][0];
        }
    }
}

#define GEMV_CASE(bits, zero_kind, parts, group, runs) \
    case bits * 1000 + zero_kind * 100 + parts * 10 + group: \
        if (rows * group <= GEMV_MOST_ROWS) /* 64 rows are there for one stream only */ \
            gemv_rows(bits, zero_kind, parts, group, runs, rows, codes, x, first, factors, zeros, sums); \
        break
#define GEMV_CASES(bits, zero_kind, parts) \
    GEMV_CASE(bits, zero_kind, parts, 1, GEMV_RUNS); \
    GEMV_CASE(bits, zero_kind, parts, 2, 2); \
    GEMV_CASE(bits, zero_kind, parts, 4, 1)

/* Scales and zero points of a task's rows, copied side by side: [group][rows] of the matrix's own type. In the matrix
 * the groups of a row are a whole column of rows apart, usually a multiple of 4096 bytes: one set of the L1 cache, a
 * page each. Taken 32 rows at a time, one cache line a group, they cost a quarter of the time of a matrix (4096 columns
 * of int4 by one core: 67 % of the read bandwidth with, 95 % without); so a task has as many rows as leave enough tasks
 * for the threads (`Matmul.task_tiles`). */
typedef struct {
    const char *scales, *zeros;
    int64_t rows;
} TaskScales;

static TaskScales gather_scales(const Matrix *m, int64_t scale_base, int64_t row0, int64_t rows, char *scratch)
{
    const int64_t size = element_bytes(m->scale_dtype), line = rows * size, groups = matrix_groups(m);
    char *scales = scratch, *zeros = scratch + groups * line;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t at = (scale_base + g * m->padded_rows + row0) * size;
        memcpy(scales + g * line, (const char *)m->scales + at, (size_t)line);
        if (m->zeros) memcpy(zeros + g * line, (const char *)m->zeros + at, (size_t)line);
    }
    return (TaskScales){scales, zeros, rows};
}

/* factors and zeros as gemv_rows reads them, for `rows` rows of the task from `at` on. */
INLINE void make_tables(int64_t dtype, const Matrix *m, TaskScales task, const Rounded *x, int64_t first, int group,
                        int64_t at, int64_t rows, float *factors, int32_t *zeros)
{
    const int64_t streams = x->rows * x->planes, part_columns = BLOCK / x->parts;
    const float *x_scales = x->scales + first;
    int64_t left = m->group_size;
    for (int64_t block = 0; block < x->blocks; block++, x_scales += streams)
        for (int64_t part = 0; part < x->parts; part++) {
            for (int64_t row = 0; row < rows; row += 16) {
                v16f scale = load_at(task.scales, dtype, at + row);
                for (int s = 0; s < group; s++) f_store(factors + s * rows + row, f_mul(scale, f_set1(x_scales[s])));
                if (m->zeros) i_store(zeros + row, i_from_f(load_at(task.zeros, dtype, at + row)));
            }
            factors += group * rows, zeros += rows;
            if ((left -= part_columns) == 0) at += task.rows, left = m->group_size;
        }
}

/* Products of streams first .. first + group - 1 with `rows` rows, row0 of the task on: y[s], or with 64 rows of a
 * single stream y[row / 16]. scratch: GEMV_TABLE_ROWS * blocks * parts words. */
INLINE void gemv_streams(const Matrix *m, const char *codes, TaskScales task, const Rounded *x, int64_t first,
                         int group, int64_t row0, int64_t rows, float *scratch, v16f *y)
{
    const int64_t parts = x->parts;
    float *factors = scratch;
    int32_t *zeros = (int32_t *)(scratch + x->blocks * parts * group * rows);
    if (m->scale_dtype == BFLOAT16 && group == 1)
        make_tables(BFLOAT16, m, task, x, first, 1, row0, rows, factors, zeros); /* most of decoding: memory waits */
    else make_tables(m->scale_dtype, m, task, x, first, group, row0, rows, factors, zeros);
    v16f sums[GEMV_MOST_ROWS]; /* 16 * GEMV_GROUP of several streams */
    const int zero_kind = zero_kind_of(m);
    switch (m->bits * 1000 + zero_kind * 100 + parts * 10 + group) {
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
    for (int i = 0; i < group * rows / 16; i++) y[i] = f_sum16(sums + 16 * i);
}

/* Functions of their own, so that the compiler lays out the loop of each by itself: together both were 5 % slower. */
static void gemv_16_rows(const Matrix *m, const char *codes, TaskScales task, const Rounded *x, int64_t first,
                         int group, int64_t row0, float *scratch, v16f *y)
{
    gemv_streams(m, codes, task, x, first, group, row0, 16, scratch, y);
}
static void gemv_most_rows(const Matrix *m, const char *codes, TaskScales task, const Rounded *x, int64_t first,
                           int64_t row0, float *scratch, v16f *y)
{
    gemv_streams(m, codes, task, x, first, 1, row0, GEMV_MOST_ROWS, scratch, y);
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

/* Rows first ... first + count - 1 of W, a multiple of 16 of them. */
static void gemv_task(const Matrix *m, int64_t expert, const Rounded *x, int64_t token0, int64_t tokens, int64_t first,
                      int64_t count, float *scratch)
{
    const int64_t row_bytes = x->blocks * (m->bits == 4 ? 64 : 128), streams = tokens * x->planes;
    const char *codes = (const char *)m->codes + expert * m->expert_code_bytes + first * row_bytes;
    for (int64_t row = 0; row < 16; row += 4) /* on their way while scales are fetched */
        for (int64_t at = 0; at < AHEAD_BYTES; at += 64) __builtin_prefetch(codes + row * row_bytes + at);
    TaskScales task = gather_scales(m, expert * m->expert_scales, first, count, (char *)scratch);
    scratch += scale_words(matrix_groups(m), count);
    int64_t row0 = 0;
    if (streams == 1 && row_bytes <= SHORT_ROW_BYTES)
        for (; count - row0 >= GEMV_MOST_ROWS; row0 += GEMV_MOST_ROWS) {
            v16f y[GEMV_MOST_ROWS / 16];
            gemv_most_rows(m, codes + row0 * row_bytes, task, x, token0, row0, scratch, y);
            for (int64_t i = 0; i < GEMV_MOST_ROWS / 16; i++) store_outputs(m, token0, first + row0 + 16 * i, y[i]);
        }
    for (; row0 < count; row0 += 16) {
        v16f y[2 * GEMV_TOKENS];
        for (int64_t s = 0; s < streams;) {
            int group = streams - s >= 4 ? 4 : streams - s >= 2 ? 2 : 1;
            gemv_16_rows(m, codes + row0 * row_bytes, task, x, token0 * x->planes + s, group, row0, scratch, y + s);
            s += group;
        }
        for (int64_t t = 0; t < tokens; t++)
            store_outputs(m, token0 + t, first + row0, x->planes == 1 ? y[t] : f_add(y[2 * t], y[2 * t + 1]));
    }
}

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

/* At most GEMM_CHUNK streams at a time, so that the float sums stay in L2. */
#define GEMM_CHUNK 1024
static void gemm_tile(const Matrix *m, int64_t expert, const Rounded *x, int64_t token0, int64_t tokens, int64_t row0,
                      float *scratch)
{
    const int64_t all = x->rows * x->planes, parts = x->parts;
    const int64_t vectors = m->padded_rows - row0 >= TILE_ROWS ? 2 : 1;
    const char *codes = (const char *)m->codes + expert * m->expert_code_bytes;
    int32_t *tile = (int32_t *)scratch;
    float *sums = scratch + 2 * 64 * 16;
    if (vectors < 2) memset(tile, 0, 2 * 64 * 16 * 4); /* both vectors are multiplied, one is stored */
    for (int64_t chunk = 0; chunk < tokens; chunk += GEMM_CHUNK / x->planes) {
        int64_t left = tokens - chunk, count = left < GEMM_CHUNK / x->planes ? left : GEMM_CHUNK / x->planes;
        int64_t first = (token0 + chunk) * x->planes, streams = count * x->planes;
        memset(sums, 0, (size_t)(streams * TILE_ROWS) * 4);
        for (int64_t block = 0; block < x->blocks; block++) {
            unpack_tile(m, codes, x->blocks, block, row0, vectors, tile);
            for (int64_t part = 0; part < parts; part++) {
                int64_t group = (block * BLOCK + part * (BLOCK / parts)) / m->group_size;
                int64_t at = expert * m->expert_scales + group * m->padded_rows + row0;
                v16f scales[2] = {load_at(m->scales, m->scale_dtype, at), f_zero()};
                v16i zeros[2] = {i_zero(), i_zero()};
                if (m->zeros) zeros[0] = i_from_f(load_at(m->zeros, m->scale_dtype, at));
                if (vectors == 2) {
                    scales[1] = load_at(m->scales, m->scale_dtype, at + 16);
                    if (m->zeros) zeros[1] = i_from_f(load_at(m->zeros, m->scale_dtype, at + 16));
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
