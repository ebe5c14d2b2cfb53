/* The one instruction set that is built for AArch64, where NEON is part of the architecture. */
#include <stdint.h>

int64_t qwenfit_has(const char *name) { return name[0] == 'n'; }
