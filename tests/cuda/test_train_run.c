// SPDX-License-Identifier: MIT
// A short training run on the GPU: the loss curve of bfloat16 beside that of float32, same weights, data and noise. Needs a GPU.
#include <math.h>

#include "core/model/dit_train.h"
#include "tests/test.h"

enum { ROWS = 64, SIDE = 16, STEPS = 500, WINDOW = 50 };

static const struct arch SMALL = {.input_size = SIDE,
                                  .patch_size = 2,
                                  .in_channels = 1,
                                  .hidden_size = 192,
                                  .depth = 4,
                                  .num_heads = 3,
                                  .num_classes = 8,
                                  .mlp_ratio = 4,
                                  .class_dropout = true};

struct run {
    struct kern *k;
    struct dit_train *t;
    float *m, *v, *ema, *x1, *x0, *loss;
};

#define NUMEL (SIDE * SIDE)

static void open_run(struct run *r, enum kern_dtype act) {
    struct err e = {0};
    char why[256] = "";
    if (kern_open(&r->k, &(struct kern_config){.backend = "cuda", .act = act, .exact_stream = true}, why, sizeof why))
        test_fail(__FILE__, __LINE__, "%s", why);
    CHECK_OK(dit_train_new(&r->t, r->k, &SMALL, ROWS, RECOMPUTE_NONE, &e), &e);
    size_t n = dit_train_floats(r->t);
    struct {
        void *out;
        size_t bytes;
    } all[] = {{&r->m, n * 4},      {&r->v, n * 4}, {&r->ema, n * 4}, {&r->x1, ROWS * NUMEL * 4}, {&r->x0, ROWS * NUMEL * 4},
               {&r->loss, ROWS * 8}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) CHECK(r->k->alloc(r->k, all[i].bytes, all[i].out) == 0);
    float *flat = malloc(n * 4);
    dit_train_init(r->t, flat, 5);
    CHECK(r->k->upload(r->k, dit_train_weights(r->t), flat, n * 4) == 0);
    free(flat);
    CHECK_OK(dit_train_refresh(r->t, &e), &e);
}

// Stripes whose direction is the class; their phase is chance
static double one_step(struct run *r, int step) {
    struct kern *k = r->k;
    struct err e = {0};
    static float x[ROWS * NUMEL];
    float time[ROWS], loss[2 * ROWS];
    int32_t y[ROWS];
    struct kern_mix mix[ROWS];
    struct kern_loss judge[ROWS];
    uint32_t s = (uint32_t)step * 2654435761u + 1;
    for (int i = 0; i < ROWS; i++) {
        y[i] = (int32_t)((s = s * 1664525u + 1013904223u) >> 29);
        float phase = (float)(s >> 8 & 0xffff) * 1e-4f, a = 0.4f * (float)y[i];
        time[i] = (float)((s = s * 1664525u + 1013904223u) >> 8) * 0x1p-24f;
        for (int j = 0; j < NUMEL; j++)
            x[i * NUMEL + j] = sinf(0.7f * (cosf(a) * (float)(j % SIDE) + sinf(a) * (float)(j / SIDE)) + phase);
        mix[i] = (struct kern_mix){7, (uint32_t)i, (uint32_t)step, time[i], 1 - time[i]};
        judge[i] = (struct kern_loss){.c_out = 1, .c1 = -1, .c0 = 1, .weight = 1, .grad = 1.0f / ROWS};
    }
    double beta1 = pow(0.9, step + 1), beta2 = pow(0.999, step + 1), sum = 0;
    struct kern_adamw a = {1e-4, 0.9, 0.999, 1e-8, 0, 1 - beta1, 1 - beta2, 1, 0, 1, {0.99}};
    size_t n = dit_train_floats(r->t);
    CHECK(k->upload(k, r->x1, x, sizeof x) == 0 && k->mix(k, dit_train_x(r->t), r->x0, r->x1, NUMEL, mix, ROWS) == 0);
    CHECK_OK(dit_train_forward(r->t, ROWS, time, y, &e), &e);
    CHECK(k->loss(k, dit_train_dout(r->t), r->loss, dit_train_out(r->t), NUMEL, r->x1, r->x0, dit_train_x(r->t), NUMEL, judge,
                  ROWS) == 0);
    CHECK_OK(dit_train_backward(r->t, ROWS, false, &e), &e);
    CHECK(k->adamw(k, dit_train_weights(r->t), r->m, r->v, &r->ema, dit_train_grads(r->t), n, &a, NULL, NULL) == 0);
    CHECK_OK(dit_train_refresh(r->t, &e), &e);
    CHECK(k->download(k, loss, r->loss, sizeof loss) == 0);
    for (int i = 0; i < ROWS; i++) sum += loss[2 * i] / ROWS;
    return sum;
}

static void curve(double *mean, enum kern_dtype act) {
    struct run r;
    open_run(&r, act);
    for (int i = 0; i < STEPS; i++) mean[i / WINDOW] += one_step(&r, i) / WINDOW;
    void *all[] = {r.m, r.v, r.ema, r.x1, r.x0, r.loss};
    for (int i = 0; i < 6; i++) r.k->free(r.k, all[i]);
    dit_train_free(r.t);
    kern_close(r.k);
}

TEST_LIMIT(cuda_train_bf16_follows_the_loss_of_f32, 120) {
    double exact[STEPS / WINDOW] = {0}, got[STEPS / WINDOW] = {0}, most = 0;
    curve(exact, KERN_F32);
    curve(got, KERN_BF16);
    for (int i = 0; i < STEPS / WINDOW; i++) most = fmax(most, fabs(got[i] / exact[i] - 1));
    printf("    loss %.4f to %.4f in float32, %.4f in bfloat16; %.3g apart at most\n", exact[0], exact[STEPS / WINDOW - 1],
           got[STEPS / WINDOW - 1], most);
    CHECK(exact[STEPS / WINDOW - 1] < 0.9 * exact[0]);
    CHECK(most <= 0.01);
}
