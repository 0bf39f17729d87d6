// SPDX-License-Identifier: MIT
/*
 * bench_train: milliseconds of a whole training step of SiT with random weights on random latents of 32x32x4: noising, forward,
 * loss, backward, AdamW, one EMA, fresh copies of the weights. torch_train.py times the same beside it.
 *
 *   bench-train SHAPE ROWS STEPS [bf16|f32] [none|block]     SHAPE: S/2, B/2, L/2, XL/2
 *
 * gib: what the GPU has less of at the end than after it was opened, whatever took it; on a card that nobody else uses.
 *
 * With RANK, WORLD_SIZE and MASTER_ADDR in the environment (or what mpirun and Slurm set) every process runs ROWS rows on its own
 * GPU, gradients are summed and each steps its share of the weights.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/model/dit_train.h"
#include "core/train/parallel.h"

static struct arch shape_arch(const char *shape) {
    static const struct {
        const char *name;
        int depth, width, heads;
    } sizes[] = {{"S/2", 12, 384, 6}, {"B/2", 12, 768, 12}, {"L/2", 24, 1024, 16}, {"XL/2", 28, 1152, 16}};
    struct arch a = {.input_size = 32,
                     .patch_size = 2,
                     .in_channels = 4,
                     .num_classes = 1000,
                     .mlp_ratio = 4,
                     .class_dropout = true,
                     .learn_sigma = true};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (strcmp(shape, sizes[i].name) == 0)
            a.depth = sizes[i].depth, a.hidden_size = sizes[i].width, a.num_heads = sizes[i].heads;
    return a;
}

struct bench {
    struct kern *k;
    struct dit_train *t;
    struct parallel *parallel; // NULL: one process
    int rows, step;
    size_t n, numel;
    float *m, *v, *ema, *x1, *x0, *loss, *time;
    int32_t *y;
    struct kern_mix *mix;
    struct kern_loss *objective;
    double *norm2;
};

static void check(int rc, const char *what, const char *why) {
    if (rc) fprintf(stderr, "bench-train: %s: %s\n", what, why), _exit(1);
}
#define OP(call) check(call, #call, k->why)
#define NET(call) check(call, #call, e.text)

static void reserve(struct bench *b) {
    struct kern *k = b->k;
    struct err e = {0};
    size_t R = (size_t)b->rows, n = b->n;
    struct {
        void *out;
        size_t bytes;
    } all[] = {{&b->m, n * 4},    {&b->v, n * 4}, {&b->ema, n * 4}, {&b->x1, R * b->numel * 4}, {&b->x0, R * b->numel * 4},
               {&b->loss, R * 8}, {&b->norm2, 16}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) OP(k->alloc(k, all[i].bytes, all[i].out));
    float *host = malloc((n > R * b->numel ? n : R * b->numel) * sizeof *host);
    uint32_t s = 1;
    for (size_t i = 0; i < n; i++)
        s = s * 1664525u + 1013904223u, host[i] = 0.035f * (float)(int32_t)s * 0x1p-31f; // deviation 0.02
    OP(k->upload(k, dit_train_weights(b->t), host, n * 4));
    for (size_t i = 0; i < R * b->numel; i++) s = s * 1664525u + 1013904223u, host[i] = 1.7f * (float)(int32_t)s * 0x1p-31f;
    OP(k->upload(k, b->x1, host, R * b->numel * 4));
    free(host);
    b->time = malloc(R * sizeof *b->time), b->y = malloc(R * sizeof *b->y);
    b->mix = calloc(R, sizeof *b->mix), b->objective = calloc(R, sizeof *b->objective);
    NET(dit_train_refresh(b->t, &e));
}

static void update(struct bench *b, const struct kern_adamw *a, size_t at, size_t n) {
    struct kern *k = b->k;
    float *ema = b->ema + at;
    OP(k->adamw(k, dit_train_weights(b->t) + at, b->m + at, b->v + at, &ema, dit_train_grads(b->t) + at, n, a, NULL, NULL));
}

static void step(struct bench *b) {
    struct kern *k = b->k;
    struct err e = {0};
    size_t ld = 2 * b->numel;
    b->step++;
    for (int r = 0; r < b->rows; r++) {
        float t = ((float)((r * 37 + b->step * 11) % b->rows) + 0.5f) / (float)b->rows;
        b->time[r] = t, b->y[r] = (r * 7 + b->step) % 1001;
        b->mix[r] = (struct kern_mix){(uint64_t)b->step, (uint32_t)r, 0, t, 1 - t};
        b->objective[r] = (struct kern_loss){.c_out = 1, .c1 = -1, .c0 = 1, .weight = 1, .grad = 1};
    }
    OP(k->mix(k, dit_train_x(b->t), b->x0, b->x1, b->numel, b->mix, b->rows));
    NET(dit_train_forward(b->t, b->rows, b->time, b->y, &e));
    OP(k->loss(k, dit_train_dout(b->t), b->loss, dit_train_out(b->t), ld, b->x1, b->x0, dit_train_x(b->t), b->numel, b->objective,
               b->rows));
    NET(dit_train_backward(b->t, b->rows, false, &e));
    if (b->parallel) NET(parallel_finish(b->parallel, &e));
    double beta1 = 1, beta2 = 1;
    for (int i = 0; i < b->step; i++) beta1 *= 0.9, beta2 *= 0.999;
    struct kern_adamw a = {1e-4, 0.9, 0.999, 1e-8, 0, 1 - beta1, 1 - beta2, 1.0 / b->rows, 0, 1, {0.9999}};
    const struct parallel_piece whole = {.share = b->n}, *p = &whole;
    int pieces = b->parallel ? parallel_pieces(b->parallel, &p) : 1;
    for (int i = 0; i < pieces; i++) {
        update(b, &a, p[i].own, p[i].share);
        if (p[i].rest_count) update(b, &a, p[i].rest, p[i].rest_count);
        if (b->parallel) parallel_share(b->parallel, dit_train_weights(b->t), i);
    }
    if (b->parallel) NET(parallel_wait(b->parallel, &e));
    NET(dit_train_refresh(b->t, &e));
}

static float mean_loss(struct bench *b) {
    struct kern *k = b->k;
    float *host = malloc((size_t)b->rows * 8), sum = 0;
    OP(k->download(k, host, b->loss, (size_t)b->rows * 8));
    for (int r = 0; r < b->rows; r++) sum += host[2 * r] / (float)b->rows;
    free(host);
    return sum;
}

int main(int argc, char **argv) {
    struct bench b = {.rows = argc > 2 ? atoi(argv[2]) : 64};
    const char *shape = argc > 1 ? argv[1] : "XL/2";
    int steps = argc > 3 ? atoi(argv[3]) : 20;
    bool f32 = argc > 4 && strcmp(argv[4], "f32") == 0, block = argc > 5 && strcmp(argv[5], "block") == 0;
    struct parallel_spec ranks;
    struct arch a = shape_arch(shape);
    struct err e = {0};
    char why[256] = "";
    NET(parallel_from_environment(&ranks, &e));
    struct kern_config config = {
        .backend = "cuda", .act = f32 ? KERN_F32 : KERN_BF16, .exact_stream = true, .device = ranks.local};
    check(kern_open(&b.k, &config, why, sizeof why), "kern_open", why);
    size_t free_before = b.k->device_memory(b.k);
    NET(dit_train_new(&b.t, b.k, &a, b.rows, block ? RECOMPUTE_BLOCK : RECOMPUTE_NONE, &e));
    b.n = dit_train_floats(b.t), b.numel = 4 * 32 * 32;
    reserve(&b);
    if (ranks.size > 1) NET(parallel_join(&b.parallel, &ranks, b.k, dit_train_grads(b.t), &e));
    if (b.parallel) dit_train_on_grads(b.t, parallel_gradients, b.parallel);
    for (int i = 0; i < 4; i++) step(&b);
    float first = mean_loss(&b);
    double begin = clock_seconds();
    for (int i = 0; i < steps; i++) step(&b);
    float last = mean_loss(&b);
    double ms = 1e3 * (clock_seconds() - begin) / steps, gib = ((double)free_before - (double)b.k->device_memory(b.k)) / (1 << 30);
    if (ranks.rank == 0)
        printf("{\"shape\": \"%s\", \"rows\": %d, \"gpus\": %d, \"ms\": %.2f, \"images_per_s\": %.0f, \"gib\": %.2f, \"loss\": "
               "[%.4f, %.4f]}\n",
               shape, b.rows, ranks.size, ms, 1e3 * b.rows * ranks.size / ms, gib, (double)first, (double)last);
    fflush(stdout);
    parallel_free(b.parallel, true);
    return 0;
}
