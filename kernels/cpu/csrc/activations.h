/* Activations as int16 under a common power of two per 128 columns.
 *
 * The largest of a block takes 15 bits, so bfloat16 (8 bits) down to 1/128 of it is exact, and so is a product with a
 * weight's scale: a one-hot row gives the dequantized column to the last bit. Smaller ones lose what lies below 2^-15
 * of the largest. The second plane of float32 takes the rest, another 15 bits. */
#pragma once
#include "elementary.h"

#define WORD_MAX 32767.0f

/* What a word of the first plane stands for, and one over it; 0 for a block below 2^-86, whose columns all count as zero.
 * Not a number as soon as one of the columns is infinite or none: their bits are larger than those of any number. */
typedef struct {
    float scale, inverse;
} Steps;
INLINE Steps steps_of(const v16f *columns)
{
    v16i largest = i_zero();
    for (int i = 0; i < 8; i++) largest = i_max(largest, i_bits(f_abs(columns[i])));
    const uint32_t exponent = (uint32_t)i_reduce_max(largest) >> 23;
    if (exponent == 255) return (Steps){NAN, 0};
    if (exponent <= 40) return (Steps){0, 0};
    const uint32_t power = (exponent - 14) << 23, reciprocal = (254 + 14 - exponent) << 23;
    Steps steps;
    memcpy(&steps.scale, &power, 4), memcpy(&steps.inverse, &reciprocal, 4);
    return steps;
}

INLINE void store_sums(const Rounded *out, int64_t block, int64_t stream, int64_t streams, const v16i *pairs)
{
    const int per_part = 4 / (int)out->parts;
    v16i lanes = i_zero();
    for (int quarter = 0; quarter < 4; quarter++) {
        w_dot(&lanes, pairs[quarter], i_set1(0x00010001));
        if ((quarter + 1) % per_part) continue;
        out->sums[(block * out->parts + quarter / per_part) * streams + stream] =
            (int32_t)-out->zero_factor * i_sum(lanes);
        lanes = i_zero();
    }
}

/* One block of one row, its 128 columns, in one plane: what is above WORD_MAX by rounding is brought back as it is
 * stored. */
INLINE void round_once(const Rounded *out, int64_t block, int64_t row, const v16f *columns)
{
    const Steps steps = steps_of(columns);
    v16i pairs[4]; /* not read back from memory: a load across two stores would wait for both */
    for (int i = 0; i < 4; i++) {
        v16i word[2];
        for (int k = 0; k < 2; k++) word[k] = i_from_f(f_mul(columns[2 * i + k], f_set1(steps.inverse)));
        pairs[i] = w_pair(word[0], word[1]);
        i_store(out->words + (block * out->rows + row) * BLOCK + 32 * i, pairs[i]);
    }
    out->scales[block * out->rows + row] = steps.scale;
    store_sums(out, block, row, out->rows, pairs);
}

/* The same in two planes: the second takes what the first left. */
INLINE void round_twice(const Rounded *out, int64_t block, int64_t row, const v16f *columns)
{
    const int64_t streams = 2 * out->rows;
    Steps steps = steps_of(columns);
    v16f rest[8];
    for (int i = 0; i < 8; i++) rest[i] = columns[i];
    for (int64_t stream = 2 * row; stream < 2 * row + 2; stream++) {
        v16i pairs[4];
        for (int i = 0; i < 4; i++) {
            v16i word[2];
            for (int k = 0; k < 2; k++) {
                v16f *x = rest + 2 * i + k;
                const v16f bounded = f_min(f_mul(*x, f_set1(steps.inverse)), f_set1(WORD_MAX));
                word[k] = i_from_f(f_max(bounded, f_set1(-WORD_MAX)));
                *x = f_fma(f_from_i(word[k]), f_set1(-steps.scale), *x);
            }
            pairs[i] = w_pair(word[0], word[1]);
            i_store(out->words + (block * streams + stream) * BLOCK + 32 * i, pairs[i]);
        }
        out->scales[block * streams + stream] = steps.scale;
        store_sums(out, block, stream, streams, pairs);
        steps.inverse *= 32768.0f;
        steps.scale *= 1 / 32768.0f;
    }
}

INLINE void round_block(const Rounded *out, int64_t block, int64_t row, const v16f *columns)
{
    if (out->planes == 1) round_once(out, block, row, columns);
    else round_twice(out, block, row, columns);
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

/* A block of a row as it is, none of it behind the last column. */
INLINE void read_block(const Rows *source, int64_t row, int64_t block, v16f *x)
{
    const int64_t at = row * source->stride + block * BLOCK;
    if (source->dtype == BFLOAT16) /* the most frequent: no question asked for each register */
        for (int i = 0; i < 8; i++) x[i] = bf16_load((const uint16_t *)source->data + at + 16 * i);
    else
        for (int i = 0; i < 8; i++) x[i] = load_at(source->data, source->dtype, at + 16 * i);
}

static void round_task(const Round *op, int64_t task, float *scratch)
{
    (void)scratch;
    const int64_t row = task / round_chunks(op), first = task % round_chunks(op) * ROUND_TASK_BLOCKS;
    const int64_t source = op->gather ? op->gather[row] : row, blocks = (op->columns + BLOCK - 1) / BLOCK;
    const int is_plain = !op->order && !op->gate.data && !op->y.data;
    for (int64_t block = first; block < first + ROUND_TASK_BLOCKS && block < blocks; block++) {
        v16f x[8];
        if (is_plain && (block + 1) * BLOCK <= op->columns) read_block(&op->source, source, block, x);
        else
            for (int i = 0; i < 8; i++) {
                const int64_t column = block * BLOCK + 16 * i;
                x[i] = column < op->columns ? round_source(op, source, column) : f_zero();
                if (op->y.data && column < op->columns) row_store(&op->y, row, column, op->columns, x[i]);
            }
        if (op->out) round_block(op->out, block, row, x);
    }
}
