// SPDX-License-Identifier: MIT
/*
 * pool: the threads of the cpu back end.
 *
 * Work is a job of n independent tasks that the threads take one by one. Two jobs can be open at once: an outer one, given by the
 * thread that owns the back end, and an inner one, given by a pool thread from inside its outer task (the outer job then has just
 * that one task). The giver of an outer job sleeps until it is done; the giver of an inner job works along.
 *
 * Threads wait on a futex after a few microseconds of looking: beside a busy neighbour spinning is what ruins OpenMP here.
 */
#ifndef KERN_CPU_POOL_H
#define KERN_CPU_POOL_H

struct pool;
typedef void pool_task_fn(int thread, int task, void *ctx); // thread: 0 .. n-1, who runs it

// Starts n threads, each `nice` steps nicer than the caller; each calls ready(thread, 0, NULL) once. 0, or a negative errno value
// with everything undone.
int pool_start(struct pool **, int n, int nice, pool_task_fn *ready);
void pool_stop(struct pool *); // joins; NULL is fine
// Runs task 0 .. n-1 and returns when all are done.
void pool_run(struct pool *, int n, pool_task_fn *, void *ctx); // from the owner, never from a task
void pool_run_inner(struct pool *, int thread, int n, pool_task_fn *,
                    void *ctx); // from the only task of an outer job, on `thread`

#endif
