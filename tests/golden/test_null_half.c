// SPDX-License-Identifier: MIT
/*
 * The authors' guided batches have a second half, the null class's, which takes the guided value in the first channels and keeps its own in the rest.
 * Only replays have such slots (runner.h, null_of): dopri5's norm there spans both halves.
 */
#include "core/engine/runner.h"
#include "core/io/import.h"
#include "tests/test.h"

enum { NUMEL = 4 * 8 * 8, PLANE = 8 * 8 };

static void step(struct runner *r, const struct sampler_spec *spec, struct runner_slot *slots, int n, float x[][NUMEL]) {
    const struct sampler_model model = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
    struct runner_slot *all[2] = {&slots[0], &slots[1]};
    struct err e = {0};
    for (int i = 0; i < n; i++) CHECK_OK(runner_start(r, &slots[i], spec, &model, &e), &e);
    CHECK_OK(runner_step(r, all, n, NULL, &e), &e);
    for (int i = 0; i < n; i++) CHECK_OK(runner_read(r, slots[i].slot, x[i], &e), &e);
}

TEST(golden_null_half_keeps_its_unguided_channels) {
    static float pair[2][NUMEL], null[1][NUMEL];
    struct checkpoint c;
    struct model_desc d;
    struct import_fact facts[IMPORT_FACTS];
    struct import_flags flags = {.step = -1, .heads = 2, .family = "sit", .path = "linear", .prediction = "velocity"};
    struct kern *k;
    struct runner *r;
    struct sampler_spec spec;
    struct err e = {0};
    int n;
    CHECK_OK(checkpoint_open(&c, "tests/golden/sit-tiny.safetensors", &e), &e);
    CHECK_OK(import_describe(&d, facts, &n, &c, &flags, &e), &e);
    CHECK(kern_open(&k, &(struct kern_config){.backend = "ref"}, NULL, 0) == 0);
    CHECK_OK(runner_new(&r, k, &d.arch, &c.table, 2, 2, &e), &e);
    CHECK(runner_numel(r) == NUMEL);
    sampler_defaults(&spec, &(struct sampler_model){.path = PATH_LINEAR, .prediction = PRED_VELOCITY}, SAMPLER_ODE);
    spec.method = METHOD_EULER;
    spec.steps = 1;
    spec.guidance = 4;
    spec.guide_channels = 3;
    struct runner_slot both[] = {{.slot = 0, .label = 3, .seed = 5, .null_of = -1}, {.slot = 1, .label = 3, .seed = 5, .null_of = 0}};
    step(r, &spec, both, 2, pair);
    spec.guidance = 1;
    struct runner_slot alone = {.slot = 0, .label = d.arch.num_classes, .seed = 5, .null_of = -1};
    step(r, &spec, &alone, 1, null);
    CHECK(memcmp(pair[0], pair[1], 3 * PLANE * sizeof(float)) == 0);
    CHECK(memcmp(pair[1] + 3 * PLANE, null[0] + 3 * PLANE, PLANE * sizeof(float)) == 0);
    CHECK(memcmp(pair[0] + 3 * PLANE, null[0] + 3 * PLANE, PLANE * sizeof(float)) != 0);
    runner_free(r);
    kern_close(k);
    model_desc_deinit(&d);
    checkpoint_close(&c);
}
