// SPDX-License-Identifier: MIT
/*
 * Fail everything once: the whole life of an engine, from opening to the last image, is run again and again with the n-th
 * allocation (read, step on the device, thread) failing, until a run passes untouched. Each time there must be a clear status in
 * the right place, exactly one last event for what was accepted, no leak and no crash (the sanitizers look on).
 */
#include "core/base/fault.h"
#include "tests/test.h"
#include "tests/unit/engine_fixture.h"

static const int32_t classes[] = {1, -1};

enum outcome { OPEN_FAILED, MODEL_FAILED, SUBMIT_FAILED, JOB_FAILED, ALL_WELL };

static enum outcome one_life(int status, struct heard_job *done) {
    struct heard h;
    struct engine *g;
    struct err e = {0};
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    int rc = engine_open(&g, &o, &e);
    if (rc) {
        CHECK(!g && rc == status && e.text[0]);
        hear_stop(&h);
        return OPEN_FAILED;
    }
    enum outcome outcome = ALL_WELL;
    const struct err *model = hear_model(&h, "a");
    struct engine_job job = fixture_job("a", 2, classes, SAMPLER_SDE, METHOD_EULER, 4);
    job.progress = true;
    uint64_t id = 0;
    if (model->status) {
        if (model->status != status) test_fail(__FILE__, __LINE__, "%d (%d wanted) %s", model->status, status, model->text);
        CHECK(model->status == status && strstr(model->text, "'a'") && !engine_ready(g));
        outcome = MODEL_FAILED;
    } else if ((rc = engine_submit(g, &job, &id, NULL, &e))) {
        CHECK(rc == status && id == 0 && e.text[0]);
        outcome = SUBMIT_FAILED;
    } else if (hear_end(&h, id)->end.kind != EV_DONE) {
        CHECK(h.jobs[id].end.kind == EV_FAILED && h.jobs[id].end.err.status == status && h.jobs[id].end.err.text[0]);
        outcome = JOB_FAILED;
    } else *done = h.jobs[id];
    engine_close(g);
    CHECK(id == 0 || h.jobs[id].ended == 1);
    hear_stop(&h);
    return outcome;
}

static void fail_each(enum fault_kind kind, int status, bool for_ever, int seen[ALL_WELL + 1]) {
    static struct heard_job first, again;
    fixture_model(&(struct tiny){.name = "a"});
    CHECK(one_life(0, &first) == ALL_WELL);
    for (long n = 1;; n++) {
        CHECK(n < 2000);
        fault_arm(kind, n, for_ever);
        enum outcome outcome = one_life(status, &again);
        bool hit = fault_count(kind) >= n;
        fault_disarm();
        seen[outcome]++;
        if (outcome == ALL_WELL) fixture_same(&first, &again, 2);
        if (!hit) break;
        CHECK(kind == FAULT_ALLOC || outcome != ALL_WELL);
    }
}

TEST_LIMIT(engine_survives_any_failing_allocation, 120) {
    int seen[ALL_WELL + 1] = {0};
    fail_each(FAULT_ALLOC, E_NOMEM, false, seen);
    for (int i = 0; i <= ALL_WELL; i++) CHECK(seen[i] > 0); // every stage was reached
    CHECK(seen[ALL_WELL] == 1);
}

TEST_LIMIT(engine_survives_memory_running_out_for_good, 120) {
    int seen[ALL_WELL + 1] = {0};
    fail_each(FAULT_ALLOC, E_NOMEM, true, seen);
    CHECK(seen[ALL_WELL] == 1);
}

TEST(engine_survives_a_failing_read) {
    int seen[ALL_WELL + 1] = {0};
    fail_each(FAULT_READ, E_IO, false, seen);
    CHECK(seen[MODEL_FAILED] > 0 && seen[ALL_WELL] == 1);
}

TEST(engine_survives_a_failing_thread) {
    int seen[ALL_WELL + 1] = {0};
    fail_each(FAULT_THREAD, E_DEVICE, false, seen);
    CHECK(seen[OPEN_FAILED] == 2 && seen[ALL_WELL] == 1);
}

TEST(engine_device_failure_ends_every_job_and_readiness) {
    fixture_model(&(struct tiny){.name = "a"});
    fixture_model(&(struct tiny){.name = "b"});
    for (long n = 1; n < 12; n += 3) {
        struct heard h;
        hear_start(&h);
        struct engine_options o = fixture_options(&h);
        o.max_rows = 2;
        struct engine *g = fixture_open(&h, &o);
        struct engine_job job = fixture_job("a", 2, classes, SAMPLER_ODE, METHOD_EULER, 5000);
        fault_arm(FAULT_KERNEL, n, false); // once: it must not be tried again
        uint64_t id, ids[6];
        int accepted = 0;
        for (int i = 0; i < 6; i++) {
            strcpy(job.model, i % 2 ? "b" : "a");
            struct err e = {0};
            if (engine_submit(g, &job, &ids[accepted], NULL, &e) == 0) accepted++;
            else CHECK(e.status == E_DEVICE);
        }
        CHECK(accepted > 0);
        for (int i = 0; i < accepted; i++) { // running and waiting alike
            const struct heard_job *j = hear_end(&h, ids[i]);
            CHECK(j->end.kind == EV_FAILED && j->end.err.status == E_DEVICE);
        }
        fault_disarm();
        CHECK(!engine_ready(g));
        struct err e = {0};
        CHECK(engine_submit(g, &job, &id, NULL, &e) == E_DEVICE);
        struct engine_stats s;
        engine_stats(g, &s);
        CHECK(!s.device_ok && s.jobs == 0 && s.running_rows == 0 && s.images_failed == 2 * (uint64_t)accepted);
        engine_close(g);
        hear_stop(&h);
    }
}

struct gate { struct heard *h; pthread_mutex_t lock; pthread_cond_t moved; bool waiting, open; };

static void hear_behind_gate(void *ctx, const struct engine_event *ev) { // keeps the worker inside its turn
    struct gate *gate = ctx;
    pthread_mutex_lock(&gate->lock);
    gate->waiting = ev->kind == EV_STARTED;
    pthread_cond_broadcast(&gate->moved);
    while (gate->waiting && !gate->open) pthread_cond_wait(&gate->moved, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
    hear(gate->h, ev);
}

// What lies in the inbox when the device fails ends too, and is not tried on it.
TEST(engine_device_failure_ends_what_is_in_the_inbox) {
    struct heard h;
    struct gate gate = {.h = &h, .lock = PTHREAD_MUTEX_INITIALIZER, .moved = PTHREAD_COND_INITIALIZER};
    fixture_model(&(struct tiny){.name = "a"});
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.event = hear_behind_gate;
    o.ctx = &gate;
    struct engine *g = fixture_open(&h, &o);
    struct engine_job job = fixture_job("a", 2, classes, SAMPLER_ODE, METHOD_EULER, 5);
    uint64_t first = fixture_submit(g, &job);
    pthread_mutex_lock(&gate.lock);
    while (!gate.waiting) pthread_cond_wait(&gate.moved, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
    uint64_t late = fixture_submit(g, &job);
    fault_arm(FAULT_KERNEL, 1, false);
    pthread_mutex_lock(&gate.lock);
    gate.open = true;
    pthread_cond_broadcast(&gate.moved);
    pthread_mutex_unlock(&gate.lock);
    CHECK(hear_end(&h, first)->end.err.status == E_DEVICE);
    CHECK(hear_end(&h, late)->end.err.status == E_DEVICE && !h.jobs[late].started);
    fault_disarm();
    engine_close(g);
    hear_stop(&h);
}
