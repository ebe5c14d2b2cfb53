/* The causal depthwise convolution of Gated DeltaNet and its SiLU, lanes are channels.
 *
 * The state keeps the last W - 1 inputs of a channel side by side ([C][W - 1]), so 16 channels are 16 (W - 1)
 * elements, taken apart through a buffer. A task is CONV_CHANNELS channels of one sequence. */
#pragma once
#include "elementary.h"

#define CONV_CHANNELS 256
#define CONV_TAPS 4

INLINE int64_t conv_chunks(const Conv *op) { return (op->channels + CONV_CHANNELS - 1) / CONV_CHANNELS; }
static int64_t conv_tasks(const Conv *op) { return op->sequences * conv_chunks(op); }

/* `columns` rows of 16 lanes from `count` channels that hold `columns` elements each, side by side; and back. */
INLINE void load_channels(const void *data, int64_t dtype, int64_t at, int64_t columns, int64_t count, v16f *out)
{
    float all[16 * CONV_TAPS], lanes[16] = {0};
    const int64_t elements = count * columns;
    for (int64_t i = 0; i < elements; i += 16)
        f_store(all + i,
                i + 16 <= elements ? load_at(data, dtype, at + i) : load_some(data, dtype, at + i, elements - i));
    for (int64_t t = 0; t < columns; t++) {
        for (int64_t l = 0; l < count; l++) lanes[l] = all[l * columns + t];
        out[t] = f_load(lanes);
    }
}
INLINE void store_channels(void *data, int64_t dtype, int64_t at, int64_t columns, int64_t count, const v16f *in)
{
    float all[16 * CONV_TAPS], lanes[16];
    const int64_t elements = count * columns;
    for (int64_t t = 0; t < columns; t++) {
        f_store(lanes, in[t]);
        for (int64_t l = 0; l < count; l++) all[l * columns + t] = lanes[l];
    }
    for (int64_t i = 0; i < elements; i += 16)
        if (i + 16 <= elements) store_at(data, dtype, at + i, f_load(all + i));
        else store_some(data, dtype, at + i, f_load(all + i), elements - i);
}

/* `count` <= 16 channels from c on; constants where they are the usual ones, so that nothing below loops over
 * unknown lengths. */
INLINE void conv_channels(const Conv *op, int64_t sequence, int64_t row0, int64_t steps, int64_t c, int64_t count,
                          int64_t taps)
{
    const Rows *state = &op->state;
    const int64_t before = taps - 1;
    v16f history[CONV_TAPS], weights[CONV_TAPS];
    load_channels(state->data, state->dtype, op->source[sequence] * state->stride + c * before, before, count, history);
    load_channels(op->weight.data, op->weight.dtype, c * taps, taps, count, weights);
    for (int64_t s = 0; s < steps; s++) {
        v16f x = row_load(&op->x, row0 + s, c, op->channels), y = f_mul(x, weights[before]);
        for (int64_t t = 0; t < before; t++) y = f_fma(history[t], weights[t], y);
        row_store(&op->y, row0 + s, c, op->channels, f_silu(y));
        for (int64_t t = 0; t + 1 < before; t++) history[t] = history[t + 1];
        history[before - 1] = as_stored(state->dtype, x); /* whether the next token comes now or in a step of its own */
        if (!op->target && s + 1 < steps) continue;
        const int64_t slot = op->target ? op->target[row0 + s] : op->source[sequence];
        store_channels(state->data, state->dtype, slot * state->stride + c * before, before, count, history);
    }
}

static void conv_task(const Conv *op, int64_t task, float *scratch)
{
    (void)scratch;
    const int64_t sequence = task / conv_chunks(op), first = task % conv_chunks(op) * CONV_CHANNELS;
    const int64_t last = first + CONV_CHANNELS < op->channels ? first + CONV_CHANNELS : op->channels;
    const int64_t row0 = op->cu_seqlens ? op->cu_seqlens[sequence] : sequence * op->steps;
    const int64_t steps = op->cu_seqlens ? op->cu_seqlens[sequence + 1] - row0 : op->steps;
    if (steps == 0) return;
    for (int64_t c = first; c < last; c += 16)
        if (op->taps == 4 && last - c >= 16) conv_channels(op, sequence, row0, steps, c, 16, 4);
        else conv_channels(op, sequence, row0, steps, c, last - c < 16 ? last - c : 16, op->taps);
}
