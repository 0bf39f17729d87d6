// SPDX-License-Identifier: MIT
// Several devices behind one queue: the same bytes, work shared, a device that fails, the last one that fails. On the reference back end, of
// which each device is a handle of its own.
#include <time.h>

#include "core/base/fault.h"
#include "core/engine/engine_int.h"
#include "tests/test.h"
#include "tests/unit/engine_fixture.h"

static const int32_t some[] = {3, 0, 7, 9};
static const int both[] = {0, 1}, three[] = {0, 1, 2};

enum { JOBS = 10 };
static void jobs_of(struct engine_job job[JOBS]) {
    for (int i = 0; i < JOBS; i++) {
        job[i] = fixture_job("a", 1 + i % 4, some, i % 3 ? SAMPLER_ODE : SAMPLER_SDE, METHOD_EULER, 6 + 5 * (i % 3));
        job[i].seed = 100 + (uint64_t)i;
        if (i == 4) job[i].sampler.guidance = 2;
    }
}

static struct engine *open_devices(struct heard *h, const int *devices, int n) {
    hear_start(h);
    struct engine_options o = fixture_options(h);
    o.devices = devices;
    o.n_devices = n;
    return fixture_open(h, &o);
}

static void run_jobs(struct engine *g, struct heard *h, struct heard_job out[JOBS]) {
    struct engine_job job[JOBS];
    uint64_t id[JOBS];
    jobs_of(job);
    for (int i = 0; i < JOBS; i++) id[i] = fixture_submit(g, &job[i]);
    for (int i = 0; i < JOBS; i++) out[i] = *hear_end(h, id[i]);
}

static void close_all(struct engine *g, struct heard *h) {
    engine_close(g);
    hear_stop(h);
}

TEST(devices_share_the_work_and_make_the_same_bytes) {
    static struct heard_job alone[JOBS], shared[JOBS];
    struct heard h;
    fixture_model(&(struct tiny){.name = "a"});
    struct engine *g = open_devices(&h, NULL, 0);
    run_jobs(g, &h, alone);
    close_all(g, &h);
    g = open_devices(&h, three, 3);
    run_jobs(g, &h, shared);
    struct engine_stats s;
    engine_stats(g, &s);
    CHECK(s.devices == 3 && s.devices_failed == 0 && s.device_ok && s.jobs_moved == 0 && s.images_done == 23);
    uint64_t sum = 0;
    for (int i = 0; i < 3; i++) {
        CHECK(g->devices[i].published.images_done > 0);
        sum += g->devices[i].published.images_done;
    }
    CHECK(sum == s.images_done);
    CHECK(strchr(engine_device(g), ';'));
    close_all(g, &h);
    for (int i = 0; i < JOBS; i++) fixture_same(&alone[i], &shared[i], alone[i].images);
}

// A burst falls evenly on devices of one kind, whatever their trial evaluations took.
TEST(devices_alike_share_a_burst_evenly) {
    struct heard h;
    fixture_model(&(struct tiny){.name = "a"});
    struct engine *g = open_devices(&h, both, 2);
    struct engine_job job = fixture_job("a", 1, some, SAMPLER_ODE, METHOD_EULER, 10000);
    uint64_t id[12];
    pthread_mutex_lock(&g->lock);
    g->devices[0].published.row_ms *= 5; // as a cold first touch may
    pthread_mutex_unlock(&g->lock);
    for (int i = 0; i < 12; i++) id[i] = fixture_submit(g, &job);
    pthread_mutex_lock(&g->lock);
    for (int i = 0; i < 2; i++) CHECK(g->devices[i].served->published.jobs + g->devices[i].served->pending.jobs == 6);
    pthread_mutex_unlock(&g->lock);
    for (int i = 0; i < 12; i++) engine_cancel(g, id[i]);
    for (int i = 0; i < 12; i++) CHECK(hear_end(&h, id[i])->end.kind == EV_CANCELLED);
    close_all(g, &h);
}

// Whichever evaluation it is that fails: everything is made, once, with the same bytes
TEST_LIMIT(devices_one_fails_and_another_makes_what_is_missing, 120) {
    static struct heard_job alone[JOBS], moved[JOBS];
    struct heard h;
    int with_moves = 0;
    fixture_model(&(struct tiny){.name = "a"});
    struct engine *g = open_devices(&h, NULL, 0);
    run_jobs(g, &h, alone);
    close_all(g, &h);
    for (long n = 1; n <= 15; n += 2) { // the longest jobs alone take 16 evaluations; how many there are in all depends on who shares them
        g = open_devices(&h, both, 2);
        fault_arm(FAULT_KERNEL, n, false);
        run_jobs(g, &h, moved);
        fault_disarm();
        struct engine_stats s;
        engine_stats(g, &s);
        CHECK(s.devices == 2 && s.devices_failed == 1 && s.device_ok && engine_ready(g));
        CHECK(s.images_done == 23 && s.images_failed == 0 && s.jobs == 0 && s.running_rows == 0);
        with_moves += s.jobs_moved > 0;
        for (int i = 0; i < JOBS; i++) {
            CHECK(moved[i].started == 1);
            fixture_same(&alone[i], &moved[i], alone[i].images);
        }
        run_jobs(g, &h, moved); // on the one that is left
        for (int i = 0; i < JOBS; i++) fixture_same(&alone[i], &moved[i], alone[i].images);
        close_all(g, &h);
    }
    CHECK(with_moves > 4);
}

TEST(devices_all_fail) {
    struct heard h;
    fixture_model(&(struct tiny){.name = "a"});
    struct engine *g = open_devices(&h, both, 2);
    struct engine_job job[JOBS];
    uint64_t id[JOBS];
    int n = 0;
    jobs_of(job);
    fault_arm(FAULT_KERNEL, 3, true);
    for (int i = 0; i < JOBS; i++) {
        struct err e = {0};
        if (engine_submit(g, &job[i], &id[n], NULL, &e) == 0) n++;
        else CHECK(e.status == E_DEVICE);
    }
    for (int i = 0; i < n; i++) {
        const struct heard_job *j = hear_end(&h, id[i]);
        CHECK(j->end.kind == EV_DONE || (j->end.kind == EV_FAILED && j->end.err.status == E_DEVICE));
    }
    fault_disarm();
    struct engine_stats s;
    engine_stats(g, &s);
    CHECK(s.devices_failed == 2 && !s.device_ok && !engine_ready(g) && s.jobs == 0);
    struct err e = {0};
    CHECK(engine_submit(g, &job[0], &id[0], NULL, &e) == E_DEVICE && strstr(e.text, "every device"));
    close_all(g, &h);
}

TEST(devices_bounds_are_of_all_together) {
    struct heard h;
    fixture_model(&(struct tiny){.name = "a"});
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.devices = both;
    o.n_devices = 2;
    o.max_jobs = 3;
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = fixture_job("a", 1, some, SAMPLER_ODE, METHOD_EULER, 3000);
    uint64_t id[4];
    int64_t wait = 0;
    for (int i = 0; i < 3; i++) id[i] = fixture_submit(g, &job);
    struct err e = {0};
    CHECK(engine_submit(g, &job, &id[3], &wait, &e) == E_BUSY && wait > 0);
    for (int i = 0; i < 3; i++) engine_cancel(g, id[i]);
    for (int i = 0; i < 3; i++) CHECK(hear_end(&h, id[i])->end.kind == EV_CANCELLED);
    close_all(g, &h);
}

// Cancels, and closing, while jobs are being moved
TEST_LIMIT(devices_cancel_and_close_while_one_fails, 120) {
    fixture_model(&(struct tiny){.name = "a"});
    for (int i = 0; i < 16; i++) {
        struct heard h;
        struct engine *g = open_devices(&h, both, 2);
        struct engine_job job = fixture_job("a", 3, some, SAMPLER_ODE, METHOD_EULER, 40);
        uint64_t id[6];
        fault_arm(FAULT_KERNEL, 1 + i % 7, false);
        for (int j = 0; j < 6; j++) id[j] = fixture_submit(g, &job);
        nanosleep(&(struct timespec){0, i * 150000L}, NULL);
        for (int j = 0; j < 6; j += 2) engine_cancel(g, id[j]);
        if (i % 3 == 0) engine_stop(g, i % 2);
        if (i % 2 == 0)
            for (int j = 0; j < 6; j++) hear_end(&h, id[j]);
        close_all(g, &h);
        fault_disarm();
        CHECK(h.broken == 0);
    }
}

TEST(devices_bad_options) {
    static const int twice[] = {1, 1};
    struct heard h;
    struct err e = {0};
    struct engine *g;
    fixture_model(&(struct tiny){.name = "a"});
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.devices = twice;
    o.n_devices = 2;
    CHECK(engine_open(&g, &o, &e) == E_RANGE && !g);
    CHECK_STR(e.param, "devices");
    o.n_devices = ENGINE_DEVICES + 1;
    e = (struct err){0};
    CHECK(engine_open(&g, &o, &e) == E_RANGE && !g);
    o.n_devices = ENGINE_ALL;
    e = (struct err){0};
    CHECK_OK(engine_open(&g, &o, &e), &e);
    CHECK(g->n_devices == 1);
    close_all(g, &h);
}
