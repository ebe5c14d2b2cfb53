/* Activations as int16 under a common power of two per 128 columns.
 *
 * The largest of a block takes 15 bits, so bfloat16 (8 bits) down to 1/128 of it is exact, and so is a product with a
 * weight's scale: a one-hot row gives the dequantized column to the last bit. Smaller ones lose what lies below 2^-15
 * of the largest. The second plane of float32 takes the rest, another 15 bits. */
#pragma once
#include "elementary.h"

#define WORD_MAX 32767.0f
/* What int4 codes with a scale per 32 columns are multiplied by in a product (CODES_STAY in gemv.h), by part; a
 * register full. */
static const int32_t CODE_STEPS[16] = {1, 16, 256, 1, 1, 16, 256, 1, 1, 16, 256, 1, 1, 16, 256, 1};

/* One block of one row: its 128 columns. */
INLINE void round_block(const Rounded *out, int64_t block, int64_t row, const v16f *columns)
{
    int64_t streams = out->rows * out->planes;
    const int codes_stay = out->lane_factor != 1 && out->parts == 4;
    v16f largest = f_zero(), trap = f_zero();
    for (int i = 0; i < 8; i++) {
        largest = f_max(largest, f_abs(columns[i]));
        trap = f_fma(columns[i], f_zero(), trap); /* not a number as soon as one of them is infinite or none */
    }
    float amax = f_reduce_max(largest), poison = f_sum(trap), scale = 0, inverse = 0;
    uint32_t exponent;
    memcpy(&exponent, &amax, 4);
    exponent = exponent >> 23 & 255;
    if (exponent > 40 && exponent < 255) { /* below 2^-86 all count as zero */
        const uint32_t power = (exponent - 14) << 23, reciprocal = (254 + 14 - exponent) << 23;
        memcpy(&scale, &power, 4), memcpy(&inverse, &reciprocal, 4);
    }
    v16f rest[8];
    for (int i = 0; i < 8; i++) rest[i] = columns[i];
    for (int64_t plane = 0; plane < out->planes; plane++) {
        int64_t stream = row * out->planes + plane;
        int16_t *words = out->words + (block * streams + stream) * BLOCK;
        v16i pairs[4]; /* not read back from memory: a load across two stores would wait for both */
        for (int i = 0; i < 4; i++) {
            v16i word[2];
            for (int k = 0; k < 2; k++) {
                v16f *x = rest + 2 * i + k;
                word[k] = i_from_f(f_max(f_min(f_mul(*x, f_set1(inverse)), f_set1(WORD_MAX)), f_set1(-WORD_MAX)));
                *x = f_fma(f_from_i(word[k]), f_set1(-scale), *x);
            }
            pairs[i] = w_pair(word[0], word[1]);
            i_store(words + 32 * i, pairs[i]);
        }
        out->scales[block * streams + stream] = scale + poison;
        const v16i ones = i_set1(0x00010001), minus = i_set1((int32_t)-out->lane_factor);
        v16i lanes = i_zero();
        for (int nibble = 0; nibble < 4; nibble++) {
            lanes = w_dot(lanes, pairs[nibble], ones);
            int per_part = 4 / (int)out->parts;
            if ((nibble + 1) % per_part == 0) {
                int64_t part = nibble / per_part;
                lanes = i_mul(lanes, minus);
                i_store(out->lanes + ((block * streams + stream) * out->parts + part) * 16,
                        codes_stay ? i_mul(lanes, i_set1(CODE_STEPS[part])) : lanes);
                out->sums[(block * out->parts + part) * streams + stream] = i_sum(lanes);
                lanes = i_zero();
            }
        }
        inverse *= 32768.0f;
        scale *= 1 / 32768.0f;
    }
}

/* A task is ROUND_TASK_BLOCKS blocks of one row. */
#define ROUND_TASK_BLOCKS 8
INLINE int64_t round_chunks(const Round *op)
{
    const int64_t columns = ROUND_TASK_BLOCKS * BLOCK;
    return (op->columns + columns - 1) / columns;
}
static int64_t round_tasks(const Round *op) { return op->rows * round_chunks(op); }

static v16f round_source(const Round *op, int64_t row, int64_t i)
{
    if (op->order) {
        float lanes[16] = {0};
        for (int64_t l = 0; l < 16 && i + l < op->columns; l++)
            lanes[l] = load_one(op->source.data, op->source.dtype, row * op->source.stride + op->order[i + l]);
        return f_load(lanes);
    }
    v16f x = row_load(&op->source, row, i, op->columns);
    if (!op->gate.data) return x;
    v16f gate = row_load(&op->gate, row, i, op->columns);
    return f_mul(op->gate_is_sigmoid ? f_sigmoid(gate) : f_silu(gate), x);
}

static void round_task(const Round *op, int64_t task, float *scratch)
{
    (void)scratch;
    const int64_t row = task / round_chunks(op), first = task % round_chunks(op) * ROUND_TASK_BLOCKS;
    const int64_t source = op->gather ? op->gather[row] : row, blocks = (op->columns + BLOCK - 1) / BLOCK;
    for (int64_t block = first; block < first + ROUND_TASK_BLOCKS && block < blocks; block++) {
        v16f x[8];
        for (int i = 0; i < 8; i++) {
            int64_t column = block * BLOCK + 16 * i;
            x[i] = column < op->columns ? round_source(op, source, column) : f_zero();
            if (op->y.data && column < op->columns) row_store(&op->y, row, column, op->columns, x[i]);
        }
        if (op->out) round_block(op->out, block, row, x);
    }
}
