/* y = x W^T for float matrices of few rows of x (lm_head, routers, the small projections of Gated DeltaNet).
 *
 * Lanes are columns, four float sums per row of W and of x (columns 16 i of i = 0, 1, 2, 3 mod 4), joined pairwise:
 * the order does not depend on the number of rows. x must be float32. bfloat16 costs one conversion and one
 * multiply-add per 16 weights, far below what memory takes. */
#pragma once
#include "gemm.h"
#include "gemv.h"

#define DENSE_STREAMS 4
#define DENSE_AHEAD_BYTES (AHEAD_CACHE == 2 ? 8192 : 1024) /* one stream; to be in L2 it must be asked for early */

INLINE void dense_rows(int64_t dtype, int group, const Matrix *m, const char *codes, const Rows *x, int64_t first,
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
        for (int64_t r = 0; r < rows; r++) dense_rows(dtype, group, m, codes, x, token, row0 + r, sums + r); \
        break
#define DENSE_CASES(dtype) \
    DENSE_CASE(dtype, 1); \
    DENSE_CASE(dtype, 2); \
    DENSE_CASE(dtype, 4)

static void dense_tile(const Matrix *m, int64_t expert, const Rows *x, int64_t token0, int64_t tokens, int64_t row0)
{
    const char *codes = (const char *)m->codes + expert * m->expert_code_bytes;
    int64_t last = row0 + TILE_ROWS < m->rows ? row0 + TILE_ROWS : m->rows;
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

/* Tasks: task_tiles tiles of every matrix (of every slot, for stacks). */
INLINE int64_t matrix_tasks(const Matmul *op, const Matrix *m)
{
    int64_t rows = TILE_ROWS * op->task_tiles;
    return (m->rows + rows - 1) / rows;
}
INLINE int64_t slot_tasks(const Matmul *op)
{
    int64_t tasks = 0;
    for (int64_t i = 0; i < op->count; i++) tasks += matrix_tasks(op, op->matrices + i);
    return tasks;
}
static int64_t matmul_tasks(const Matmul *op)
{
    return (op->offsets ? (op->active ? *op->active : op->slots) : 1) * slot_tasks(op);
}
static int64_t matmul_scratch_bytes(const Matmul *op)
{
    int64_t gemm = 2 * 64 * 16 * 4, gemv = 0;
    if (op->x) {
        int64_t streams = op->x->rows * op->x->planes;
        gemm += (streams < GEMM_CHUNK ? streams : GEMM_CHUNK) * TILE_ROWS * 4;
        gemv = GEMV_SCRATCH_ROWS * times_words(op->x) * 4;
        int64_t most = 0;
        for (int64_t i = 0; i < op->count; i++)
            if (op->matrices[i].bits && tile_scale_words(op->matrices + i) > most)
                most = tile_scale_words(op->matrices + i);
        gemm += most * 4;
    }
    return gemm > gemv ? gemm : gemv;
}

/* Rows first .. first + rows - 1 of a matrix, of slot `slot` of a stack. */
typedef struct {
    const Matrix *m;
    int64_t slot, first, rows;
} Place;
INLINE Place place_of(const Matmul *op, int64_t task)
{
    const int64_t slot = task / slot_tasks(op), most = TILE_ROWS * op->task_tiles;
    int64_t i = 0;
    task %= slot_tasks(op);
    while (task >= matrix_tasks(op, op->matrices + i)) task -= matrix_tasks(op, op->matrices + i++);
    const Matrix *m = op->matrices + i;
    const int64_t left = (m->bits ? m->padded_rows : m->rows) - task * most;
    return (Place){m, slot, task * most, left < most ? left : most};
}

static void matmul_task(const Matmul *op, int64_t task, float *scratch)
{
    const Place place = place_of(op, task);
    const Matrix *m = place.m;
    int64_t token0 = op->offsets ? op->offsets[place.slot] : 0,
            tokens = (op->offsets ? op->offsets[place.slot + 1] : op->rows) - token0;
    int64_t expert = op->experts ? op->experts[place.slot] : place.slot;
    if (tokens == 0) return;
    if (m->bits && tokens <= GEMV_TOKENS) {
        gemv_task(m, expert, op->x, token0, tokens, place.first, place.rows, scratch);
        return;
    }
    for (int64_t row0 = place.first; row0 < place.first + place.rows; row0 += TILE_ROWS)
        if (m->bits == 0) dense_tile(m, expert, &op->floats, token0, tokens, row0);
        else gemm_tile(m, expert, op->x, token0, tokens, row0, scratch);
}

/* Asks for a part of the first ASK_BYTES of every run that a task begins with. Which experts of a stack are read is
 * not known beforehand; and where many tokens share a matrix, its first lines are nothing. */
#define ASK_BYTES 8192
static void matmul_ask(const Matmul *op, int64_t task, int64_t step)
{
    if (op->offsets || op->rows > GEMV_TOKENS) return;
    const Place place = place_of(op, task);
    const Matrix *m = place.m;
    const int64_t bytes = ASK_BYTES / ASK_STEPS, columns = m->columns;
    const int64_t row_bytes = m->bits ? columns * m->bits / 8 : columns * element_bytes(m->code_dtype);
    const int64_t stride = m->bits ? gemv_run(op->rows * op->x->planes, row_bytes, place.rows) * row_bytes : ASK_BYTES;
    const char *codes = (const char *)m->codes + place.first * row_bytes + step * bytes;
    for (int64_t at = 0; at < bytes; at += 64)
        for (int run = 0; run < GEMV_RUNS; run++) __builtin_prefetch(codes + run * stride + at, 0, 2);
}
