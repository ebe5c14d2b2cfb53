/* Up to GEMV_TOKENS rows of activations times a matrix, row by row of it, as fast as its bytes come (matmul.h). */
#pragma once
#include "block.h"

#define GEMV_MOST_FACTORS 8
#define GEMV_MOST_ROWS 64
/* Rows of up to so many bytes are read 64 at a time in place of 16: runs of 4 rows would be shorter than a page, and
 * two streams in one page are more than the processor's prefetcher follows (docs/cpu.md). */
#define SHORT_ROW_BYTES 1024

/* Where the codes lie that are wanted AHEAD_BYTES after those of `row`, in the order in which gemv_rows reads a run of
 * `run` rows: row after row of a panel, panel after panel, and then the first panel of the run that lies `rows` rows on
 * (past the last ones a prefetch asks for nothing that faults). */
INLINE const char *codes_ahead(const char *codes, int64_t row_bytes, int64_t panel_bytes, int64_t panel, int64_t row,
                               int64_t run, int64_t rows)
{
    const int64_t width = row_bytes < panel_bytes ? row_bytes : panel_bytes, steps = (AHEAD_BYTES + width - 1) / width;
    const int64_t ahead = row + (steps < run ? steps : run), next = panel + panel_bytes;
    if (ahead < run) return codes + ahead * row_bytes + panel;
    return codes + (ahead - run) * row_bytes + (next < row_bytes ? next : rows * row_bytes);
}

/* The scales of a row by blocks, where each stands for `group_blocks` of them: 16 from block 16 `chunk` on. */
static v16f spread_scales(const void *scales, int64_t dtype, int64_t at, int64_t end, int64_t chunk,
                          int64_t group_blocks)
{
    int64_t group = 16 * chunk / group_blocks, left = group_blocks - 16 * chunk % group_blocks;
    float lanes[16], values[16];
    f_store(values, load_scales(scales, dtype, at + group, end));
    for (int64_t l = 0, i = 0; l < 16; l++) {
        lanes[l] = values[i];
        if (--left == 0) i++, left = group_blocks;
    }
    return f_load(lanes);
}

/* A task of gemv: some rows of a matrix, whose scales end at `end`, and up to 2 * GEMV_TOKENS streams of activations
 * from `first` on. times: what scales are multiplied by, [stream][words], the activations' scales; and behind them what
 * zero points are. floats: room for the scales and zero points of GEMV_MOST_ROWS rows. */
typedef struct {
    const Matrix *m;
    const Rounded *x;
    int64_t first, streams, groups, end, words;
    float *times, *floats;
} Gemv;
#define GEMV_SCRATCH_ROWS (2 * GEMV_TOKENS + 1 + 2 * GEMV_MOST_ROWS)
INLINE int64_t times_words(const Rounded *x) { return 16 * chunks_of(x->blocks * x->parts); }

static void find_times(const Gemv *t)
{
    const int64_t all = t->x->rows * t->x->planes, parts = t->x->parts;
    const int stay = CODES_STAY(t->m->bits, parts);
    float *steps = t->times + t->streams * t->words;
    memset(t->times, 0, (size_t)((t->streams + 1) * t->words) * 4);
    for (int64_t block = 0; block < t->x->blocks; block++)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t i = block * parts + part;
            steps[i] = stay ? (float)CODE_STEPS[part] : 1;
            for (int64_t s = 0; s < t->streams; s++)
                t->times[s * t->words + i] = t->x->scales[block * all + t->first + s] / steps[i];
        }
    if (t->x->blocks * parts == 8) /* for rows in pairs */
        for (int64_t s = 0; s <= t->streams; s++) memcpy(t->times + s * t->words + 8, t->times + s * t->words, 8 * 4);
}

/* The two types that gemv_rows reads; others are copied as floats, for every branch here is there many times. */
INLINE v16f scale_at(const void *scales, int64_t dtype, int64_t i)
{
    return dtype == BFLOAT16 ? bf16_load((const uint16_t *)scales + i) : f_load((const float *)scales + i);
}

/* Scales and zero points of some rows, each row `stride` elements after the other, whole registers of them. */
typedef struct {
    const void *scales, *zeros;
    int64_t dtype, stride;
} RowScales;

INLINE int lie_whole(const Gemv *t, int64_t at, int64_t rows)
{
    const int64_t behind = at + (rows - 1) * t->groups + t->words;
    return t->m->scale_dtype != FLOAT16 && t->m->group_size <= BLOCK && behind <= t->end;
}
INLINE RowScales scales_as_stored(const Gemv *t, int64_t at)
{
    const int64_t bytes = at * element_bytes(t->m->scale_dtype);
    return (RowScales){(const char *)t->m->scales + bytes, t->m->zeros ? (const char *)t->m->zeros + bytes : NULL,
                       t->m->scale_dtype, t->groups};
}
static void copy_as_floats(const Gemv *t, const void *scales, int64_t at, int64_t rows, float *out)
{
    const int64_t dtype = t->m->scale_dtype, group_blocks = t->m->group_size / BLOCK;
    for (int64_t row = 0; row < rows; row++, at += t->groups) {
        const v16f only = t->groups == 1 ? f_set1(load_one(scales, dtype, at)) : f_zero();
        ask_for((const char *)scales + (at + rows * t->groups) * element_bytes(dtype));
        for (int64_t i = 0; i < t->words; i += 16, out += 16)
            f_store(out, t->groups == 1     ? only
                         : group_blocks > 1 ? spread_scales(scales, dtype, at, t->end, i / 16, group_blocks)
                                            : load_scales(scales, dtype, at + i, t->end));
    }
}
/* Of float16, of groups of several blocks, and at the end of the tensor: float32, one per block and part. */
static RowScales scales_as_floats(const Gemv *t, int64_t at, int64_t rows)
{
    float *zeros = t->floats + GEMV_MOST_ROWS * t->words;
    copy_as_floats(t, t->m->scales, at, rows, t->floats);
    if (t->m->zeros) copy_as_floats(t, t->m->zeros, at, rows, zeros);
    return (RowScales){t->floats, zeros, FLOAT32, t->words};
}

/* `rows` rows of W (16, or GEMV_MOST_ROWS) in `runs` runs that are read side by side (of 16 rows 0, 4, 8 and 12, then
 * 1, 5, 9 and 13, ...), times `group` streams of activations from stream `from` on: sums[rows s + row] are the lanes of
 * one product. Columns go in panels, so that the activations of one stay in L1 while the rows pass.
 *
 * This loop must leave memory no time to wait; a line takes 6 to 7 ns to come, and 3 to 4 to be multiplied:
 * Each run is a stream of neighbouring lines, which the processor's own prefetchers follow, and its lines are asked for
 * a row or AHEAD_BYTES before they are used (one stream must ask for more, and is slower). Two chains of products per
 * line: one would be 20 cycles long, and the lines that wait for it fill the scheduler. Two sums in turn where a block
 * has several groups, for the same reason.
 * Scales become factors 16 at a time, between the lines that use them: a table made beforehand is time in which
 * nothing is read. */
INLINE void gemv_rows(int bits, int zero_kind, int parts, int group, int runs, int64_t rows, const Gemv *t,
                      const char *codes, RowScales lie, int64_t from, v16f *sums)
{
    const Rounded *x = t->x;
    const int64_t dtype = lie.dtype, scale_bytes = element_bytes(dtype), stride = lie.stride;
    const int64_t streams = x->rows * x->planes, blocks = x->blocks, block_bytes = bits == 4 ? 64 : 128;
    const int64_t panel_blocks = PANEL_BLOCKS(group), run = rows / runs, first = t->first + from;
    const int64_t row_bytes = blocks * block_bytes, panel_bytes = panel_blocks * block_bytes;
    const int64_t words_of_times = t->words, in_pairs = stride == 8; /* a register: two rows' scales */
    float factors[GEMV_MOST_FACTORS * 16];
    int32_t zero[4 * 16];
    const float *times = t->times + from * words_of_times, *steps = t->times + t->streams * words_of_times;
    for (int i = 0; i < rows * group; i++) sums[i] = f_zero();
    for (int64_t begin = 0; begin < blocks; begin += panel_blocks) {
        const int64_t end = begin + panel_blocks < blocks ? begin + panel_blocks : blocks;
        for (int64_t row = 0; row < run; row++) {
            const char *p = codes + row * row_bytes + begin * block_bytes;
            const char *ahead = codes_ahead(codes, row_bytes, panel_bytes, begin * block_bytes, row, run, rows);
            const int16_t *words = x->words + (begin * streams + first) * BLOCK;
            const int32_t *lanes = x->lanes + (begin * streams + first) * parts * 16;
            v16f y[4][GEMV_GROUP][2];
            for (int r = 0; r < runs; r++)
                for (int s = 0; s < group; s++) y[r][s][0] = sums[rows * s + row + r * run], y[r][s][1] = f_zero();
            for (int64_t block = begin; block < end;) {
                const int64_t chunk = block * parts / 16, next = 16 / parts * (chunk + 1);
                const int64_t stop = next < end ? next : end;
                for (int r = 0; r < runs; r++) {
                    if (in_pairs && row % 2) break;
                    const int64_t i = (row + r * run) * stride + 16 * chunk;
                    const v16f scale = scale_at(lie.scales, dtype, i);
                    ask_for((const char *)lie.scales + (i + rows * stride) * scale_bytes);
                    for (int s = 0; s < group; s++)
                        f_store(factors + (r * group + s) * 16,
                                f_mul(scale, f_load(times + s * words_of_times + 16 * chunk)));
                    if (zero_kind == ZEROS) {
                        const v16f point = scale_at(lie.zeros, dtype, i);
                        ask_for((const char *)lie.zeros + (i + rows * stride) * scale_bytes);
                        i_store(zero + r * 16, i_from_f(f_mul(point, f_load(steps + 16 * chunk))));
                    }
                }
                for (int64_t i = block * parts % 16 + in_pairs * (row % 2 * 8); block < stop; block++, i += parts) {
                    const Block these = {p, ahead, run * row_bytes, words, lanes, factors + i, zero + i};
                    if (group == 1) multiply_stream(bits, zero_kind, parts, runs, &these, y);
                    else multiply_streams(bits, zero_kind, parts, group, runs, &these, y);
                    p += block_bytes, ahead += block_bytes;
                    words += streams * BLOCK, lanes += streams * parts * 16;
                }
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
            gemv_rows(bits, zero_kind, parts, group, runs, rows, t, codes, lie, from, sums); \
        break
#define GEMV_CASES(bits, zero_kind, parts) \
    GEMV_CASE(bits, zero_kind, parts, 1, GEMV_RUNS); \
    GEMV_CASE(bits, zero_kind, parts, 2, 2); \
    GEMV_CASE(bits, zero_kind, parts, 4, GEMV_RUNS_OF_FOUR)

/* Products of streams from .. from + group - 1 with `rows` rows: y[stream], or with 64 rows of a single stream
 * y[row / 16]. */
INLINE void gemv_streams(const Gemv *t, const char *codes, RowScales lie, int64_t from, int group, int64_t rows,
                         v16f *y)
{
    v16f sums[GEMV_MOST_ROWS]; /* 16 * GEMV_GROUP of several streams */
    switch (t->m->bits * 1000 + zero_kind_of(t->m) * 100 + t->x->parts * 10 + group) {
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

/* 16 rows, all streams. This and the next are functions of their own, so that the compiler lays out the loop of each by
 * itself: together both were 5 % slower. */
static void gemv_16_rows(const Gemv *t, const char *codes, int64_t at, v16f *y)
{
    const int64_t streams = t->streams;
    const RowScales lie = lie_whole(t, at, 16) ? scales_as_stored(t, at) : scales_as_floats(t, at, 16);
    for (int64_t s = 0; s < streams;) {
        const int group = streams - s >= 4 ? 4 : streams - s >= 2 ? 2 : 1;
        gemv_streams(t, codes, lie, s, group, 16, y + s);
        s += group;
    }
}
/* GEMV_MOST_ROWS rows of a single stream. */
static void gemv_most_rows(const Gemv *t, const char *codes, int64_t at, v16f *y)
{
    const RowScales lie = lie_whole(t, at, GEMV_MOST_ROWS) ? scales_as_stored(t, at)
                                                           : scales_as_floats(t, at, GEMV_MOST_ROWS);
    gemv_streams(t, codes, lie, 0, 1, GEMV_MOST_ROWS, y);
}

/* Rows of each run that `count` rows begin with. */
INLINE int64_t gemv_run(int64_t streams, int64_t row_bytes, int64_t count)
{
    const int most = streams == 1 && row_bytes <= SHORT_ROW_BYTES && count >= GEMV_MOST_ROWS;
    return (most ? GEMV_MOST_ROWS : 16) / GEMV_RUNS;
}

/* Rows first ... first + count - 1 of W, a multiple of 16 of them. */
static void gemv_task(const Matrix *m, int64_t expert, const Rounded *x, int64_t token0, int64_t tokens, int64_t first,
                      int64_t count, float *scratch)
{
    const int64_t row_bytes = x->blocks * (m->bits == 4 ? 64 : 128), streams = tokens * x->planes;
    const char *codes = (const char *)m->codes + expert * m->expert_code_bytes + first * row_bytes;
    const int64_t run = gemv_run(streams, row_bytes, count);
    for (int64_t row = 0; row < GEMV_RUNS * run; row += run) /* on their way while scales are fetched */
        for (int64_t at = 0; at < AHEAD_BYTES; at += 64) ask_for(codes + row * row_bytes + at);
    const int64_t groups = matrix_groups(m), at = expert * m->expert_scales + first * groups;
    const int64_t end = at + (m->padded_rows - first) * groups;
    const int64_t words = times_words(x);
    const Gemv task = {m, x, token0 * x->planes, streams, groups, end, words, scratch, scratch + (streams + 1) * words};
    find_times(&task);
    int64_t row0 = 0;
    if (run > 16 / GEMV_RUNS)
        for (; count - row0 >= GEMV_MOST_ROWS; row0 += GEMV_MOST_ROWS) {
            v16f y[GEMV_MOST_ROWS / 16];
            gemv_most_rows(&task, codes + row0 * row_bytes, at + row0 * groups, y);
            for (int64_t i = 0; i < GEMV_MOST_ROWS / 16; i++) store_outputs(m, token0, first + row0 + 16 * i, y[i]);
        }
    for (; row0 < count; row0 += 16) {
        v16f y[2 * GEMV_TOKENS];
        gemv_16_rows(&task, codes + row0 * row_bytes, at + row0 * groups, y);
        for (int64_t t = 0; t < tokens; t++)
            store_outputs(m, token0 + t, first + row0, x->planes == 1 ? y[t] : f_add(y[2 * t], y[2 * t + 1]));
    }
}
