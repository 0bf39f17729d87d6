// SPDX-License-Identifier: MIT
/*
 * The scheduler against an oracle: random sequences of every operation are given to sched.c and to the naive model below, which
 * keeps a plain list of jobs in turn order and recounts everything from scratch. Every answer must be the same, and the
 * invariants that the engine lives on are checked after each operation. Policy (fairness, priorities, the head that waits) has
 * tests of its own.
 */
#include "core/base/fault.h"
#include "core/engine/sched.h"
#include "tests/test.h"

#define ROWS 16
#define JOBS 24
#define IMAGES 60

static struct sched *new_sched(int rows, int jobs, int images) {
    struct sched *s;
    struct err e = {0};
    CHECK_OK(sched_new(&s, &(struct sched_limits){rows, jobs, images}, &e), &e);
    return s;
}

static int submit(struct sched *s, uint64_t id, int images, int peak, int priority) {
    return sched_submit(
        s, &(struct sched_job){.id = id, .images = images, .peak_rows = peak, .evaluations = 10, .priority = priority}, NULL);
}

static struct sched_stats stats(const struct sched *s) {
    struct sched_stats st;
    sched_stats(s, &st);
    return st;
}

/* ---- the oracle: jobs in turn order, no clever state ---- */

struct model_job {
    struct sched_job is;
    int next, running;
};
struct model_run {
    bool busy;
    uint64_t job;
    int image, left;
};
struct model {
    struct model_job jobs[JOBS]; // in order of turn, those without waiting images included
    int n;
    struct model_run run[ROWS];
};

static struct model_job *model_find(struct model *m, uint64_t id) {
    for (int i = 0; i < m->n; i++)
        if (m->jobs[i].is.id == id) return &m->jobs[i];
    return NULL;
}

static void model_remove(struct model *m, struct model_job *j) {
    memmove(j, j + 1, (size_t)(&m->jobs[m->n] - (j + 1)) * sizeof *j);
    m->n--;
}

static void model_append(struct model *m, struct model_job j) { m->jobs[m->n++] = j; }

static struct sched_stats model_stats(struct model *m) {
    struct sched_stats st = {.jobs = m->n};
    for (int i = 0; i < m->n; i++) {
        struct model_job *j = &m->jobs[i];
        st.queued_images += j->is.images - j->next;
        st.rows_left += (int64_t)(j->is.images - j->next) * j->is.evaluations * j->is.peak_rows;
    }
    for (int i = 0; i < ROWS; i++) {
        if (!m->run[i].busy) continue;
        int peak = model_find(m, m->run[i].job)->is.peak_rows;
        st.running_images++;
        st.running_rows += peak;
        st.rows_left += (int64_t)m->run[i].left * peak;
    }
    return st;
}

static int model_submit(struct model *m, const struct sched_job *job) {
    if (job->peak_rows > ROWS || job->peak_rows < 1 || job->images < 1 || job->images > IMAGES) return E_RANGE;
    if (model_find(m, job->id)) return E_CONFLICT;
    if (m->n == JOBS || model_stats(m).queued_images + job->images > IMAGES) return E_BUSY;
    model_append(m, (struct model_job){.is = *job});
    return 0;
}

static struct model_job *model_turn(struct model *m) { // highest priority, first in turn order
    struct model_job *best = NULL;
    for (int i = 0; i < m->n; i++) {
        struct model_job *j = &m->jobs[i];
        if (j->next < j->is.images && (!best || j->is.priority > best->is.priority)) best = j;
    }
    return best;
}

static int model_admit(struct model *m, int *slots) {
    int n = 0;
    for (struct model_job *j; (j = model_turn(m)) && model_stats(m).running_rows + j->is.peak_rows <= ROWS;) {
        int slot = 0;
        while (m->run[slot].busy) slot++;
        m->run[slot] = (struct model_run){true, j->is.id, j->next++, j->is.evaluations};
        j->running++;
        slots[n++] = slot;
        struct model_job copy = *j;
        model_remove(m, j);
        model_append(m, copy);
    }
    return n;
}

static bool model_done(struct model *m, int slot) {
    struct model_job *j = model_find(m, m->run[slot].job);
    m->run[slot] = (struct model_run){0};
    if (--j->running || j->next < j->is.images) return false;
    model_remove(m, j);
    return true;
}

static int model_cancel(struct model *m, uint64_t id, int *slots) {
    struct model_job *j = model_find(m, id);
    int n = 0;
    if (!j) return -1;
    for (int i = 0; i < ROWS; i++)
        if (m->run[i].busy && m->run[i].job == id) {
            m->run[i] = (struct model_run){0};
            slots[n++] = i;
        }
    model_remove(m, j);
    return n;
}

/* ---- comparison ---- */

static void same(const struct sched *s, struct model *m) {
    struct sched_stats a = stats(s), b = model_stats(m);
    CHECK(a.jobs == b.jobs && a.queued_images == b.queued_images && a.running_images == b.running_images);
    CHECK(a.running_rows == b.running_rows && a.rows_left == b.rows_left);
    CHECK(a.running_rows <= ROWS && a.jobs <= JOBS && a.queued_images <= IMAGES);
    int slots[ROWS], n = sched_running(s, slots), seen = 0;
    CHECK(n == a.running_images);
    for (int i = 0; i < ROWS; i++) {
        const struct sched_slot *x = sched_slot(s, i);
        CHECK(x->busy == m->run[i].busy);
        if (!x->busy) continue;
        CHECK(x->job == m->run[i].job && x->image == m->run[i].image);
        CHECK(slots[seen++] == i);
    }
    int64_t first = 0;
    for (int i = 0; i < m->n; i++) {
        int64_t d = m->jobs[i].is.deadline_ms;
        if (d && (!first || d < first)) first = d;
    }
    CHECK(sched_next_deadline(s) == first);
}

static uint64_t rng = 88172645463325252ull;
static int any(int n) {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (int)(rng % (uint64_t)n);
}

static void check_expired(const struct sched *s, struct model *m, int64_t now) {
    uint64_t ids[JOBS];
    int n = sched_expired(s, now, ids, JOBS), want = 0;
    for (int i = 0; i < m->n; i++) want += m->jobs[i].is.deadline_ms && m->jobs[i].is.deadline_ms <= now;
    CHECK(n == want);
    for (int i = 0; i < n; i++) {
        struct model_job *j = model_find(m, ids[i]);
        CHECK(j && j->is.deadline_ms <= now);
        for (int k = 0; k < i; k++) CHECK(ids[k] != ids[i]);
    }
    CHECK(sched_expired(s, now, ids, 1) == (want > 0));
}

static void random_op(struct sched *s, struct model *m, uint64_t *id, int64_t now) {
    int a[ROWS], b[ROWS], op = any(100), slot = any(ROWS);
    if (op < 25) {
        struct sched_job job = {.id = any(10) ? ++*id : 1 + (uint64_t)any((int)*id + 1),
                                .images = any(20) ? 1 + any(8) : any(70),
                                .peak_rows = any(30) ? 1 + any(2) : any(ROWS + 3),
                                .evaluations = 1 + any(50),
                                .priority = any(4) ? 0 : any(5) - 2,
                                .deadline_ms = any(3) ? 0 : now + any(40)};
        CHECK(sched_submit(s, &job, NULL) == model_submit(m, &job));
    } else if (op < 50) {
        int n = sched_admit(s, a);
        CHECK(n == model_admit(m, b));
        for (int i = 0; i < n; i++) CHECK(a[i] == b[i]);
        CHECK(sched_admit(s, a) == 0); // nothing more fits
    } else if (op < 70) {
        if (m->run[slot].busy) CHECK(sched_image_done(s, slot) == model_done(m, slot));
        else CHECK(!sched_image_done(s, slot));
    } else if (op < 80) {
        int left = any(60);
        sched_progress(s, slot, left);
        if (m->run[slot].busy) m->run[slot].left = left;
    } else if (op < 88) {
        uint64_t victim = m->n && any(4) ? m->jobs[any(m->n)].is.id : 1 + (uint64_t)any((int)*id + 1);
        int n = sched_cancel(s, victim, a);
        CHECK(n == model_cancel(m, victim, b));
        for (int i = 0; i < n; i++) CHECK(a[i] == b[i]);
    } else check_expired(s, m, now);
}

TEST(sched_random_operations_match_the_oracle) {
    for (int round = 0; round < 60; round++) {
        struct sched *s = new_sched(ROWS, JOBS, IMAGES);
        static struct model m;
        m = (struct model){0};
        uint64_t id = 0;
        for (int i = 0; i < 3000; i++) {
            random_op(s, &m, &id, i);
            same(s, &m);
        }
        // every job that is left ends, and nothing stays behind
        int a[ROWS], b[ROWS];
        for (int guard = 0; m.n; guard++) {
            CHECK(guard < 10000);
            CHECK(sched_admit(s, a) == model_admit(&m, b));
            int n = sched_running(s, a), pick = a[any(n)];
            CHECK(n > 0);
            CHECK(sched_image_done(s, pick) == model_done(&m, pick));
            same(s, &m);
        }
        struct sched_stats st = stats(s);
        CHECK(st.jobs == 0 && st.queued_images == 0 && st.running_images == 0 && st.running_rows == 0 && st.rows_left == 0);
        sched_free(s);
    }
}

/* ---- policy ---- */

TEST(sched_a_big_job_does_not_shut_out_a_small_one) {
    struct sched *s = new_sched(4, 8, 100);
    int slots[4];
    CHECK(submit(s, 1, 64, 1, 0) == 0);
    CHECK(sched_admit(s, slots) == 4); // alone it may have the whole device
    CHECK(submit(s, 2, 1, 1, 0) == 0);
    CHECK(!sched_image_done(s, 2));
    CHECK(sched_admit(s, slots) == 1 && sched_slot(s, slots[0])->job == 1); // job 1's turn had come before job 2 existed
    CHECK(!sched_image_done(s, 0));
    CHECK(sched_admit(s, slots) == 1 && sched_slot(s, slots[0])->job == 2);
    CHECK(submit(s, 3, 64, 1, 0) == E_BUSY);
    CHECK(submit(s, 3, 30, 1, 0) == 0);
    int turns[4] = {0};
    for (int i = 0; i < 20; i++) {
        CHECK(sched_slot(s, 1)->busy);
        sched_image_done(s, 1);
        CHECK(sched_admit(s, slots) == 1);
        turns[sched_slot(s, slots[0])->job]++;
    }
    CHECK(turns[1] == 10 && turns[3] == 10);
    sched_free(s);
}

TEST(sched_images_of_a_job_are_handed_out_in_order) {
    struct sched *s = new_sched(2, 4, 10);
    int slots[2], next = 0;
    CHECK(submit(s, 7, 5, 1, 0) == 0);
    for (bool last = false; !last;) {
        int n = sched_admit(s, slots);
        for (int i = 0; i < n; i++) CHECK(sched_slot(s, slots[i])->image == next++);
        last = sched_image_done(s, slots[0]);
        if (!last && sched_running(s, slots) && next == 5) last = sched_image_done(s, slots[0]);
    }
    CHECK(next == 5);
    sched_free(s);
}

TEST(sched_priority_goes_first_and_does_not_interrupt) {
    struct sched *s = new_sched(2, 8, 100);
    int slots[2];
    CHECK(submit(s, 1, 9, 1, 0) == 0);
    CHECK(sched_admit(s, slots) == 2);
    CHECK(submit(s, 2, 2, 1, 5) == 0);
    CHECK(submit(s, 3, 2, 1, -5) == 0);
    CHECK(submit(s, 4, 1, 1, 5) == 0);
    CHECK(sched_admit(s, slots) == 0);
    uint64_t want[] = {2, 4, 2, 1, 1, 1, 1, 1, 1, 1, 3, 3};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        sched_image_done(s, 0);
        CHECK(sched_admit(s, slots) == 1);
        CHECK(sched_slot(s, 0)->job == want[i]);
    }
    sched_free(s);
}

TEST(sched_a_wide_image_is_not_passed_for_ever) {
    struct sched *s = new_sched(2, 200, 200);
    int slots[2];
    uint64_t id = 1;
    CHECK(submit(s, id++, 1, 1, 0) == 0);
    CHECK(submit(s, id++, 1, 1, 0) == 0);
    CHECK(sched_admit(s, slots) == 2);
    CHECK(submit(s, 1000, 1, 2, 0) == 0); // guided: needs both rows
    for (int i = 0; i < 50; i++) CHECK(submit(s, id++, 1, 1, 0) == 0);
    sched_image_done(s, 0);
    CHECK(sched_admit(s, slots) == 0); // one row idles
    sched_image_done(s, 1);
    CHECK(sched_admit(s, slots) == 1 && sched_slot(s, slots[0])->job == 1000);
    sched_free(s);
}

// A job of the same priority waits for at most one image of each job that was before it, whatever comes later.
TEST(sched_nobody_starves_under_steady_load) {
    for (int round = 0; round < 40; round++) {
        struct sched *s = new_sched(8, 64, 4000);
        int slots[8], ahead[4000] = {0};
        uint64_t id = 0;
        int waiting_jobs = 0, taken[4000] = {0}, images[4000] = {0};
        for (int i = 0; i < 2000; i++) {
            if (id < 3999 && any(3) == 0) {
                int n = 1 + any(12);
                if (submit(s, id + 1, n, 1 + any(2), 0) == 0) {
                    ahead[++id] = waiting_jobs++; // the jobs that have waiting images now
                    images[id] = n;
                }
            }
            int n = sched_admit(s, slots);
            for (int k = 0; k < n; k++) {
                uint64_t who = sched_slot(s, slots[k])->job;
                CHECK(ahead[who] == 0); // exactly its turn
                for (uint64_t j = 1; j <= id; j++) ahead[j] -= j != who && taken[j] < images[j];
                if (++taken[who] == images[who]) waiting_jobs--;
                else ahead[who] = waiting_jobs - 1;
            }
            int r = sched_running(s, slots);
            if (r) sched_image_done(s, slots[any(r)]);
        }
        sched_free(s);
    }
}

TEST(sched_bounds_and_reasons) {
    struct sched *s = new_sched(4, 2, 10);
    struct err e = {0};
    struct sched_job job = {.id = 1, .images = 1, .peak_rows = 5};
    CHECK(sched_submit(s, &job, &e) == E_RANGE && strstr(e.text, "5 rows"));
    err_clear(&e);
    job.peak_rows = 1;
    job.images = 11;
    CHECK(sched_submit(s, &job, &e) == E_RANGE); // would never fit: not "try again"
    CHECK_STR(e.param, "classes");
    err_clear(&e);
    job.images = 0;
    CHECK(sched_submit(s, &job, NULL) == E_RANGE);
    CHECK(submit(s, 1, 6, 1, 0) == 0);
    CHECK(submit(s, 1, 1, 1, 0) == E_CONFLICT);
    CHECK(submit(s, 2, 5, 1, 0) == E_BUSY);
    CHECK(submit(s, 2, 4, 1, 0) == 0);
    int slots[4];
    CHECK(sched_admit(s, slots) == 4);
    job = (struct sched_job){.id = 3, .images = 1, .peak_rows = 1};
    CHECK(sched_submit(s, &job, &e) == E_BUSY && strstr(e.text, "2 requests")); // room for images, none for a job
    CHECK(sched_cancel(s, 1, slots) >= 0);
    CHECK(sched_submit(s, &job, NULL) == 0);
    CHECK(sched_cancel(s, 99, slots) == -1);
    sched_free(s);
    struct sched *none;
    CHECK(sched_new(&none, &(struct sched_limits){0, 1, 1}, NULL) == E_RANGE && !none);
}

TEST(sched_work_left_is_counted_in_rows) {
    struct sched *s = new_sched(4, 4, 10);
    struct sched_job job = {.id = 1, .images = 3, .peak_rows = 2, .evaluations = 100};
    CHECK(sched_submit(s, &job, NULL) == 0);
    CHECK(stats(s).rows_left == 600);
    int slots[4];
    CHECK(sched_admit(s, slots) == 2);
    sched_progress(s, slots[0], 40);
    CHECK(stats(s).rows_left == 480);
    CHECK(!sched_image_done(s, slots[0]));
    CHECK(stats(s).rows_left == 400);
    sched_progress(s, slots[0], 7); // a slot that is free: ignored
    CHECK(stats(s).rows_left == 400);
    CHECK(sched_cancel(s, 1, slots) == 1 && stats(s).rows_left == 0);
    sched_free(s);
}

TEST(sched_no_memory) {
    struct sched *s = NULL;
    int n = 0;
    for (;; n++) {
        fault_arm(FAULT_ALLOC, n + 1, false);
        struct err e = {0};
        int rc = sched_new(&s, &(struct sched_limits){8, 8, 8}, &e);
        fault_disarm();
        if (rc == 0) break;
        CHECK(rc == E_NOMEM && !s && e.text[0]);
        CHECK(n < 100);
    }
    CHECK(n == 5);
    sched_free(s);
    sched_free(NULL);
}
