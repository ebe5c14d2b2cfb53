/* What is asked of memory before it is needed (docs/cpu.md has the figures): into which cache (3 is the first level, 2
 * the second), and how many bytes ahead.
 *
 * AMD's cores keep 16 or so lines on their way to the first level, each for as long as memory takes: less than half of
 * what the second level's prefetchers bring. Intel's Cascade Lake gained nothing by the second level; NEON was measured
 * nowhere. library.py says which sets of instructions are built with AHEAD_INTO_L2. */
#pragma once

#ifdef AHEAD_INTO_L2
#define AHEAD_CACHE 2
#define AHEAD_BYTES 6144
#else
#define AHEAD_CACHE 3
#define AHEAD_BYTES 2048
#endif

#define ask_for(p) __builtin_prefetch(p, 0, AHEAD_CACHE)
