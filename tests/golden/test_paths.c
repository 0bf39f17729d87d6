// SPDX-License-Identifier: MIT
/*
 * A trained network sampled along other paths than its own. The flow's end does not depend on the path, so linear, GVP and VP from the
 * same noise must give one picture, up to what the paths' ends leave (VP begins with a little of the data's mean) and the solver's
 * tolerance; so must EDM's sampler, which asks the same network where sigma/alpha = sigma.
 */
#include <math.h>

#include "core/base/mem.h"
#include "core/engine/runner.h"
#include "tests/test.h"

enum { IMAGES = 2, LARGEST = 32 * 32 };

struct bundled {
    struct kern *k;
    struct model_dir dir;
    struct runner *runner;
    struct sampler_model model;
};

static void open_bundled(struct bundled *b) {
    struct kern_config config = {.backend = "cpu", .threads = 2};
    struct err e = {0};
    CHECK(kern_open(&b->k, &config, NULL, 0) == 0);
    CHECK_OK(model_dir_open(&b->dir, "deploy/models/fashion-sit", &e), &e);
    CHECK_OK(runner_new(&b->runner, b->k, &b->dir.desc.arch, b->dir.weights, IMAGES, 2 * IMAGES, &e), &e);
    CHECK(runner_numel(b->runner) <= LARGEST);
    b->model = (struct sampler_model){.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
}

static void close_bundled(struct bundled *b) {
    runner_free(b->runner);
    model_dir_close(&b->dir);
    kern_close(b->k);
}

// The images are at different places of their programs: those that are done wait.
static void sample(struct bundled *b, const struct sampler_spec *spec, float x[IMAGES][LARGEST]) {
    struct runner_slot slots[IMAGES], *live[IMAGES];
    struct err e = {0};
    int running = IMAGES;
    for (int i = 0; i < IMAGES; i++) {
        slots[i] = (struct runner_slot){.slot = i, .label = 3 * i, .seed = 11, .image = (uint32_t)i, .null_of = -1};
        CHECK_OK(runner_start(b->runner, &slots[i], spec, &b->model, &e), &e);
        live[i] = &slots[i];
    }
    while (running > 0) {
        CHECK_OK(runner_step(b->runner, live, running, NULL, &e), &e);
        CHECK_OK(runner_plan(b->runner, live, running, &e), &e);
        int kept = 0;
        for (int i = 0; i < running; i++)
            if (!live[i]->done) live[kept++] = live[i];
        running = kept;
    }
    for (int i = 0; i < IMAGES; i++) {
        CHECK_OK(slots[i].err.status, &slots[i].err);
        CHECK_OK(runner_read(b->runner, i, x[i], &e), &e);
    }
}

static double distance(size_t n, float a[IMAGES][LARGEST], float b[IMAGES][LARGEST]) { // of the worst image
    double worst = 0;
    for (int i = 0; i < IMAGES; i++) {
        double diff = 0, size = 0;
        for (size_t e = 0; e < n; e++) {
            diff += ((double)a[i][e] - (double)b[i][e]) * ((double)a[i][e] - (double)b[i][e]);
            size += (double)b[i][e] * (double)b[i][e];
        }
        if (sqrt(diff / size) > worst) worst = sqrt(diff / size);
    }
    return worst;
}

TEST_LIMIT(golden_paths_of_one_flow_agree, 240) {
    static float home[IMAGES][LARGEST], other[IMAGES][LARGEST];
    struct bundled b;
    struct sampler_spec spec;
    open_bundled(&b);
    size_t n = runner_numel(b.runner);
    sampler_defaults(&spec, &b.model, SAMPLER_ODE);
    spec.method = METHOD_DOPRI5;
    spec.rtol = 1e-4;
    spec.atol = 1e-5;
    spec.max_evaluations = 5000;
    spec.denoise = true;
    sample(&b, &spec, home);
    for (int path = PATH_GVP; path <= PATH_VP; path++) {
        spec.path = (enum path_kind)path;
        sample(&b, &spec, other);
        double d = distance(n, other, home);
        if (getenv("SITD_TEST_PRINT")) printf("    %s against linear: %.2e\n", path_name(spec.path), d);
        CHECK(d < 2e-2);
    }
    sampler_defaults(&spec, &b.model, SAMPLER_EDM);
    spec.steps = 100;
    sample(&b, &spec, other);
    double d = distance(n, other, home);
    if (getenv("SITD_TEST_PRINT")) printf("    edm heun, 100 steps, against linear: %.2e\n", d);
    CHECK(d < 3e-2);
    close_bundled(&b);
}
