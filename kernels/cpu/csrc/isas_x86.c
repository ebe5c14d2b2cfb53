/* The instruction sets that were built for x86-64, best first. */
#include <stddef.h>
#include <string.h>
#include "kernel.h"

extern const Kernel qwenfit_kernels_avx512vnni[], qwenfit_kernels_avx512[], qwenfit_kernels_avx2[];
const Kernel *const qwenfit_isas[] = {qwenfit_kernels_avx512vnni, qwenfit_kernels_avx512, qwenfit_kernels_avx2};
const char *const qwenfit_isa_names[] = {"avx512vnni", "avx512", "avx2", NULL};

/* Whether this processor has it (and the system saves its registers: the compiler's test asks for that, too). */
int64_t qwenfit_has(const char *name)
{
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512")) return avx512;
    return !strcmp(name, "avx512vnni") && avx512 && __builtin_cpu_supports("avx512vnni");
}
