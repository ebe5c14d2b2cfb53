/* Sixteen lanes as four NEON registers (AArch64). */
#pragma once
#include <arm_neon.h>

typedef struct {
    float32x4_t v[4];
} v16f;
typedef struct {
    int32x4_t v[4];
} v16i;

/* Registers: 16 sums of 4 tokens x 16 rows, 4 of weights, the rest for tokens and halves. */
#define GEMM_TOKENS 4
#define GEMM_VECTORS 1
#define GEMV_GROUP 1

#define EACH(type, expression) \
    type r; \
    for (int k = 0; k < 4; k++) r.v[k] = expression; \
    return r

INLINE v16f f_set1(float a) { EACH(v16f, vdupq_n_f32(a)); }
INLINE v16f f_zero(void) { return f_set1(0); }
INLINE v16f f_load(const float *p) { EACH(v16f, vld1q_f32(p + 4 * k)); }
INLINE void f_store(float *p, v16f x)
{
    for (int k = 0; k < 4; k++) vst1q_f32(p + 4 * k, x.v[k]);
}
INLINE v16f f_add(v16f x, v16f y) { EACH(v16f, vaddq_f32(x.v[k], y.v[k])); }
INLINE v16f f_sub(v16f x, v16f y) { EACH(v16f, vsubq_f32(x.v[k], y.v[k])); }
INLINE v16f f_mul(v16f x, v16f y) { EACH(v16f, vmulq_f32(x.v[k], y.v[k])); }
INLINE v16f f_div(v16f x, v16f y) { EACH(v16f, vdivq_f32(x.v[k], y.v[k])); }
INLINE v16f f_fma(v16f x, v16f y, v16f z) { EACH(v16f, vfmaq_f32(z.v[k], x.v[k], y.v[k])); }
INLINE v16f f_max(v16f x, v16f y) { EACH(v16f, vmaxq_f32(x.v[k], y.v[k])); }
INLINE v16f f_min(v16f x, v16f y) { EACH(v16f, vminq_f32(x.v[k], y.v[k])); }
INLINE v16f f_abs(v16f x) { EACH(v16f, vabsq_f32(x.v[k])); }
INLINE v16f f_from_i(v16i x) { EACH(v16f, vcvtq_f32_s32(x.v[k])); }
INLINE v16f f_bits(v16i x) { EACH(v16f, vreinterpretq_f32_s32(x.v[k])); }

INLINE v16i i_set1(int32_t a) { EACH(v16i, vdupq_n_s32(a)); }
INLINE v16i i_zero(void) { return i_set1(0); }
INLINE v16i i_keep(v16i a)
{
    __asm__("" : "+w"(a.v[0]), "+w"(a.v[1]), "+w"(a.v[2]), "+w"(a.v[3]));
    return a;
}
INLINE v16i i_load(const void *p) { EACH(v16i, vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)p + 16 * k))); }
INLINE void i_store(void *p, v16i x)
{
    for (int k = 0; k < 4; k++) vst1q_u8((uint8_t *)p + 16 * k, vreinterpretq_u8_s32(x.v[k]));
}
INLINE v16i i_add(v16i x, v16i y) { EACH(v16i, vaddq_s32(x.v[k], y.v[k])); }
INLINE v16i i_sub(v16i x, v16i y) { EACH(v16i, vsubq_s32(x.v[k], y.v[k])); }
INLINE v16i i_mul(v16i x, v16i y) { EACH(v16i, vmulq_s32(x.v[k], y.v[k])); }
INLINE v16i i_max(v16i x, v16i y) { EACH(v16i, vmaxq_s32(x.v[k], y.v[k])); }
INLINE v16i i_and(v16i x, v16i y) { EACH(v16i, vandq_s32(x.v[k], y.v[k])); }
INLINE v16i i_from_f(v16f x) { EACH(v16i, vcvtnq_s32_f32(x.v[k])); }
INLINE v16i i_bits(v16f x) { EACH(v16i, vreinterpretq_s32_f32(x.v[k])); }
INLINE v16i i_sll(v16i x, int n) { EACH(v16i, vshlq_s32(x.v[k], vdupq_n_s32(n))); }
INLINE v16i i_srl(v16i x, int n)
{
    EACH(v16i, vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.v[k]), vdupq_n_s32(-n))));
}
INLINE v16i i_sra(v16i x, int n) { EACH(v16i, vshlq_s32(x.v[k], vdupq_n_s32(-n))); }
INLINE v16i w_sll(v16i x, int n)
{
    EACH(v16i, vreinterpretq_s32_s16(vshlq_s16(vreinterpretq_s16_s32(x.v[k]), vdupq_n_s16((int16_t)n))));
}
INLINE v16i w_sra(v16i x, int n)
{
    EACH(v16i, vreinterpretq_s32_s16(vshlq_s16(vreinterpretq_s16_s32(x.v[k]), vdupq_n_s16((int16_t)-n))));
}
INLINE v16i w_srl(v16i x, int n)
{
    EACH(v16i, vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(x.v[k]), vdupq_n_s16((int16_t)-n))));
}

/* The even and the odd int16 of four lanes, each narrowed to 64 bits: two widening multiply-adds per four lanes. */
INLINE void w_dot(v16i *c, v16i x, v16i y)
{
    for (int k = 0; k < 4; k++) {
        c->v[k] = vmlal_s16(c->v[k], vmovn_s32(x.v[k]), vmovn_s32(y.v[k]));
        c->v[k] = vmlal_s16(c->v[k], vshrn_n_s32(x.v[k], 16), vshrn_n_s32(y.v[k], 16));
    }
}

INLINE int32x4_t w_narrow(int32x4_t a, int32x4_t b)
{
    return vreinterpretq_s32_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)));
}
INLINE v16i w_pair(v16i x, v16i y)
{
    return (v16i){{w_narrow(x.v[0], x.v[1]), w_narrow(x.v[2], x.v[3]), w_narrow(y.v[0], y.v[1]),
                   w_narrow(y.v[2], y.v[3])}};
}
INLINE v16i i_load_bytes(const int8_t *p)
{
    int16x8_t low = vmovl_s8(vld1_s8(p)), high = vmovl_s8(vld1_s8(p + 8));
    return (v16i){{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                   vmovl_s16(vget_high_s16(high))}};
}
INLINE void i_store_bytes(int8_t *p, v16i x)
{
    vst1_s8(p, vqmovn_s16(vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]))));
    vst1_s8(p + 8, vqmovn_s16(vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]))));
}
INLINE v16i i_load_u16(const uint16_t *p) { EACH(v16i, vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p + 4 * k)))); }
INLINE void i_store_u16(uint16_t *p, v16i x)
{
    for (int k = 0; k < 4; k++) vst1_u16(p + 4 * k, vmovn_u32(vreinterpretq_u32_s32(x.v[k])));
}
INLINE v16f f_load_f16(const uint16_t *p) { EACH(v16f, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * k)))); }
INLINE void f_store_f16(uint16_t *p, v16f x)
{
    for (int k = 0; k < 4; k++) vst1_u16(p + 4 * k, vreinterpret_u16_f16(vcvt_f16_f32(x.v[k])));
}

INLINE v16f f_where_greater(v16i x, v16i y, v16f c, v16f otherwise)
{
    EACH(v16f, vbslq_f32(vcgtq_s32(x.v[k], y.v[k]), c.v[k], otherwise.v[k]));
}
INLINE v16i i_where_nan(v16f x, v16i c, v16i otherwise)
{
    EACH(v16i, vbslq_s32(vceqq_f32(x.v[k], x.v[k]), otherwise.v[k], c.v[k]));
}

INLINE float32x4_t sum4(v16f x) { return vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3])); }
INLINE float f_sum(v16f x)
{
    float32x4_t c = sum4(x);
    float32x2_t d = vadd_f32(vget_low_f32(c), vget_high_f32(c));
    return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
INLINE int32_t i_sum(v16i x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
INLINE int32_t i_reduce_max(v16i x)
{
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
}
INLINE float f_reduce_max(v16f x)
{
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}

INLINE void transpose4(int32x4_t *t)
{
    int32x4x2_t a = vtrnq_s32(t[0], t[1]), b = vtrnq_s32(t[2], t[3]);
    t[0] = vcombine_s32(vget_low_s32(a.val[0]), vget_low_s32(b.val[0]));
    t[1] = vcombine_s32(vget_low_s32(a.val[1]), vget_low_s32(b.val[1]));
    t[2] = vcombine_s32(vget_high_s32(a.val[0]), vget_high_s32(b.val[0]));
    t[3] = vcombine_s32(vget_high_s32(a.val[1]), vget_high_s32(b.val[1]));
}
INLINE v16f f_sum16(const v16f *x)
{
    v16f r;
    for (int q = 0; q < 4; q++) {
        int32x4_t t[4];
        for (int k = 0; k < 4; k++) t[k] = vreinterpretq_s32_f32(sum4(x[4 * q + k]));
        transpose4(t);
        r.v[q] = vaddq_f32(vaddq_f32(vreinterpretq_f32_s32(t[0]), vreinterpretq_f32_s32(t[2])),
                           vaddq_f32(vreinterpretq_f32_s32(t[1]), vreinterpretq_f32_s32(t[3])));
    }
    return r;
}
