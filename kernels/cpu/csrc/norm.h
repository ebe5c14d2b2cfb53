/* RMS norms, with the residual added before or a gate after, and the result as activations for the next matmul. */
#pragma once
#include "activations.h"

static int64_t norm_tasks(const Norm *op) { return op->rows; }
static int64_t norm_scratch_bytes(const Norm *op) { return (op->columns + BLOCK) * 4; }

/* 1 / sqrt(mean of squares + eps) of `count` floats; four sums, columns 16 i of i = 0 .. 3 mod 4. */
INLINE float inverse_rms(const float *x, int64_t count, double eps)
{
    v16f sums[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        v16f v = f_load(x + i);
        sums[i / 16 % 4] = f_fma(v, v, sums[i / 16 % 4]);
    }
    float sum = f_sum(f_add(f_add(sums[0], sums[1]), f_add(sums[2], sums[3])));
    for (; i < count; i++) sum += x[i] * x[i];
    return 1 / sqrtf(sum / (float)count + (float)eps);
}

static void norm_task(const Norm *op, int64_t row, float *scratch)
{
    const int64_t n = op->columns;
    for (int64_t i = 0; i < n; i += 16) {
        v16f x = row_load(&op->x, row, i, n);
        if (op->residual.data) {
            x = f_add(x, row_load(&op->residual, row, i, n));
            row_store(&op->residual, row, i, n, x);
            x = row_load(&op->residual, row, i, n); /* what the next layer will read: in the residual's type */
        }
        f_store(scratch + i, x);
    }
    v16f scale = f_set1(inverse_rms(scratch, n, op->eps)), offset = f_set1((float)op->offset);
    for (int64_t i = 0; i < n; i += 16) {
        v16f y = f_mul(f_mul(f_load(scratch + i), scale), f_add(row_load(&op->weight, 0, i, n), offset));
        if (op->gate.data) y = f_mul(y, f_silu(row_load(&op->gate, row, i, n)));
        if (op->y.data) row_store(&op->y, row, i, n, y);
        f_store(scratch + i, y);
    }
    if (!op->rounded) return;
    for (int64_t i = n; i < op->rounded->blocks * BLOCK; i++) scratch[i] = 0;
    for (int64_t block = 0; block < op->rounded->blocks; block++) {
        v16f x[8];
        for (int i = 0; i < 8; i++) x[i] = f_load(scratch + block * BLOCK + 16 * i);
        round_block(op->rounded, block, row, x);
    }
}
