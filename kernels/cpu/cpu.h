// SPDX-License-Identifier: MIT
/*
 * cpu: inside of the cpu back end.
 *
 * Every pool thread has a lane: a struct kern of its own (so that its failures have a place), a oneDNN stream, scratch memory.
 * The owner of the back end has a lane too, for work too small to be handed over. An op cuts its work into tasks whose shape
 * depends on the layer or on the op's sizes only; cpu_run then runs them here, one after the other, or spreads them over the
 * pool. As a task computes the same wherever and whenever it runs, results depend neither on the number of threads nor on the
 * number of rows.
 */
#ifndef KERN_CPU_H
#define KERN_CPU_H
#include "kernels/backend.h"

#include <dnnl.h>

#include "kernels/cpu/pool.h"

struct simd;

enum lane_mode {
    LANE_OWNER,  // not a pool thread: hands work to the pool if it is worth the trip
    LANE_SERIAL, // runs all by itself: the other lanes have rows of their own
    LANE_SHARED, // the only row-walker: shares each op's tasks with the whole pool
};

struct lane {
    struct kern kern; // kern.impl is this lane
    struct cpu *cpu;
    int id; // pool thread; the owner's lane comes last
    enum lane_mode mode;
    dnnl_stream_t stream;
    void *scratch; // cpu->scratch_bytes
};

struct cpu {
    struct pool *pool;
    int threads;
    dnnl_engine_t engine;
    const struct simd *simd; // NULL: no vector code for this machine, the reference serves
    struct lane *lanes;      // threads + 1; the last is the owner's
    struct shape *shapes;    // linear.c: what layers of one shape share
    size_t scratch_bytes;    // the most that any layer or op made so far asked for
};

#define LANE(k) ((struct lane *)(k)->impl)

// A task: runs on `lane`, whichever that is. 0 or a status with lane->kern.why set.
typedef int cpu_task_fn(struct lane *lane, int task, void *ctx);
// Runs tasks 0 .. n-1. work: an estimate in floating-point operations; below CPU_WORTH_SHARING the caller does it all, as a trip
// through the pool costs some 10 microseconds. The first failure is returned, with its text in k.
#define CPU_WORTH_SHARING 4e5
int cpu_run(struct kern *k, int n, double work, cpu_task_fn *, void *ctx);
// Makes every lane's scratch at least this large. 0 or KERN_ENOMEM. Only while no op runs.
int cpu_reserve(struct kern *k, size_t bytes);

/* linear.c; vectors.c does the layers that cpu_vectors_suit */
struct cpu_layer { // every layer begins so
    struct kern_linear_spec spec;
    bool own;           // of vectors.c
    const float *w, *b; // of linear_wrap: the caller's; else w is NULL
};
bool cpu_vectors_suit(struct kern *, const struct kern_linear_spec *);
int cpu_vectors_new(struct kern *, const struct kern_linear_spec *, const void *w, const float *b, struct kern_linear **);
int cpu_vectors_load(struct kern *, struct cpu_layer *, const void *w, const float *b); // packs the weights
void cpu_vectors_free(struct cpu_layer *);
int cpu_vectors(struct kern *, const struct cpu_layer *, void *y, const void *x, int units, void *save_pre);
int cpu_linear_new(struct kern *, const struct kern_linear_spec *, const void *w, const float *b, struct kern_linear **);
void cpu_linear_free(struct kern *, struct kern_linear *);
int cpu_linear_wrap(struct kern *, const struct kern_linear_spec *, const float *w, const float *b, struct kern_linear **);
int cpu_linear_refresh(struct kern *, struct kern_linear *);
int cpu_linear(struct kern *, const struct kern_linear *, void *y, const void *x, int units, void *save_pre);

/* ops.c: the rest, over the vector code. Sets the entries that cpu->simd has code for. */
void cpu_ops_fill(struct kern *, const struct cpu *);
#define CPU_OPS_SCRATCH ((size_t)(6 << 20)) // attention's packed keys and values: 2 * 4096 tokens * 128 floats, and a tile

/* threads.c: OpenMP, on which oneDNN is built, must never make a thread: each calling thread's own setting. Returns what it was.
 */
int cpu_omp_single(int threads);

#endif
