/* Which instruction sets this processor has. */
#include <stdint.h>
#include <string.h>

/* (And the system saves its registers: the compiler's test asks for that, too.) */
int64_t qwenfit_has(const char *name)
{
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512")) return avx512;
    if (!strcmp(name, "avx512vnni")) return vnni;
    return !strcmp(name, "zen4") && vnni && __builtin_cpu_is("amd");
}
