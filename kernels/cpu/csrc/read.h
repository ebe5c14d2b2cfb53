/* A plain sum over memory: how fast bytes can come in, by the same threads and chunks as the matrices. */
#pragma once
#include "elementary.h"

#define READ_TASK_BYTES 65536
static int64_t read_tasks(const Read *op) { return op->bytes / READ_TASK_BYTES; }
static void read_task(Read *op, int64_t task, float *scratch)
{
    (void)scratch;
    const char *p = (const char *)op->data + task * READ_TASK_BYTES;
    v16i sums[4] = {i_zero(), i_zero(), i_zero(), i_zero()};
    for (int64_t at = 0; at < READ_TASK_BYTES; at += 256) {
        __builtin_prefetch(p + at + 1024), __builtin_prefetch(p + at + 1152);
        for (int k = 0; k < 4; k++) sums[k] = i_add(sums[k], i_load(p + at + 64 * k));
    }
    int32_t sum = i_sum(i_add(i_add(sums[0], sums[1]), i_add(sums[2], sums[3])));
    __atomic_fetch_add(&op->sum, (uint64_t)(uint32_t)sum, __ATOMIC_RELAXED);
}
