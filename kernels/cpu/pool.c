// SPDX-License-Identifier: MIT
/*
 * One 64-bit word holds all that a thread must know to take a task: the job's number of tasks and the next one to take. Taking a
 * task is one fetch-add, and what it returns is consistent in itself: a thread that wakes late for an old job finds the word of a
 * newer one and takes a task of that, or finds next >= count and takes nothing. A job's function and context only change once all
 * its tasks are done, and whoever holds a task has not finished it; so they may be plain reads. Nobody has to check in or out of
 * a job, so a sleeping thread never delays a small one.
 */
#include "kernels/cpu/pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOKS 200 // pause instructions: 2 to 8 microseconds, by processor

struct job {
    _Alignas(64) _Atomic uint64_t word; // count << 32 | next; next runs past count by at most one per thread
    pool_task_fn *fn;
    void *ctx;
    _Alignas(64) _Atomic uint32_t done; // tasks finished
    _Atomic uint32_t awaited;           // the giver sleeps on `done`
};

struct pool {
    struct job jobs[2];                   // outer, inner
    _Alignas(64) _Atomic uint32_t posted; // counts jobs; the threads sleep on it
    _Atomic uint32_t asleep;
    _Atomic bool stopping;
    int n, nice;
    pool_task_fn *ready;
    struct member {
        struct pool *pool;
        int id;
        pthread_t thread;
    } * members;
};

static void futex_wait(_Atomic uint32_t *at, uint32_t value) { syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0); }
static void futex_wake(_Atomic uint32_t *at, int n) { syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0); }

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static bool job_has_tasks(struct job *j) {
    uint64_t w = atomic_load_explicit(&j->word, memory_order_relaxed);
    return (uint32_t)w < (uint32_t)(w >> 32);
}

// Takes and runs tasks until none is left to take
static void job_work(struct job *j, int thread) {
    while (job_has_tasks(j)) {
        uint64_t w = atomic_fetch_add_explicit(&j->word, 1, memory_order_acquire);
        uint32_t next = (uint32_t)w, count = (uint32_t)(w >> 32);
        if (next >= count) return;
        j->fn(thread, (int)next, j->ctx);
        if (atomic_fetch_add(&j->done, 1) + 1 == count && atomic_load(&j->awaited)) futex_wake(&j->done, 1);
    }
}

static void job_post(struct pool *p, struct job *j, int n, pool_task_fn *fn, void *ctx) {
    j->fn = fn;
    j->ctx = ctx;
    atomic_store_explicit(&j->done, 0, memory_order_relaxed);
    atomic_store_explicit(&j->word, (uint64_t)n << 32, memory_order_release);
    atomic_fetch_add(&p->posted, 1);
    if (atomic_load(&p->asleep)) futex_wake(&p->posted, n < p->n ? n : p->n);
}

static void job_await(struct job *j, uint32_t n, int looks) {
    for (int i = 0; i < looks; i++, pause_briefly())
        if (atomic_load_explicit(&j->done, memory_order_acquire) == n) return;
    atomic_store(&j->awaited, 1);
    for (uint32_t d; (d = atomic_load(&j->done)) != n;) futex_wait(&j->done, d);
    atomic_store(&j->awaited, 0);
}

static void *thread_main(void *arg) {
    struct member *m = arg;
    struct pool *p = m->pool;
    if (p->nice) { // on Linux niceness belongs to the thread
        int now = getpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid));
        setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), now + p->nice);
    }
    if (p->ready) p->ready(m->id, 0, NULL);
    for (;;) {
        uint32_t seen = atomic_load(&p->posted);
        job_work(&p->jobs[1], m->id);
        job_work(&p->jobs[0], m->id);
        for (int i = 0; i < LOOKS && atomic_load_explicit(&p->posted, memory_order_relaxed) == seen; i++) pause_briefly();
        if (atomic_load(&p->posted) != seen) continue;
        if (atomic_load(&p->stopping)) return NULL;
        atomic_fetch_add(&p->asleep, 1);
        futex_wait(&p->posted, seen); // returns at once if a job came since
        atomic_fetch_sub(&p->asleep, 1);
    }
}

void pool_run(struct pool *p, int n, pool_task_fn *fn, void *ctx) {
    if (n < 1) return;
    job_post(p, &p->jobs[0], n, fn, ctx);
    job_await(&p->jobs[0], (uint32_t)n, 0);
}

void pool_run_inner(struct pool *p, int thread, int n, pool_task_fn *fn, void *ctx) {
    if (n < 1) return;
    job_post(p, &p->jobs[1], n, fn, ctx);
    job_work(&p->jobs[1], thread);
    job_await(&p->jobs[1], (uint32_t)n, LOOKS);
}

void pool_stop(struct pool *p) {
    if (!p) return;
    atomic_store(&p->stopping, true);
    atomic_fetch_add(&p->posted, 1);
    futex_wake(&p->posted, p->n);
    for (int i = 0; i < p->n; i++) pthread_join(p->members[i].thread, NULL);
    free(p->members);
    free(p);
}

int pool_start(struct pool **out, int n, int nice, pool_task_fn *ready) {
    *out = NULL;
    struct pool *p = aligned_alloc(64, sizeof *p);
    if (!p) return -ENOMEM;
    *p = (struct pool){.nice = nice, .ready = ready};
    p->members = calloc((size_t)n, sizeof *p->members);
    if (!p->members) return free(p), -ENOMEM;
    sigset_t all, old; // signals are for the threads that expect them
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = 0;
    for (; p->n < n && rc == 0; p->n += rc == 0) {
        p->members[p->n] = (struct member){.pool = p, .id = p->n};
        rc = pthread_create(&p->members[p->n].thread, NULL, thread_main, &p->members[p->n]);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc) return pool_stop(p), -rc;
    *out = p;
    return 0;
}
