// SPDX-License-Identifier: MIT
/*
 * Ten steps of AdamW with an EMA beside PyTorch's, from the same weights, images, noise and times (make_designs.py). A key's bias
 * has no gradient, since softmax does not see what all scores share; Adam makes whole steps of the rounding that is left, so
 * these are not compared.
 */
#include <math.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/model/dit_train.h"
#include "core/train/objective.h"
#include "tests/test.h"

#define WEIGHTS "tests/golden/designs/cross-attention.safetensors"
#define STEPS "tests/golden/designs/cross-attention.steps.safetensors"

enum { ROWS = 2, COUNT = 10 };
enum { P, E, M, V, ARRAYS }; // weights, their EMA, moments

struct steps {
    struct kern *k;
    struct checkpoint weights, recorded;
    struct dit_train *net;
    size_t floats, numel;
    float *on[ARRAYS], *x1, *x0, *loss; // buffers; on[P] is the network's
    float *host[ARRAYS];
};

static const float *floats_of(const struct steps *s, const char *name) {
    const struct tensor *t = tensor_find(&s->recorded.table, name);
    if (!t || t->dtype != DT_F32) test_fail(__FILE__, __LINE__, "no %s", name);
    return t->data;
}

static void open_steps(struct steps *s, const char *backend) {
    struct kern_config config = {.backend = backend, .threads = 2};
    struct arch a;
    struct err e = {0};
    *s = (struct steps){0};
    CHECK(kern_open(&s->k, &config, NULL, 0) == 0);
    CHECK_OK(checkpoint_open(&s->weights, WEIGHTS, &e), &e);
    CHECK_OK(checkpoint_open(&s->recorded, STEPS, &e), &e);
    CHECK_OK(arch_infer(&a, &s->weights.table, &e), &e);
    CHECK_OK(arch_parse_config(&a, checkpoint_meta(&s->weights, "config"), &e), &e);
    CHECK_OK(dit_train_new(&s->net, s->k, &a, ROWS, RECOMPUTE_NONE, &e), &e);
    s->floats = dit_train_floats(s->net);
    s->numel = (size_t)(a.in_channels * a.input_size * a.input_size);
    s->on[P] = dit_train_weights(s->net);
    for (int i = 0; i < ARRAYS; i++) CHECK((s->host[i] = mem_array(s->floats, sizeof(float))));
    for (int i = E; i < ARRAYS; i++) CHECK(s->k->alloc(s->k, s->floats * sizeof(float), (void **)&s->on[i]) == 0);
    float **images[] = {&s->x1, &s->x0, &s->loss};
    for (int i = 0; i < 3; i++) CHECK(s->k->alloc(s->k, ROWS * s->numel * sizeof(float), (void **)images[i]) == 0);
    CHECK_OK(dit_train_import(s->net, s->host[P], &s->weights.table, &e), &e);
    for (int i = P; i <= E; i++) CHECK(s->k->upload(s->k, s->on[i], s->host[P], s->floats * sizeof(float)) == 0);
}

static void close_steps(struct steps *s) {
    float *buffers[] = {s->on[E], s->on[M], s->on[V], s->x1, s->x0, s->loss};
    for (int i = 0; i < 6; i++) s->k->free(s->k, buffers[i]);
    for (int i = 0; i < ARRAYS; i++) mem_free(s->host[i]);
    dit_train_free(s->net);
    checkpoint_close(&s->weights), checkpoint_close(&s->recorded);
    kern_close(s->k);
}

// Losses and gradients of recorded step i.
static void gradients(struct steps *s, int i) {
    struct objective o = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
    struct kern_loss rows[ROWS];
    struct kern *k = s->k;
    struct err e = {0};
    size_t images = ROWS * s->numel, at = (size_t)i * images, bytes = images * sizeof(float);
    const float *x1 = floats_of(s, "x1") + at, *x0 = floats_of(s, "x0") + at, *t = floats_of(s, "t") + i * ROWS;
    const int64_t *label = (const int64_t *)tensor_find(&s->recorded.table, "y")->data + i * ROWS;
    int32_t y[ROWS];
    float *xt = mem_array(images, sizeof *xt);
    for (size_t r = 0; r < ROWS; r++) {
        struct objective_row row;
        y[r] = (int32_t)label[r];
        objective_row_at(&o, (double)t[r], y[r], 1.0 / ROWS, &row);
        rows[r] = row.loss;
        for (size_t j = r * s->numel; j < (r + 1) * s->numel; j++) xt[j] = row.mix.a1 * x1[j] + row.mix.a0 * x0[j];
    }
    CHECK(k->upload(k, s->x1, x1, bytes) == 0 && k->upload(k, s->x0, x0, bytes) == 0 &&
          k->upload(k, dit_train_x(s->net), xt, bytes) == 0);
    CHECK_OK(dit_train_refresh(s->net, &e), &e);
    CHECK_OK(dit_train_forward(s->net, ROWS, t, y, &e), &e);
    CHECK(k->loss(k, dit_train_dout(s->net), s->loss, dit_train_out(s->net), 2 * s->numel, s->x1, s->x0, dit_train_x(s->net),
                  s->numel, rows, ROWS) == 0);
    CHECK_OK(dit_train_backward(s->net, ROWS, false, &e), &e);
    mem_free(xt);
}

static void step(struct steps *s, int i) {
    struct kern_adamw a = {
        .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .decay = 0.01, .grad_scale = 1, .n_ema = 1, .ema = {0.99}};
    a.bias1 = 1 - pow(a.beta1, i + 1), a.bias2 = 1 - pow(a.beta2, i + 1);
    gradients(s, i);
    CHECK(s->k->adamw(s->k, s->on[P], s->on[M], s->on[V], &s->on[E], dit_train_grads(s->net), s->floats, &a, NULL, NULL) == 0);
}

// Elements [from, to) of a tensor are a key's bias.
static void key_rows(const struct dit_param *p, size_t *from, size_t *to) {
    bool self = strstr(p->name, "attn.qkv.bias") != NULL, cross = strstr(p->name, "cross_attn.kv.bias") != NULL;
    *from = self ? p->count / 3 : 0;
    *to = self ? 2 * p->count / 3 : cross ? p->count / 2 : 0;
}

// Relative L2 of tensor p (-1: of all that were recorded) in array `which`.
static double off(const struct steps *s, int which, int p) {
    static const char *const kinds[ARRAYS] = {[P] = "weights", [E] = "ema", [M] = "m", [V] = "v"};
    const struct dit_param *params;
    int n = dit_train_params(s->net, &params);
    double diff = 0, size = 0;
    for (int i = p < 0 ? 0 : p; i < (p < 0 ? n : p + 1); i++) {
        char name[80];
        size_t from, to;
        snprintf(name, sizeof name, "%s.%s", kinds[which], params[i].name);
        if (!tensor_find(&s->recorded.table, name)) continue;
        const float *theirs = floats_of(s, name), *ours = s->host[which] + params[i].offset;
        key_rows(&params[i], &from, &to);
        for (size_t j = 0; j < params[i].count; j++) {
            if (j >= from && j < to) continue;
            diff += ((double)ours[j] - (double)theirs[j]) * ((double)ours[j] - (double)theirs[j]);
            size += (double)theirs[j] * (double)theirs[j];
        }
    }
    return size > 0 ? sqrt(diff / size) : sqrt(diff);
}

static void ten_steps(const char *backend) {
    static const double allowed[ARRAYS] = {[P] = 1e-5, [E] = 1e-5, [M] = 1e-4, [V] = 2e-4};
    struct steps s;
    const struct dit_param *params;
    open_steps(&s, backend);
    for (int i = 0; i < COUNT; i++) step(&s, i);
    for (int i = 0; i < ARRAYS; i++) CHECK(s.k->download(s.k, s.host[i], s.on[i], s.floats * sizeof(float)) == 0);
    for (int i = 0; i < ARRAYS; i++)
        if (!(off(&s, i, -1) <= allowed[i]))
            test_fail(__FILE__, __LINE__, "%s: array %d is off by %g", backend, i, off(&s, i, -1));
    for (int p = dit_train_params(s.net, &params) - 1; p >= 0; p--)
        for (int i = M; i <= V; i++)
            if (!(off(&s, i, p) <= allowed[i]))
                test_fail(__FILE__, __LINE__, "%s: moment %d of %s is off by %g", backend, i - P, params[p].name, off(&s, i, p));
    close_steps(&s);
}

TEST(golden_train_ten_steps) {
    ten_steps("ref");
    ten_steps("cpu");
}
