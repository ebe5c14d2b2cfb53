/* A plain sum over memory: how fast bytes can come in, by the same threads as the matrices.
 *
 * A task is read as `streams` pieces side by side, each asked for `ahead_bytes` before (0: the processor's own
 * prefetchers alone). What is fastest depends on the processor: bench_cpu takes the best of several. */
#pragma once
#include "elementary.h"

#define READ_TASK_BYTES (1 << 20)
#define READ_MOST_STREAMS 4

INLINE uint32_t read_pieces(int streams, int asked, const char *p, int64_t bytes, int64_t ahead)
{
    const int64_t lines = bytes / 64 / streams;
    v16i sums[READ_MOST_STREAMS] = {i_zero(), i_zero(), i_zero(), i_zero()};
    for (int64_t at = 0; at < lines * 64; at += 64)
        for (int s = 0; s < streams; s++) {
            if (asked) __builtin_prefetch(p + s * lines * 64 + at + ahead);
            sums[s] = i_add(sums[s], i_load(p + s * lines * 64 + at));
        }
    return (uint32_t)i_sum(i_add(i_add(sums[0], sums[1]), i_add(sums[2], sums[3])));
}

static int64_t read_tasks(const Read *op) { return (op->bytes + READ_TASK_BYTES - 1) / READ_TASK_BYTES; }
static void read_task(Read *op, int64_t task, float *scratch)
{
    (void)scratch;
    const char *p = (const char *)op->data + task * READ_TASK_BYTES;
    const int64_t left = op->bytes - task * READ_TASK_BYTES, bytes = left < READ_TASK_BYTES ? left : READ_TASK_BYTES;
    uint32_t sum = op->streams == 1 ? op->ahead_bytes ? read_pieces(1, 1, p, bytes, op->ahead_bytes)
                                                      : read_pieces(1, 0, p, bytes, 0)
                   : op->ahead_bytes ? read_pieces(READ_MOST_STREAMS, 1, p, bytes, op->ahead_bytes)
                                     : read_pieces(READ_MOST_STREAMS, 0, p, bytes, 0);
    __atomic_fetch_add(&op->sum, (uint64_t)sum, __ATOMIC_RELAXED);
}
