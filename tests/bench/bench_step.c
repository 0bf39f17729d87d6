// SPDX-License-Identifier: MIT
/*
 * bench-step: whole training steps of a model directory's network on the CPU: noise mixed in, forward, velocity loss, backward,
 * AdamW with one average. bench-step MODEL_DIR ROWS THREADS SECONDS One JSON line: medians of a step's milliseconds by the clock
 * and of processor milliseconds, all threads together.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "core/io/model_dir.h"
#include "core/model/dit_train.h"

struct bench {
    struct kern *k;
    struct dit_train *net;
    int rows;
    size_t numel, floats;
    float *x1, *x0, *loss, *m, *v, *e;
    double *norm2;
    float *t;
    int32_t *y;
    struct kern_mix *mix;
    struct kern_loss *what;
};

static double clock_now(clockid_t clock) {
    struct timespec ts;
    clock_gettime(clock, &ts);
    return 1e3 * (double)ts.tv_sec + 1e-6 * (double)ts.tv_nsec;
}

static int fail(const char *why) { return fprintf(stderr, "bench-step: %s\n", why), 1; }

static int begin(struct bench *b, const struct arch *a, int threads, struct err *e) {
    char why[256];
    if (kern_open(&b->k, &(struct kern_config){.backend = "cpu", .threads = threads}, why, sizeof why)) return fail(why);
    if (dit_train_new(&b->net, b->k, a, b->rows, RECOMPUTE_NONE, e)) return fail(e->text);
    size_t rows = (size_t)b->rows;
    b->numel = (size_t)a->in_channels * (size_t)a->input_size * (size_t)a->input_size;
    b->floats = dit_train_floats(b->net);
    const struct {
        void *out;
        size_t bytes;
    } wanted[] = {{&b->x1, rows * b->numel * 4}, {&b->x0, rows * b->numel * 4}, {&b->loss, rows * 8},
                  {&b->m, b->floats * 4},        {&b->v, b->floats * 4},        {&b->e, b->floats * 4},
                  {&b->norm2, sizeof(double)}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (b->k->alloc(b->k, wanted[i].bytes, wanted[i].out)) return fail(b->k->why);
    b->t = calloc(rows, sizeof *b->t), b->y = calloc(rows, sizeof *b->y);
    b->mix = calloc(rows, sizeof *b->mix), b->what = calloc(rows, sizeof *b->what);
    if (!b->t || !b->y || !b->mix || !b->what) return fail("out of memory");
    dit_train_init(b->net, dit_train_weights(b->net), 1); // on the CPU a buffer is host memory
    if (dit_train_refresh(b->net, e)) return fail(e->text);
    for (size_t i = 0; i < rows * b->numel; i++) b->x1[i] = (float)(i % 255) / 127.5f - 1;
    for (int r = 0; r < b->rows; r++) {
        float t = b->t[r] = ((float)r + 0.5f) / (float)b->rows;
        b->y[r] = r % a->num_classes;
        b->mix[r] = (struct kern_mix){.seed = 1, .image = (uint32_t)r, .a1 = t, .a0 = 1 - t};
        b->what[r] = (struct kern_loss){.c_out = 1, .c1 = -1, .c0 = 1, .weight = 1, .grad = 1 / (float)b->rows};
    }
    return 0;
}

static int step(struct bench *b, int n, struct err *e) {
    struct kern *k = b->k;
    float *x = dit_train_x(b->net), *grads = dit_train_grads(b->net);
    struct kern_adamw a = {.lr = 1e-4,
                           .beta1 = 0.9,
                           .beta2 = 0.999,
                           .eps = 1e-8,
                           .bias1 = 0.5,
                           .bias2 = 0.5,
                           .grad_scale = 1,
                           .n_ema = 1,
                           .ema = {0.9999}};
    for (int r = 0; r < b->rows; r++) b->mix[r].draw = (uint32_t)n;
    int rc = k->mix(k, x, b->x0, b->x1, b->numel, b->mix, b->rows);
    if (!rc) rc = dit_train_forward(b->net, b->rows, b->t, b->y, e);
    if (!rc)
        rc = k->loss(k, dit_train_dout(b->net), b->loss, dit_train_out(b->net), b->numel, b->x1, b->x0, x, b->numel, b->what,
                     b->rows);
    if (!rc) rc = dit_train_backward(b->net, b->rows, false, e);
    if (!rc) rc = k->zero(k, b->norm2, sizeof(double));
    if (!rc) rc = k->sum_squares(k, b->norm2, grads, b->floats);
    if (!rc) rc = k->adamw(k, dit_train_weights(b->net), b->m, b->v, &b->e, grads, b->floats, &a, b->norm2, NULL);
    return rc ? rc : dit_train_refresh(b->net, e);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    enum { MOST = 1000 };
    static double wall[MOST], processor[MOST];
    struct model_dir dir = {0};
    struct err e = {0};
    if (argc != 5) return fail("usage: bench-step MODEL_DIR ROWS THREADS SECONDS");
    if (model_dir_open(&dir, argv[1], &e)) return fail(e.text);
    struct bench b = {.rows = atoi(argv[2])};
    if (b.rows < 1 || b.rows > 4096 || begin(&b, &dir.desc.arch, atoi(argv[3]), &e)) return fail("not begun");
    int n = 0;
    for (double start = clock_now(CLOCK_MONOTONIC);
         n < MOST && (n < 4 || clock_now(CLOCK_MONOTONIC) - start < 1e3 * atof(argv[4])); n++) {
        double w = clock_now(CLOCK_MONOTONIC), p = clock_now(CLOCK_PROCESS_CPUTIME_ID);
        if (step(&b, n, &e)) return fail(e.text);
        wall[n] = clock_now(CLOCK_MONOTONIC) - w, processor[n] = clock_now(CLOCK_PROCESS_CPUTIME_ID) - p;
    }
    n--; // the first step warms caches
    qsort(wall + 1, (size_t)n, sizeof *wall, by_value), qsort(processor + 1, (size_t)n, sizeof *processor, by_value);
    printf("{\"who\":\"sitd\",\"rows\":%d,\"runs\":%d,\"ms\":%.2f,\"ms_min\":%.2f,\"processor_ms\":%.2f,\"loss\":%.4f}\n", b.rows,
           n, wall[1 + n / 2], wall[1], processor[1 + n / 2], (double)b.loss[0]);
    return 0;
}
