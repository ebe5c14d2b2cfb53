/* Embedding rows, the router of a mixture of experts, and the sum of what the experts say. */
#pragma once
#include "activations.h"

#define EXPERTS_MOST 1024
#define TOP_MOST 64

static int64_t embed_tasks(const Embed *op) { return op->count; }
static void embed_task(const Embed *op, int64_t row, float *scratch)
{
    (void)scratch;
    const Matrix *m = op->matrix;
    const int64_t token = op->tokens[row], columns = op->y.stride;
    const int64_t groups = (m->columns + m->group_size - 1) / m->group_size;
    for (int64_t column = 0; column < columns; column += 16) {
        if (m->bits == 0) {
            const int64_t count = columns - column < 16 ? columns - column : 16;
            row_store(&op->y, row, column, columns,
                      load_some(m->codes, m->code_dtype, token * m->columns + column, count));
            continue;
        }
        const int64_t tile = token / 16, quarter = column % BLOCK / 32;
        const int64_t at = (tile * groups + column / m->group_size) * 16 + token % 16;
        const float scale = load_one(m->scales, m->scale_dtype, at);
        const float zero = m->zeros ? load_one(m->zeros, m->scale_dtype, at) : m->bits == 4 ? 8 : 0;
        const int lines = (int)m->bits / 4, line = m->bits == 4 ? 0 : (int)quarter / 2;
        const int32_t *steps = (const int32_t *)m->codes +
                               ((tile * m->columns + column / BLOCK * BLOCK) / 8 + column % 32 / 2) * lines * 16;
        int32_t codes[16];
        for (int l = 0; l < 16; l++) { /* nibble or byte `quarter` of the low or the high word of a row's lane */
            const uint32_t word = (uint32_t)steps[(l / 2 * lines + line) * 16 + token % 16] >> (l % 2 * 16);
            codes[l] = m->bits == 4 ? (int32_t)(word >> (4 * quarter) & 15) : (int8_t)(word >> (quarter % 2 * 8));
        }
        row_store(&op->y, row, column, columns, f_mul(f_sub(f_from_i(i_load(codes)), f_set1(zero)), f_set1(scale)));
    }
}

/* One task: a handful of tokens, and the sort sees all of them. */
static int64_t route_tasks(const Route *op) { return op->tokens > 0; }
static void route_task(const Route *op, int64_t task, float *scratch)
{
    (void)task;
    const int64_t experts = op->experts_count, top = op->top;
    int32_t *chosen = (int32_t *)scratch;
    float *share = scratch + op->tokens * top;
    int32_t counts[EXPERTS_MOST] = {0};
    for (int64_t t = 0; t < op->tokens; t++) {
        const float *logits = op->logits + t * experts;
        float sum = 0, best = 0;
        for (int64_t i = 0; i < top; i++) { /* the softmax over all experts cancels in the renormalisation */
            int32_t most = -1;
            for (int64_t e = 0; e < experts; e++) {
                if (most >= 0 && logits[e] <= logits[most]) continue;
                int taken = 0;
                for (int64_t j = 0; j < i; j++) taken |= chosen[t * top + j] == e;
                if (!taken) most = (int32_t)e;
            }
            if (i == 0) best = logits[most];
            chosen[t * top + i] = most;
            share[t * top + i] = expf(logits[most] - best);
            sum += share[t * top + i];
            counts[most]++;
        }
        for (int64_t i = 0; i < top; i++) share[t * top + i] /= sum;
    }
    int32_t slots = 0, rows = 0, next[EXPERTS_MOST];
    for (int32_t e = 0; e < experts; e++) {
        if (!counts[e]) continue;
        op->experts[slots] = e, op->offsets[slots++] = rows;
        next[e] = rows, rows += counts[e];
    }
    op->offsets[slots] = rows, *op->active = slots;
    for (int64_t i = 0; i < op->tokens * top; i++) {
        int32_t row = next[chosen[i]]++;
        op->gather[row] = (int32_t)(i / top), op->weights[row] = share[i];
    }
}
static int64_t route_scratch_bytes(const Route *op) { return op->tokens * op->top * 8; }

static int64_t combine_tasks(const Combine *op) { return op->tokens; }
static void combine_task(const Combine *op, int64_t token, float *scratch)
{
    (void)scratch;
    float gate = op->shared_gate.data
                     ? load_one(op->shared_gate.data, op->shared_gate.dtype, token * op->shared_gate.stride)
                     : 0;
    for (int64_t i = 0; i < op->columns; i += 16) {
        v16f y = f_zero();
        if (op->shared.data) y = f_mul(row_load(&op->shared, token, i, op->columns), f_set1(sigmoid(gate)));
        for (int64_t row = 0; row < op->rows; row++) /* in the order of experts, whichever token */
            if (op->gather[row] == token) y = f_fma(f_set1(op->weights[row]), row_load(&op->x, row, i, op->columns), y);
        row_store(&op->y, token, i, op->columns, y);
    }
}
