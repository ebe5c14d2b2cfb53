/* Rotary embedding and the write into the cache; attention of few queries over a long cache.
 *
 * A task of ATTENTION is one key head of one sequence and one part of its context: keys and values of that part are
 * read once for all query heads (and drafts) that share them. Tiles of KEY_TILE keys: scores of four keys x four
 * queries at a time (16 sums over lanes, shared), a running maximum per query, then values into [queries][D] sums in
 * L1. Each task leaves (sum, maximum, weight); ATTENTION_JOIN adds the parts in order. Parts are cut by the context
 * alone, so results do not depend on the number of threads. */
#pragma once
#include "norm.h"

#define KEY_TILE 64
#define HEAD_MOST 512
#define QUERY_GROUP 4
#define LOWEST -3.0e38f

static int64_t rope_store_tasks(const RopeStore *op) { return op->tokens * (op->heads + 2 * op->kv_heads); }

static void store_head(const RopeStore *op, int64_t token, int64_t head, const float *x, void *cache, float *scales)
{
    const int64_t d = op->head_dim;
    const int64_t at = (op->slots[token] * op->kv_heads + head) * op->cache_tokens + op->positions[token];
    if (op->cache_dtype != INT8) {
        for (int64_t i = 0; i < d; i += 16) store_at(cache, op->cache_dtype, at * d + i, f_load(x + i));
        return;
    }
    v16f largest = f_zero();
    for (int64_t i = 0; i < d; i += 16) largest = f_max(largest, f_abs(f_load(x + i)));
    const float amax = f_reduce_max(largest), scale = amax / 127;
    for (int64_t i = 0; i < d; i += 16) {
        v16f code = amax > 0 ? f_div(f_load(x + i), f_set1(scale)) : f_zero();
        i_store_bytes((int8_t *)cache + at * d + i, i_from_f(code));
    }
    scales[at] = scale;
}

/* One head of a query, a key or a value of one token. */
static void rope_store_task(const RopeStore *op, int64_t task, float *scratch)
{
    (void)scratch;
    const int64_t per_token = op->heads + 2 * op->kv_heads, token = task / per_token, d = op->head_dim;
    int64_t head = task % per_token;
    const int is_query = head < op->heads;
    if (is_query && !op->q.data) return;
    if (!is_query) head -= op->heads;
    const int is_value = !is_query && head >= op->kv_heads;
    if (is_value) head -= op->kv_heads;
    const Rows *from = is_query ? &op->q : is_value ? &op->v : &op->k;
    const Rows *norm = is_query ? &op->q_norm : &op->k_norm;
    float x[HEAD_MOST], y[HEAD_MOST];
    const int64_t at = token * from->stride + head * (is_query ? op->q_head_stride : d);
    for (int64_t i = 0; i < d; i += 16) f_store(x + i, load_at(from->data, from->dtype, at + i));
    if (is_value) {
        store_head(op, token, head, x, op->values, op->value_scales);
        return;
    }
    if (norm->data) {
        const v16f scale = f_set1(inverse_rms(x, d, op->eps));
        for (int64_t i = 0; i < d; i += 16) {
            v16f weight = f_add(f_set1(1), load_at(norm->data, norm->dtype, i));
            f_store(x + i, f_mul(f_mul(f_load(x + i), scale), weight));
        }
    }
    memcpy(y, x, sizeof(float) * (size_t)d);
    for (int64_t i = 0; op->cosines && i < op->half; i++) {
        const float cosine = op->cosines[token * op->half + i], sine = op->sines[token * op->half + i];
        y[i] = x[i] * cosine - x[op->half + i] * sine;
        y[op->half + i] = x[op->half + i] * cosine + x[i] * sine;
    }
    if (!is_query) {
        store_head(op, token, head, y, op->keys, op->key_scales);
        return;
    }
    for (int64_t i = 0; i < d; i += 16)
        store_at(op->q_out.data, op->q_out.dtype, token * op->q_out.stride + head * d + i, f_load(y + i));
}

static int64_t attention_tasks(const Attention *op) { return op->sequences * op->kv_heads * op->splits; }
static int64_t attention_queries(const Attention *op)
{
    return (op->steps * (op->heads / op->kv_heads) + QUERY_GROUP - 1) / QUERY_GROUP * QUERY_GROUP;
}
static int64_t attention_scratch_bytes(const Attention *op)
{
    return attention_queries(op) * (2 * op->head_dim + KEY_TILE + 4) * 4;
}

/* While keys are scored the values of the tile come into L2, and while those are summed the next tile's keys: no
 * hardware stream follows rows of 512 bytes that are read 64 at a time. scores[4 queries][KEY_TILE] of `count` keys (a
 * multiple of 4; keys past the end are masked by the caller) */
INLINE void score_tile(int64_t dtype, const char *keys, const char *values, int64_t count, int64_t d, const float *q,
                       float *scores)
{
    const int64_t size = element_bytes(dtype), ahead = values - keys;
    for (int64_t key = 0; key < count; key += 4) {
        v16f sums[16];
        for (int i = 0; i < 16; i++) sums[i] = f_zero();
        const char *p = keys + key * d * size;
        for (int64_t i = 0; i < d; i += 16) {
            v16f x[QUERY_GROUP];
            for (int r = 0; r < QUERY_GROUP; r++) x[r] = f_load(q + r * d + i);
            for (int j = 0; j < 4; j++) {
                v16f k = load_at(p, dtype, j * d + i);
                __builtin_prefetch(p + (j * d + i) * size + ahead, 0, 2);
                for (int r = 0; r < QUERY_GROUP; r++) sums[4 * r + j] = f_fma(k, x[r], sums[4 * r + j]);
            }
        }
        float out[16];
        f_store(out, f_sum16(sums));
        for (int r = 0; r < QUERY_GROUP; r++) memcpy(scores + r * KEY_TILE + key, out + 4 * r, 16);
    }
}

/* sums[4 queries][D] += weights[4][KEY_TILE] x values, `vectors` x 16 dims from i on */
INLINE void value_columns(int64_t dtype, int vectors, const char *values, const char *next, int64_t count, int64_t d,
                          int64_t i, const float *weights, float *sums)
{
    const int64_t size = element_bytes(dtype), ahead = next - values;
    v16f y[QUERY_GROUP][2];
    for (int r = 0; r < QUERY_GROUP; r++)
        for (int j = 0; j < vectors; j++) y[r][j] = f_load(sums + r * d + i + 16 * j);
    for (int64_t key = 0; key < count; key++) {
        v16f v[2];
        __builtin_prefetch(values + (key * d + i) * size + ahead, 0, 2);
        for (int j = 0; j < vectors; j++) v[j] = load_at(values, dtype, key * d + i + 16 * j);
        for (int r = 0; r < QUERY_GROUP; r++) {
            const v16f w = f_set1(weights[r * KEY_TILE + key]);
            for (int j = 0; j < vectors; j++) y[r][j] = f_fma(v[j], w, y[r][j]);
        }
    }
    for (int r = 0; r < QUERY_GROUP; r++)
        for (int j = 0; j < vectors; j++) f_store(sums + r * d + i + 16 * j, y[r][j]);
}
INLINE void value_tile(int64_t dtype, const char *values, const char *next, int64_t count, int64_t d,
                       const float *weights, float *sums)
{
    int64_t i = 0;
    for (; i + 32 <= d; i += 32) value_columns(dtype, 2, values, next, count, d, i, weights, sums);
    if (i < d) value_columns(dtype, 1, values, next, count, d, i, weights, sums);
}

#define BY_DTYPE(dtype, call) \
    switch (dtype) { \
    case FLOAT32: { \
        enum { T = FLOAT32 }; \
        call; \
        break; \
    } \
    case BFLOAT16: { \
        enum { T = BFLOAT16 }; \
        call; \
        break; \
    } \
    case FLOAT16: { \
        enum { T = FLOAT16 }; \
        call; \
        break; \
    } \
    default: { \
        enum { T = INT8 }; \
        call; \
    } \
    }

static void attention_task(const Attention *op, int64_t task, float *scratch)
{
    const int64_t d = op->head_dim, shared = op->heads / op->kv_heads, rows = op->steps * shared;
    const int64_t split = task % op->splits, kv_head = task / op->splits % op->kv_heads;
    const int64_t sequence = task / op->splits / op->kv_heads, padded = attention_queries(op);
    const int64_t total = op->lengths[sequence] + op->steps;
    const int64_t tiles = (total + KEY_TILE - 1) / KEY_TILE, per_split = (tiles + op->splits - 1) / op->splits;
    const int64_t first = split * per_split * KEY_TILE;
    const int64_t last = first + per_split * KEY_TILE < total ? first + per_split * KEY_TILE : total;
    float *q = scratch, *sums = q + padded * d, *scores = sums + padded * d, *state = scores + padded * KEY_TILE;
    const int64_t head_at = (op->slots[sequence] * op->kv_heads + kv_head) * op->cache_tokens;
    const int64_t size = element_bytes(op->cache_dtype);
    const float scale = 1 / sqrtf((float)d);
    memset(q, 0, (size_t)(2 * padded * d) * 4);
    for (int64_t row = 0; row < padded; row++) {
        state[2 * row] = LOWEST, state[2 * row + 1] = 0;
        if (row >= rows || first >= last) continue;
        const int64_t at = (sequence * op->steps + row / shared) * op->q.stride + (kv_head * shared + row % shared) * d;
        for (int64_t i = 0; i < d; i += 16)
            f_store(q + row * d + i, f_mul(load_at(op->q.data, op->q.dtype, at + i), f_set1(scale)));
    }
    for (int64_t tile = first; tile < last; tile += KEY_TILE) {
        const int64_t count = last - tile < KEY_TILE ? last - tile : KEY_TILE, fours = (count + 3) / 4 * 4;
        const char *keys = (const char *)op->keys + (head_at + tile) * d * size;
        const char *values = (const char *)op->values + (head_at + tile) * d * size;
        for (int64_t group = 0; group < padded; group += QUERY_GROUP) {
            float *s = scores + group * KEY_TILE;
            BY_DTYPE(op->cache_dtype, score_tile(T, keys, values, fours, d, q + group * d, s))
            for (int r = 0; r < QUERY_GROUP; r++, s += KEY_TILE) {
                const int64_t row = group + r;
                const int64_t seen = op->lengths[sequence] + (row < rows ? row / shared : 0) + 1 - tile;
                if (op->key_scales)
                    for (int64_t key = 0; key < count; key++) s[key] *= op->key_scales[head_at + tile + key];
                for (int64_t key = seen < count ? (seen < 0 ? 0 : seen) : count; key < KEY_TILE; key++)
                    s[key] = -INFINITY;
                v16f largest = f_set1(state[2 * row]);
                for (int64_t key = 0; key < KEY_TILE; key += 16) largest = f_max(f_load(s + key), largest);
                const float maximum = f_reduce_max(largest);
                const v16f top = f_set1(maximum);
                if (maximum > state[2 * row]) {
                    v16f lower = f_exp(f_set1(state[2 * row] - maximum));
                    float factor[16];
                    f_store(factor, lower);
                    for (int64_t i = 0; i < d; i += 16)
                        f_store(sums + row * d + i, f_mul(f_load(sums + row * d + i), lower));
                    state[2 * row + 1] *= factor[0];
                    state[2 * row] = maximum;
                }
                v16f weight = f_zero();
                for (int64_t key = 0; key < KEY_TILE; key += 16) {
                    v16f p = f_exp(f_sub(f_load(s + key), top));
                    f_store(s + key, p);
                    weight = f_add(weight, p);
                }
                state[2 * row + 1] += f_sum(weight);
                if (op->value_scales)
                    for (int64_t key = 0; key < count; key++) s[key] *= op->value_scales[head_at + tile + key];
            }
            BY_DTYPE(op->cache_dtype, value_tile(T, values, keys + KEY_TILE * d * size, count, d,
                                                 scores + group * KEY_TILE, sums + group * d))
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t query = (sequence * op->steps + row / shared) * op->heads + kv_head * shared + row % shared;
        float *out = op->partial + (query * op->splits + split) * (d + 2);
        memcpy(out, sums + row * d, sizeof(float) * (size_t)d);
        out[d] = state[2 * row], out[d + 1] = state[2 * row + 1];
    }
}

static int64_t join_tasks(const Attention *op) { return op->sequences * op->steps * op->heads; }
static void join_task(const Attention *op, int64_t query, float *scratch)
{
    (void)scratch;
    const int64_t d = op->head_dim, row = query / op->heads, head = query % op->heads;
    const float *parts = op->partial + query * op->splits * (d + 2);
    float maximum = LOWEST, weight = 0, factor[16];
    v16f sums[HEAD_MOST / 16];
    for (int64_t i = 0; i < op->splits; i++) maximum = fmaxf(maximum, parts[i * (d + 2) + d]);
    for (int64_t i = 0; i < d / 16; i++) sums[i] = f_zero();
    for (int64_t split = 0; split < op->splits; split++) {
        const float *part = parts + split * (d + 2);
        if (part[d + 1] == 0) continue;
        f_store(factor, f_exp(f_set1(part[d] - maximum)));
        weight += part[d + 1] * factor[0];
        for (int64_t i = 0; i < d / 16; i++) sums[i] = f_fma(f_load(part + 16 * i), f_set1(factor[0]), sums[i]);
    }
    for (int64_t i = 0; i < d; i += 16) {
        v16f y = f_div(sums[i / 16], f_set1(weight));
        if (op->gate.data) {
            v16f gate = load_at(op->gate.data, op->gate.dtype, row * op->gate.stride + head * op->gate_head_stride + i);
            y = f_mul(y, f_sigmoid(gate));
        }
        store_at(op->y.data, op->y.dtype, row * op->y.stride + head * d + i, y);
    }
}
