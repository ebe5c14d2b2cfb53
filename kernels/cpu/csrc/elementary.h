/* Rows of any element type as lanes, and the functions of one number that the model needs. */
#pragma once
#include "lanes.h"
#include "operations.h"

INLINE v16f bf16_load(const uint16_t *p) { return f_bits(i_sll(i_load_u16(p), 16)); }
INLINE void bf16_store(uint16_t *p, v16f a)
{
    v16i bits = i_bits(a), odd = i_and(i_srl(bits, 16), i_set1(1));
    v16i rounded = i_srl(i_add(bits, i_add(odd, i_set1(0x7FFF))), 16); /* to nearest, ties to even */
    i_store_u16(p, i_where_nan(a, i_set1(0x7FC0), rounded));
}
INLINE v16f load_at(const void *data, int64_t dtype, int64_t i)
{
    if (dtype == FLOAT32) return f_load((const float *)data + i);
    if (dtype == BFLOAT16) return bf16_load((const uint16_t *)data + i);
    if (dtype == FLOAT16) return f_load_f16((const uint16_t *)data + i);
    return f_from_i(i_load_bytes((const int8_t *)data + i));
}
INLINE void store_at(void *data, int64_t dtype, int64_t i, v16f a)
{
    if (dtype == FLOAT32) f_store((float *)data + i, a);
    else if (dtype == BFLOAT16) bf16_store((uint16_t *)data + i, a);
    else f_store_f16((uint16_t *)data + i, a);
}
/* As it would come back from memory of that type. */
INLINE v16f as_stored(int64_t dtype, v16f a)
{
    float buffer[16];
    if (dtype == FLOAT32) return a;
    store_at(buffer, dtype, 0, a);
    return load_at(buffer, dtype, 0);
}
INLINE int64_t element_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2; }

/* `count` < 16 elements through a buffer, for nothing may be touched behind the end of a tensor. */
static v16f load_some(const void *data, int64_t dtype, int64_t i, int64_t count)
{
    float buffer[16] = {0};
    int64_t size = element_bytes(dtype);
    memcpy(buffer, (const char *)data + i * size, (size_t)(count * size));
    return load_at(buffer, dtype, 0);
}
static void store_some(void *data, int64_t dtype, int64_t i, v16f a, int64_t count)
{
    float buffer[16];
    int64_t size = element_bytes(dtype);
    store_at(buffer, dtype, 0, a);
    memcpy((char *)data + i * size, buffer, (size_t)(count * size));
}
INLINE v16f row_load(const Rows *rows, int64_t row, int64_t i, int64_t columns)
{
    int64_t at = row * rows->stride + i;
    return i + 16 <= columns ? load_at(rows->data, rows->dtype, at)
                             : load_some(rows->data, rows->dtype, at, columns - i);
}
INLINE void row_store(const Rows *rows, int64_t row, int64_t i, int64_t columns, v16f a)
{
    int64_t at = row * rows->stride + i;
    if (i + 16 <= columns) store_at(rows->data, rows->dtype, at, a);
    else store_some(rows->data, rows->dtype, at, a, columns - i);
}
static float load_one(const void *data, int64_t dtype, int64_t i)
{
    float lanes[16];
    f_store(lanes, load_some(data, dtype, i, 1));
    return lanes[0];
}

/* exp to 1 ulp or so (degree 6 on [-ln 2 / 2, ln 2 / 2]); 0 below -87, +inf above 88.7. */
INLINE v16f f_exp(v16f x)
{
    v16f clamped = f_max(f_min(x, f_set1(88.72f)), f_set1(-87.3f));
    v16i n = i_from_f(f_mul(clamped, f_set1(1.44269504f)));
    v16f whole = f_from_i(n);
    v16f r = f_fma(whole, f_set1(-0.693145752f), clamped);
    r = f_fma(whole, f_set1(-1.42860677e-6f), r);
    v16f p = f_set1(1.3888889e-3f);
    p = f_fma(p, r, f_set1(8.3333333e-3f));
    p = f_fma(p, r, f_set1(4.1666667e-2f));
    p = f_fma(p, r, f_set1(0.16666667f));
    p = f_fma(p, r, f_set1(0.5f));
    p = f_fma(p, r, f_set1(1.0f));
    p = f_fma(p, r, f_set1(1.0f));
    /* Two factors: 2^128 alone is no float. */
    v16i half = i_sub(n, i_set1(1));
    v16f y = f_mul(f_mul(p, f_bits(i_sll(i_add(half, i_set1(127)), 23))), f_set1(2.0f));
    /* Ordered as integers, floats below zero fall with their magnitude: both ends by the bits of |x|. */
    v16i bits = i_bits(x), magnitude = i_and(bits, i_set1(0x7FFFFFFF));
    v16f end = f_where_greater(i_zero(), bits, f_zero(), f_set1(INFINITY));
    v16f limit = f_where_greater(i_zero(), bits, f_set1(87.3f), f_set1(88.72f));
    y = f_where_greater(magnitude, i_bits(limit), end, y);
    return f_bits(i_where_nan(x, i_bits(x), i_bits(y)));
}
INLINE v16f f_sigmoid(v16f x) { return f_div(f_set1(1), f_add(f_set1(1), f_exp(f_sub(f_zero(), x)))); }
INLINE v16f f_silu(v16f x) { return f_div(x, f_add(f_set1(1), f_exp(f_sub(f_zero(), x)))); }
INLINE float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }
INLINE float sigmoid(float x) { return 1 / (1 + expf(-x)); }
