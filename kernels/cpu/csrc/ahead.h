/* What is asked of memory before it is needed (docs/cpu.md has the figures): into which cache (3 is the first level, 2
 * the second), how many bytes of a run ahead, and how many blocks of the activations stay near while rows pass (gemv.h).
 *
 * AMD's cores keep 16 or so lines on their way to the first level, each for as long as memory takes: less than half of
 * what the second level's prefetchers bring. Intel's Cascade Lake gained nothing by the second level; NEON was measured
 * nowhere. library.py says which sets of instructions are built with AHEAD_INTO_L2. */
#pragma once

#ifdef AHEAD_INTO_L2
#define AHEAD_CACHE 2
#define AHEAD_BYTES 2048
#define PANEL_BLOCKS(group) ((group) == 1 ? 96 : (group) == 2 ? 32 : 8)
#else
#define AHEAD_CACHE 3
#define AHEAD_BYTES 1024
#define PANEL_BLOCKS(group) (32 / (group))
#endif

#define ask_for(p) __builtin_prefetch(p, 0, AHEAD_CACHE)
