/* Sixteen lanes as one AVX-512 register (F, BW, DQ, VL; VNNI fuses the int16 dot product). */
#pragma once
#include <immintrin.h>

typedef __m512 v16f;
typedef __m512i v16i;

/* Registers: 24 sums of 12 tokens x 32 rows, 2 of weights, the rest for the broadcast token. */
#define GEMM_TOKENS 12
#define GEMM_VECTORS 2
#define GEMV_GROUP 4

INLINE v16f f_zero(void) { return _mm512_setzero_ps(); }
INLINE v16f f_set1(float a) { return _mm512_set1_ps(a); }
INLINE v16f f_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void f_store(float *p, v16f a) { _mm512_storeu_ps(p, a); }
INLINE v16f f_add(v16f a, v16f b) { return _mm512_add_ps(a, b); }
INLINE v16f f_sub(v16f a, v16f b) { return _mm512_sub_ps(a, b); }
INLINE v16f f_mul(v16f a, v16f b) { return _mm512_mul_ps(a, b); }
INLINE v16f f_div(v16f a, v16f b) { return _mm512_div_ps(a, b); }
INLINE v16f f_fma(v16f a, v16f b, v16f c) { return _mm512_fmadd_ps(a, b, c); }
INLINE v16f f_max(v16f a, v16f b) { return _mm512_max_ps(a, b); }
INLINE v16f f_min(v16f a, v16f b) { return _mm512_min_ps(a, b); }
INLINE v16f f_abs(v16f a) { return _mm512_abs_ps(a); }
INLINE v16f f_from_i(v16i a) { return _mm512_cvtepi32_ps(a); }
INLINE v16f f_bits(v16i a) { return _mm512_castsi512_ps(a); }

INLINE v16i i_zero(void) { return _mm512_setzero_si512(); }
INLINE v16i i_set1(int32_t a) { return _mm512_set1_epi32(a); }
INLINE v16i i_keep(v16i a)
{
    __asm__("" : "+v"(a));
    return a;
}
INLINE v16i i_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void i_store(void *p, v16i a) { _mm512_storeu_si512(p, a); }
INLINE v16i i_add(v16i a, v16i b) { return _mm512_add_epi32(a, b); }
INLINE v16i i_sub(v16i a, v16i b) { return _mm512_sub_epi32(a, b); }
INLINE v16i i_mul(v16i a, v16i b) { return _mm512_mullo_epi32(a, b); }
INLINE v16i i_max(v16i a, v16i b) { return _mm512_max_epi32(a, b); }
INLINE v16i i_and(v16i a, v16i b) { return _mm512_and_si512(a, b); }
INLINE v16i i_from_f(v16f a) { return _mm512_cvtps_epi32(a); }
INLINE v16i i_bits(v16f a) { return _mm512_castps_si512(a); }
#define i_sll(a, n) _mm512_slli_epi32(a, n)
#define i_srl(a, n) _mm512_srli_epi32(a, n)
#define i_sra(a, n) _mm512_srai_epi32(a, n)
#define w_sll(a, n) _mm512_slli_epi16(a, n)
#define w_srl(a, n) _mm512_srli_epi16(a, n)
#define w_sra(a, n) _mm512_srai_epi16(a, n)

INLINE void w_dot(v16i *c, v16i a, v16i b)
{
#ifdef __AVX512VNNI__
    /* Not the intrinsic, and in place: GCC 12 copies the accumulator before and after otherwise, and spills half of a
     * tile's. */
    __asm__("vpdpwssd %2, %1, %0" : "+v"(*c) : "v"(a), "v"(b));
#else
    *c = _mm512_add_epi32(*c, _mm512_madd_epi16(a, b));
#endif
}

/* Twice 16 int32 -> 32 int16, those outside their range the nearest one. */
INLINE v16i w_pair(v16i a, v16i b)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtsepi32_epi16(a)), _mm512_cvtsepi32_epi16(b), 1);
}
INLINE v16i i_load_bytes(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE void i_store_bytes(int8_t *p, v16i a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(a)); }
INLINE v16i i_load_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void i_store_u16(uint16_t *p, v16i a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a)); }
INLINE v16f f_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void f_store_f16(uint16_t *p, v16f a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, 0)); }

/* Lanes where a > b (signed) become c. */
INLINE v16f f_where_greater(v16i a, v16i b, v16f c, v16f otherwise)
{
    return _mm512_mask_mov_ps(otherwise, _mm512_cmpgt_epi32_mask(a, b), c);
}
/* Lanes that are not a number become c. */
INLINE v16i i_where_nan(v16f a, v16i c, v16i otherwise)
{
    return _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), c);
}

INLINE float f_sum(v16f a)
{
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
INLINE int32_t i_sum(v16i a) { return _mm512_reduce_add_epi32(a); }
INLINE int32_t i_reduce_max(v16i a) { return _mm512_reduce_max_epi32(a); }
INLINE float f_reduce_max(v16f a) { return _mm512_reduce_max_ps(a); }

INLINE v16f f_sum16(const v16f *a)
{
    v16f b[8], c[4], d[2];
    for (int k = 0; k < 8; k++)
        b[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a[k], a[k + 8], 0x44), _mm512_shuffle_f32x4(a[k], a[k + 8], 0xEE));
    for (int k = 0; k < 4; k++)
        c[k] = _mm512_add_ps(_mm512_shuffle_f32x4(b[k], b[k + 4], 0x88), _mm512_shuffle_f32x4(b[k], b[k + 4], 0xDD));
    for (int k = 0; k < 2; k++) {
        __m512d x = _mm512_castps_pd(c[k]), y = _mm512_castps_pd(c[k + 2]);
        d[k] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    v16f e = _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xDD));
    /* The folds left vector 0, 2, 1, 3 (+ 0, 8, 4, 12 by quarter) in lanes 0, 1, 2, 3 of each quarter. */
    const v16i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(order, e);
}
