// SPDX-License-Identifier: MIT
// Latent models with a VAE behind the engine: a picture depends on nothing else, samples in progress go on, queues and cancels
// hold.
#include <time.h>
#include <unistd.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/engine/engine_int.h"
#include "tests/test.h"
#include "tests/unit/engine_fixture.h"

static const struct vae_arch half = {.image_channels = 3,
                                     .latent_channels = 4,
                                     .levels = 2,
                                     .layers = 1,
                                     .groups = 4,
                                     .width = {8, 16},
                                     .encoder = true,
                                     .decoder = true,
                                     .quant = true,
                                     .post_quant = true,
                                     .attention = {true, true}};
// 4x4 latents, 8x8 pixels
static const struct tiny latent_model = {.name = "l", .channels = 4, .side = 4, .vae = &half, .seed = 3};

static const int32_t some[] = {3, 0, 7, 9}, one[] = {5};

/* ---- same bytes ---- */

enum { JOBS = 6 };
static void jobs_of(struct engine_job job[JOBS]) {
    job[0] = fixture_job("l", 4, some, SAMPLER_ODE, METHOD_EULER, 1);
    job[1] = fixture_job("l", 1, one, SAMPLER_ODE, METHOD_HEUN, 9);
    job[2] = fixture_job("l", 2, some, SAMPLER_SDE, METHOD_EULER, 5);
    job[3] = fixture_job("l", 4, some, SAMPLER_ODE, METHOD_RK4, 2);
    job[4] = fixture_job("l", 1, one, SAMPLER_ODE, METHOD_DOPRI5, 0);
    job[5] = fixture_job("l", 3, some, SAMPLER_ODE, METHOD_EULER, 4);
    for (int i = 0; i < JOBS; i++) {
        job[i].seed = 50 + (uint64_t)i;
        job[i].progress = true;
        job[i].sampler.guide_channels = 4;
    }
    job[3].sampler.guidance = 3;
}

static void run_jobs(struct engine_options *o, bool together, struct heard_job out[JOBS]) {
    struct heard h;
    hear_start(&h);
    o->ctx = &h;
    struct engine *g = fixture_open(&h, o);
    CHECK(hear_model(&h, "l")->status == 0);
    struct engine_job job[JOBS];
    uint64_t id[JOBS];
    jobs_of(job);
    for (int i = 0; i < JOBS; i++) {
        id[i] = fixture_submit(g, &job[i]);
        if (!together) hear_end(&h, id[i]);
    }
    for (int i = 0; i < JOBS; i++) {
        out[i] = *hear_end(&h, id[i]);
        CHECK(out[i].end.kind == EV_DONE && out[i].end.decode_ms > 0 && out[i].end.denoise_ms >= 0);
    }
    struct engine_stats s;
    engine_stats(g, &s);
    CHECK(s.images_done == 15 && s.images_failed == 0);
    engine_close(g);
    hear_stop(&h);
}

static void same_bytes_on(const char *backend) {
    static struct heard_job alone[JOBS], other[JOBS];
    static const struct { int rows, threads; } ways[] = {{8, 1}, {2, 2}, {16, 3}};
    fixture_model(&latent_model);
    struct engine_options o = fixture_options(NULL);
    o.backend = backend;
    run_jobs(&o, false, alone);
    for (int w = 0; w < 3; w++) {
        o.max_rows = ways[w].rows;
        o.threads = ways[w].threads;
        run_jobs(&o, true, other);
        for (int i = 0; i < JOBS; i++) fixture_same(&alone[i], &other[i], alone[i].images);
    }
    CHECK(memcmp(alone[0].pixels[0], alone[0].pixels[1], 8 * 8 * 3) != 0);
}

TEST(engine_vae_same_bytes) { same_bytes_on("cpu"); }
TEST(engine_vae_same_bytes_reference) { same_bytes_on("ref"); }

// The engine's picture is the one that runner and VAE make by hand.
TEST(engine_vae_picture_is_the_decoded_sample) {
    static struct heard_job out[JOBS];
    char path[512];
    fixture_model(&latent_model);
    struct engine_options o = fixture_options(NULL);
    o.backend = "cpu";
    run_jobs(&o, true, out);
    struct kern_config config = {.backend = "cpu", .threads = 1};
    struct model_dir dir;
    struct vae_file file;
    struct kern *k;
    struct runner *r;
    struct vae *v;
    struct engine_job job[JOBS];
    struct err e = {0};
    float x[64], picture[192];
    uint8_t pixels[192];
    CHECK(kern_open(&k, &config, path, sizeof path) == 0);
    snprintf(path, sizeof path, "%s/l", fixture_dir());
    CHECK_OK(model_dir_open(&dir, path, &e), &e);
    snprintf(path, sizeof path, "%s/l/vae", fixture_dir());
    CHECK_OK(vae_file_open(&file, path, dir.desc.latent.vae_sha256, &e), &e);
    CHECK_OK(runner_new(&r, k, &dir.desc.arch, dir.weights, 1, 2, &e), &e);
    CHECK_OK(vae_new(&v, k, &file.arch, &file.table, &(struct vae_size){.height = 4, .width = 4, .decode = true}, &e), &e);
    jobs_of(job);
    for (int i = 0; i < 4; i++) { // the guided job
        struct runner_slot slot = {.label = some[i], .seed = job[3].seed, .image = (uint32_t)i, .null_of = -1}, *s = &slot;
        struct sampler_model model = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
        CHECK_OK(runner_start(r, s, &job[3].sampler, &model, &e), &e);
        while (!slot.done) {
            CHECK_OK(runner_step(r, &s, 1, NULL, &e), &e);
            CHECK_OK(runner_plan(r, &s, 1, &e), &e);
        }
        CHECK_OK(runner_read(r, 0, x, &e), &e);
        for (int c = 0; c < 64; c++) x[c] /= 0.5f;
        CHECK_OK(vae_run(v, VAE_DECODE, x, picture, &e), &e);
        CHECK_OK(served_pixels(pixels, picture, 3, 8, false, &e), &e);
        CHECK(memcmp(pixels, out[3].pixels[i], sizeof pixels) == 0);
    }
    vae_free(v), runner_free(r);
    vae_file_close(&file), model_dir_close(&dir);
    kern_close(k);
}

/* ---- what it says of itself, and refusals ---- */

TEST(engine_vae_facts_and_refusals) {
    struct vae_arch three = half, encoder = half, five = half;
    three.latent_channels = 3;
    encoder.decoder = false;
    five.image_channels = 5;
    fixture_model(&latent_model);
    fixture_model(&(struct tiny){.name = "three", .channels = 4, .side = 4, .vae = &three});
    fixture_model(&(struct tiny){.name = "encoder", .channels = 4, .side = 4, .vae = &encoder});
    fixture_model(&(struct tiny){.name = "five", .channels = 4, .side = 4, .vae = &five});
    fixture_model(&(struct tiny){.name = "bare", .channels = 3, .side = 4, .latents = true});
    char zeros[65] = {0}, path[512];
    memset(zeros, '0', 64);
    fixture_model(&(struct tiny){.name = "digest", .channels = 4, .side = 4, .vae = &half, .vae_sha256 = zeros});
    fixture_model(&(struct tiny){.name = "gone", .channels = 4, .side = 4, .vae = &half});
    snprintf(path, sizeof path, "%s/gone/vae/diffusion_pytorch_model.safetensors", fixture_dir());
    CHECK(unlink(path) == 0);
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    const struct engine_model *m = engine_model_ref(g, "l");
    CHECK(m && m->image_size == 8 && m->image_channels == 3 && m->guide_channels == 4 && m->decode_rows > 0);
    engine_model_unref(m);
    static const struct {
        const char *model, *param;
        int status;
    } bad[] = {{"three", "latent.vae", E_CONFLICT},         {"encoder", "latent.vae", E_CONFLICT},
               {"five", "latent.vae", E_UNSUPPORTED},       {"bare", "latent.vae", E_UNSUPPORTED},
               {"digest", "latent.vae.sha256", E_CONFLICT}, {"gone", "", E_NOTFOUND}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const struct err *e = hear_model(&h, bad[i].model);
        if (e->status != bad[i].status) test_fail(__FILE__, __LINE__, "%s: %d %s", bad[i].model, e->status, e->text);
        CHECK_STR(e->param, bad[i].param);
    }
    struct engine_job job = fixture_job("l", 1, one, SAMPLER_ODE, METHOD_EULER, 1);
    struct err e = {0};
    uint64_t id;
    job.sampler.guide_channels = 5;
    CHECK(engine_submit(g, &job, &id, NULL, &e) == E_RANGE);
    CHECK_STR(e.param, "guidance.channels");
    engine_close(g);
    hear_stop(&h);
}

/* ---- decoding beside denoising ---- */

static const struct vae_arch slow = {.image_channels = 3,
                                     .latent_channels = 4,
                                     .levels = 2,
                                     .layers = 8,
                                     .groups = 4,
                                     .width = {64, 128},
                                     .decoder = true,
                                     .post_quant = true,
                                     .attention = {false, true}};
static const struct tiny slow_model = {.name = "l", .channels = 4, .side = 4, .vae = &slow, .seed = 3};

TEST(engine_vae_lets_others_denoise) {
    struct heard h;
    struct engine_stats before, after;
    fixture_model(&slow_model);
    hear_start(&h);
    struct engine_options o = fixture_options(&h); // the reference: a decode takes a good while
    struct engine *g = fixture_open(&h, &o);
    struct engine_job longer = fixture_job("l", 1, one, SAMPLER_ODE, METHOD_RK4, 10000),
                      quick = fixture_job("l", 2, some, SAMPLER_ODE, METHOD_EULER, 1);
    uint64_t b = fixture_submit(g, &longer);
    hear_started(&h, b);
    uint64_t a = fixture_submit(g, &quick);
    hear_started(&h, a);
    engine_stats(g, &before);
    const struct heard_job *done = hear_end(&h, a);
    engine_stats(g, &after);
    CHECK(done->end.kind == EV_DONE && done->images == 2);
    CHECK(after.batches >= before.batches + 4); // turns are taken slice by slice, however fast a slice is
    engine_cancel(g, b);
    CHECK(hear_end(&h, b)->end.kind == EV_CANCELLED);
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_vae_cancel_deadline_and_close_while_decoding) {
    struct heard h;
    fixture_model(&slow_model);
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    struct engine_job quick = fixture_job("l", 4, some, SAMPLER_ODE, METHOD_EULER, 1), late;
    uint64_t id[4], alone = fixture_submit(g, &quick);
    const struct heard_job *want = hear_end(&h, alone);
    for (int i = 0; i < 3; i++) {
        quick.seed = i == 1 ? 42 : 100 + (uint64_t)i;
        id[i] = fixture_submit(g, &quick);
    }
    late = quick;
    late.timeout_ms = 1 + (int64_t)(want->end.denoise_ms + want->end.decode_ms); // it waits behind three of that length
    id[3] = fixture_submit(g, &late);
    hear_started(&h, id[0]);
    struct engine_stats s;
    do {
        engine_stats(g, &s);
        usleep(1000);
    } while (s.evaluations < 4 + 8);
    CHECK(s.jobs >= 3);      // samples are finished, jobs are not
    engine_cancel(g, id[0]); // whose picture is in hand: the next one must not inherit what is done of it
    CHECK(hear_end(&h, id[0])->end.kind == EV_CANCELLED);
    CHECK(hear_end(&h, id[3])->end.kind == EV_FAILED && hear_end(&h, id[3])->end.err.status == E_TIMEOUT);
    fixture_same(hear_end(&h, id[1]), want, 4);
    engine_close(g); // with id[2] under way, perhaps
    int end = hear_end(&h, id[2])->end.kind;
    CHECK(end == EV_CANCELLED || end == EV_DONE);
    hear_stop(&h);
}

TEST(engine_vae_many_finished_samples) { // more than slots: the worker catches up, everything ends, nothing is left
    struct heard h;
    enum { MANY = 40 };
    uint64_t id[MANY];
    fixture_model(&latent_model);
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.max_rows = 2;
    struct engine *g = fixture_open(&h, &o);
    struct engine_job quick = fixture_job("l", 4, some, SAMPLER_ODE, METHOD_EULER, 1);
    for (int i = 0; i < MANY; i++) id[i] = fixture_submit(g, &quick);
    struct engine_stats s;
    for (int i = 0; i < MANY; i++) {
        CHECK(hear_end(&h, id[i])->end.kind == EV_DONE && h.jobs[id[i]].images == 4);
        engine_stats(g, &s);
        CHECK(s.running_images <= 2 + 2 + 2); // slots, and those that wait
    }
    engine_stats(g, &s);
    CHECK(s.jobs == 0 && s.queued_images == 0 && s.running_images == 0 && s.images_done == 4 * MANY);
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_vae_nonfinite_picture) { // finite weights whose products overflow
    struct heard h;
    fixture_model(&(struct tiny){.name = "l", .channels = 4, .side = 4, .vae = &half, .seed = 3, .bad_class = 9});
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = fixture_job("l", 4, some, SAMPLER_ODE, METHOD_EULER, 2);
    const struct heard_job *j = hear_end(&h, fixture_submit(g, &job));
    CHECK(j->end.kind == EV_FAILED && j->end.err.status == E_NONFINITE && strstr(j->end.err.text, "image 3"));
    CHECK(j->images == 3);
    engine_close(g);
    hear_stop(&h);
}
