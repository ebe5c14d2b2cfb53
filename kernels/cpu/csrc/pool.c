/* Runs a program on a few threads, by the order that progress.h keeps.
 *
 * The threads are those of torch's OpenMP runtime, where the host has found it (qwenfit_borrow): they spin for
 * milliseconds after each of torch's loops, and beside threads of our own a prompt took 1.2 times as long on two cores
 * and a decode step behind an argmax over the vocabulary 1.4 to 1.8 times. Elsewhere, and in a forked child, workers of
 * our own live as long as the process: after a program they spin for SPIN_NS (the next one usually comes at once), then
 * sleep. One program runs at a time; a second caller waits. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include "progress.h"

#define SPIN_NS 50000

static pthread_mutex_t running_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int workers, sleepers;
static void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */
static _Atomic(int) helpers; /* workers that are called */
static _Atomic(uint32_t) generation;

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
        if (number < atomic_load(&helpers)) take_part(number + 1);
    }
    return NULL;
}

/* On every thread of a team, the caller's among them. */
static void take_part_in_team(void *data)
{
    uint64_t before = flush_denormals();
    take_part(atomic_fetch_add((_Atomic(int) *)data, 1));
    restore_denormals(before);
}

static void forget_workers(void)
{
    workers = sleepers = 0;
    parallel = NULL; /* OpenMP's threads are not there either, and GNU's runtime does not notice */
    forget_program();
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
    int wanted = (int)(threads > MOST_MEMBERS ? MOST_MEMBERS : threads < 1 ? 1 : threads) - 1;
    uint64_t before = flush_denormals();
    if (begin(table, operations, count, wanted + 1) && wanted > 0) {
        _Atomic(int) arrived = 0;
        if (parallel) parallel(take_part_in_team, &arrived, (unsigned)wanted + 1, 0);
        else call_workers(wanted);
    }
    take_part(0);
    await_the_others();
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
