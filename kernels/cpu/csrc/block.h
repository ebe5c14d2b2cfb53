/* A block of 128 columns of a few rows of W times up to GEMV_GROUP rows of activations: the inside of gemv_rows. */
#pragma once
#include "ahead.h"
#include "matmul.h"

#define GEMV_GROUP 4

/* int4 codes of a block with a scale per 32 columns stay where they are in their words, times CODE_STEPS: a shift less
 * each, and the scale makes up for it. The last one would reach the sign. */
#define CODES_STAY(bits, parts) ((bits) == 4 && (parts) == 4)

INLINE void unpack_block(int bits, int parts, const char *p, v16i *w)
{
    const v16i mask = i_set1(0x000F000F);
    if (bits == 4) {
        v16i four = i_keep(i_load(p)); /* GCC would read the line four times, and the load buffers would be full */
        w[0] = i_and(four, mask), w[3] = w_srl(four, 12);
        if (CODES_STAY(bits, parts)) w[1] = i_and(four, i_set1(0x00F000F0)), w[2] = i_and(four, i_set1(0x0F000F00));
        else w[1] = i_and(w_srl(four, 4), mask), w[2] = i_and(w_srl(four, 8), mask);
    } else {
        for (int i = 0; i < 4; i++) w[i] = w_load_bytes((const int8_t *)p + 32 * i);
    }
}

/* A block of 128 columns of one row of each run: the first run's codes at `codes`, the next ones' `run_bytes` on, and
 * those to ask for at `ahead`, likewise. The factors of run r and stream s lie 16 (r * streams + s) on, a zero point of
 * run r 16 r on, each part's next to the one before. */
typedef struct {
    const char *codes, *ahead;
    int64_t run_bytes;
    const int16_t *words;
    const int32_t *lanes;
    const float *factors;
    const int32_t *zero;
} Block;

INLINE void unpack_run(int bits, int parts, const Block *b, int r, v16i *w)
{
    unpack_block(bits, parts, b->codes + r * b->run_bytes, w);
    for (int64_t line = 0; line < (bits == 4 ? 64 : 128); line += 64) ask_for(b->ahead + r * b->run_bytes + line);
}
INLINE v16i start_of(int zero_kind, const Block *b, int r, int part, v16i lanes)
{
    return zero_kind == ZEROS ? i_mul(lanes, i_set1(b->zero[r * 16 + part])) : lanes;
}
INLINE void add_product(int parts, int part, const v16i *chains, float factor, v16f *y)
{
    v16i sum = parts < 4 ? i_add(chains[0], chains[1]) : chains[0];
    y[part % 2] = f_fma(f_from_i(sum), f_set1(factor), y[part % 2]);
}

/* One stream: what is read of it serves all runs, whose rows are unpacked one after the other. */
INLINE void multiply_stream(int bits, int zero_kind, int parts, int runs, const Block *b, v16f (*y)[GEMV_GROUP][2])
{
    v16i held[4], held_lanes[4];
    for (int j = 0; j < 4; j++) held[j] = runs == 4 ? i_keep(i_load(b->words + 32 * j)) : i_zero();
    for (int part = 0; part < parts; part++)
        held_lanes[part] = zero_kind != NO_ZERO && runs == 4 ? i_keep(i_load(b->lanes + part * 16)) : i_zero();
#pragma GCC unroll 4
    for (int r = 0; r < runs; r++) {
        v16i w[4];
        unpack_run(bits, parts, b, r, w);
        for (int part = 0; part < parts; part++) {
            const v16i lanes = zero_kind == NO_ZERO || runs == 4 ? held_lanes[part] : i_load(b->lanes + part * 16);
            v16i chains[2] = {start_of(zero_kind, b, r, part, lanes), i_zero()};
            for (int j = 4 / parts * part; j < 4 / parts * (part + 1); j++) {
                v16i *chain = chains + (parts < 4 && j % 2);
                *chain = w_dot(*chain, w[j], runs == 4 ? held[j] : i_load(b->words + 32 * j));
            }
            add_product(parts, part, chains, b->factors[r * 16 + part], y[r][0]);
        }
    }
}

/* Several streams: rows are unpacked once for all of them, and a register of activations is read once for all runs. */
INLINE void multiply_streams(int bits, int zero_kind, int parts, int group, int runs, const Block *b,
                             v16f (*y)[GEMV_GROUP][2])
{
    v16i w[2][4];
#pragma GCC unroll 2
    for (int r = 0; r < runs; r++) unpack_run(bits, parts, b, r, w[r]);
#pragma GCC unroll 4
    for (int s = 0; s < group; s++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            const v16i lanes = zero_kind == NO_ZERO ? i_zero() : i_load(b->lanes + (s * parts + part) * 16);
            v16i chains[2][2];
#pragma GCC unroll 2
            for (int r = 0; r < runs; r++)
                chains[r][0] = start_of(zero_kind, b, r, part, lanes), chains[r][1] = i_zero();
#pragma GCC unroll 4
            for (int j = 4 / parts * part; j < 4 / parts * (part + 1); j++) {
                const v16i x = i_load(b->words + s * BLOCK + 32 * j);
#pragma GCC unroll 2
                for (int r = 0; r < runs; r++) {
                    v16i *chain = chains[r] + (parts < 4 && j % 2);
                    *chain = w_dot(*chain, w[r][j], runs > 1 ? i_keep(x) : x);
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < runs; r++)
                add_product(parts, part, chains[r], b->factors[(r * group + s) * 16 + part], y[r][s]);
        }
}
