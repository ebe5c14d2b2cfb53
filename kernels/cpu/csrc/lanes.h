/* Sixteen lanes of 32 bits, the one vector that all kernels here are written in.
 *
 * Each instruction set spells the same names: one 512-bit register, two of 256 bits, or four of 128. A lane does the
 * same arithmetic everywhere (fused multiply-add, round to nearest even, sums in the order of `f_sum`), so that a
 * result does not depend on the instruction set. Compile with -ffp-contract=off: only the fusions written here happen.
 *
 *   v16f, v16i     16 floats, 16 int32 (or 32 int16: `w_...`)
 *   w_dot(&c, a, b) lane l: c[l] += a[2 l] * b[2 l] + a[2 l + 1] * b[2 l + 1], int16 factors, int32 sums (exact)
 *   i_keep         the same value, which the compiler cannot read again from where it came
 *   f_sum          ((l, l + 8), (l, l + 4), (l, l + 2), (l, l + 1)): the tree of every sum over lanes
 *   f_sum16        16 such sums at once, lane v the sum of vector v
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#elif defined(__ARM_NEON)
#include "lanes_neon.h"
#else
#error "no vector unit that these kernels know: AVX2 with FMA and F16C, AVX-512 F/BW/DQ/VL, or NEON"
#endif
