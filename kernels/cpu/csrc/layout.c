/* Bytes of each operation, by kind: the mirror in Python checks itself against them when the library is loaded. */
#include "operations.h"

const int64_t qwenfit_bytes[KINDS] = {
    [ROUND] = sizeof(Round),         [MATMUL] = sizeof(Matmul),
    [NORM] = sizeof(Norm),           [CONV_UPDATE] = sizeof(Conv),
    [CONV_PREFILL] = sizeof(Conv),   [DELTA_STEP] = sizeof(Delta),
    [DELTA_PREFILL] = sizeof(Delta), [ROPE_STORE] = sizeof(RopeStore),
    [ATTENTION] = sizeof(Attention), [ATTENTION_JOIN] = sizeof(Attention),
    [EMBED] = sizeof(Embed),         [ROUTE] = sizeof(Route),
    [COMBINE] = sizeof(Combine),     [READ] = sizeof(Read),
    [FIND_SCALES] = sizeof(FindScales), [SOLVE_COLUMNS] = sizeof(SolveColumns),
    [ROUND_GROUPS] = sizeof(RoundGroups),
};
