// SPDX-License-Identifier: MIT
/*
 * kernel_times: a library for CUDA_INJECTION64_PATH that prints, when a program ends, how long its kernels took, by name and
 * grid, graphs included.
 *
 *   gcc -shared -fPIC -O2 -I/usr/local/cuda/include -o kernel_times.so tests/cuda/cupti/kernel_times.c -L/usr/local/cuda/lib64
 * -lcupti CUDA_INJECTION64_PATH=$PWD/kernel_times.so build/sitd bench --backend cuda --shape XL/2 --rows 64 --precision bf16
 *
 * One line a kind: count, median and total microseconds, grid x block, name. CUPTI's own cost makes the program slower, not the
 * kernels. It also prints the span of the last LAST kernels from the first start to the last end and how much of it no kernel
 * filled.
 */
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KINDS 4096
#define SAMPLES 8192
#define LAST 4096
#define BUFFER (8u << 20)

static struct kind {
    char name[160];
    int x, y, z, block, regs, shared;
    long count;
    double total;
    float *us;
} kinds[KINDS];
static int kinds_n;
static struct { uint64_t start, end; } last[LAST];
static long seen;

static struct kind *kind_of(const CUpti_ActivityKernel9 *k) {
    for (int i = 0; i < kinds_n; i++)
        if (kinds[i].x == k->gridX && kinds[i].y == k->gridY && kinds[i].z == k->gridZ &&
            !strncmp(kinds[i].name, k->name, sizeof kinds[i].name - 1))
            return &kinds[i];
    if (kinds_n == KINDS) return NULL;
    struct kind *n = &kinds[kinds_n++];
    snprintf(n->name, sizeof n->name, "%s", k->name);
    n->x = k->gridX, n->y = k->gridY, n->z = k->gridZ, n->block = k->blockX, n->regs = k->registersPerThread;
    n->shared = k->dynamicSharedMemory + k->staticSharedMemory;
    n->us = malloc(SAMPLES * sizeof *n->us);
    return n;
}

static void CUPTIAPI requested(uint8_t **buffer, size_t *size, size_t *records) {
    *buffer = aligned_alloc(8, BUFFER), *size = BUFFER, *records = 0;
}

static void CUPTIAPI completed(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    (void)context, (void)stream, (void)size;
    for (CUpti_Activity *a = NULL; cuptiActivityGetNextRecord(buffer, valid, &a) == CUPTI_SUCCESS;) {
        if (a->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL && a->kind != CUPTI_ACTIVITY_KIND_KERNEL) continue;
        const CUpti_ActivityKernel9 *k = (const CUpti_ActivityKernel9 *)a;
        struct kind *n = kind_of(k);
        float us = 1e-3f * (float)(k->end - k->start);
        last[seen % LAST].start = k->start, last[seen++ % LAST].end = k->end;
        if (!n) continue;
        n->us[n->count++ % SAMPLES] = us;
        n->total += us;
    }
    free(buffer);
}

static int by_value(const void *a, const void *b) {
    return (*(const float *)a > *(const float *)b) - (*(const float *)a < *(const float *)b);
}
static int by_total(const void *a, const void *b) {
    return (((const struct kind *)a)->total < ((const struct kind *)b)->total) -
           (((const struct kind *)a)->total > ((const struct kind *)b)->total);
}
static int by_start(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void report(void) {
    cuptiActivityFlushAll(1);
    qsort(kinds, (size_t)kinds_n, sizeof *kinds, by_total);
    for (int i = 0; i < kinds_n && i < 40; i++) {
        long n = kinds[i].count < SAMPLES ? kinds[i].count : SAMPLES;
        qsort(kinds[i].us, (size_t)n, sizeof(float), by_value);
        fprintf(stderr, "KERNEL %6ld x %8.2f us (least %.2f)  %dx%dx%d x %d, %d regs, %d B  %.110s\n", kinds[i].count,
                (double)kinds[i].us[n / 2], (double)kinds[i].us[0], kinds[i].x, kinds[i].y, kinds[i].z, kinds[i].block,
                kinds[i].regs, kinds[i].shared, kinds[i].name);
    }
    size_t n = seen < LAST ? (size_t)seen : LAST;
    if (n < 2) return;
    qsort(last, n, sizeof *last, by_start);
    double busy = 0, span = 1e-3 * (double)(last[n - 1].end - last[0].start), gap = 0;
    for (size_t i = 0; i < n; i++) {
        busy += 1e-3 * (double)(last[i].end - last[i].start);
        double g = i ? 1e-3 * (double)last[i].start - 1e-3 * (double)last[i - 1].end : 0;
        if (g > 0 && g < 20) gap += g; // longer: between forward passes
    }
    fprintf(stderr, "KERNELS last %zu: span %.1f us, busy %.1f us, gaps under 20 us %.1f us\n", n, span, busy, gap);
}

__attribute__((visibility("default"))) int InitializeInjection(void);
int InitializeInjection(void) {
    cuptiActivityRegisterCallbacks(requested, completed);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    atexit(report);
    return 1;
}
