/* What the kernels are told: one structure per operation, mirrored field by field in kernels/cpu/operations.py.
 *
 * Every field has 8 bytes, so that no compiler pads. A program is an array of pointers to operations; each starts with
 * its kind. Pointers stay valid while a program runs; nothing here is owned by the kernels. Strides count elements. */
#pragma once
#include <stdint.h>

enum { FLOAT32, BFLOAT16, FLOAT16, INT8 };
enum {
    ROUND,
    MATMUL,
    NORM,
    CONV_UPDATE,
    CONV_PREFILL,
    DELTA_STEP,
    DELTA_PREFILL,
    ROPE_STORE,
    ATTENTION,
    ATTENTION_JOIN,
    EMBED,
    ROUTE,
    COMBINE,
    READ,
    FIND_SCALES,
    SOLVE_COLUMNS,
    ROUND_GROUPS,
    KINDS
};

#define BLOCK 128 /* columns of a block: 64 bytes of int4 codes */

/* Rows of a matrix: element i of row r is data[r * stride + i] of type `dtype`. */
typedef struct {
    void *data;
    int64_t dtype, stride;
} Rows;

/* Activations as block fixed point: x[r][128 b + i] = words[b][s][i] * scales[b][s], s = r * planes + plane, summed
 * over the planes. One plane keeps 15 bits and a sign under the largest of 128, two keep 31. Zero points need sums of
 * words: sums[b][p][s] is minus zero_factor times the sum of the words in part p of the block. A part is 128 / parts
 * columns: what shares a scale of the weights. zero_factor is 8 for symmetric int4 (codes stand around 8), 1 where the
 * matrix has zero points to multiply by. */
typedef struct {
    int16_t *words;
    float *scales;
    int32_t *sums;
    int64_t blocks, rows, planes, parts, zero_factor;
} Rounded;

/* ROUND: sources are rows of `source`, or by `gather` (row r is source[gather[r]]), columns by `order`; with `gate`
 * rows, silu(gate) * source; with `gate_is_sigmoid`, sigmoid(gate) * source. `y`, if its data is not null, receives
 * the rows as floats; `out` may be null then. */
typedef struct {
    int64_t kind;
    Rows source, gate;
    int64_t gate_is_sigmoid;
    const int32_t *gather, *order;
    int64_t rows, columns;
    Rows y;
    Rounded *out;
} Round;

/* One quantized matrix (bits 4 or 8) in tiles of 16 rows, or one of floats (bits 0, dtype of `codes` in code_dtype), or a
 * stack of them. */
typedef struct {
    const void *codes;
    const void *scales, *zeros; /* [padded_rows / 16][groups][16], zeros may be null */
    const void *bias;           /* of y's dtype, may be null */
    int64_t bits, code_dtype, scale_dtype, group_size, rows, padded_rows, columns; /* columns: padded to 128 */
    int64_t expert_code_bytes, expert_scales;
    Rows y;
} Matrix;

/* MATMUL: every matrix times the same rows. Quantized ones read `x`, those of floats read `floats`. For a stack, slot
 * i holds rows offsets[i] .. offsets[i + 1] - 1 of expert experts[i] (null: i); `*active` slots of `slots` are in use
 * (null: all). A task is task_rows rows of a matrix: 16, or a multiple of 32. With `rounding`, whose one row `x` has the
 * shape of, every thread rounds that row for itself, into its scratch: nobody waits for it, and no line of it goes from
 * core to core. */
typedef struct {
    int64_t kind;
    Matrix *matrices;
    int64_t count;
    const Rounded *x;
    Rows floats;
    int64_t rows;
    const int32_t *offsets, *experts, *active;
    int64_t slots, task_rows;
    const Round *rounding;
} Matmul;

/* NORM: residual += x (if residual.data), y = rmsnorm(residual or x) * (weight + offset) [* silu(gate)], and y as
 * activations. */
typedef struct {
    int64_t kind;
    Rows x, residual, weight, gate, y; /* weight: one row; y.data or rounded may be null */
    int64_t rows, columns;
    double eps, offset;
    Rounded *rounded;
} Norm;

/* CONV_UPDATE: x [B S][C] -> y, W taps; state [slots][C][W - 1]; history from source[b], after token s to
 * target[b][s]. CONV_PREFILL: sequence b is rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1 of x; history from and to
 * state[source[b]]. */
typedef struct {
    int64_t kind;
    Rows x, weight, y, state; /* weight.stride = W, state.stride = C * (W - 1) */
    const int32_t *source, *target, *cu_seqlens;
    int64_t sequences, steps, channels, taps;
} Conv;

/* DELTA_STEP: qkv rows after the convolution; S tokens of each sequence, state from source[b], after token s to
 * target[b][s]. DELTA_PREFILL: rows cu_seqlens[b] .. of sequence b, state from and to source[b]. With `norm_weight`: y
 * = gated RMS norm of the output. */
typedef struct {
    int64_t kind;
    Rows qkv, a, b, state, y; /* state.stride: elements of a slot */
    const float *a_log, *dt_bias;
    const int32_t *source, *target, *cu_seqlens;
    int64_t sequences, steps, key_heads, value_heads, key_dim, value_dim;
    Rows norm_weight, gate;
    double eps;
    Rounded *rounded; /* only with norm_weight: y as activations, one block of 128 per head */
} Delta;

/* ROPE_STORE: q [T][H][2 D] (query, gate per head) or [T][H][D]; heads normed (weights may be null), first 2 * half
 * dims turned; queries to `q_out` [T][H][D], keys and values to the cache at (slots[t], positions[t]). */
typedef struct {
    int64_t kind;
    Rows q, k, v, q_out;
    int64_t q_head_stride;
    Rows q_norm, k_norm;
    const float *cosines, *sines; /* [T][half] */
    const int32_t *slots, *positions;
    int64_t tokens, heads, kv_heads, head_dim, half;
    double eps;
    void *keys, *values;
    float *key_scales, *value_scales;
    int64_t cache_dtype, cache_tokens; /* [seqs][KV][cache_tokens][D] */
} RopeStore;

/* ATTENTION: q [B S][H][D] over the cache, in `splits` parts of the context; partial [B S H][splits][D + 2] (sum,
 * maximum, weight). Query row r = b * steps + s sees lengths[b] + s + 1 tokens. ATTENTION_JOIN: y [B S][H D] = joined
 * * sigmoid(gate). */
typedef struct {
    int64_t kind;
    Rows q, gate, y;
    int64_t gate_head_stride;
    const int32_t *slots, *lengths;
    int64_t sequences, steps, heads, kv_heads, head_dim, splits;
    const void *keys, *values;
    const float *key_scales, *value_scales;
    int64_t cache_dtype, cache_tokens;
    float *partial;
} Attention;

/* EMBED: y[t] = row tokens[t] of a matrix of floats, int8 or int4. */
typedef struct {
    int64_t kind;
    const int32_t *tokens;
    int64_t count;
    const Matrix *matrix;
    Rows y;
} Embed;

/* ROUTE: logits [T][E] -> softmax, the `top` largest, renormalised: rows sorted by expert. Row i of the sorted ones is
 * token gather[i] with weight weights[i]; slot j holds rows offsets[j] .. of expert experts[j]; *active slots.
 * COMBINE: residual-free sum y[t] = sum of weight * x[row], + sigmoid(shared_gate[t]) * shared[t]. */
typedef struct {
    int64_t kind;
    const float *logits;
    int64_t tokens, experts_count, top;
    int32_t *gather, *offsets, *experts, *active;
    float *weights;
} Route;
typedef struct {
    int64_t kind;
    Rows x, shared, shared_gate, y;
    const int32_t *gather;
    const float *weights;
    int64_t rows, tokens, columns;
} Combine;

/* READ: sums the lines of `bytes` bytes, the read bandwidth that the tables compare with. `streams`: 1, or 4 side by
 * side; `ahead_bytes`: how far ahead a line is asked for, 0 for not at all. */
typedef struct {
    int64_t kind;
    const void *data;
    int64_t bytes, streams, ahead_bytes;
    uint64_t sum;
} Read;

/* FIND_SCALES: for every group of a row of `weight` the scale (exact in scale_dtype) and zero with the least sum of
 * importance * error^2, among step * ratios[k] with the zeros next to the range's, then refined by least squares.
 * signed_scales: a symmetric group whose largest magnitude is positive gets a negative scale. */
typedef struct {
    int64_t kind;
    const float *weight;     /* [rows][columns] */
    const float *importance; /* [columns] */
    const float *ratios;
    int64_t ratio_count, refinements, rows, columns, group_size, bits, symmetric;
    int64_t signed_scales, scale_dtype;
    float *scales;  /* [rows][columns / group_size] */
    uint8_t *zeros; /* likewise */
} FindScales;

/* SOLVE_COLUMNS: `columns` columns of GPTQ (64 at most), the last first. Everything is [..][rows]: a column lies side
 * by side. targets[j] is rounded to the grid of group groups[j]; codes[j]; weights[j] becomes weights[j] - its rounding, which
 * times factor[j][k] goes into the targets k < j. */
#define SOLVE_COLUMNS_MOST 64
typedef struct {
    int64_t kind;
    const float *targets;
    float *weights;
    const float *factor, *scales, *zeros;
    const int64_t *groups;
    uint8_t *codes;
    int64_t rows, columns, factor_stride, bits;
} SolveColumns;

/* ROUND_GROUPS: FIND_SCALES with equal costs, straight from the checkpoint's dtype, and the codes of it in the same
 * pass: 0 ... 2^bits - 1, by division. A group has ROUND_GROUPS_MOST columns at most, a multiple of 16. Where a weight
 * is infinite or not a number, is_bad becomes 1 and codes mean nothing. */
#define ROUND_GROUPS_MOST 16384
typedef struct {
    int64_t kind;
    const void *weight; /* [rows][columns] */
    int64_t dtype;
    const float *ratios;
    int64_t ratio_count, refinements, rows, columns, group_size, bits, symmetric;
    int64_t signed_scales, scale_dtype;
    uint8_t *codes; /* [rows][columns] */
    float *scales;  /* [rows][columns / group_size] */
    uint8_t *zeros; /* likewise */
    int64_t is_bad;
} RoundGroups;
