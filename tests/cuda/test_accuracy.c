// SPDX-License-Identifier: MIT
// What the precisions cost: 50 Euler steps of a random SiT-XL/2 and of the bundled model, against float32 on the same GPU. Needs a
// GPU of 16 GB and a minute. tests/bench/cuda_accuracy.py has torch's own errors.
#include <math.h>

#include "core/engine/runner.h"
#include "core/io/checkpoint.h"
#include "core/io/model_dir.h"
#include "tests/test.h"

enum { IMAGES = 4, NUMEL = 4 * 32 * 32 }; // NUMEL: at most

struct net {
    const struct arch *a;
    const struct tensor_table *w;
    size_t numel;
};

static const struct arch XL = {.input_size = 32,
                               .patch_size = 2,
                               .in_channels = 4,
                               .hidden_size = 1152,
                               .depth = 28,
                               .num_heads = 16,
                               .num_classes = 1000,
                               .mlp_ratio = 4,
                               .class_dropout = true,
                               .learn_sigma = true};

static void samples(float *out, const struct net *net, struct kern_config cfg) {
    struct err e = {0};
    char why[256] = "";
    struct kern *k;
    struct runner *r;
    struct runner_slot slots[IMAGES], *all[IMAGES];
    struct sampler_spec spec;
    struct sampler_model model = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
    if (kern_open(&k, &cfg, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    CHECK_OK(runner_new(&r, k, net->a, net->w, IMAGES, IMAGES, &e), &e);
    sampler_defaults(&spec, &model, SAMPLER_ODE);
    spec.method = METHOD_EULER, spec.steps = 50, spec.guidance = 1;
    for (int i = 0; i < IMAGES; i++) {
        slots[i] = (struct runner_slot){.slot = i, .label = i * 207 % net->a->num_classes, .seed = 1, .image = (uint32_t)i, .null_of = -1};
        CHECK_OK(runner_start(r, &slots[i], &spec, &model, &e), &e);
        all[i] = &slots[i];
    }
    while (!slots[0].done) {
        CHECK_OK(runner_step(r, all, IMAGES, NULL, &e), &e);
        CHECK_OK(runner_plan(r, all, IMAGES, &e), &e);
    }
    for (int i = 0; i < IMAGES; i++) CHECK_OK(runner_read(r, i, out + (size_t)i * net->numel, &e), &e);
    runner_free(r);
    kern_close(k);
}

static double distance(const float *a, const float *b, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++)
        num += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]), den += (double)b[i] * (double)b[i];
    return sqrt(num / den);
}

// The same, by the name of the precision, against `exact`
static double error_of(const float *exact, const struct net *net, const char *precision, bool exact_stream) {
    struct kern_config cfg = {.backend = "cuda", .exact_stream = exact_stream};
    float *got = malloc(IMAGES * NUMEL * 4);
    CHECK(kern_precision(&cfg, precision));
    samples(got, net, cfg);
    double d = distance(got, exact, IMAGES * net->numel);
    printf("    %s%s: relative L2 %.3g\n", precision, exact_stream ? ", residual stream in float32" : "", d);
    free(got);
    return d;
}

// A trained network's gates are near 15 times a random one's
static void larger_gates(struct arch_weights *w) {
    for (int i = 0; i < w->table.n; i++)
        if (strstr(w->table.tensors[i].name, "adaLN"))
            for (size_t j = 0; j < w->table.tensors[i].count; j++) ((float *)w->table.tensors[i].data)[j] *= 15;
}

TEST_LIMIT(cuda_fifty_steps_of_XL_stay_close, 600) {
    struct arch_weights w;
    struct err e = {0};
    const struct net net = {&XL, &w.table, NUMEL};
    float *exact = malloc(IMAGES * NUMEL * 4);
    CHECK_OK(arch_random(&w, &XL, 1, &e), &e);
    samples(exact, &net, (struct kern_config){.backend = "cuda"});
    CHECK(error_of(exact, &net, "bf16", false) <= 1.6e-3);
    CHECK(error_of(exact, &net, "bf16", true) <= 1.6e-3);
    CHECK(error_of(exact, &net, "f16", false) <= 6e-4);
    CHECK(error_of(exact, &net, "tf32", false) <= 6e-4);
    CHECK(error_of(exact, &net, "fp8", false) <= 6.1e-3); // what torch loses with everything in bfloat16
    CHECK(error_of(exact, &net, "fp8-static", false) <= 6.1e-3);
    printf("    with adaLN weights 15 times larger:\n");
    larger_gates(&w);
    samples(exact, &net, (struct kern_config){.backend = "cuda"});
    CHECK(error_of(exact, &net, "bf16", false) <= 6e-3);
    CHECK(error_of(exact, &net, "f16", false) <= 2e-3);
    CHECK(error_of(exact, &net, "tf32", false) <= 2e-3);
    error_of(exact, &net, "fp8", false); // printed only: nothing bounds these
    error_of(exact, &net, "fp8-static", false);
    arch_weights_free(&w);
    free(exact);
}

TEST_LIMIT(cuda_fifty_steps_of_the_bundled_model_stay_close, 120) {
    struct model_dir dir = {0};
    struct err e = {0};
    float *exact = malloc(IMAGES * NUMEL * 4);
    CHECK_OK(model_dir_open(&dir, "deploy/models/fashion-sit", &e), &e);
    const struct arch *a = &dir.desc.arch;
    const struct net net = {a, dir.weights, (size_t)a->in_channels * (size_t)a->input_size * (size_t)a->input_size};
    samples(exact, &net, (struct kern_config){.backend = "cuda"});
    CHECK(error_of(exact, &net, "bf16", false) <= 2e-2);
    CHECK(error_of(exact, &net, "bf16", true) <= 2e-2);
    CHECK(error_of(exact, &net, "f16", false) <= 3e-3);
    CHECK(error_of(exact, &net, "tf32", false) <= 3e-3);
    model_dir_close(&dir);
    free(exact);
}
