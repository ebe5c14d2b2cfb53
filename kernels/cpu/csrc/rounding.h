/* The quantizer's two inner loops: which scale a group of weights gets, and GPTQ's walk through a few columns.
 *
 * quant/rounding.py has both in plain torch, with the same bits: no fused multiply-add here, sums over lanes by the tree
 * of f_sum, the same order of candidates. */
#pragma once
#include "elementary.h"

/* The nearest level of the grid, counted from zero's: clamped before rounding, so that every value fits an int32. */
INLINE v16f nearest_level(v16f t, v16f lowest, v16f highest)
{
    return f_from_i(i_from_f(f_min(f_max(t, lowest), highest)));
}

/* A group under one candidate: sum v (c s - x)^2 and what least squares needs to know of its levels c. */
typedef struct {
    float error, xc, cc;
} Fit;

INLINE Fit fit(const float *x, const float *v, int64_t count, float scale, float zero, float top)
{
    v16f s = f_set1(scale), inverse = f_set1(1.0f / scale), lowest = f_set1(-zero), highest = f_set1(top - zero);
    v16f error = f_zero(), xc = f_zero(), cc = f_zero();
    for (int64_t i = 0; i < count; i += 16) {
        v16f a = f_load(x + i), b = f_load(v + i);
        v16f c = nearest_level(f_mul(a, inverse), lowest, highest);
        v16f e = f_sub(f_mul(c, s), a), bc = f_mul(b, c);
        error = f_add(error, f_mul(f_mul(e, e), b));
        xc = f_add(xc, f_mul(bc, a));
        cc = f_add(cc, f_mul(bc, c));
    }
    return (Fit){f_sum(error), f_sum(xc), f_sum(cc)};
}

INLINE float stored_scale(int64_t dtype, float scale)
{
    float lanes[16];
    f_store(lanes, as_stored(dtype, f_set1(scale)));
    return lanes[0];
}

static int64_t find_scales_tasks(const FindScales *op) { return op->rows; }
static void find_scales_task(FindScales *op, int64_t row, float *scratch)
{
    (void)scratch;
    float top = (float)((1 << op->bits) - 1), middle = (float)(1 << (op->bits - 1));
    int64_t groups = op->columns / op->group_size;
    for (int64_t g = 0; g < groups; g++) {
        const float *x = op->weight + row * op->columns + g * op->group_size, *v = op->importance + g * op->group_size;
        float low = 0, high = 0;
        v16f lows = f_zero(), highs = f_zero();
        for (int64_t i = 0; i < op->group_size; i += 16)
            lows = f_min(lows, f_load(x + i)), highs = f_max(highs, f_load(x + i));
        high = f_reduce_max(highs), low = -f_reduce_max(f_sub(f_zero(), lows));
        float step, first, last;
        if (op->symmetric) {
            float largest = high > -low ? high : -low;
            step = (op->signed_scales && high > -low ? -largest : largest) / middle;
            first = last = middle;
        } else {
            step = (high - low) / top;
            float zero = step > 0 ? rintf(-low / step) : 0;
            first = zero > 1 ? zero - 1 : 0, last = zero + 1 < top ? zero + 1 : top;
        }
        float best_scale = 1, best_zero = first, best_error = INFINITY;
        Fit best = {INFINITY, 0, 0};
        for (float zero = first; zero <= last; zero++)
            for (int64_t k = 0; k < op->ratio_count; k++) {
                float scale = stored_scale(op->scale_dtype, step * op->ratios[k]);
                if (!isfinite(scale) || scale == 0) continue;
                Fit now = fit(x, v, op->group_size, scale, zero, top);
                if (now.error < best_error)
                    best = now, best_error = now.error, best_scale = scale, best_zero = zero;
            }
        for (int64_t k = 0; k < op->refinements && best.cc > 0; k++) {
            float scale = stored_scale(op->scale_dtype, best.xc / best.cc);
            if (!isfinite(scale) || scale == 0) break;
            Fit now = fit(x, v, op->group_size, scale, best_zero, top);
            if (!(now.error < best_error)) break;
            best = now, best_error = now.error, best_scale = scale;
        }
        op->scales[row * groups + g] = best_scale;
        op->zeros[row * groups + g] = (uint8_t)best_zero;
    }
}

static int64_t solve_columns_tasks(const SolveColumns *op) { return op->rows / 16; }
static void solve_columns_task(SolveColumns *op, int64_t strip, float *scratch)
{
    (void)scratch;
    int64_t at = 16 * strip;
    v16f top = f_set1((float)((1 << op->bits) - 1));
    /* In memory the columns of a strip lie a power of two apart and would push each other out of the cache. */
    v16f targets[SOLVE_COLUMNS_MOST];
    for (int64_t j = 0; j < op->columns; j++) targets[j] = f_load(op->targets + j * op->rows + at);
    for (int64_t j = op->columns - 1; j >= 0; j--) {
        float *weights = op->weights + j * op->rows + at;
        v16f s = f_load(op->scales + op->groups[j] * op->rows + at);
        v16f zero = f_load(op->zeros + op->groups[j] * op->rows + at), lowest = f_sub(f_zero(), zero);
        v16f c = nearest_level(f_div(targets[j], s), lowest, f_sub(top, zero));
        int8_t codes[16];
        i_store_bytes(codes, i_sub(i_from_f(f_add(c, zero)), i_set1(128))); /* it saturates as signed bytes */
        for (int l = 0; l < 16; l++) op->codes[j * op->rows + at + l] = (uint8_t)(codes[l] + 128);
        v16f error = f_sub(f_load(weights), f_mul(c, s));
        f_store(weights, error);
        const float *factor = op->factor + j * op->factor_stride;
        for (int64_t k = 0; k < j; k++) targets[k] = f_add(targets[k], f_mul(error, f_set1(factor[k])));
    }
}
