/* The one instruction set that is built for AArch64, where NEON is part of the architecture. */
#include <stddef.h>
#include "kernel.h"

extern const Kernel qwenfit_kernels_neon[];
const Kernel *const qwenfit_isas[] = {qwenfit_kernels_neon};
const char *const qwenfit_isa_names[] = {"neon", NULL};

int64_t qwenfit_has(const char *name) { return name[0] == 'n'; }
