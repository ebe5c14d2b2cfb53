/* Runs every kernel of csrc/ on fixed numbers and prints a hash of the bits of each result.
 *
 * Compiled once per instruction set (-I the folder of isa.c), natively or for a machine that an emulator
 * plays: all of them must print the same lines. */
#include <stdio.h>
#include <stdlib.h>
#include "isa.c"

static uint32_t seed = 12345;
static float uniform(void) { return (float)(int32_t)(seed = seed * 1664525u + 1013904223u) / 2147483648.0f; }
static void *room(size_t bytes)
{
    return memset(aligned_alloc(64, (bytes + 127) / 64 * 64), 0, (bytes + 127) / 64 * 64);
}
static float *floats(size_t n)
{
    float *p = room(n * 4);
    for (size_t i = 0; i < n; i++) p[i] = uniform();
    return p;
}
static uint16_t *bfloats(size_t n, float scale, float shift)
{
    uint16_t *p = room(n * 2);
    for (size_t i = 0; i < n; i++) {
        float x = uniform() * scale + shift;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        p[i] = (uint16_t)(bits >> 16);
    }
    return p;
}
static void *bytes(size_t n)
{
    uint8_t *p = room(n);
    for (size_t i = 0; i < n; i++) p[i] = (uint8_t)((seed = seed * 1664525u + 1013904223u) >> 24);
    return p;
}
static void report(const char *name, const void *data, size_t n)
{
    uint64_t hash = 1469598103934665603ull;
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211ull;
    printf("%s %016llx\n", name, (unsigned long long)hash);
}
static void run(void *op)
{
    const Kernel *kernel = qwenfit_kernels + *(int64_t *)op;
    float *scratch = room((size_t)kernel->scratch_bytes(op) + 64);
    for (int64_t i = 0; i < kernel->tasks(op); i++) kernel->task(op, i, scratch);
    free(scratch);
}
static Rounded rounded(int64_t rows, int64_t columns, int64_t planes, int64_t parts, int64_t factor)
{
    int64_t blocks = (columns + 127) / 128, streams = rows * planes;
    return (Rounded){room(blocks * streams * 256),
                     room(blocks * streams * 4),
                     room(blocks * parts * streams * 4),
                     blocks,
                     rows,
                     planes,
                     parts,
                     factor};
}

static void matmuls(void)
{
    const int64_t rows = 44, padded = 48, columns = 384;
    const int64_t counts[] = {1, 3, 8, 9, 30}, groups[] = {32, 64, 128, 384};
    for (int bits = 4; bits <= 8; bits += 4)
        for (int g = 0; g < 4; g++)
            for (int asymmetric = 0; asymmetric < 2; asymmetric++)
                for (int n = 0; n < 5; n++)
                    for (int64_t planes = 1; planes <= 2; planes++) {
                        const int64_t group = groups[g], parts = group < 128 ? 128 / group : 1, m = counts[n];
                        Rounded x = rounded(m, columns, planes, parts, bits == 4 && !asymmetric ? 8 : 1);
                        Rows source = {floats(m * columns), FLOAT32, columns}, y = {room(m * rows * 4), FLOAT32, rows};
                        uint16_t *zeros = room(columns / group * padded * 2);
                        for (int64_t i = 0; i < columns / group * padded; i++) {
                            float zero = (float)(i * 7 % 16);
                            uint32_t b;
                            memcpy(&b, &zero, 4);
                            zeros[i] = (uint16_t)(b >> 16);
                        }
                        Matrix w = {bytes(padded * columns * bits / 8),
                                    bfloats(columns / group * padded, 0.01f, 0.02f),
                                    asymmetric ? zeros : NULL,
                                    NULL,
                                    bits,
                                    0,
                                    BFLOAT16,
                                    group,
                                    rows,
                                    padded,
                                    columns,
                                    0,
                                    0,
                                    y};
                        Round round = {ROUND, source, {0}, 0, NULL, NULL, m, columns, {0}, &x};
                        Matmul product = {MATMUL, &w, 1, &x, {0}, m, NULL, NULL, NULL, 0, m <= GEMV_TOKENS ? 16 : 32};
                        char name[64];
                        run(&round), run(&product);
                        snprintf(name, sizeof name, "int%d g%d %s %d rows %d planes", bits, (int)group,
                                 asymmetric ? "asym" : "sym", (int)m, (int)planes);
                        report(name, y.data, (size_t)(m * rows) * 4);
                    }
    const int64_t m = 6;
    Rows x = {floats(m * 200), FLOAT32, 200}, y = {room(m * 20 * 2), BFLOAT16, 20};
    Matrix w = {bfloats(20 * 200, 1, 0), NULL, NULL, NULL, 0, BFLOAT16, 0, 1, 20, 20, 200, 0, 0, y};
    Matmul product = {MATMUL, &w, 1, NULL, x, m, NULL, NULL, NULL, 0, 16};
    run(&product), report("dense bf16", y.data, (size_t)(m * 20) * 2);
}

static void others(void)
{
    const int64_t b = 2, s = 3, c = 70;
    int32_t source[] = {0, 4}, target[] = {1, 2, 0, 5, 6, 4}, slots[] = {1, 0}, lengths[] = {150, 61};
    Rows x = {floats(b * s * 300), FLOAT32, 300}, gate = {floats(b * s * 300), FLOAT32, 300};
    Rows weight = {bfloats(300, 0.2f, 1), BFLOAT16, 300}, y = {room(b * s * 300 * 2), BFLOAT16, 300};
    Norm norm = {NORM, x, {0}, weight, gate, y, b * s, 300, 1e-6, 0.0, NULL};
    run(&norm), report("gated norm", y.data, (size_t)(b * s * 300) * 2);

    Rows taps = {bfloats(c * 4, 1, 0), BFLOAT16, 4}, state = {bfloats(8 * c * 3, 1, 0), BFLOAT16, c * 3};
    Conv conv = {
        CONV_UPDATE, {x.data, FLOAT32, 300}, taps, {y.data, BFLOAT16, 300}, state, source, target, NULL, b, s, c, 4};
    run(&conv), report("conv", y.data, (size_t)(b * s * 300) * 2),
        report("conv state", state.data, (size_t)(8 * c * 3) * 2);

    const int64_t nk = 2, nv = 4, dk = 32, dv = 48, width = 2 * nk * dk + nv * dv;
    Rows qkv = {floats(b * s * width), FLOAT32, width}, a = {floats(b * s * nv), FLOAT32, nv};
    Rows memory = {floats(8 * nv * dv * dk), FLOAT32, nv * dv * dk},
         out = {room(b * s * nv * dv * 4), FLOAT32, nv * dv};
    Delta delta = {DELTA_STEP, qkv, a,  a,  memory, out, floats(nv), floats(nv), source, target, NULL,
                   b,          s,   nk, nv, dk,     dv,  {0},        {0},        1e-6,   NULL};
    run(&delta), report("delta", out.data, (size_t)(b * s * nv * dv) * 4);
    report("delta state", memory.data, (size_t)(8 * nv * dv * dk) * 4);

    const int64_t h = 6, kv = 2, d = 48, ctx = 192;
    for (int dtype = FLOAT32; dtype <= INT8; dtype++) {
        void *keys = dtype == FLOAT32 ? (void *)floats(2 * kv * ctx * d)
                     : dtype == INT8  ? bytes(2 * kv * ctx * d)
                                      : (void *)bfloats(2 * kv * ctx * d, 1, 0);
        if (dtype == FLOAT16) /* small numbers of that format */
            for (int64_t i = 0; i < 2 * kv * ctx * d; i++) ((uint16_t *)keys)[i] &= 0xBBFF;
        float *scales = dtype == INT8 ? floats(2 * kv * ctx) : NULL, *partial = room(b * s * h * 16 * (d + 2) * 4);
        Rows q = {floats(b * s * h * d), FLOAT32, h * d}, result = {room(b * s * h * d * 4), FLOAT32, h * d};
        Attention attention = {ATTENTION, q, q,  result, d,    slots,  lengths, b,     s,   h,
                               kv,        d, 16, keys,   keys, scales, scales,  dtype, ctx, partial};
        run(&attention), attention.kind = ATTENTION_JOIN, run(&attention);
        char name[32];
        snprintf(name, sizeof name, "attention %d", dtype);
        report(name, result.data, (size_t)(b * s * h * d) * 4);
    }
}

int main(void)
{
    matmuls();
    others();
}
