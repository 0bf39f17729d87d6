// SPDX-License-Identifier: MIT
/*
 * How rows meet threads. With at least as many rows as threads each row runs through the whole network on one thread: its
 * activations stay in that core's second-level cache, and no thread waits for another until the end. Short rows go several at
 * once, if there are enough: each block's weights come from further away than activations do, and serve them all. The rows left
 * over when the number does not divide, or all of them when they are fewer than the threads, are walked by one thread that shares
 * each op's tasks with the others. All ways run the same tasks, so all give the same bits; only the order differs.
 */
#include "kernels/cpu/cpu.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cpu/picture.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/train.h"

struct job { // one cpu_run or one part of cpu_rows, as the pool sees it
    struct cpu *cpu;
    cpu_task_fn *task;
    void *ctx;
    enum lane_mode mode;
    _Atomic int status;
    _Atomic int failed_lane;
};

static void job_task(int thread, int i, void *arg) {
    struct job *j = arg;
    struct lane *lane = &j->cpu->lanes[thread];
    lane->mode = j->mode;
    if (atomic_load_explicit(&j->status, memory_order_relaxed) < 0) return;
    int rc = j->task(lane, i, j->ctx), none = 0;
    if (rc < 0 && atomic_compare_exchange_strong(&j->status, &none, rc)) atomic_store(&j->failed_lane, thread);
}

static int job_result(struct kern *k, struct job *j) {
    struct kern *from = &j->cpu->lanes[j->failed_lane].kern;
    if (j->status < 0 && from != k) memcpy(k->why, from->why, sizeof k->why);
    return j->status;
}

int cpu_run(struct kern *k, int n, double work, cpu_task_fn *task, void *ctx) {
    struct lane *lane = LANE(k);
    if (n < 1) return KERN_OK;
    if (lane->mode == LANE_SERIAL || work < CPU_WORTH_SHARING || (lane->mode == LANE_SHARED && n == 1)) {
        int rc = KERN_OK;
        for (int i = 0; i < n && rc >= 0; i++) rc = task(lane, i, ctx);
        if (rc < 0 && k != &lane->kern) memcpy(k->why, lane->kern.why, sizeof k->why);
        return rc;
    }
    struct job j = {.cpu = lane->cpu, .task = task, .ctx = ctx, .mode = LANE_SERIAL};
    if (lane->mode == LANE_OWNER) {
        pool_run(lane->cpu->pool, n, job_task, &j);
    } else {
        pool_run_inner(lane->cpu->pool, lane->id, n, job_task, &j);
        lane->mode = LANE_SHARED; // this thread has run tasks of its own job
    }
    return job_result(k, &j);
}

/* ---- rows ---- */

enum { WALK_LINES = 512 };

struct walk {
    kern_rows_fn *fn;
    void *ctx;
    int first, each; // task i walks rows [first + i*each, + each)
    bool scratch_of_lane;
};

static int walk_task(struct lane *lane, int i, void *arg) {
    struct walk *w = arg;
    return w->fn(&lane->kern, w->ctx, w->first + i * w->each, w->each, w->scratch_of_lane ? lane->id * w->each : 0);
}

// Rows that a thread walks at once: a power of two, two walks a thread at least
static int rows_at_once(const struct cpu *cpu, int n, int lines) {
    int each = 1;
    while (2 * each * lines <= WALK_LINES && 4 * each * cpu->threads <= n) each *= 2;
    return each;
}

static int run_walks(struct kern *k, struct walk *w, int walks, enum lane_mode mode) {
    struct cpu *cpu = LANE(k)->cpu;
    struct job j = {.cpu = cpu, .task = walk_task, .ctx = w, .mode = mode};
    if (walks < 1) return KERN_OK;
    pool_run(cpu->pool, walks, job_task, &j);
    w->first += walks * w->each;
    return job_result(k, &j);
}

static int cpu_rows(struct kern *k, int n, int lines, kern_rows_fn *fn, void *ctx) {
    struct cpu *cpu = LANE(k)->cpu;
    struct walk w = {.fn = fn, .ctx = ctx, .scratch_of_lane = true};
    int rc = KERN_OK;
    for (w.each = rows_at_once(cpu, n, lines); w.each > 0 && rc >= 0; w.each /= 2)
        rc = run_walks(k, &w, (n - w.first) / (w.each * cpu->threads) * cpu->threads, LANE_SERIAL);
    if (rc < 0 || w.first == n) return rc;
    w.each = n - w.first, w.scratch_of_lane = false;
    return run_walks(k, &w, 1, LANE_SHARED);
}

static int cpu_rows_scratch(struct kern *k, int n, int lines) {
    const struct cpu *cpu = LANE(k)->cpu;
    int most = rows_at_once(cpu, n, lines) * cpu->threads;
    return n < most ? n : most;
}

/* ---- opening ---- */

int cpu_reserve(struct kern *k, size_t bytes) {
    struct cpu *cpu = LANE(k)->cpu;
    size_t size = kern_alloc_size(bytes);
    if (size <= cpu->scratch_bytes && size) return KERN_OK;
    for (int i = 0; i <= cpu->threads; i++) { // a lane that has more than scratch_bytes after a failure half-way does no harm
        void *p = size ? aligned_alloc(64, size) : NULL;
        if (!p) return kern_fail(k, KERN_ENOMEM, "out of memory for %zu bytes of scratch", bytes);
        free(cpu->lanes[i].scratch);
        cpu->lanes[i].scratch = p;
    }
    cpu->scratch_bytes = size;
    return KERN_OK;
}

static int lane_init(struct lane *lane, struct kern *k, struct cpu *cpu, int id) {
    lane->cpu = cpu;
    lane->id = id;
    lane->mode = id == cpu->threads ? LANE_OWNER : LANE_SERIAL;
    lane->kern = *k;
    lane->kern.impl = lane;
    return dnnl_stream_create(&lane->stream, cpu->engine, dnnl_stream_in_order) == dnnl_success ? KERN_OK : KERN_EDEVICE;
}

static void cpu_close(struct kern *k) {
    struct cpu *cpu = LANE(k)->cpu;
    pool_stop(cpu->pool);
    for (int i = 0; i <= cpu->threads; i++) {
        if (cpu->lanes[i].stream) dnnl_stream_destroy(cpu->lanes[i].stream);
        free(cpu->lanes[i].scratch);
    }
    if (cpu->engine) dnnl_engine_destroy(cpu->engine);
    free(cpu->lanes);
    free(cpu);
}

bool kern_cpu_has_bf16(void) {
#if defined(__x86_64__)
    unsigned isa = (unsigned)dnnl_get_effective_cpu_isa();
    return (isa & dnnl_cpu_isa_avx512_core_bf16) == dnnl_cpu_isa_avx512_core_bf16 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// The vector code that both the processor and ONEDNN_MAX_CPU_ISA allow: one limit for all of the back end
static const struct simd *best_simd(void) {
#if defined(__x86_64__)
    unsigned isa = (unsigned)dnnl_get_effective_cpu_isa();
    bool avx512 = (isa & dnnl_cpu_isa_avx512_core) == dnnl_cpu_isa_avx512_core,
         avx2 = (isa & dnnl_cpu_isa_avx2) == dnnl_cpu_isa_avx2;
    if (avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return kern_cpu_has_bf16() ? &simd_avx512bf16 : &simd_avx512;
    if (avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &simd_avx2;
#endif
    return NULL;
}

static void describe(struct kern *k, const struct cpu *cpu) {
    char line[128], model[64] = "processor of unknown make";
    FILE *f = fopen("/proc/cpuinfo", "re");
    while (f && fgets(line, sizeof line, f)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon) continue;
        snprintf(model, sizeof model, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    if (f) fclose(f);
    snprintf(k->device, sizeof k->device, "%.52s, %d thread%s, %s", model, cpu->threads, cpu->threads == 1 ? "" : "s",
             cpu->simd ? cpu->simd->name : "no vector code");
}

static void pool_thread_ready(int thread, int task, void *ctx) {
    (void)thread, (void)task, (void)ctx;
    cpu_omp_single(1);
}

static int cpu_init(struct kern *k, struct cpu *cpu, int nice) {
    if (dnnl_engine_create(&cpu->engine, dnnl_cpu, 0) != dnnl_success)
        return kern_fail(k, KERN_EDEVICE, "oneDNN has no CPU engine");
    for (int i = 0; i <= cpu->threads; i++)
        if (lane_init(&cpu->lanes[i], k, cpu, i) < 0) return kern_fail(k, KERN_EDEVICE, "oneDNN cannot make a stream");
    int rc = cpu_reserve(k, cpu->simd ? CPU_OPS_SCRATCH : 64);
    if (rc < 0) return rc;
    rc = pool_start(&cpu->pool, cpu->threads, nice, pool_thread_ready);
    if (rc < 0)
        return kern_fail(k, rc == -ENOMEM ? KERN_ENOMEM : KERN_ETHREAD, "cannot start %d threads: %s", cpu->threads,
                         strerror(-rc));
    return KERN_OK;
}

int kern_cpu_open(struct kern *k, const struct kern_config *cfg) {
    if (cfg->act == KERN_BF16 && !kern_cpu_has_bf16())
        return kern_fail(k, KERN_EUNSUPPORTED,
                         "bfloat16 needs a processor with AVX-512 BF16 (and ONEDNN_MAX_CPU_ISA must not exclude it)");
    if (cfg->act == KERN_F16) return kern_fail(k, KERN_EUNSUPPORTED, "precision f16 needs a GPU (back end cuda)");
    int threads = cfg->threads > 0 ? cfg->threads : kern_threads_allowed();
    struct cpu *cpu = calloc(1, sizeof *cpu);
    struct lane *lanes = calloc((size_t)threads + 1, sizeof *lanes);
    if (!cpu || !lanes) {
        free(cpu);
        free(lanes);
        return kern_fail(k, KERN_ENOMEM, "out of memory for %d threads", threads);
    }
    cpu->lanes = lanes;
    cpu->threads = threads;
    cpu->simd = best_simd();
    k->name = "cpu";
    k->threads = threads;
    k->impl = &lanes[threads];
    k->close = cpu_close;
    k->rows = cpu_rows;
    k->rows_scratch = cpu_rows_scratch;
    k->linear_new = cpu_linear_new;
    k->linear_free = cpu_linear_free;
    k->linear = cpu_linear;
    cpu_ops_fill(k, cpu);
    cpu_picture_fill(k, cpu);
    cpu_train_fill(k, cpu);
    describe(k, cpu);
    int rc = cpu_init(k, cpu, cfg->nice);
    if (rc < 0) cpu_close(k);
    return rc;
}
