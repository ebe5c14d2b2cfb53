/* All kernels for one instruction set: compiled with its flags into a library of its own. */
#include "kernel.h"
#include "attention.h"
#include "conv.h"
#include "delta.h"
#include "matmul_tasks.h"
#include "mixture.h"
#include "read.h"
#include "rounding.h"

static int64_t no_scratch(const void *op) { return (void)op, 0; }
#define TASKS(f) (int64_t (*)(const void *)) f
#define TASK(f) (void (*)(void *, int64_t, float *)) f
#define ASK(f) (void (*)(const void *, int64_t, int64_t)) f
#define JOINS(f) (int (*)(const void *)) f
#define JOINED(f) (void (*)(const void *, int64_t, int64_t, float *)) f
#define PREPARE(f) (void (*)(const void *, float *)) f

const Kernel qwenfit_kernels[KINDS] = {
    [ROUND] = {TASKS(round_tasks), TASK(round_task), no_scratch},
    [MATMUL] = {TASKS(matmul_tasks), TASK(matmul_task), TASKS(matmul_scratch_bytes), ASK(matmul_ask),
                JOINS(matmul_joins), JOINED(matmul_joined), PREPARE(matmul_prepare)},
    [NORM] = {TASKS(norm_tasks), TASK(norm_task), TASKS(norm_scratch_bytes)},
    [CONV_UPDATE] = {TASKS(conv_tasks), TASK(conv_task), no_scratch},
    [CONV_PREFILL] = {TASKS(conv_tasks), TASK(conv_task), no_scratch},
    [DELTA_STEP] = {TASKS(delta_tasks), TASK(delta_task), no_scratch},
    [DELTA_PREFILL] = {TASKS(delta_tasks), TASK(delta_prefill_task), TASKS(delta_prefill_scratch_bytes)},
    [ROPE_STORE] = {TASKS(rope_store_tasks), TASK(rope_store_task), no_scratch},
    [ATTENTION] = {TASKS(attention_tasks), TASK(attention_task), TASKS(attention_scratch_bytes)},
    [ATTENTION_JOIN] = {TASKS(join_tasks), TASK(join_task), no_scratch},
    [EMBED] = {TASKS(embed_tasks), TASK(embed_task), no_scratch},
    [ROUTE] = {TASKS(route_tasks), TASK(route_task), TASKS(route_scratch_bytes)},
    [COMBINE] = {TASKS(combine_tasks), TASK(combine_task), no_scratch},
    [READ] = {TASKS(read_tasks), TASK(read_task), no_scratch},
    [FIND_SCALES] = {TASKS(find_scales_tasks), TASK(find_scales_task), no_scratch},
    [SOLVE_COLUMNS] = {TASKS(solve_columns_tasks), TASK(solve_columns_task), no_scratch},
    [ROUND_GROUPS] = {TASKS(round_groups_tasks), TASK(round_groups_task), no_scratch},
};
