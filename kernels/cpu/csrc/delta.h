/* The gated delta rule, token by token: a task is one value head of one sequence.
 *
 * S is [DV][DK] (V-major), so S k and S q are dot products of rows. Per token and row one pass over S: with d = e^g S
 * k,
 *     e = beta (v - d),  S <- e^g S + e k^T,  o = S q = e^g (S_old q) + e (k . q)
 * both products come from the old row, which is then written once: 3 multiply-adds per element, one read, one write.
 * Sixteen rows at a time, so that the sums over lanes are shared. With a norm, o becomes weight * rmsnorm(o) *
 * silu(gate).
 *
 * A prompt goes the same way, not through chunked matmuls: rows of S do not know of each other, so 16 of them (8 KiB)
 * stay in L1 while PREFILL_TOKENS tokens pass, whose keys and queries (16 KiB) do as well. It takes as many products
 * as the chunked form with 64 tokens, and nothing is laid out for a matmul. S is float32 from the first token to the
 * last, whatever the state's type. */
#pragma once
#include "norm.h"

#define DELTA_ROWS 16
#define DELTA_MOST 256 /* largest DK and DV */

static int64_t delta_tasks(const Delta *op) { return op->sequences * op->value_heads; }

/* x * rsqrt(sum x^2 + 1e-6) * scale */
INLINE void unit_vector(const Rows *rows, int64_t row, int64_t at, int64_t count, float scale, float *out)
{
    v16f sum = f_zero();
    for (int64_t i = 0; i < count; i += 16) {
        v16f x = load_at(rows->data, rows->dtype, row * rows->stride + at + i);
        f_store(out + i, x);
        sum = f_fma(x, x, sum);
    }
    v16f factor = f_set1(scale / sqrtf(f_sum(sum) + 1e-6f));
    for (int64_t i = 0; i < count; i += 16) f_store(out + i, f_mul(f_load(out + i), factor));
}

/* 16 rows of S, one token: S in `from` is replaced into `to`; v, o: 16 elements. kq is the dot product of k and q. */
INLINE void delta_rows(int64_t dtype, const char *from, char *to, int64_t dk, const float *q, const float *k, float kq,
                       const float *v, float decay, float beta, float *o)
{
    v16f sk[DELTA_ROWS], sq[DELTA_ROWS];
    float errors[DELTA_ROWS];
    const v16f old = f_set1(decay);
    for (int r = 0; r < DELTA_ROWS; r++) {
        v16f a = f_zero(), b = f_zero();
        for (int64_t i = 0; i < dk; i += 16) {
            v16f s = load_at(from, dtype, r * dk + i);
            a = f_fma(s, f_load(k + i), a), b = f_fma(s, f_load(q + i), b);
        }
        sk[r] = a, sq[r] = b;
    }
    v16f error = f_mul(f_set1(beta), f_sub(f_load(v), f_mul(old, f_sum16(sk))));
    f_store(errors, error);
    f_store(o, f_fma(error, f_set1(kq), f_mul(old, f_sum16(sq))));
    for (int r = 0; r < DELTA_ROWS; r++) {
        const v16f e = f_set1(errors[r]);
        for (int64_t i = 0; i < dk; i += 16) {
            const int64_t at = r * dk + i;
            store_at(to, dtype, at, f_fma(e, f_load(k + i), f_mul(old, load_at(from, dtype, at))));
        }
    }
}

/* What a token brings: unit vectors, their product, and the two gates. */
typedef struct {
    float *q, *k, *v;
    float kq, decay, beta;
} Token;

INLINE Token delta_inputs(const Delta *op, int64_t row, int64_t head, float *q, float *k, float *v)
{
    const int64_t dk = op->key_dim, dv = op->value_dim, key_head = head / (op->value_heads / op->key_heads);
    const int64_t v_at = 2 * op->key_heads * dk + head * dv;
    unit_vector(&op->qkv, row, key_head * dk, dk, 1 / sqrtf((float)dk), q);
    unit_vector(&op->qkv, row, (op->key_heads + key_head) * dk, dk, 1, k);
    for (int64_t i = 0; i < dv; i += 16)
        f_store(v + i, load_at(op->qkv.data, op->qkv.dtype, row * op->qkv.stride + v_at + i));
    v16f dot = f_zero();
    for (int64_t i = 0; i < dk; i += 16) dot = f_fma(f_load(k + i), f_load(q + i), dot);
    const float a = load_one(op->a.data, op->a.dtype, row * op->a.stride + head);
    const float decay = expf(-expf(op->a_log[head]) * softplus(a + op->dt_bias[head]));
    const float beta = sigmoid(load_one(op->b.data, op->b.dtype, row * op->b.stride + head));
    return (Token){q, k, v, f_sum(dot), decay, beta};
}

/* o [DV] of one token, to the gated norm if there is one, to y and to the activations. */
INLINE void delta_output(const Delta *op, int64_t row, int64_t head, float *o)
{
    const int64_t dv = op->value_dim;
    if (op->norm_weight.data) {
        const v16f scale = f_set1(inverse_rms(o, dv, op->eps));
        for (int64_t i = 0; i < dv; i += 16) {
            v16f gate = load_at(op->gate.data, op->gate.dtype, row * op->gate.stride + head * dv + i);
            v16f weight = load_at(op->norm_weight.data, op->norm_weight.dtype, i);
            f_store(o + i, f_mul(f_mul(f_mul(f_load(o + i), scale), weight), f_silu(gate)));
        }
    }
    for (int64_t i = 0; op->y.data && i < dv; i += 16)
        store_at(op->y.data, op->y.dtype, row * op->y.stride + head * dv + i, f_load(o + i));
    if (!op->rounded) return;
    v16f x[8];
    for (int i = 0; i < 8; i++) x[i] = f_load(o + 16 * i);
    round_block(op->rounded, head, row, x);
}

static void delta_task(const Delta *op, int64_t task, float *scratch)
{
    (void)scratch;
    const int64_t sequence = task / op->value_heads, head = task % op->value_heads, dk = op->key_dim,
                  dv = op->value_dim;
    const int64_t size = element_bytes(op->state.dtype), rows_bytes = DELTA_ROWS * dk * size;
    char *base = (char *)op->state.data + head * dv * dk * size;
    char *from = base + op->source[sequence] * op->state.stride * size;
    float q[DELTA_MOST], k[DELTA_MOST], v[DELTA_MOST], o[DELTA_MOST];
    for (int64_t s = 0; s < op->steps; s++) {
        const int64_t row = sequence * op->steps + s;
        const Token t = delta_inputs(op, row, head, q, k, v);
        char *to = base + op->target[row] * op->state.stride * size;
        for (int64_t i = 0; i < dv / DELTA_ROWS; i++) {
            char *old = from + i * rows_bytes, *new = to + i *rows_bytes;
            float *value = v + DELTA_ROWS * i, *out = o + DELTA_ROWS * i;
            if (op->state.dtype == FLOAT32) delta_rows(FLOAT32, old, new, dk, q, k, t.kq, value, t.decay, t.beta, out);
            else delta_rows(BFLOAT16, old, new, dk, q, k, t.kq, value, t.decay, t.beta, out);
        }
        from = to;
        delta_output(op, row, head, o);
    }
}

#define PREFILL_TOKENS 16
static int64_t delta_prefill_scratch_bytes(const Delta *op)
{
    return (op->value_dim * op->key_dim + PREFILL_TOKENS * 2 * (op->key_dim + op->value_dim)) * 4;
}
static void delta_prefill_task(const Delta *op, int64_t task, float *scratch)
{
    const int64_t sequence = task / op->value_heads, head = task % op->value_heads, dk = op->key_dim,
                  dv = op->value_dim;
    const int64_t last = op->cu_seqlens[sequence + 1], at = op->source[sequence] * op->state.stride + head * dv * dk;
    float *s = scratch, *q = s + dv * dk, *k = q + PREFILL_TOKENS * dk, *v = k + PREFILL_TOKENS * dk;
    float *o = v + PREFILL_TOKENS * dv;
    Token tokens[PREFILL_TOKENS];
    for (int64_t i = 0; i < dv * dk; i += 16) f_store(s + i, load_at(op->state.data, op->state.dtype, at + i));
    for (int64_t first = op->cu_seqlens[sequence]; first < last; first += PREFILL_TOKENS) {
        const int64_t count = last - first < PREFILL_TOKENS ? last - first : PREFILL_TOKENS;
        for (int64_t t = 0; t < count; t++)
            tokens[t] = delta_inputs(op, first + t, head, q + t * dk, k + t * dk, v + t * dv);
        for (int64_t row = 0; row < dv; row += DELTA_ROWS)
            for (int64_t t = 0; t < count; t++) {
                const Token *x = tokens + t;
                char *rows = (char *)(s + row * dk);
                delta_rows(FLOAT32, rows, rows, dk, x->q, x->k, x->kq, x->v + row, x->decay, x->beta, o + t * dv + row);
            }
        for (int64_t t = 0; t < count; t++) delta_output(op, first + t, head, o + t * dv);
    }
    for (int64_t i = 0; i < dv * dk; i += 16) store_at(op->state.data, op->state.dtype, at + i, f_load(s + i));
}
