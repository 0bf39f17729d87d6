// SPDX-License-Identifier: MIT
/*
 * Two orders are kept. `alive` is every job, in no order, for searches. The waiting ring is the jobs that still have images to
 * admit, by priority and, within a priority, by turn: a job joins behind its equals, and after each image that it gets it goes
 * behind them again.
 *
 * Why admission stops at the first image that does not fit, although a smaller one behind it would: images run for hundreds of
 * steps, so with one free row and a guided image (two rows) at the head, letting unguided images pass would, under steady load,
 * use up every row that comes free, and the guided image would wait for ever. Stopping leaves at most peak - 1 = 1 row idle, and
 * only until the next image ends. From this follow the two promises the tests check: a waiting job's place in the ring never gets
 * worse (among equal or higher priorities only newcomers of higher priority pass it), and rows never exceed max_rows. Strict
 * priority means that a stream of urgent work can hold back ordinary work for as long as it lasts; a deadline bounds that wait.
 *
 * Slots: an image takes at least one row, so with max_rows slots a free row implies a free slot.
 */
#include "core/engine/sched.h"

#include "core/base/mem.h"

struct job {
    struct sched_job is;
    int next_image, running; // images admitted so far; of these, still running
    int at;                  // place in alive
    struct job *prev, *next; // waiting ring; NULL when no image waits
};

struct place { // a slot's private half
    struct job *job;
    int evaluations_left;
};

struct sched {
    struct sched_limits limits;
    struct job *jobs;   // [max_jobs], the storage
    struct job **alive; // [max_jobs]: the first n_alive are in use, the rest are free
    int n_alive;
    struct job ring;          // head of the waiting ring
    struct sched_slot *slots; // [max_rows]
    struct place *places;     // [max_rows]
    struct sched_stats now;
};

int sched_new(struct sched **out, const struct sched_limits *limits, struct err *e) {
    *out = NULL;
    if (limits->max_rows < 1 || limits->max_jobs < 1 || limits->max_images < 1)
        return err_set(e, E_RANGE, "scheduler limits must be at least 1 (rows %d, jobs %d, images %d)", limits->max_rows,
                       limits->max_jobs, limits->max_images);
    struct sched *s = mem_alloc(sizeof *s);
    if (!s) return err_set(e, E_NOMEM, "no memory for a scheduler");
    s->limits = *limits;
    s->ring.prev = s->ring.next = &s->ring;
    s->jobs = mem_array((size_t)limits->max_jobs, sizeof *s->jobs);
    s->alive = mem_array((size_t)limits->max_jobs, sizeof(struct job *));
    s->slots = mem_array((size_t)limits->max_rows, sizeof *s->slots);
    s->places = mem_array((size_t)limits->max_rows, sizeof *s->places);
    if (!s->jobs || !s->alive || !s->slots || !s->places) {
        sched_free(s);
        return err_set(e, E_NOMEM, "no memory for a scheduler of %d jobs and %d rows", limits->max_jobs, limits->max_rows);
    }
    for (int i = 0; i < limits->max_jobs; i++) s->alive[i] = &s->jobs[i];
    *out = s;
    return 0;
}

void sched_free(struct sched *s) {
    if (!s) return;
    mem_free(s->jobs);
    mem_free(s->alive);
    mem_free(s->slots);
    mem_free(s->places);
    mem_free(s);
}

int sched_slots(const struct sched *s) { return s->limits.max_rows; }
const struct sched_slot *sched_slot(const struct sched *s, int slot) { return &s->slots[slot]; }
void sched_stats(const struct sched *s, struct sched_stats *out) { *out = s->now; }

static struct job *find(const struct sched *s, uint64_t id) {
    for (int i = 0; i < s->n_alive; i++)
        if (s->alive[i]->is.id == id) return s->alive[i];
    return NULL;
}

static int64_t image_rows(const struct job *j) { return (int64_t)j->is.evaluations * j->is.peak_rows; }

static void ring_join(struct sched *s, struct job *j) { // behind all of its priority and above
    struct job *after = s->ring.prev;
    while (after != &s->ring && after->is.priority < j->is.priority) after = after->prev;
    j->prev = after;
    j->next = after->next;
    j->prev->next = j->next->prev = j;
}

static void ring_leave(struct job *j) {
    if (!j->next) return;
    j->prev->next = j->next;
    j->next->prev = j->prev;
    j->prev = j->next = NULL;
}

static void forget(struct sched *s, struct job *j) {
    ring_leave(j);
    struct job *last = s->alive[--s->n_alive];
    s->alive[j->at] = last;
    last->at = j->at;
    s->alive[s->n_alive] = j;
    s->now.jobs--;
}

static void vacate(struct sched *s, int slot) {
    struct place *p = &s->places[slot];
    s->now.running_images--;
    s->now.running_rows -= p->job->is.peak_rows;
    s->now.rows_left -= (int64_t)p->evaluations_left * p->job->is.peak_rows;
    p->job->running--;
    *p = (struct place){0};
    s->slots[slot] = (struct sched_slot){0};
}

static int check(const struct sched *s, const struct sched_job *job, struct err *e) {
    const struct sched_limits *l = &s->limits;
    if (job->peak_rows < 1 || job->peak_rows > l->max_rows)
        return err_set(e, E_RANGE, "an image needs %d rows at once, the largest batch has %d", job->peak_rows, l->max_rows);
    if (job->images < 1 || job->images > l->max_images)
        return err_param(e, E_RANGE, "classes", "a request of %d images: 1 to %d are allowed", job->images, l->max_images);
    if (job->evaluations < 0) return err_set(e, E_RANGE, "%d evaluations an image", job->evaluations);
    if (find(s, job->id)) return err_set(e, E_CONFLICT, "job %llu is already there", (unsigned long long)job->id);
    if (s->n_alive == l->max_jobs) return err_set(e, E_BUSY, "the queue is full: %d requests", l->max_jobs);
    if (job->images > l->max_images - s->now.queued_images)
        return err_set(e, E_BUSY, "the queue is full: %d images wait, %d more would pass its limit of %d", s->now.queued_images,
                       job->images, l->max_images);
    return 0;
}

int sched_submit(struct sched *s, const struct sched_job *job, struct err *e) {
    int rc = check(s, job, e);
    if (rc) return rc;
    struct job *j = s->alive[s->n_alive];
    *j = (struct job){.is = *job, .at = s->n_alive++};
    ring_join(s, j);
    s->now.jobs++;
    s->now.queued_images += job->images;
    s->now.rows_left += image_rows(j) * job->images;
    return 0;
}

int sched_admit(struct sched *s, int *slots) {
    int n = 0, slot = 0;
    for (struct job *j; (j = s->ring.next) != &s->ring;) {
        if (s->now.running_rows + j->is.peak_rows > s->limits.max_rows) break;
        while (s->slots[slot].busy) slot++;
        s->slots[slot] = (struct sched_slot){.job = j->is.id, .image = j->next_image++, .busy = true};
        s->places[slot] = (struct place){.job = j, .evaluations_left = j->is.evaluations};
        j->running++;
        s->now.queued_images--;
        s->now.running_images++;
        s->now.running_rows += j->is.peak_rows;
        slots[n++] = slot;
        ring_leave(j);
        if (j->next_image < j->is.images) ring_join(s, j);
    }
    return n;
}

int sched_running(const struct sched *s, int *slots) {
    int n = 0;
    for (int i = 0; n < s->now.running_images; i++)
        if (s->slots[i].busy) slots[n++] = i;
    return n;
}

void sched_progress(struct sched *s, int slot, int evaluations_left) {
    struct place *p = &s->places[slot];
    if (!p->job) return;
    s->now.rows_left += ((int64_t)evaluations_left - p->evaluations_left) * p->job->is.peak_rows;
    p->evaluations_left = evaluations_left;
}

bool sched_image_done(struct sched *s, int slot) {
    struct job *j = s->places[slot].job;
    if (!j) return false;
    vacate(s, slot);
    if (j->running || j->next_image < j->is.images) return false;
    forget(s, j);
    return true;
}

int sched_cancel(struct sched *s, uint64_t id, int *slots) {
    struct job *j = find(s, id);
    if (!j) return -1;
    int n = 0, waiting = j->is.images - j->next_image;
    for (int i = 0; j->running; i++)
        if (s->places[i].job == j) {
            vacate(s, i);
            slots[n++] = i;
        }
    s->now.queued_images -= waiting;
    s->now.rows_left -= image_rows(j) * waiting;
    forget(s, j);
    return n;
}

int sched_expired(const struct sched *s, int64_t now_ms, uint64_t *ids, int max) {
    int n = 0;
    for (int i = 0; i < s->n_alive && n < max; i++) {
        const struct sched_job *j = &s->alive[i]->is;
        if (j->deadline_ms && j->deadline_ms <= now_ms) ids[n++] = j->id;
    }
    return n;
}

int64_t sched_next_deadline(const struct sched *s) {
    int64_t first = 0;
    for (int i = 0; i < s->n_alive; i++) {
        int64_t d = s->alive[i]->is.deadline_ms;
        if (d && (!first || d < first)) first = d;
    }
    return first;
}
