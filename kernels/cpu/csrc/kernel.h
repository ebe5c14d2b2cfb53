/* What the pool knows of an operation: how many tasks it has, one of them, the bytes of scratch that a task needs;
 * how to ask memory for what a task reads first, one of ASK_STEPS steps (null: it asks for nothing); whether neighbouring
 * tasks are alike and may be done as one, and how (null: they are not); what a thread puts into its scratch before its
 * first task of the operation (null: nothing). */
#pragma once
#include <stdint.h>

#define ASK_STEPS 32

typedef struct {
    int64_t (*tasks)(const void *op);
    void (*task)(void *op, int64_t task, float *scratch);
    int64_t (*scratch_bytes)(const void *op);
    void (*ask)(const void *op, int64_t task, int64_t step);
    int (*joins)(const void *op);
    void (*joined)(const void *op, int64_t first, int64_t count, float *scratch);
    void (*prepare)(const void *op, float *scratch);
} Kernel;
