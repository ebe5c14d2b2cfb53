/* The tasks of a MATMUL: which rows of which matrix each of them is, and which kernel multiplies them: few tokens by a
 * quantized matrix gemv.h, many gemm.h, matrices of floats dense.h. */
#pragma once
#include "dense.h"
#include "gemm.h"
#include "gemv.h"

/* Tasks: task_rows rows of every matrix (of every slot, for stacks). */
INLINE int64_t matrix_tasks(const Matmul *op, const Matrix *m)
{
    return (m->rows + op->task_rows - 1) / op->task_rows;
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

/* A thread's own rounded row, at the front of its scratch. */
INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
INLINE int64_t own_row_bytes(const Matmul *op)
{
    if (!op->rounding) return 0;
    const int64_t streams = op->x->blocks * op->x->planes, parts = streams * op->x->parts;
    return streams * BLOCK * 2 + whole_lines(parts * 4) + whole_lines(streams * 4);
}
INLINE Rounded own_row(const Matmul *op, float *scratch)
{
    Rounded x = *op->x;
    const int64_t streams = x.blocks * x.planes, parts = streams * x.parts;
    x.words = (int16_t *)scratch;
    x.sums = (int32_t *)(x.words + streams * BLOCK);
    x.scales = (float *)((char *)x.sums + whole_lines(parts * 4));
    return x;
}
static void matmul_prepare(const Matmul *op, float *scratch)
{
    if (!op->rounding) return;
    Rounded row = own_row(op, scratch);
    Round rounding = *op->rounding;
    rounding.out = &row;
    for (int64_t task = 0, count = round_tasks(&rounding); task < count; task++) round_task(&rounding, task, NULL);
}

static int64_t matmul_scratch_bytes(const Matmul *op)
{
    int64_t gemm = 2 * 64 * 16 * 4;
    if (op->x) {
        const int64_t streams = op->x->rows * op->x->planes;
        gemm += (streams < GEMM_CHUNK ? streams : GEMM_CHUNK) * GEMM_ROWS * 4;
    }
    return own_row_bytes(op) + gemm;
}

/* Rows first .. first + rows - 1 of a matrix, of slot `slot` of a stack. */
typedef struct {
    const Matrix *m;
    int64_t slot, first, rows;
} Place;
INLINE Place place_of(const Matmul *op, int64_t task)
{
    const int64_t slot = task / slot_tasks(op), most = op->task_rows;
    int64_t i = 0;
    task %= slot_tasks(op);
    while (task >= matrix_tasks(op, op->matrices + i)) task -= matrix_tasks(op, op->matrices + i++);
    const Matrix *m = op->matrices + i;
    const int64_t left = (m->bits ? m->padded_rows : m->rows) - task * most;
    return (Place){m, slot, task * most, left < most ? left : most};
}

static void multiply_place(const Matmul *op, Place place, float *scratch)
{
    const Matrix *m = place.m;
    int64_t token0 = op->offsets ? op->offsets[place.slot] : 0,
            tokens = (op->offsets ? op->offsets[place.slot + 1] : op->rows) - token0;
    int64_t expert = op->experts ? op->experts[place.slot] : place.slot;
    if (tokens == 0) return;
    if (m->bits && tokens <= GEMV_TOKENS) {
        const Rounded x = op->rounding ? own_row(op, scratch) : *op->x;
        gemv_task(m, expert, &x, token0, tokens, place.first, place.rows);
        return;
    }
    for (int64_t row0 = place.first, end = row0 + place.rows; row0 < end; row0 += GEMM_ROWS)
        if (m->bits == 0) dense_rows(m, expert, &op->floats, token0, tokens, row0, end);
        else gemm_tile(m, expert, op->x, token0, tokens, row0, scratch);
}

static void matmul_task(const Matmul *op, int64_t task, float *scratch)
{
    multiply_place(op, place_of(op, task), scratch);
}

/* Experts have different numbers of tokens, and many tokens keep a tile busy by themselves: those go one by one. */
static int matmul_joins(const Matmul *op) { return !op->offsets && op->rows <= GEMV_TOKENS; }
static void matmul_joined(const Matmul *op, int64_t first, int64_t count, float *scratch)
{
    const int64_t most = op->task_rows;
    while (count > 0) {
        Place place = place_of(op, first);
        const int64_t left = (place.m->bits ? place.m->padded_rows : place.m->rows) - place.first;
        place.rows = count * most < left ? count * most : left; /* of this matrix; what is behind it is another's */
        multiply_place(op, place, scratch);
        const int64_t done = (place.rows + most - 1) / most;
        first += done, count -= done;
    }
}

/* Asks for a part of the first ASK_BYTES that a task begins with. Which experts of a stack are read is not known
 * beforehand; and where many tokens share a matrix, its first lines are nothing. */
#define ASK_BYTES 32768
static void matmul_ask(const Matmul *op, int64_t task, int64_t step)
{
    if (op->offsets || op->rows > GEMV_TOKENS) return;
    const Place place = place_of(op, task);
    const Matrix *m = place.m;
    const int64_t bytes = ASK_BYTES / ASK_STEPS;
    const int64_t row_bytes = m->bits ? row_bytes_of(m) : m->columns * element_bytes(m->code_dtype);
    const char *codes = (const char *)m->codes + place.first * row_bytes + step * bytes;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(codes + at, 0, 2);
}
