/* Runs a program on a few threads: operation after operation, the tasks of each handed out one by one.
 *
 * There is no barrier that every thread must reach. A 64-bit cursor holds (serial number of the operation, next task);
 * a thread takes a task by compare-and-swap, and whoever finishes the last one publishes the next operation. A thread
 * that the system has put aside while it holds no task delays nobody, which a barrier would not survive on a shared
 * machine. Every output is computed within one task, so results do not depend on the number of threads.
 *
 * The threads are those of torch's OpenMP runtime, where the host has found it (qwenfit_borrow): they spin for
 * milliseconds after each of torch's loops, and beside threads of our own a prompt took 1.2 times as long on two cores
 * and a decode step behind an argmax over the vocabulary 1.4 to 1.8 times. Elsewhere, and in a forked child, workers of
 * our own live as long as the process: after a program they spin for SPIN_NS (the next one usually comes at once), then
 * sleep. One program runs at a time; a second caller waits. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define pause_briefly() _mm_pause()
#elif defined(__aarch64__)
#define pause_briefly() __asm__ volatile("isb")
#endif

#define MOST_WORKERS 255
#define SPIN_NS 50000
#define SPINS_BEFORE_YIELD 4000
#define CLOSED 0xFFFFFFFFu

static const Kernel *kernels;
static pthread_mutex_t running_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int workers, sleepers;
static void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */

static const void *const *program;
static int64_t program_count;
static _Atomic(uint64_t) cursor;     /* serial number << 32 | next task */
static _Atomic(void *) current;      /* the operation that the cursor counts */
static _Atomic(int64_t) tasks, done; /* of that operation */
static _Atomic(int) running, helpers;
static _Atomic(uint32_t) generation;
static int64_t position; /* of `current` in the program; only whoever publishes touches it */

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

/* The next operation that has tasks, or the end.
 *
 * The cursor is closed first: a thread that read it before cannot take a task by it once `current` and `tasks` change,
 * and one that reads it closed finds no task. Without that a thread could pair the old cursor with the new count. */
static void publish(void)
{
    uint64_t serial = (atomic_load_explicit(&cursor, memory_order_relaxed) >> 32) + 1;
    atomic_store(&cursor, serial << 32 | CLOSED);
    int64_t count = 0;
    void *op = NULL;
    while (++position < program_count && count == 0) {
        op = (void *)program[position];
        count = kernel_of(op)->tasks(op);
        if (count) break;
    }
    atomic_store_explicit(&current, op, memory_order_release);
    atomic_store_explicit(&tasks, count, memory_order_release);
    atomic_store_explicit(&done, 0, memory_order_release);
    if (count == 0) atomic_store(&running, 0);
    atomic_store(&cursor, serial << 32);
}

static void take_part(void)
{
    int spins = 0;
    while (atomic_load(&running)) {
        uint64_t now = atomic_load(&cursor);
        void *op = atomic_load_explicit(&current, memory_order_acquire);
        int64_t count = atomic_load_explicit(&tasks, memory_order_acquire);
        if ((int64_t)(now & 0xFFFFFFFFu) >= count) { /* all are taken: somebody will finish the last */
            if (++spins < SPINS_BEFORE_YIELD) pause_briefly();
            else sched_yield();
            continue;
        }
        /* If the cursor has not moved since it was read, neither have `current` and `tasks`: it closes before they
         * do. */
        if (!atomic_compare_exchange_strong(&cursor, &now, now + 1)) continue;
        spins = 0;
        kernel_of(op)->task(op, (int64_t)(now & 0xFFFFFFFFu), scratch_for(op));
        if (atomic_fetch_add(&done, 1) + 1 == count) publish();
    }
}

/* Numbers below 2^-126 count as zero while a program runs: a decaying state would otherwise slow down a hundredfold. */
static uint64_t flush_denormals(void)
{
#if defined(__x86_64__)
    uint64_t before = _mm_getcsr();
    _mm_setcsr((uint32_t)before | 0x8040);
#else
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"(before | (1u << 24)));
#endif
    return before;
}
static void restore_denormals(uint64_t before)
{
#if defined(__x86_64__)
    _mm_setcsr((uint32_t)before);
#else
    __asm__ volatile("msr fpcr, %0" ::"r"(before));
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void await_generation(uint32_t seen)
{
    int64_t start = now_ns();
    for (int spins = 0; atomic_load(&generation) == seen; spins++) {
        pause_briefly();
        if (spins % 64 != 63 || now_ns() - start < SPIN_NS) continue;
        pthread_mutex_lock(&sleep_lock);
        sleepers++;
        while (atomic_load(&generation) == seen) pthread_cond_wait(&wake, &sleep_lock);
        sleepers--;
        pthread_mutex_unlock(&sleep_lock);
    }
}

static void *worker(void *argument)
{
    int number = (int)(intptr_t)argument;
    uint32_t seen = 0;
    flush_denormals();
    for (;;) {
        await_generation(seen);
        seen = atomic_load(&generation);
        if (number < atomic_load(&helpers)) take_part();
    }
    return NULL;
}

/* On every thread of a team, the caller's among them. */
static void take_part_in_team(void *data)
{
    (void)data;
    uint64_t before = flush_denormals();
    take_part();
    restore_denormals(before);
}

static void forget_workers(void)
{
    workers = sleepers = 0;
    parallel = NULL; /* OpenMP's threads are not there either, and GNU's runtime does not notice */
    atomic_store(&running, 0);
    pthread_mutex_init(&running_lock, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake, NULL);
}

static void watch_forks(void)
{
    static int watching;
    if (!watching) watching = 1, pthread_atfork(NULL, NULL, forget_workers);
}

static void start_workers(int wanted)
{
    watch_forks();
    while (workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)workers)) break; /* fewer threads, same result */
        pthread_detach(thread);
        workers++;
    }
}

/* Programs run on the threads of an OpenMP runtime from now on: the address of its GOMP_parallel (libgomp's ABI, which
 * LLVM's and Intel's runtimes have, too), or NULL for workers of our own. */
void qwenfit_borrow(void *gomp_parallel)
{
    pthread_mutex_lock(&running_lock);
    watch_forks();
    *(void **)&parallel = gomp_parallel;
    pthread_mutex_unlock(&running_lock);
}

static void call_workers(int wanted)
{
    if (workers < wanted) start_workers(wanted);
    atomic_store(&helpers, wanted);
    atomic_fetch_add(&generation, 1);
    pthread_mutex_lock(&sleep_lock);
    if (sleepers) pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&sleep_lock);
}

/* Runs `count` operations in order by the kernels of `table`, on at most `threads` threads, the caller among them. */
void qwenfit_run(const Kernel *table, const void *const *operations, int64_t count, int64_t threads)
{
    pthread_mutex_lock(&running_lock);
    kernels = table;
    int wanted = (int)(threads > MOST_WORKERS ? MOST_WORKERS : threads) - 1;
    program = operations, program_count = count, position = -1;
    uint64_t before = flush_denormals();
    atomic_store(&running, 1);
    publish();
    if (wanted > 0 && atomic_load(&running)) {
        if (parallel) parallel(take_part_in_team, NULL, (unsigned)wanted + 1, 0);
        else call_workers(wanted);
    }
    take_part();
    restore_denormals(before);
    pthread_mutex_unlock(&running_lock);
}

/* One operation that needs no scratch, by the calling thread alone: callers that bring threads of their own do not
 * wait for each other. */
void qwenfit_run_here(const Kernel *table, void *op)
{
    const Kernel *kernel = table + *(const int64_t *)op;
    for (int64_t task = 0, count = kernel->tasks(op); task < count; task++) kernel->task(op, task, NULL);
}
