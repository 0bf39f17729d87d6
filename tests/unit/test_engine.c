// SPDX-License-Identifier: MIT
#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/engine/engine_int.h"
#include "tests/test.h"
#include "tests/unit/engine_fixture.h"

#include <math.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const int32_t nine[] = {9}, two[] = {3, 0}, four[] = {1, 2, 3, 4};

static void sleep_ms(int ms) { nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL); }

static struct engine_stats stats(struct engine *g) {
    struct engine_stats s;
    engine_stats(g, &s);
    return s;
}

// A job that runs for seconds and so is still there when a test looks; cancelled or closed away.
static struct engine_job endless(const char *model) { return fixture_job(model, 1, nine, SAMPLER_ODE, METHOD_RK4, 10000); }

/* ---- same seed, same bytes ---- */

#define UNLIKE 10
static void unlike_jobs(struct engine_job job[UNLIKE], const char *model) {
    static const int32_t mixed[] = {-1, 5};
    job[0] = fixture_job(model, 2, two, SAMPLER_ODE, METHOD_HEUN, 6);
    job[1] = fixture_job(model, 1, nine, SAMPLER_ODE, METHOD_EULER, 11);
    job[2] = fixture_job(model, 2, mixed, SAMPLER_ODE, METHOD_RK4, 3);
    job[3] = fixture_job(model, 1, nine, SAMPLER_ODE, METHOD_DOPRI5, 0);
    job[4] = fixture_job(model, 2, two, SAMPLER_SDE, METHOD_EULER, 9);
    job[5] = fixture_job(model, 4, four, SAMPLER_SDE, METHOD_HEUN, 5);
    job[6] = fixture_job(model, 2, mixed, SAMPLER_ODE, METHOD_MIDPOINT, 4);
    job[7] = fixture_job(model, 2, two, SAMPLER_ODE, METHOD_HEUN, 6);
    job[8] = fixture_job(model, 2, two, SAMPLER_SDE, METHOD_EULER, 12);
    job[9] = fixture_job(model, 1, nine, SAMPLER_ODE, METHOD_DOPRI5, 0);
    for (int i = 0; i < UNLIKE; i++) {
        job[i].seed = 1000 + (uint64_t)i;
        job[i].seed_index = (uint32_t)i % 3;
    }
    job[4].sampler.guidance = 3;
    job[6].sampler.guidance = 2.5;
    job[6].sampler.guide_from = 0.25;
    job[6].sampler.guide_to = 0.75;
    job[7].sampler.path = PATH_GVP;
    job[8].sampler.w_t = W_CONSTANT;
    job[8].sampler.last = LAST_TWEEDIE;
    job[8].priority = 2;
    job[9].sampler.guidance = 4;
    job[9].seed = UINT64_MAX;
}

// Runs every job: one after another, or all at once in the order i*stride mod UNLIKE; fills what was heard of job i.
static void run_unlike(struct engine_options *o, int stride, struct heard_job out[UNLIKE]) {
    struct heard h;
    hear_start(&h);
    o->ctx = &h;
    struct engine *g = fixture_open(&h, o);
    struct engine_job job[UNLIKE];
    uint64_t id[UNLIKE];
    unlike_jobs(job, "a");
    for (int i = 0; i < UNLIKE; i++) {
        int k = stride ? i * stride % UNLIKE : i;
        id[k] = fixture_submit(g, &job[k]);
        if (!stride) hear_end(&h, id[k]);
    }
    for (int i = 0; i < UNLIKE; i++) out[i] = *hear_end(&h, id[i]);
    engine_close(g);
    hear_stop(&h);
}

static void same_bytes_on(const char *backend) {
    static struct heard_job alone[UNLIKE], other[UNLIKE];
    static const struct { int rows, threads, stride; } ways[] = {{16, 1, 1}, {5, 2, 3}, {2, 1, 9}, {32, 3, 7}, {8, 2, 0}};
    fixture_model(&(struct tiny){.name = "a"});
    struct engine_options o = fixture_options(NULL);
    o.backend = backend;
    o.max_rows = 2;
    run_unlike(&o, 0, alone);
    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
        o.max_rows = ways[w].rows;
        o.threads = ways[w].threads;
        run_unlike(&o, ways[w].stride, other);
        for (int i = 0; i < UNLIKE; i++) {
            fixture_same(&alone[i], &other[i], alone[i].images);
            CHECK(alone[i].end.evaluations == other[i].end.evaluations);
        }
    }
    CHECK(memcmp(alone[0].pixels[0], alone[7].pixels[0], 64) != 0); // another seed is another picture
    CHECK(memcmp(alone[4].pixels[0], alone[4].pixels[1], 64) != 0); // so is the next image of a request
}

TEST(engine_same_bytes_alone_and_among_others_ref) { same_bytes_on("ref"); }

TEST(engine_same_bytes_alone_and_among_others_cpu) {
    struct kern *k;
    int rc = kern_open(&k, &(struct kern_config){.backend = "cpu", .threads = 1}, NULL, 0);
    kern_close(k);
    if (rc != KERN_EUNSUPPORTED) same_bytes_on("cpu"); // the reference is in every build, this one on x86-64 only
}

// n images of one request are the images of n requests with seed_index moved on.
TEST(engine_image_i_is_stream_seed_index_plus_i) {
    fixture_model(&(struct tiny){.name = "a", .channels = 3});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    struct engine_job all = fixture_job("a", 4, four, SAMPLER_SDE, METHOD_EULER, 6);
    uint64_t id = fixture_submit(g, &all);
    for (int i = 0; i < 4; i++) {
        struct engine_job one = all;
        one.n = 1;
        one.classes = &four[i];
        one.seed_index = (uint32_t)i;
        uint64_t single = fixture_submit(g, &one);
        CHECK(hear_end(&h, single)->images == 1);
        CHECK(hear_end(&h, id)->images == 4);
        CHECK(memcmp(h.jobs[single].pixels[0], h.jobs[id].pixels[i], 8 * 8 * 3) == 0);
    }
    engine_close(g);
    hear_stop(&h);
}

/* ---- cancel, deadlines, bounds ---- */

TEST(engine_cancel_at_every_stage) {
    fixture_model(&(struct tiny){.name = "a"});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.max_rows = 2;
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = endless("a"), quick = fixture_job("a", 2, two, SAMPLER_ODE, METHOD_EULER, 2);
    job.n = 2, job.classes = two;
    engine_cancel(g, 12345); // unknown: nothing happens
    uint64_t running = fixture_submit(g, &job);
    hear_started(&h, running); // both its images, since nobody else was there
    uint64_t queued = fixture_submit(g, &quick), mate = fixture_submit(g, &quick);
    engine_cancel(g, queued);
    CHECK(hear_end(&h, queued)->end.kind == EV_CANCELLED && !h.jobs[queued].started);
    engine_cancel(g, running);
    engine_cancel(g, running);
    CHECK(hear_end(&h, running)->end.kind == EV_CANCELLED && h.jobs[running].images == 0);
    CHECK(hear_end(&h, mate)->end.kind == EV_DONE); // the rows came free
    engine_cancel(g, mate);                         // done: nothing happens
    engine_cancel(g, running);
    uint64_t fresh = fixture_submit(g, &job);
    engine_cancel(g, fresh); // perhaps still in the inbox
    CHECK(hear_end(&h, fresh)->end.kind == EV_CANCELLED);
    struct engine_stats s = stats(g);
    CHECK(s.images_cancelled == 6 && s.images_done == 2 && s.jobs == 0 && s.running_rows == 0 && s.queued_images == 0);
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_deadlines_cover_queue_and_execution) {
    fixture_model(&(struct tiny){.name = "a"});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.max_rows = 2;
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = endless("a"), queued = fixture_job("a", 1, nine, SAMPLER_ODE, METHOD_EULER, 1);
    job.sampler.guidance = 2; // both rows
    job.timeout_ms = 150;
    queued.timeout_ms = 20;
    uint64_t a = fixture_submit(g, &job);
    hear_started(&h, a);
    uint64_t b = fixture_submit(g, &queued);
    queued.timeout_ms = INT64_MAX;
    uint64_t c = fixture_submit(g, &queued);
    CHECK(hear_end(&h, b)->end.err.status == E_TIMEOUT && !h.jobs[b].started);
    CHECK(hear_end(&h, a)->end.err.status == E_TIMEOUT && h.jobs[a].started == 1);
    CHECK_STR(h.jobs[a].end.err.param, "timeout_ms");
    CHECK(hear_end(&h, c)->end.kind == EV_DONE);
    CHECK(stats(g).images_failed == 2);
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_full_queue_says_how_long) {
    fixture_model(&(struct tiny){.name = "a"});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.max_rows = 2, o.max_jobs = 3, o.max_images = 5;
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = endless("a"), five = fixture_job("a", 4, four, SAMPLER_ODE, METHOD_EULER, 10000);
    job.sampler.guidance = 2;
    uint64_t id, first = fixture_submit(g, &job), second;
    hear_started(&h, first); // it leaves the queue of images
    second = fixture_submit(g, &five);
    int64_t retry = 0, less;
    struct err e = {0};
    CHECK(engine_submit(g, &five, &id, &retry, &e) == E_BUSY && id == 0); // 4 + 4 images
    CHECK(strstr(e.text, "queue") && retry > 0);
    struct engine_stats s = stats(g);
    CHECK(s.row_ms > 0 && s.jobs == 2 && s.queued_images == 4 && s.running_rows == 2 && s.max_rows == 2);
    CHECK(retry > (int64_t)(s.row_ms * 0.2 * 100000)); // about 40,000 rows of the second job, up to 80,000 of the first
    CHECK(fixture_submit(g, &job) != 0);
    err_clear(&e);
    CHECK(engine_submit(g, &job, &id, &retry, &e) == E_BUSY); // three jobs
    engine_cancel(g, second);
    hear_end(&h, second);
    CHECK(engine_submit(g, &five, &id, &less, NULL) == 0); // its room is free as soon as its end was told
    five.n = 6;
    five.classes = (const int32_t[]){0, 0, 0, 0, 0, 0};
    err_clear(&e);
    CHECK(engine_submit(g, &five, &id, &less, &e) == E_RANGE && less == 0); // never, not later
    CHECK_STR(e.param, "classes");
    engine_close(g);
    hear_stop(&h);
}

// The estimate is of what is left, not of what was asked for: it must follow the running image, neither stay nor vanish.
TEST(engine_wait_counts_what_is_left_of_running_images) {
    fixture_model(&(struct tiny){.name = "a"});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.max_jobs = 1;
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = endless("a");
    uint64_t id;
    int64_t retry = 0;
    fixture_submit(g, &job);
    while (stats(g).batches < 5) sleep_ms(1);
    CHECK(engine_submit(g, &job, &id, &retry, NULL) == E_BUSY);
    CHECK(retry > 100); // nearly 40,000 rows, each of 10 us at the very least
    engine_close(g);
    hear_stop(&h);
}

/* ---- refusals ---- */

static void refused(struct engine *g, const struct engine_job *job, int status, const char *param) {
    struct err e = {0};
    uint64_t id = 99;
    int64_t retry = 99;
    int rc = engine_submit(g, job, &id, &retry, &e);
    if (rc != status || strcmp(e.param, param) != 0 || !e.text[0])
        test_fail(__FILE__, __LINE__, "%d %s: %s", rc, e.param, e.text);
    CHECK(id == 0);
}

TEST(engine_refuses_what_the_model_cannot_do) {
    fixture_model(&(struct tiny){.name = "a"});
    fixture_model(&(struct tiny){.name = "plain", .no_null_class = true});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    struct engine_job good = fixture_job("plain", 1, nine, SAMPLER_ODE, METHOD_EULER, 2), job = good;
    strcpy(job.model, "none");
    refused(g, &job, E_NOTFOUND, "model");
    job = good, strcpy(job.digest, "0123");
    refused(g, &job, E_CONFLICT, "digest");
    job = good, job.classes = (const int32_t[]){-1};
    refused(g, &job, E_RANGE, "classes");
    job.classes = (const int32_t[]){10};
    refused(g, &job, E_RANGE, "classes");
    job.classes = (const int32_t[]){-2};
    refused(g, &job, E_RANGE, "classes");
    job = good, job.n = 0;
    refused(g, &job, E_RANGE, "classes");
    job = good, job.sampler.guidance = 2;
    refused(g, &job, E_RANGE, "guidance.scale");
    job = good, job.sampler.guide_channels = 2;
    refused(g, &job, E_RANGE, "guidance.channels");
    job = good, job.sampler.steps = 0;
    refused(g, &job, E_RANGE, "sampler.steps");
    job = good, job.sampler.steps = SAMPLER_MAX_STEPS + 1;
    refused(g, &job, E_RANGE, "sampler.steps");
    job = good, job.timeout_ms = -1;
    refused(g, &job, E_RANGE, "timeout_ms");
    job = good, job.n = 2, job.classes = two, job.seed_index = UINT32_MAX;
    refused(g, &job, E_RANGE, "seed_index");
    job.n = 1; // the last stream there is
    const struct engine_model *m = engine_model_ref(g, "plain");
    strcpy(job.digest, m->digest);
    engine_model_unref(m);
    CHECK(hear_end(&h, fixture_submit(g, &job))->end.kind == EV_DONE);
    CHECK(stats(g).jobs == 0);
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_open_refuses_bad_options) {
    struct heard h;
    hear_start(&h);
    struct engine *g;
    struct engine_options o = fixture_options(&h);
    struct err e = {0};
    CHECK(engine_open(&g, &o, &e) == E_NOTFOUND && !g && strstr(e.text, "model.json")); // an empty folder
    fixture_model(&(struct tiny){.name = "a"});
    static const struct {
        const char *param;
        int status;
    } want[] = {{"backend", E_UNSUPPORTED}, {"precision", E_RANGE},  {"max_rows", E_RANGE},
                {"max_jobs", E_RANGE},      {"max_images", E_RANGE}, {"threads", E_RANGE}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        o = fixture_options(&h);
        if (i == 0) o.backend = "abacus";
        if (i == 1) o.precision = "f8";
        if (i == 2) o.max_rows = 1;
        if (i == 3) o.max_jobs = 0;
        if (i == 4) o.max_images = 0;
        if (i == 5) o.threads = -1;
        err_clear(&e);
        CHECK(engine_open(&g, &o, &e) == want[i].status && !g);
        CHECK_STR(e.param, want[i].param);
    }
    o = fixture_options(&h);
    o.models_dir = "/nonexistent/models";
    err_clear(&e);
    CHECK(engine_open(&g, &o, &e) == E_NOTFOUND && strstr(e.text, "/nonexistent/models"));
    hear_stop(&h);
}

/* ---- models ---- */

static void spoil(const char *name, const char *file, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", fixture_dir(), name);
    mkdir(path, 0755);
    snprintf(path, sizeof path, "%s/%s/%s", fixture_dir(), name, file);
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

TEST(engine_bad_models_are_reported_and_others_serve) {
    fixture_model(&(struct tiny){.name = "good"});
    fixture_model(&(struct tiny){.name = "latent", .channels = 4});
    fixture_model(&(struct tiny){.name = "huge", .huge = true});
    spoil("broken", "model.json", "{\"format\":1,");
    spoil("folder-without-model", "readme.txt", "not a model");
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    CHECK(h.n_models == 4);
    CHECK(hear_model(&h, "good")->status == 0);
    const struct err *latent = hear_model(&h, "latent"), *huge = hear_model(&h, "huge"), *broken = hear_model(&h, "broken");
    CHECK(latent->status == E_UNSUPPORTED && strstr(latent->text, "VAE") && strstr(latent->text, "'latent'"));
    CHECK_STR(latent->param, "architecture.in_channels");
    CHECK(huge->status == E_NONFINITE && strstr(huge->text, "'huge'"));
    CHECK(broken->status == E_FORMAT && strstr(broken->text, "'broken'"));
    struct engine_stats s = stats(g);
    CHECK(s.models_ready == 1 && s.models_failed == 3 && s.models_loading == 0 && s.device_ok && s.device_bytes > 0);
    CHECK(engine_ready(g));
    struct engine_job job = fixture_job("latent", 1, nine, SAMPLER_ODE, METHOD_EULER, 1);
    refused(g, &job, E_NOTFOUND, "model");
    job = fixture_job("good", 1, nine, SAMPLER_ODE, METHOD_EULER, 1);
    CHECK(hear_end(&h, fixture_submit(g, &job))->end.kind == EV_DONE);
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_model_facts_and_default) {
    fixture_model(&(struct tiny){.name = "b"});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    char itself[512], names[4][64];
    snprintf(itself, sizeof itself, "%s/b/", fixture_dir());
    o.models_dir = itself; // a folder that is itself a model directory
    struct engine *g = fixture_open(&h, &o);
    const struct engine_model *m = engine_model_ref(g, NULL); // the only one
    CHECK(m && engine_model_names(g, names, 4) == 1);
    CHECK_STR(m->name, "b");
    CHECK(m->image_size == 8 && m->image_channels == 1 && m->guide_channels == 1 && m->desc.step == 7 && strlen(m->digest) == 64);
    CHECK(engine_device(g)[0]);
    engine_close(g);
    CHECK(m->desc.arch.num_classes == 10); // a reference outlives the engine
    engine_model_unref(m);
    hear_stop(&h);

    fixture_model(&(struct tiny){.name = "c", .is_default = true});
    fixture_model(&(struct tiny){.name = "a"});
    hear_start(&h);
    o = fixture_options(&h);
    g = fixture_open(&h, &o);
    CHECK(engine_model_names(g, names, 4) == 3 && engine_model_names(g, names, 2) == 2);
    CHECK_STR(names[0], "a");
    CHECK_STR(names[1], "b");
    m = engine_model_ref(g, NULL);
    CHECK_STR(m->name, "c");
    engine_model_unref(m);
    CHECK(!engine_model_ref(g, "d"));
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_models_take_turns) {
    fixture_model(&(struct tiny){.name = "a"});
    fixture_model(&(struct tiny){.name = "b", .seed = 2});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    struct engine_job big = endless("a"), small = fixture_job("b", 2, two, SAMPLER_ODE, METHOD_HEUN, 10);
    uint64_t first = fixture_submit(g, &big);
    hear_started(&h, first);
    CHECK(hear_end(&h, fixture_submit(g, &small))->end.kind == EV_DONE); // while the other goes on
    CHECK(!h.jobs[first].ended);
    engine_close(g);
    CHECK(h.jobs[first].end.kind == EV_CANCELLED);
    hear_stop(&h);
}

/* ---- failures of one image ---- */

TEST(engine_one_bad_image_fails_its_job_only) {
    fixture_model(&(struct tiny){.name = "a", .bad_class = 9});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    CHECK(hear_model(&h, "a")->status == 0);
    struct engine_job job = fixture_job("a", 2, two, SAMPLER_SDE, METHOD_EULER, 8),
                      bad = fixture_job("a", 1, nine, SAMPLER_ODE, METHOD_EULER, 5),
                      tired = fixture_job("a", 2, two, SAMPLER_ODE, METHOD_DOPRI5, 0);
    bad.n = 3;
    bad.classes = (const int32_t[]){2, 9, 2};
    tired.sampler.max_evaluations = 8;
    tired.sampler.atol = tired.sampler.rtol = 1e-9;
    uint64_t alone = fixture_submit(g, &job);
    hear_end(&h, alone);
    uint64_t one = fixture_submit(g, &bad), second = fixture_submit(g, &job), three = fixture_submit(g, &tired);
    CHECK(hear_end(&h, one)->end.kind == EV_FAILED && h.jobs[one].end.err.status == E_NONFINITE);
    CHECK(strstr(h.jobs[one].end.err.text, "image 1") && strstr(h.jobs[one].end.err.text, "'a'"));
    CHECK(hear_end(&h, three)->end.kind == EV_FAILED && h.jobs[three].end.err.status == E_RANGE);
    hear_end(&h, second);
    fixture_same(&h.jobs[alone], &h.jobs[second], 2);
    struct engine_stats s = stats(g);
    CHECK(s.device_ok && s.jobs == 0 && s.running_rows == 0 && s.images_done + s.images_failed == 9);
    engine_close(g);
    hear_stop(&h);
}

TEST(engine_pixels_are_clamped_and_cut) {
    float x[3 * 4] = {-1, 1, 0, 0.5f, -5, 5, -0.999f, 0.00391f, 0.9999f, -1.01f, 3e38f, -3e38f};
    uint8_t p[12];
    CHECK(served_pixels(p, x, 3, 2, false, NULL) == 0);
    static const uint8_t want[12] = {0, 0, 255, 255, 255, 0, 128, 0, 255, 191, 128, 0};
    for (int i = 0; i < 12; i++) CHECK(p[i] == want[i]);
    CHECK(served_pixels(p, x, 3, 2, true, NULL) == 0); // MaskDiT's
    static const uint8_t edm[12] = {0, 0, 254, 255, 255, 0, 127, 0, 255, 191, 127, 0};
    for (int i = 0; i < 12; i++) CHECK(p[i] == edm[i]);
    struct err e = {0};
    x[7] = NAN;
    CHECK(served_pixels(p, x, 3, 2, false, &e) == E_NONFINITE && strstr(e.text, "channel 1, pixel 3"));
    x[7] = INFINITY;
    CHECK(served_pixels(p, x, 3, 2, false, NULL) == E_NONFINITE);
}

/* ---- account ---- */

TEST(engine_progress_timings_and_counts) {
    fixture_model(&(struct tiny){.name = "a"});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = fixture_job("a", 2, two, SAMPLER_SDE, METHOD_EULER, 20);
    job.progress = true;
    job.sampler.guidance = 2;
    const struct heard_job *j = hear_end(&h, fixture_submit(g, &job));
    CHECK(j->end.kind == EV_DONE && j->end.evaluations == 40 && j->images == 2);
    CHECK(j->tellings >= 10 && j->tellings <= 20 && j->progress > 0.8);
    CHECK(j->end.queue_ms >= 0 && j->end.denoise_ms > 0 && j->end.decode_ms >= 0);
    struct engine_stats s = stats(g);
    CHECK(s.batches == 20 && s.evaluations == 80 && s.batch_rows[4] == 20 && s.steps[SAMPLER_SDE] == 40 &&
          s.steps[SAMPLER_ODE] == 0);
    CHECK(s.images_done == 2 && s.busy_seconds > 0 && s.row_ms > 0 && s.row_ms < 1000);
    double busy = s.busy_seconds;
    struct timespec cpu0, cpu1;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu0);
    sleep_ms(200); // idle: no busy loop
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu1);
    double cpu = (double)(cpu1.tv_sec - cpu0.tv_sec) + 1e-9 * (double)(cpu1.tv_nsec - cpu0.tv_nsec);
    CHECK(cpu < 0.05 && stats(g).busy_seconds == busy);
    engine_close(g);
    hear_stop(&h);
}

/* ---- crowds and endings ---- */

struct crowd {
    struct engine *g;
    struct heard *h;
    int seed, accepted;
    uint64_t images;
};

static void *crowd_main(void *arg) {
    struct crowd *c = arg;
    unsigned r = (unsigned)c->seed;
    for (int i = 0; i < 250; i++) {
        struct engine_job job = fixture_job(rand_r(&r) % 3 ? "a" : "b", 1 + rand_r(&r) % 2, two,
                                            rand_r(&r) % 2 ? SAMPLER_ODE : SAMPLER_SDE, METHOD_EULER, 2 + rand_r(&r) % 3);
        uint64_t id;
        job.seed = (uint64_t)i;
        job.sampler.guidance = rand_r(&r) % 3 ? 1 : 2;
        job.progress = rand_r(&r) % 2;
        if (engine_submit(c->g, &job, &id, NULL, NULL) != 0) continue;
        c->accepted++;
        c->images += (uint64_t)job.n;
        if (rand_r(&r) % 8 == 0) engine_cancel(c->g, id);
        if (rand_r(&r) % 8 == 0) engine_cancel(c->g, 1 + (uint64_t)rand_r(&r) % (id + 2));
        if (rand_r(&r) % 4 == 0) hear_end(c->h, id);
        if (i % 50 == 0) engine_model_unref(engine_model_ref(c->g, "a"));
        if (i % 16 == 0) (void)stats(c->g);
    }
    return NULL;
}

static int ends(const struct heard *h) {
    int n = 0;
    for (int i = 0; i < HEARD_JOBS; i++) n += h->jobs[i].ended;
    return n;
}

static void crowd_starts(struct crowd c[4], pthread_t t[4], struct engine *g, struct heard *h) {
    for (int i = 0; i < 4; i++) {
        c[i] = (struct crowd){.g = g, .h = h, .seed = i + 1};
        CHECK(pthread_create(&t[i], NULL, crowd_main, &c[i]) == 0);
    }
}

TEST_LIMIT(engine_a_thousand_jobs_from_four_threads, 120) {
    fixture_model(&(struct tiny){.name = "a"});
    fixture_model(&(struct tiny){.name = "b", .seed = 5});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    struct crowd c[4];
    pthread_t t[4];
    crowd_starts(c, t, g, &h);
    int accepted = 0;
    uint64_t images = 0;
    for (int i = 0; i < 4; i++) {
        pthread_join(t[i], NULL);
        accepted += c[i].accepted;
        images += c[i].images;
    }
    CHECK(accepted == 1000);
    for (uint64_t id = 1; id <= 1000; id++) CHECK(hear_end(&h, id)->end.kind != EV_FAILED);
    struct engine_stats s = stats(g);
    CHECK(s.images_done + s.images_cancelled == images && s.images_failed == 0 && s.images_done > images / 2);
    CHECK(s.jobs == 0 && s.queued_images == 0 && s.running_images == 0 && s.running_rows == 0);
    uint64_t batches = 0, rows = 0;
    for (int i = 0; i < 33; i++) {
        batches += s.batch_rows[i];
        rows += s.batch_rows[i] * (uint64_t)i;
        CHECK(i <= s.max_rows || s.batch_rows[i] == 0);
    }
    CHECK(batches == s.batches && rows == s.evaluations);
    CHECK(rows > 2 * batches); // they did share batches
    engine_close(g);
    CHECK(ends(&h) == 1000);
    hear_stop(&h);
}

TEST_LIMIT(engine_closes_with_jobs_in_flight, 120) {
    fixture_model(&(struct tiny){.name = "a"});
    fixture_model(&(struct tiny){.name = "b", .seed = 5});
    for (int round = 0; round < 6; round++) {
        struct heard h;
        hear_start(&h);
        struct engine_options o = fixture_options(&h);
        struct engine *g = fixture_open(&h, &o);
        struct engine_job job = endless("a");
        int accepted = 40;
        for (int i = 0; i < accepted; i++) {
            strcpy(job.model, i % 3 ? "a" : "b");
            job.seed = (uint64_t)i;
            fixture_submit(g, &job);
        }
        sleep_ms(round * 3);
        if (round == 1) engine_stop(g, true);
        if (round == 2) engine_stop(g, false);
        engine_close(g);
        CHECK(ends(&h) == accepted);
        for (int i = 1; i <= accepted; i++) CHECK(h.jobs[i].end.kind == EV_CANCELLED);
        hear_stop(&h);
    }
    engine_close(NULL);
}

// Closing while models still load must neither hang nor lose the model's memory.
TEST(engine_closes_while_loading) {
    fixture_model(&(struct tiny){.name = "a"});
    fixture_model(&(struct tiny){.name = "b"});
    fixture_model(&(struct tiny){.name = "c"});
    for (int i = 0; i < 30; i++) {
        struct heard h;
        hear_start(&h);
        struct engine_options o = fixture_options(&h);
        struct engine *g;
        struct err e = {0};
        CHECK_OK(engine_open(&g, &o, &e), &e);
        struct engine_job job = fixture_job("c", 1, nine, SAMPLER_ODE, METHOD_EULER, 1);
        uint64_t id;
        int64_t retry;
        int rc = engine_submit(g, &job, &id, &retry, NULL);
        CHECK(rc == E_BUSY ? retry > 0 : rc == 0); // still loading: come back
        if (i % 2) nanosleep(&(struct timespec){0, i * 100000L}, NULL);
        engine_close(g);
        CHECK(rc != 0 || h.jobs[id].ended == 1);
        hear_stop(&h);
    }
}

TEST(engine_stop_and_finish) {
    fixture_model(&(struct tiny){.name = "a"});
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = fixture_job("a", 2, two, SAMPLER_ODE, METHOD_HEUN, 20);
    CHECK(engine_ready(g));
    for (int i = 0; i < 20; i++) fixture_submit(g, &job);
    engine_stop(g, true);
    CHECK(!engine_ready(g));
    refused(g, &job, E_BUSY, "");
    for (uint64_t id = 1; id <= 20; id++) CHECK(hear_end(&h, id)->end.kind == EV_DONE);
    engine_stop(g, false); // nothing left to cancel
    engine_close(g);
    CHECK(ends(&h) == 20);
    hear_stop(&h);
}

TEST(engine_without_a_listener) {
    fixture_model(&(struct tiny){.name = "a"});
    struct engine_options o = fixture_options(NULL);
    o.event = NULL;
    struct engine *g;
    struct err e = {0};
    CHECK_OK(engine_open(&g, &o, &e), &e);
    while (!engine_ready(g)) sleep_ms(1);
    struct engine_job job = fixture_job("a", 2, two, SAMPLER_ODE, METHOD_HEUN, 3);
    fixture_submit(g, &job);
    while (stats(g).images_done < 2) sleep_ms(1);
    engine_close(g);
}
