// SPDX-License-Identifier: MIT
// What can go wrong with a GPU while an engine serves from it. Needs a GPU that nobody else uses.
#include <time.h>

#include "core/engine/engine_int.h"
#include "tests/cuda/break_context.h"
#include "tests/test.h"
#include "tests/unit/engine_fixture.h"

static const int32_t some[] = {3, 4};

static struct engine *open_cuda(struct heard *h, const char *precision) {
    hear_start(h);
    struct engine_options o = fixture_options(h);
    o.backend = "cuda";
    o.precision = precision;
    o.retry_ms = 20;
    return fixture_open(h, &o);
}

static void close_all(struct engine *g, struct heard *h) {
    engine_close(g);
    hear_stop(h);
}

// All of the device's memory but so much. What comes in pieces may leave a little less.
static void hog(struct kern *k, size_t but, void **pieces, int *n) {
    for (size_t piece = (size_t)8 << 30; piece >= (size_t)2 << 20; piece /= 2)
        while (k->device_memory(k) > but + piece && *n < 256 && k->alloc(k, piece, &pieces[*n]) == 0) ++*n;
}

static void let_go(struct kern *k, void **pieces, int n) {
    while (n) k->free(k, pieces[--n]);
}

TEST(cuda_engine_nan_fails_its_job_and_nobody_else) {
    static const char *const precisions[] = {"f32", "bf16", "f16"};
    for (int i = 0; i < 3; i++) {
        struct heard h;
        fixture_model(&(struct tiny){.name = "a", .bad_class = 4});
        struct engine *g = open_cuda(&h, precisions[i]);
        struct engine_job good = fixture_job("a", 1, some, SAMPLER_SDE, METHOD_EULER, 40), bad = fixture_job("a", 1, some + 1, SAMPLER_ODE, METHOD_EULER, 40);
        struct heard_job alone = *hear_end(&h, fixture_submit(g, &good));
        uint64_t id_bad = fixture_submit(g, &bad), id_good = fixture_submit(g, &good);
        const struct heard_job *failed = hear_end(&h, id_bad);
        CHECK(failed->end.kind == EV_FAILED && failed->end.err.status == E_NONFINITE && strstr(failed->end.err.text, "not finite"));
        fixture_same(hear_end(&h, id_good), &alone, 1);
        CHECK(engine_ready(g));
        close_all(g, &h);
    }
}

TEST(cuda_engine_says_that_its_gpu_failed) {
    struct heard h;
    fixture_model(&(struct tiny){.name = "a"});
    struct engine *g = open_cuda(&h, "bf16");
    struct engine_job job = fixture_job("a", 1, some, SAMPLER_ODE, METHOD_RK4, 10000);
    uint64_t id = fixture_submit(g, &job);
    hear_started(&h, id);
    break_context();
    const struct heard_job *failed = hear_end(&h, id);
    CHECK(failed->end.kind == EV_FAILED && failed->end.err.status == E_DEVICE && strstr(failed->end.err.text, "cuda"));
    struct engine_stats s;
    struct err e = {0};
    engine_stats(g, &s);
    CHECK(!engine_ready(g) && !s.device_ok && s.devices_failed == 1 && s.jobs == 0);
    CHECK(engine_submit(g, &job, &id, NULL, &e) == E_DEVICE && e.text[0]);
    close_all(g, &h);
}

// The old version serves on, and what comes free later is used.
TEST(cuda_engine_second_copy_waits_for_device_memory) {
    struct heard h;
    void *pieces[256];
    int n = 0;
    struct engine_job job = fixture_job("a", 2, some, SAMPLER_ODE, METHOD_EULER, 8);
    fixture_model(&(struct tiny){.name = "a", .seed = 1});
    struct engine *g = open_cuda(&h, "bf16");
    struct heard_job before = *hear_end(&h, fixture_submit(g, &job));
    struct kern *k = other_handle();
    hog(k, (size_t)40 << 20, pieces, &n);
    fixture_model(&(struct tiny){.name = "a", .seed = 2});
    engine_scan(g);
    while (__atomic_load_n(&h.n_models, __ATOMIC_ACQUIRE) < 2) nanosleep(&(struct timespec){0, 5000000}, NULL);
    CHECK(h.models[1].status == E_NOMEM && strstr(h.models[1].text, "memory") && engine_ready(g));
    fixture_same(hear_end(&h, fixture_submit(g, &job)), &before, 2);
    let_go(k, pieces, n);
    kern_close(k);
    const struct engine_model *m;
    char digest[DIGEST_HEX];
    m = engine_model_ref(g, "a");
    strcpy(digest, m->digest);
    for (bool same = true; same;) { // by itself, after a pause
        engine_model_unref(m);
        nanosleep(&(struct timespec){0, 5000000}, NULL);
        m = engine_model_ref(g, "a");
        same = strcmp(digest, m->digest) == 0;
    }
    engine_model_unref(m);
    CHECK(hear_end(&h, fixture_submit(g, &job))->end.kind == EV_DONE);
    close_all(g, &h);
}

TEST(cuda_engine_model_that_is_too_large_says_so) {
    struct heard h;
    void *pieces[256];
    int n = 0;
    fixture_model(&(struct tiny){.name = "a", .side = 64, .channels = 3}); // 64 rows of 1,024 tokens: 130 MB
    struct kern *k = other_handle();
    hog(k, (size_t)64 << 20, pieces, &n);
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.backend = "cuda";
    o.max_rows = 64;
    o.retry_ms = 20;
    struct engine *g;
    struct err e = {0};
    CHECK_OK(engine_open(&g, &o, &e), &e);
    const struct err *model = hear_model(&h, "a");
    CHECK(model->status == E_NOMEM && strstr(model->text, "GPU memory") && !engine_ready(g));
    let_go(k, pieces, n);
    while (!engine_ready(g)) nanosleep(&(struct timespec){0, 5000000}, NULL);
    close_all(g, &h);
    kern_close(k);
}
