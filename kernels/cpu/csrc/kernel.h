/* What the pool knows of an operation: how many tasks it has, one of them, and the bytes of scratch that a task
 * needs. */
#pragma once
#include <stdint.h>

typedef struct {
    int64_t (*tasks)(const void *op);
    void (*task)(void *op, int64_t task, float *scratch);
    int64_t (*scratch_bytes)(const void *op);
} Kernel;
