/* Where a program stands: the operation that is on, who has which of its tasks, and what comes next.
 *
 * Every member of a team has a share of an operation's tasks, neighbours in memory, and takes them from the front: what
 * it has asked of memory ahead of time (ahead.h) belongs to the task that it takes next. Who has done his own takes from
 * the back of the others'. There is no barrier that every thread must reach: whoever finishes the last task publishes
 * the next operation, and a thread that the system has put aside while it holds no task delays no operation, which a
 * barrier would not survive on a shared machine. Every output is computed within one task, so results depend neither on
 * the number of threads nor on who does what.
 *
 * Who finds no task left asks memory for the first lines of his share of the next matrix, so that memory does not stand
 * still from one operation to the next.
 *
 * An operation is known by an even serial number, odd while it changes. What has been taken of a share is one word with
 * that number in it: whoever comes with an old number finds a newer one there, or a share that has no task left. */
#pragma once
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define pause_briefly() _mm_pause()
#elif defined(__aarch64__)
#define pause_briefly() __asm__ volatile("isb")
#endif

#define MOST_MEMBERS 256
#define MOST_LOTS 0xFFFF /* of a share: what is taken of it is counted in 16 bits */
#define SPINS_BEFORE_YIELD 4000
#define LOOK_AHEAD 4 /* operations among which the next matrix is sought */

static const Kernel *kernels;
static const void *const *program;
static int64_t program_count;
static int members;

/* What many look at lies apart from what each of them writes: between cores that share no cache a line takes six times as
 * long (docs/cpu.md). Two lines each, for they are fetched in pairs. */
#define APART _Alignas(128)

static struct {
    APART _Atomic(uint32_t) serial;
    _Atomic(int) running;
    _Atomic(int64_t) position; /* in the program */
    _Atomic(void *) op;
    _Atomic(int64_t) tasks, lot; /* so many tasks are taken at a time */
} current;
static struct {
    APART _Atomic(int64_t) lots; /* of the operation that is on */
} done;
static struct {
    APART _Atomic(int) members; /* that look at the program */
} inside;
typedef struct {
    APART _Atomic(uint64_t) taken; /* serial number << 32 | lots from the front << 16 | from the back */
} Share;
static Share shares[MOST_MEMBERS];

static _Thread_local float *scratch;
static _Thread_local int64_t scratch_bytes;

static const Kernel *kernel_of(const void *op) { return kernels + *(const int64_t *)op; }

static void *scratch_for(const void *op)
{
    int64_t bytes = kernel_of(op)->scratch_bytes(op);
    if (bytes > scratch_bytes) {
        free(scratch);
        scratch_bytes = (bytes + 4095) / 4096 * 4096;
        scratch = aligned_alloc(4096, (size_t)scratch_bytes);
        if (!scratch) abort(); /* a few hundred kilobytes: nothing else would work either */
    }
    return scratch;
}

/* Tasks that are taken at a time, so that no share has more than MOST_LOTS lots: 1 but for millions of tasks. */
static int64_t lot_of(int64_t count) { return 1 + count / ((int64_t)MOST_LOTS * members); }
static int64_t lots_of(int64_t count, int64_t in_lot) { return (count + in_lot - 1) / in_lot; }
static int64_t first_of_share(int64_t lots, int64_t member) { return member * lots / members; }

/* The next operation that has tasks, or the end. */
static void publish(void)
{
    const uint32_t before = atomic_load_explicit(&current.serial, memory_order_relaxed);
    int64_t at = atomic_load_explicit(&current.position, memory_order_relaxed), count = 0;
    void *op = NULL;
    atomic_store(&current.serial, before + 1);
    while (count == 0 && ++at < program_count) {
        op = (void *)program[at];
        count = kernel_of(op)->tasks(op);
    }
    atomic_store_explicit(&current.position, at, memory_order_release);
    atomic_store_explicit(&current.op, op, memory_order_release);
    atomic_store_explicit(&current.tasks, count, memory_order_release);
    atomic_store_explicit(&current.lot, lot_of(count), memory_order_release);
    atomic_store_explicit(&done.lots, 0, memory_order_release);
    if (count == 0) atomic_store(&current.running, 0);
    atomic_store(&current.serial, before + 2);
}

/* Whether the program has anything to do; if so its first operation is on. */
static int begin(const Kernel *table, const void *const *operations, int64_t count, int team)
{
    kernels = table, program = operations, program_count = count, members = team;
    atomic_store(&current.position, -1);
    for (int i = 0; i < team; i++) atomic_store(&shares[i].taken, (uint64_t)atomic_load(&current.serial) << 32);
    atomic_store(&current.running, 1);
    publish();
    return atomic_load(&current.running);
}

/* Some of a share's lots; none: count 0. */
typedef struct {
    int64_t first, count;
} Taken;

/* So much of what is left of a share is taken at once, of tasks that may be done as one: large pieces begin seldom, and
 * small ones at the end let all threads finish together. Each piece that is done is a line that goes from core to core,
 * so they are few; but half of a large share, and of another's, is enough at a time. */
#define LARGE_SHARE 64
static int64_t piece_of(int64_t left, int is_own)
{
    if (left <= 1) return 1;
    return is_own && left <= LARGE_SHARE ? left - (left + 3) / 4 : left / 2;
}

/* Of the share of `owner` in operation `now`, from its front or its back. */
static Taken take(uint32_t now, int64_t lots, int64_t owner, int is_own, int joins)
{
    const int64_t first = first_of_share(lots, owner), end = first_of_share(lots, owner + 1);
    uint64_t seen = atomic_load(&shares[owner].taken);
    for (;;) {
        const int32_t age = (int32_t)(now - (uint32_t)(seen >> 32));
        const uint64_t taken = age == 0 ? seen : (uint64_t)now << 32;
        const int64_t front = taken >> 16 & MOST_LOTS, back = taken & MOST_LOTS;
        const int64_t left = end - first - front - back, count = joins ? piece_of(left, is_own) : 1;
        if (age < 0 || left <= 0) return (Taken){0, 0};
        if (atomic_compare_exchange_strong(&shares[owner].taken, &seen, taken + (uint64_t)(is_own ? count << 16 : count)))
            return (Taken){is_own ? first + front : end - back - count, count};
    }
}

/* What a member has asked memory for, of the operation at `position` in the program. */
typedef struct {
    int64_t position, step;
} Asked;

/* Asks for a little of what the member will read of the next matrix. */
static void ask_for_next(int64_t member, Asked *asked)
{
    const int64_t at = atomic_load_explicit(&current.position, memory_order_relaxed) + 1;
    for (int64_t i = at; i < at + LOOK_AHEAD && i < program_count; i++) {
        const void *op = program[i];
        const Kernel *kernel = kernel_of(op);
        if (i == asked->position && asked->step == ASK_STEPS) return;
        const int64_t count = kernel->ask ? kernel->tasks(op) : 0, in_lot = lot_of(count);
        if (count == 0) continue;
        if (i != asked->position) asked->position = i, asked->step = 0;
        kernel->ask(op, first_of_share(lots_of(count, in_lot), member) * in_lot, asked->step++);
        return;
    }
}

static void work(int64_t member)
{
    Asked asked = {-1, 0};
    uint32_t spent = 1;    /* the operation in which no task was left */
    uint32_t prepared = 1; /* the one that scratch is prepared for */
    int spins = 0;
    while (atomic_load(&current.running)) {
        const uint32_t now = atomic_load(&current.serial);
        if (now % 2 || now == spent) {
            ask_for_next(member, &asked);
            if (++spins < SPINS_BEFORE_YIELD) pause_briefly();
            else sched_yield();
            continue;
        }
        void *op = atomic_load_explicit(&current.op, memory_order_acquire);
        const int64_t count = atomic_load_explicit(&current.tasks, memory_order_acquire);
        const int64_t in_lot = atomic_load_explicit(&current.lot, memory_order_acquire), lots = lots_of(count, in_lot);
        if (atomic_load(&current.serial) != now) continue;
        const Kernel *kernel = count ? kernel_of(op) : NULL;
        const int joins = kernel && kernel->joins && kernel->joins(op);
        Taken mine = {0, 0};
        for (int64_t i = 0; kernel && !mine.count && i < members; i++)
            mine = take(now, lots, (member + i) % members, i == 0, joins);
        if (!mine.count) {
            spent = now;
            continue;
        }
        spins = 0;
        const int64_t first = mine.first * in_lot, behind = (mine.first + mine.count) * in_lot;
        const int64_t end = behind < count ? behind : count;
        if (kernel->prepare && prepared != now) kernel->prepare(op, scratch_for(op)), prepared = now;
        if (joins) kernel->joined(op, first, end - first, scratch_for(op));
        else
            for (int64_t task = first; task < end; task++) kernel->task(op, task, scratch_for(op));
        if (atomic_fetch_add(&done.lots, mine.count) + mine.count == lots) publish();
    }
}

/* Works on the program until it is done. */
static void take_part(int member)
{
    atomic_fetch_add(&inside.members, 1);
    work(member % members);
    atomic_fetch_sub(&inside.members, 1);
}

/* Once the program is done: no thread looks at its operations any more. */
static void await_the_others(void)
{
    for (int spins = 0; atomic_load(&inside.members); spins++)
        if (spins < SPINS_BEFORE_YIELD) pause_briefly();
        else sched_yield();
}

/* In a forked child: nobody is at work. */
static void forget_program(void)
{
    atomic_store(&current.running, 0);
    atomic_store(&inside.members, 0);
}
