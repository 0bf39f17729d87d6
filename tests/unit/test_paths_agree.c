// SPDX-License-Identifier: MIT
/*
 * The bundled models sampled on each path from the same noise: the flow of the probability has one end, whichever path leads there, so
 * dopri5 at a tight tolerance with a final denoise must give the same picture. What is left is dopri5's error and where each path's
 * interval begins and ends. SITD_TEST_PRINT=1 prints what was measured (docs/samplers.md).
 */
#include <math.h>

#include "core/engine/engine_int.h"
#include "tests/test.h"

enum { IMAGES = 2, NUMEL = 32 * 32 };

static void sample(struct runner *r, const struct sampler_model *model, enum path_kind path, float *x, int *evaluations) {
    struct runner_slot slots[IMAGES], *live[IMAGES];
    struct sampler_spec spec;
    struct err e = {0};
    sampler_defaults(&spec, model, SAMPLER_ODE);
    spec.method = METHOD_DOPRI5;
    spec.path = path;
    spec.atol = 1e-7;
    spec.rtol = 1e-5;
    spec.max_evaluations = 4000;
    spec.denoise = true;
    for (int i = 0; i < IMAGES; i++) {
        slots[i] = (struct runner_slot){.slot = i, .label = 3 * i, .seed = 7, .image = (uint32_t)i, .null_of = -1};
        CHECK_OK(runner_start(r, &slots[i], &spec, model, &e), &e);
    }
    *evaluations = 0;
    for (;;) {
        int n = 0;
        for (int i = 0; i < IMAGES; i++) {
            CHECK_OK(slots[i].err.status, &slots[i].err);
            if (!slots[i].done) live[n++] = &slots[i];
        }
        if (n == 0) break;
        CHECK_OK(runner_step(r, live, n, NULL, &e), &e);
        CHECK_OK(runner_plan(r, live, n, &e), &e);
        ++*evaluations;
    }
    for (int i = 0; i < IMAGES; i++) CHECK_OK(runner_read(r, i, x + i * NUMEL, &e), &e);
}

static double relative(const float *a, const float *b) { // the worst image's
    double worst = 0;
    for (int i = 0; i < IMAGES; i++) {
        double off = 0, size = 0;
        for (int e = i * NUMEL; e < (i + 1) * NUMEL; e++) {
            off += ((double)a[e] - b[e]) * ((double)a[e] - b[e]);
            size += (double)b[e] * b[e];
        }
        worst = fmax(worst, sqrt(off / size));
    }
    return worst;
}

static void paths_agree(const char *dir, double most, double most_vp) {
    static float x[PATH_COUNT][IMAGES * NUMEL];
    const struct kern_config config = {.backend = "cpu", .act = KERN_F32, .threads = 2};
    struct sampler_model model;
    struct model_dir m;
    struct runner *r;
    struct kern *k;
    struct err e = {0};
    char why[256];
    CHECK_OK(model_dir_open(&m, dir, &e), &e);
    CHECK_OK(served_check(&m.desc, NULL, &model, &e), &e);
    CHECK(kern_open(&k, &config, why, sizeof why) == 0);
    CHECK_OK(runner_new(&r, k, &m.desc.arch, m.weights, IMAGES, IMAGES, &e), &e);
    CHECK(runner_numel(r) == NUMEL);
    for (int path = 0; path < PATH_COUNT; path++) {
        int evaluations;
        sample(r, &model, (enum path_kind)path, x[path], &evaluations);
        for (int other = 0; other < path; other++) {
            double off = relative(x[path], x[other]);
            if (getenv("SITD_TEST_PRINT"))
                printf("    %s: %s (%d evaluations) and %s differ by %.1e\n", dir, path_name((enum path_kind)path), evaluations, path_name((enum path_kind)other), off);
            CHECK(off < (path == PATH_VP ? most_vp : most));
        }
        if (path == 0 && getenv("SITD_TEST_PRINT")) printf("    %s: linear made %d evaluations\n", dir, evaluations);
    }
    runner_free(r);
    kern_close(k);
    model_dir_close(&m);
}

TEST_LIMIT(paths_agree_sit, 600) { paths_agree("deploy/models/fashion-sit", 1e-3, 5e-3); }
TEST_LIMIT(paths_agree_dit, 600) { // minutes: only where the numbers are wanted
    if (getenv("SITD_TEST_PRINT")) paths_agree("deploy/models/fashion-dit", 1e-2, 1e-2);
}
