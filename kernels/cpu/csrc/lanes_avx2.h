/* Sixteen lanes as two AVX2 registers (with FMA and F16C). */
#pragma once
#include <immintrin.h>

typedef struct {
    __m256 a, b;
} v16f;
typedef struct {
    __m256i a, b;
} v16i;

/* Registers: 12 sums of 6 tokens x 16 rows, 2 of weights, 1 of the broadcast token, 1 spare: all sixteen. */
#define GEMM_TOKENS 6
#define GEMM_VECTORS 1
#define GEMV_GROUP 1

#define F2(f, x, y) \
    (v16f) { f((x).a, (y).a), f((x).b, (y).b) }
#define I2(f, x, y) \
    (v16i) { f((x).a, (y).a), f((x).b, (y).b) }

INLINE v16f f_set1(float a) { return (v16f){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INLINE v16f f_zero(void) { return f_set1(0); }
INLINE v16f f_load(const float *p) { return (v16f){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void f_store(float *p, v16f x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE v16f f_add(v16f x, v16f y) { return F2(_mm256_add_ps, x, y); }
INLINE v16f f_sub(v16f x, v16f y) { return F2(_mm256_sub_ps, x, y); }
INLINE v16f f_mul(v16f x, v16f y) { return F2(_mm256_mul_ps, x, y); }
INLINE v16f f_div(v16f x, v16f y) { return F2(_mm256_div_ps, x, y); }
INLINE v16f f_fma(v16f x, v16f y, v16f z)
{
    return (v16f){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE v16f f_max(v16f x, v16f y) { return F2(_mm256_max_ps, x, y); }
INLINE v16f f_min(v16f x, v16f y) { return F2(_mm256_min_ps, x, y); }
INLINE v16f f_abs(v16f x) { return F2(_mm256_andnot_ps, f_set1(-0.0f), x); }
INLINE v16f f_from_i(v16i x) { return (v16f){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE v16f f_bits(v16i x) { return (v16f){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

INLINE v16i i_set1(int32_t a) { return (v16i){_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
INLINE v16i i_zero(void) { return i_set1(0); }
INLINE v16i i_keep(v16i v)
{
    __asm__("" : "+x"(v.a), "+x"(v.b));
    return v;
}
INLINE v16i i_load(const void *p)
{
    return (v16i){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
INLINE void i_store(void *p, v16i x)
{
    _mm256_storeu_si256((__m256i *)p, x.a), _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
INLINE v16i i_add(v16i x, v16i y) { return I2(_mm256_add_epi32, x, y); }
INLINE v16i i_sub(v16i x, v16i y) { return I2(_mm256_sub_epi32, x, y); }
INLINE v16i i_mul(v16i x, v16i y) { return I2(_mm256_mullo_epi32, x, y); }
INLINE v16i i_max(v16i x, v16i y) { return I2(_mm256_max_epi32, x, y); }
INLINE v16i i_and(v16i x, v16i y) { return I2(_mm256_and_si256, x, y); }
INLINE v16i i_from_f(v16f x) { return (v16i){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE v16i i_bits(v16f x) { return (v16i){_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
#define i_sll(x, n) ((v16i){_mm256_slli_epi32((x).a, n), _mm256_slli_epi32((x).b, n)})
#define i_srl(x, n) ((v16i){_mm256_srli_epi32((x).a, n), _mm256_srli_epi32((x).b, n)})
#define i_sra(x, n) ((v16i){_mm256_srai_epi32((x).a, n), _mm256_srai_epi32((x).b, n)})
#define w_sll(x, n) ((v16i){_mm256_slli_epi16((x).a, n), _mm256_slli_epi16((x).b, n)})
#define w_srl(x, n) ((v16i){_mm256_srli_epi16((x).a, n), _mm256_srli_epi16((x).b, n)})
#define w_sra(x, n) ((v16i){_mm256_srai_epi16((x).a, n), _mm256_srai_epi16((x).b, n)})

INLINE void w_dot(v16i *c, v16i x, v16i y) { *c = i_add(*c, I2(_mm256_madd_epi16, x, y)); }

INLINE v16i w_pair(v16i x, v16i y)
{
    return (v16i){_mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8),
                  _mm256_permute4x64_epi64(_mm256_packs_epi32(y.a, y.b), 0xD8)};
}
INLINE v16i i_load_bytes(const int8_t *p)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (v16i){_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
INLINE void i_store_bytes(int8_t *p, v16i x)
{
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}
INLINE v16i i_load_u16(const uint16_t *p)
{
    return (v16i){_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
                  _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + 1))};
}
INLINE void i_store_u16(uint16_t *p, v16i x)
{
    __m256i mask = _mm256_set1_epi32(0xFFFF);
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xD8));
}
INLINE v16f f_load_f16(const uint16_t *p)
{
    return (v16f){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                  _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1))};
}
INLINE void f_store_f16(uint16_t *p, v16f x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph(x.b, 0));
}

INLINE v16f f_where_greater(v16i x, v16i y, v16f c, v16f otherwise)
{
    return (v16f){_mm256_blendv_ps(otherwise.a, c.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(x.a, y.a))),
                  _mm256_blendv_ps(otherwise.b, c.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(x.b, y.b)))};
}
INLINE v16i i_where_nan(v16f x, v16i c, v16i otherwise)
{
    __m256i a = _mm256_castps_si256(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q));
    __m256i b = _mm256_castps_si256(_mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q));
    return (v16i){_mm256_blendv_epi8(otherwise.a, c.a, a), _mm256_blendv_epi8(otherwise.b, c.b, b)};
}

INLINE float f_sum(v16f x)
{
    __m256 b = _mm256_add_ps(x.a, x.b);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
INLINE int32_t i_sum(v16i x)
{
    __m256i b = _mm256_add_epi32(x.a, x.b);
    __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xB1)));
}
INLINE int32_t i_reduce_max(v16i x)
{
    __m256i b = _mm256_max_epi32(x.a, x.b);
    __m128i c = _mm_max_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_max_epi32(c, _mm_shuffle_epi32(c, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xB1)));
}
INLINE float f_reduce_max(v16f x)
{
    __m256 b = _mm256_max_ps(x.a, x.b);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

/* Eight sums over the eight lanes left of each vector, in the order of f_sum. */
INLINE __m256 sum8(const v16f *x)
{
    __m256 b[4], c[2];
    for (int k = 0; k < 4; k++) {
        __m256 y = _mm256_add_ps(x[k].a, x[k].b), z = _mm256_add_ps(x[k + 4].a, x[k + 4].b);
        b[k] = _mm256_add_ps(_mm256_permute2f128_ps(y, z, 0x20), _mm256_permute2f128_ps(y, z, 0x31));
    }
    for (int k = 0; k < 2; k++) {
        __m256d y = _mm256_castps_pd(b[k]), z = _mm256_castps_pd(b[k + 2]);
        c[k] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(y, z)), _mm256_castpd_ps(_mm256_unpackhi_pd(y, z)));
    }
    __m256 d = _mm256_add_ps(_mm256_shuffle_ps(c[0], c[1], 0x88), _mm256_shuffle_ps(c[0], c[1], 0xDD));
    return _mm256_permute_ps(d, 0xD8); /* lanes 0, 2, 1, 3 of each half back into order */
}
INLINE v16f f_sum16(const v16f *x) { return (v16f){sum8(x), sum8(x + 8)}; }
