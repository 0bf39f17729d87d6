// SPDX-License-Identifier: MIT
/*
 * SiT, DiT and MaskDiT in one engine: what each is to its samplers, and the same bytes alone and among jobs of every family.
 */
#include "core/engine/engine_int.h"
#include "tests/test.h"
#include "tests/unit/engine_fixture.h"

#define JOBS 12
static const int32_t nine[] = {9}, mixed[] = {-1, 5, 2};

static void make_models(void) {
    fixture_model(&(struct tiny){.name = "sit"});
    fixture_model(&(struct tiny){.name = "dit", .family = "dit", .seed = 3});
    fixture_model(&(struct tiny){.name = "maskdit", .family = "maskdit", .channels = 3, .seed = 4});
}

static struct engine_job job_of(struct engine *g, const char *model, enum sampler_type type, int steps, uint64_t seed) {
    const struct engine_model *m = engine_model_ref(g, model);
    struct engine_job job = {.n = seed % 2 ? 1 : 3, .classes = seed % 2 ? nine : mixed, .seed = seed};
    snprintf(job.model, sizeof job.model, "%s", model);
    sampler_defaults(&job.sampler, &m->sampler, type);
    job.sampler.steps = steps;
    job.sampler.guide_channels = m->guide_channels;
    engine_model_unref(m);
    return job;
}

static void fill(struct engine *g, struct engine_job job[JOBS]) {
    job[0] = job_of(g, "sit", SAMPLER_ODE, 6, 100);
    job[1] = job_of(g, "dit", SAMPLER_DDPM, 11, 101);
    job[2] = job_of(g, "dit", SAMPLER_DDPM, 9, 102), job[2].sampler.guidance = 3;
    job[3] = job_of(g, "dit", SAMPLER_DDIM, 8, 103), job[3].sampler.eta = 0.5, job[3].sampler.clip = true;
    job[4] = job_of(g, "dit", SAMPLER_ODE, 5, 104);
    job[5] = job_of(g, "dit", SAMPLER_SDE, 7, 105), job[5].sampler.guidance = 2;
    job[6] = job_of(g, "maskdit", SAMPLER_EDM, 6, 106);
    job[7] = job_of(g, "maskdit", SAMPLER_EDM, 5, 107), job[7].sampler.guidance = 1.5, job[7].sampler.churn = 10;
    job[8] = job_of(g, "maskdit", SAMPLER_ODE, 4, 108), job[8].sampler.method = METHOD_DPMPP2M;
    job[9] = job_of(g, "sit", SAMPLER_DDIM, 7, 109), job[9].sampler.eta = 1;
    job[10] = job_of(g, "sit", SAMPLER_EDM, 4, 110), job[10].sampler.guidance = 2;
    job[11] = job_of(g, "sit", SAMPLER_ODE, 6, 111), job[11].sampler.method = METHOD_EXPONENTIAL;
}

// Every job: one after another, or all at once in the order i*stride mod JOBS.
static void run(int rows, int threads, int stride, struct heard_job out[JOBS]) {
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.max_rows = rows, o.threads = threads;
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job[JOBS];
    uint64_t id[JOBS];
    fill(g, job);
    for (int i = 0; i < JOBS; i++) {
        int k = stride ? i * stride % JOBS : i;
        id[k] = fixture_submit(g, &job[k]);
        if (!stride) hear_end(&h, id[k]);
    }
    for (int i = 0; i < JOBS; i++) out[i] = *hear_end(&h, id[i]);
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_families_same_bytes_alone_and_among_others) {
    static struct heard_job alone[JOBS], other[JOBS];
    static const struct { int rows, threads, stride; } ways[] = {{16, 1, 1}, {5, 2, 5}, {2, 1, 7}};
    make_models();
    run(2, 1, 0, alone);
    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
        run(ways[w].rows, ways[w].threads, ways[w].stride, other);
        for (int i = 0; i < JOBS; i++) fixture_same(&alone[i], &other[i], alone[i].images);
    }
    for (int i = 1; i < JOBS; i++) CHECK(memcmp(alone[i].pixels[0], alone[i - 1].pixels[0], 64) != 0);
}

TEST(engine_families_facts) {
    make_models();
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    const struct engine_model *sit = engine_model_ref(g, "sit"), *dit = engine_model_ref(g, "dit"), *edm = engine_model_ref(g, "maskdit");
    CHECK(sit->sampler.kind == MODEL_PATH && sit->guide_channels == 1 && sit->max_guide_channels == 1);
    CHECK(dit->sampler.kind == MODEL_DISCRETE && dit->sampler.learned_variance);
    CHECK(dit->image_channels == 1 && dit->guide_channels == 2 && dit->max_guide_channels == 2); // "3": the variance's channel too
    CHECK(edm->sampler.kind == MODEL_EDM && edm->image_channels == 3 && edm->guide_channels == 3 && edm->max_guide_channels == 3);
    struct engine_job job = job_of(g, "maskdit", SAMPLER_EDM, 4, 1);
    struct err e = {0};
    uint64_t id;
    job.sampler.guide_channels = 4;
    CHECK(engine_submit(g, &job, &id, NULL, &e) == E_RANGE);
    CHECK_STR(e.param, "guidance.channels");
    job = job_of(g, "sit", SAMPLER_DDPM, 4, 1);
    CHECK(engine_submit(g, &job, &id, NULL, &e) == E_RANGE);
    engine_model_unref(sit), engine_model_unref(dit), engine_model_unref(edm);
    engine_close(g);
    hear_stop(&h);
}

// A model that cannot be served says which field of model.json stands in the way.
TEST(engine_families_that_make_latents_need_a_vae) {
    struct sampler_model m;
    struct err e = {0};
    struct model_desc d = {.family = "dit", .arch = {.in_channels = 3}, .latent = {.scale = 0.18215}};
    CHECK(served_check(&d, NULL, &m, &e) == E_UNSUPPORTED);
    CHECK_STR(e.param, "latent.vae");
    d.latent.scale = 0;
    CHECK_OK(served_check(&d, NULL, &m, &e), &e);
    CHECK(m.kind == MODEL_DISCRETE && !m.learned_variance);
}

TEST(engine_families_loss_curve_is_thinned) {
    static struct loss_knot knots[1000];
    struct sampler_model m;
    struct err e = {0};
    struct model_desc d = {.family = "sit", .path = "gvp", .prediction = "noise", .arch = {.in_channels = 1}, .loss_curve = knots, .n_loss_curve = 1000};
    for (int i = 0; i < 1000; i++) knots[i] = (struct loss_knot){i / 999.0, 1 + i};
    CHECK_OK(served_check(&d, NULL, &m, &e), &e);
    CHECK(m.loss.n == SAMPLER_KNOTS && m.loss.t[0] == 0 && m.loss.t[m.loss.n - 1] == 1 && m.loss.v[m.loss.n - 1] == 1000);
    for (int i = 1; i < m.loss.n; i++) CHECK(m.loss.t[i] > m.loss.t[i - 1]);
    CHECK_OK(sampler_check(&(struct sampler_spec){.type = SAMPLER_SDE, .path = PATH_GVP, .w_t = W_KL_ETA, .w_t_scale = 1, .steps = 5, .guidance = 1,
                                                  .guide_to = 1, .last_size = 0.04}, &m, &e), &e);
    d.n_loss_curve = 2;
    CHECK_OK(served_check(&d, NULL, &m, &e), &e);
    CHECK(m.loss.n == 2 && m.loss.v[1] == 2);
}
