/* The quantizer's inner loops: which scale a group of weights gets, the same with codes at once, and GPTQ's walk
 * through a few columns.
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

/* What is tried for a group from low <= 0 to high >= 0: its step, and the zeros from first to last. */
typedef struct {
    float step, first, last;
} Range;

INLINE Range range_of(int64_t symmetric, int64_t signed_scales, float low, float high, float top, float middle)
{
    if (symmetric) {
        float largest = high > -low ? high : -low;
        return (Range){(signed_scales && high > -low ? -largest : largest) / middle, middle, middle};
    }
    float step = (high - low) / top, zero = step > 0 ? rintf(-low / step) : 0;
    return (Range){step, zero > 1 ? zero - 1 : 0, zero + 1 < top ? zero + 1 : top};
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
        const Range range = range_of(op->symmetric, op->signed_scales, low, high, top, middle);
        float best_scale = 1, best_zero = range.first, best_error = INFINITY;
        Fit best = {INFINITY, 0, 0};
        for (float zero = range.first; zero <= range.last; zero++)
            for (int64_t k = 0; k < op->ratio_count; k++) {
                float scale = stored_scale(op->scale_dtype, range.step * op->ratios[k]);
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

/* Errors of several candidates in one walk over the group: a single one waits for its own sums. */
#define CANDIDATES 5
INLINE void errors_of(int count, const float *x, int64_t columns, const float *scales, float zero, float top,
                      float *errors)
{
    v16f sum[CANDIDATES], s[CANDIDATES], inverse[CANDIDATES];
    const v16f lowest = f_set1(-zero), highest = f_set1(top - zero);
    for (int k = 0; k < count; k++) sum[k] = f_zero(), s[k] = f_set1(scales[k]), inverse[k] = f_set1(1.0f / scales[k]);
    for (int64_t i = 0; i < columns; i += 16) {
        const v16f a = f_load(x + i);
#pragma GCC unroll 5
        for (int k = 0; k < count; k++) {
            v16f e = f_sub(f_mul(nearest_level(f_mul(a, inverse[k]), lowest, highest), s[k]), a);
            sum[k] = f_add(sum[k], f_mul(e, e));
        }
    }
    for (int k = 0; k < count; k++) errors[k] = f_sum(sum[k]);
}

/* `fit` with equal costs, and the same bits. */
INLINE Fit plain_fit(const float *x, int64_t columns, float scale, float zero, float top)
{
    const v16f s = f_set1(scale), inverse = f_set1(1.0f / scale), lowest = f_set1(-zero), highest = f_set1(top - zero);
    v16f error = f_zero(), xc = f_zero(), cc = f_zero();
    for (int64_t i = 0; i < columns; i += 16) {
        const v16f a = f_load(x + i), c = nearest_level(f_mul(a, inverse), lowest, highest), e = f_sub(f_mul(c, s), a);
        error = f_add(error, f_mul(e, e));
        xc = f_add(xc, f_mul(c, a));
        cc = f_add(cc, f_mul(c, c));
    }
    return (Fit){f_sum(error), f_sum(xc), f_sum(cc)};
}

INLINE void store_codes(const float *x, int64_t columns, float scale, float zero, float top, uint8_t *codes)
{
    const v16f s = f_set1(scale), lowest = f_set1(-zero), highest = f_set1(top - zero);
    const v16i shift = i_set1((int32_t)zero - 128); /* bytes are stored with a sign */
    for (int64_t i = 0; i < columns; i += 16) {
        v16i level = i_from_f(f_min(f_max(f_div(f_load(x + i), s), lowest), highest));
        i_store_bytes((int8_t *)codes + i, i_add(level, shift));
    }
    for (int64_t i = 0; i < columns; i++) codes[i] ^= 128;
}

INLINE void round_group(const RoundGroups *op, const float *scales, const float *x, Range range, float top,
                        float *chosen_scale, float *chosen_zero)
{
    float scale = 1, zero = range.first, error = INFINITY;
    for (float z = range.first; z <= range.last; z++)
        for (int64_t k = 0; k < op->ratio_count; k += CANDIDATES) {
            float errors[CANDIDATES];
            const int64_t left = op->ratio_count - k, count = left < CANDIDATES ? left : CANDIDATES;
            if (count == CANDIDATES) errors_of(CANDIDATES, x, op->group_size, scales + k, z, top, errors);
            else
                for (int64_t i = 0; i < count; i++) errors_of(1, x, op->group_size, scales + k + i, z, top, errors + i);
            for (int64_t i = 0; i < count; i++)
                if (isfinite(scales[k + i]) && scales[k + i] != 0 && errors[i] < error)
                    error = errors[i], scale = scales[k + i], zero = z;
        }
    if (error < INFINITY) {
        Fit best = plain_fit(x, op->group_size, scale, zero, top);
        for (int64_t k = 0; k < op->refinements && best.cc > 0; k++) {
            float refined = stored_scale(op->scale_dtype, best.xc / best.cc);
            if (refined == scale || !isfinite(refined) || refined == 0) break;
            Fit now = plain_fit(x, op->group_size, refined, zero, top);
            if (!(now.error < best.error)) break;
            best = now, scale = refined;
        }
    }
    *chosen_scale = scale, *chosen_zero = zero;
}

#define RATIOS_MOST 64
INLINE void round_row(RoundGroups *op, int64_t dtype, int64_t row)
{
    const float top = (float)((1 << op->bits) - 1), middle = (float)(1 << (op->bits - 1));
    const int64_t groups = op->columns / op->group_size;
    float x[ROUND_GROUPS_MOST];
    for (int64_t g = 0; g < groups; g++) {
        const int64_t at = row * op->columns + g * op->group_size;
        v16f lows = f_zero(), highs = f_zero(), trap = f_zero();
        for (int64_t i = 0; i < op->group_size; i += 16) {
            const v16f a = load_at(op->weight, dtype, at + i);
            f_store(x + i, a);
            lows = f_min(lows, a), highs = f_max(highs, a), trap = f_fma(a, f_zero(), trap);
        }
        if (f_sum(trap) != 0) { /* infinity times 0 is not a number, nor is what it is added to */
            __atomic_store_n(&op->is_bad, 1, __ATOMIC_RELAXED);
            return;
        }
        const float high = f_reduce_max(highs), low = -f_reduce_max(f_sub(f_zero(), lows));
        const Range range = range_of(op->symmetric, op->signed_scales, low, high, top, middle);
        float scales[RATIOS_MOST], scale, zero;
        for (int64_t k = 0; k < op->ratio_count; k += 16) {
            const int64_t left = op->ratio_count - k, count = left < 16 ? left : 16;
            v16f ratios = count < 16 ? load_some(op->ratios, FLOAT32, k, count) : f_load(op->ratios + k);
            f_store(scales + k, as_stored(op->scale_dtype, f_mul(f_set1(range.step), ratios)));
        }
        round_group(op, scales, x, range, top, &scale, &zero);
        store_codes(x, op->group_size, scale, zero, top, op->codes + at);
        op->scales[row * groups + g] = scale, op->zeros[row * groups + g] = (uint8_t)zero;
    }
}

static int64_t round_groups_tasks(const RoundGroups *op) { return op->rows; }
static void round_groups_task(RoundGroups *op, int64_t row, float *scratch)
{
    (void)scratch;
    if (op->dtype == BFLOAT16) round_row(op, BFLOAT16, row);
    else round_row(op, op->dtype, row);
}
