// SPDX-License-Identifier: MIT
/*
 * The thread that runs a device: networks, schedulers, the images in the making.
 *
 * One turn is one batch of one model: take what came in, drop what was cancelled or is too late, admit, evaluate, plan, hand out
 * finished images. Models with work take turns, a batch each. Between turns anything may change (rows join and leave between
 * evaluations), inside a turn nothing does; so a cancel takes effect within one evaluation, and no lock is held while the device
 * works.
 *
 * Every accepted job ends in job_close and nowhere else, which takes it out of the list of alive jobs, counts it, sends its one last
 * event and frees it; before that job_leave takes it out of the scheduler. What can go wrong goes wrong for somebody in particular:
 *   - one image (dopri5 gave up, the sample is not finite, no memory for its pixels): its job fails, batch mates go on;
 *   - the step as a whole, but not the device: the jobs in that batch fail;
 *   - the device (E_DEVICE): it is not trusted again. What its jobs still lack is made by another device, from the start of each image
 *     (the same seed gives the same picture); a job that has lost two devices fails, and so do all where there is no other. When the last
 *     one has failed later jobs are refused, stats and engine_ready say so. A sticky failure of a GPU cannot be cured from inside; the
 *     process manager restarts us.
 *
 * The account (published, pending) is brought up to date before each last event, so that who answers it with a new request finds
 * the room.
 *
 * Idle, the worker sleeps on the bell. It needs no timer: while jobs exist there is something to evaluate, since an empty device
 * always admits the first image in line; deadlines are looked at every turn.
 */
#include "core/engine/engine_int.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/base/fault.h"
#include "core/base/log.h"
#include "core/base/mem.h"

#define DECODE_LEAST_US 10000 // of decoding at a turn, where some waits
#define ROW_MS_WEIGHT 0.1 // of the newest batch in the smoothed time of a row

/* ---- account ---- */

static void publish(struct device *d) {
    pthread_mutex_lock(&d->engine->lock);
    for (struct served *s = d->served; s; s = s->next) {
        sched_stats(s->sched, &s->published);
        s->published.jobs = s->n_jobs; // the scheduler forgets a job when its last sample is finished
        s->published.running_images += s->n_decodes;
        s->published.rows_left += (int64_t)s->n_decodes * s->facts->model.decode_rows;
        s->pending = (struct sched_stats){0};
    }
    for (struct job *j = d->inbox; j; j = j->next) {
        j->on->pending.jobs++;
        j->on->pending.queued_images += j->left;
        j->on->pending.rows_left += (int64_t)j->left * j->evaluations_each * j->peak_rows;
    }
    d->published = d->counters;
    pthread_mutex_unlock(&d->engine->lock);
}

static void count_batch(struct device *d, int rows, double seconds) {
    struct engine_stats *c = &d->counters;
    double row_ms = 1000 * seconds / rows;
    int bins = (int)(sizeof c->batch_rows / sizeof *c->batch_rows);
    c->batches++;
    c->evaluations += (uint64_t)rows;
    c->batch_rows[rows < bins ? rows : bins - 1]++;
    c->busy_seconds += seconds;
    // The first batch replaces what the trial evaluation took, which pays for first touches of memory and may have been starved.
    c->row_ms = c->batches > 1 ? (1 - ROW_MS_WEIGHT) * c->row_ms + ROW_MS_WEIGHT * row_ms : row_ms;
}

/* ---- end of a job ---- */

// Out of this device's hands
static void job_leave(struct device *d, struct job *j) {
    struct served *s = j->on;
    int freed = sched_cancel(s->sched, j->id, s->freed); // -1 when its last image has just left
    for (int i = 0; i < freed; i++) s->runs[s->freed[i]].job = NULL;
    decode_drop(s, j);
    if (j->prev) j->prev->next = j->next;
    else s->jobs = j->next;
    s->n_jobs--;
    if (j->next) j->next->prev = j->prev;
    d->jobs--;
}

static void job_forget(struct engine *g, struct job *j) {
    pthread_mutex_lock(&g->lock);
    if (j->alive_prev) j->alive_prev->alive_next = j->alive_next;
    else g->alive = j->alive_next;
    if (j->alive_next) j->alive_next->alive_prev = j->alive_prev;
    pthread_mutex_unlock(&g->lock);
}

// Its last event. err is copied into EV_FAILED.
static void job_close(struct device *d, struct job *j, enum engine_event_kind kind, const struct err *err) {
    uint64_t lost = (uint64_t)(j->n - j->done);
    if (kind == EV_FAILED) d->counters.images_failed += lost;
    if (kind == EV_CANCELLED) d->counters.images_cancelled += lost;
    struct engine_event ev = {.kind = kind, .job = j->id};
    if (kind == EV_FAILED) ev.err = *err;
    if (kind == EV_DONE) {
        ev.evaluations = j->evaluations;
        ev.queue_ms = (double)(j->first_us - j->submit_us) / 1000;
        ev.decode_ms = j->decode_ms;
        ev.denoise_ms = (double)(j->last_us - j->first_us) / 1000 - j->decode_ms;
    }
    job_forget(d->engine, j);
    publish(d);
    engine_emit(d->engine, &ev);
    job_free(j);
}

static void job_end(struct device *d, struct job *j, enum engine_event_kind kind, const struct err *err) {
    job_leave(d, j);
    job_close(d, j, kind, err);
}

static void end_all(struct device *d, enum engine_event_kind kind, const struct err *err) {
    for (struct served *s = d->served; s; s = s->next)
        while (s->jobs) job_end(d, s->jobs, kind, err);
}

// What it lacks is made elsewhere, or it fails.
static void job_move(struct device *d, struct job *j, const struct err *err) {
    struct engine *g = d->engine;
    job_leave(d, j);
    j->left = 0;
    for (int i = 0; i < j->n; i++)
        if (!j->handed[i]) j->todo[j->left++] = i;
    publish(d); // it must not count twice
    pthread_mutex_lock(&g->lock);
    struct served *to = j->moved ? NULL : engine_place(g, j->on->facts);
    if (to) {
        j->moved = true;
        j->on = to;
        engine_enqueue(to, j);
        to->device->cancels = true; // it may have been cancelled on the way
    }
    pthread_mutex_unlock(&g->lock);
    if (to) d->counters.jobs_moved++;
    else job_close(d, j, EV_FAILED, err);
}

static void device_failed(struct device *d, const struct err *err) {
    d->dead = true;
    d->counters.device_ok = false;
    publish(d); // first: no job comes here any more
    log_error("device failed", log_str("device", d->name), log_str("error", err->text), log_int("jobs", d->jobs));
    for (struct served *s = d->served; s; s = s->next)
        while (s->jobs) job_move(d, s->jobs, err);
    publish(d);
}

/* ---- images ---- */

static struct job *job_find(const struct served *s, uint64_t id) {
    struct job *j = s->jobs;
    while (j && j->id != id) j = j->next;
    return j;
}

// A slot that cannot start is left marked done with the reason; finish_images takes it from there. Negative: the device failed.
static int start_image(struct device *d, struct served *s, int slot, struct err *err) {
    const struct sched_slot *at = sched_slot(s->sched, slot);
    const struct engine_model *m = &s->facts->model;
    struct run *run = &s->runs[slot];
    struct job *j = job_find(s, at->job);
    int image = j->todo[at->image];
    int32_t label = j->classes[image];
    run->job = j;
    run->slot = (struct runner_slot){.slot = slot,
                                     .label = label < 0 ? m->desc.arch.num_classes : label,
                                     .seed = j->seed,
                                     .image = j->seed_index + (uint32_t)image,
                                     .null_of = -1};
    if (j->rng == RNG_TORCH_CPU) {
        run->slot.stream = &run->stream;
        stream_start(&run->stream, &j->spec, &m->sampler, runner_numel(s->runner), j->seed, run->slot.image);
    }
    if (!j->first_us) {
        j->first_us = engine_now_us();
        engine_emit(d->engine, &(struct engine_event){.kind = EV_STARTED, .job = j->id});
    }
    struct err why = {0};
    int rc = runner_start(s->runner, &run->slot, &j->spec, &m->sampler, &why);
    if (rc == E_DEVICE) return *err = why, rc;
    if (rc) {
        run->slot.done = true;
        run->slot.err = why;
        err_set(&run->slot.err, rc, "the image could not be started");
    }
    return 0;
}

static int make_image(const struct engine_model *m, const float *planes, int index, struct engine_image *image, struct err *err) {
    size_t side = (size_t)m->image_size;
    *image = (struct engine_image){.index = index, .width = m->image_size, .height = m->image_size, .channels = m->image_channels};
    image->pixels = mem_alloc(side * side * (size_t)m->image_channels);
    if (!image->pixels) return err_set(err, E_NOMEM, "no memory for an image");
    int rc = served_pixels(image->pixels, planes, m->image_channels, m->image_size, m->sampler.kind == MODEL_EDM, err);
    if (rc) mem_free(image->pixels);
    return rc;
}

static void image_failed(struct device *d, struct job *j, int image, int rc, struct err *err) {
    if (rc == E_DEVICE) {
        device_failed(d, err);
        return;
    }
    err_set(err, rc, "the image failed");
    err_prefix(err, "model '%s', image %d", j->on->facts->model.name, image);
    job_end(d, j, EV_FAILED, err);
}

// A picture as planes goes out; with a job's last the job ends.
static void hand_out(struct device *d, struct job *j, const float *planes, int image) {
    struct engine_event ev = {.kind = EV_IMAGE, .job = j->id};
    struct err err = {0};
    int64_t start = engine_now_us();
    int rc = make_image(&j->on->facts->model, planes, image, &ev.image, &err);
    if (rc) {
        image_failed(d, j, image, rc, &err);
        return;
    }
    j->last_us = engine_now_us();
    j->decode_ms += (double)(j->last_us - start) / 1000;
    j->done++;
    j->handed[image] = true;
    d->counters.images_done++;
    engine_emit(d->engine, &ev);
    if (j->done == j->n) job_end(d, j, EV_DONE, NULL);
}

// A finished sample leaves its slot: as a picture, or for the VAE's queue.
static void finish_image(struct device *d, struct served *s, int slot) {
    struct run *run = &s->runs[slot];
    struct job *j = run->job;
    struct err err = run->slot.err;
    int image = j->todo[sched_slot(s->sched, slot)->image], rc = err.status;
    if (!rc) rc = runner_read(s->runner, slot, s->pixels, &err);
    if (!rc && s->vae) rc = decode_add(s, j, image, s->pixels, &err);
    if (rc) {
        image_failed(d, j, image, rc, &err);
        return;
    }
    run->job = NULL;
    sched_image_done(s->sched, slot);
    if (!s->vae) hand_out(d, j, s->pixels, image);
}

static void finish_images(struct device *d, struct served *s) {
    for (int i = 0, n = sched_slots(s->sched); i < n && !d->dead; i++)
        if (s->runs[i].job && s->runs[i].slot.done) finish_image(d, s, i);
}

static void decode_images(struct device *d, struct served *s, int64_t until_us) {
    while (s->decodes && !d->dead) {
        struct err err = {0};
        int64_t start = engine_now_us();
        int rc = decode_work(s, until_us, &err);
        d->counters.busy_seconds += (double)(engine_now_us() - start) / 1e6;
        if (rc == 0) return;
        struct job *j = s->decodes->job;
        int image = s->decodes->index;
        if (rc < 0) image_failed(d, j, image, rc, &err);
        else {
            const float *picture = decode_picture(s);
            decode_pop(s);
            hand_out(d, j, picture, image);
        }
    }
}

static void tell_progress(struct device *d, struct served *s) {
    int n = sched_running(s->sched, s->slots);
    for (struct job *j = s->jobs; j; j = j->next) j->running_progress = 0;
    for (int i = 0; i < n; i++) {
        struct run *run = &s->runs[s->slots[i]];
        run->job->running_progress += (1 - run->job->decode_share) * sampler_progress(&run->slot.sampler);
    }
    for (struct job *j = s->jobs; j; j = j->next) {
        double p = (j->done + (1 - j->decode_share) * j->decoding + j->running_progress) / j->n;
        if (!j->progress || p < j->told_progress + 0.01) continue;
        j->told_progress = p;
        engine_emit(d->engine, &(struct engine_event){.kind = EV_PROGRESS, .job = j->id, .progress = p});
    }
}

/* ---- one turn ---- */

static int gather_batch(struct served *s) {
    int n = sched_running(s->sched, s->slots), kept = 0;
    for (int i = 0; i < n; i++)
        if (!s->runs[s->slots[i]].slot.done) s->batch[kept++] = &s->runs[s->slots[i]].slot;
    return kept;
}

// Steps still under way count the next time.
static void count_overflows(struct device *d, struct served *s) {
    uint64_t now = s->kern->overflows ? s->kern->overflows(s->kern) : 0;
    if (now == s->overflows) return;
    if (!s->overflows)
        log_warn("residual stream leaves the range of float16: such images fail, exact-residual makes them",
                 log_str("model", s->facts->model.name), log_str("device", d->name), log_int("numbers", (int64_t)now));
    d->counters.overflows += now - s->overflows;
    s->overflows = now;
}

static int evaluate(struct device *d, struct served *s, int n, struct err *err) {
    int rows = 0, rc = 0;
    int64_t start = engine_now_us();
    if (fault_hit(FAULT_KERNEL)) rc = err_set(err, E_DEVICE, "a device failure was asked for by a test");
    if (!rc) rc = runner_step(s->runner, s->batch, n, &rows, err);
    if (!rc) rc = runner_plan(s->runner, s->batch, n, err);
    if (rc) return rc;
    count_batch(d, rows, (double)(engine_now_us() - start) / 1e6);
    count_overflows(d, s);
    for (int i = 0; i < n; i++) {
        struct run *run = &s->runs[s->batch[i]->slot];
        run->job->evaluations++;
        d->counters.steps[run->job->spec.type]++;
        sched_progress(s->sched, run->slot.slot, run->slot.done ? 0 : sampler_left(&run->slot.sampler));
    }
    return 0;
}

static void batch_failed(struct device *d, struct served *s, int n, const struct err *err) {
    for (int i = 0; i < n; i++) {
        struct job *j = s->runs[s->batch[i]->slot].job;
        if (j) job_end(d, j, EV_FAILED, err); // NULL: a mate of the same job was before it
    }
}

static void turn(struct device *d, struct served *s) {
    struct err err = {0};
    int rc = 0;
    int64_t start = engine_now_us();
    d->last = s;
    s->kern->use(s->kern); // the loader has until now; a failure shows at the first op
    int n = sched_admit(s->sched, s->slots);
    if (n) publish(d); // before EV_STARTED, and not only after a step that may be long
    for (int i = 0; i < n && !rc; i++) rc = start_image(d, s, s->slots[i], &err);
    bool behind = s->n_decodes >= sched_slots(s->sched);
    n = rc || behind ? 0 : gather_batch(s);
    if (n) rc = evaluate(d, s, n, &err);
    if (rc == E_DEVICE) device_failed(d, &err);
    else if (rc) {
        err_set(&err, rc, "the step failed");
        batch_failed(d, s, n, &err);
    }
    finish_images(d, s);
    int64_t now = engine_now_us(), spent = now - start;
    decode_images(d, s, now + (n && spent > DECODE_LEAST_US ? spent : DECODE_LEAST_US));
    tell_progress(d, s);
}

static struct served *next_with_work(const struct device *d) { // round robin, beginning after the last
    struct served *first = d->last && d->last->next ? d->last->next : d->served, *s = first;
    while (s) {
        if (s->jobs) return s;
        s = s->next ? s->next : d->served;
        if (s == first) break;
    }
    return NULL;
}

/* ---- what came in ---- */

static void accept_job(struct device *d, struct job *j) {
    struct served *s = j->on;
    struct err err = {0};
    j->prev = NULL;
    j->next = s->jobs;
    if (s->jobs) s->jobs->prev = j;
    s->jobs = j;
    s->n_jobs++;
    d->jobs++;
    struct sched_job job = {.id = j->id,
                            .images = j->left,
                            .peak_rows = j->peak_rows,
                            .evaluations = j->evaluations_each,
                            .priority = j->priority,
                            .deadline_ms = j->deadline_ms};
    if (d->dead) {
        err_set(&err, E_DEVICE, "the device has failed");
        job_move(d, j, &err);
    } else if (sched_submit(s->sched, &job, &err)) {
        err_set(&err, E_INTERNAL, "the scheduler refused an accepted job");
        job_end(d, j, EV_FAILED, &err);
    }
}

static void drop_cancelled(struct device *d) {
    for (struct served *s = d->served; s; s = s->next)
        for (struct job *j = s->jobs, *next; j; j = next) {
            next = j->next;
            if (atomic_load_explicit(&j->cancel, memory_order_relaxed)) job_end(d, j, EV_CANCELLED, NULL);
        }
}

static void too_late(struct device *d, struct job *j) {
    struct err err = {0};
    err_param(&err, E_TIMEOUT, "timeout_ms", "the deadline of %lld ms passed; %d of %d images were done",
              (long long)(j->deadline_ms - j->submit_us / 1000), j->done, j->n);
    job_end(d, j, EV_FAILED, &err);
}

static void drop_late(struct device *d, struct served *s) {
    int64_t now_ms = engine_now_us() / 1000;
    for (uint64_t id; sched_expired(s->sched, now_ms, &id, 1);) too_late(d, job_find(s, id));
    if (!s->n_decodes) return;
    for (struct job *j = s->jobs, *next; j; j = next) { // the scheduler has forgotten those that are only decoded
        next = j->next;
        if (j->decoding && j->deadline_ms && j->deadline_ms <= now_ms) too_late(d, j);
    }
}

static void install(struct device *d, struct load *load) {
    struct served *s = load->served;
    load->status = d->dead ? E_DEVICE : OK;
    if (d->dead) return;
    if (d->counters.row_ms <= 0) d->counters.row_ms = s->row_ms;
    d->counters.device_bytes += s->bytes;
    pthread_mutex_lock(&d->engine->lock);
    struct served **end = &d->served;
    while (*end) end = &(*end)->next;
    *end = s;
    pthread_mutex_unlock(&d->engine->lock);
    publish(d);
}

// Versions that nobody can ask for any more and that have no job left go to the loader.
static void drop_retired(struct device *d) {
    for (struct served **at = &d->served, *s; (s = *at);) {
        pthread_mutex_lock(&d->engine->lock);
        bool unused = s->retired && !s->jobs && !s->pending.jobs;
        if (unused) {
            if (d->last == s) d->last = NULL;
            d->counters.device_bytes -= s->bytes;
            d->published.device_bytes = d->counters.device_bytes;
            *at = s->next;
            s->next = d->engine->dropped;
            d->engine->dropped = s;
            pthread_cond_signal(&d->engine->built);
        } else at = &s->next;
        pthread_mutex_unlock(&d->engine->lock);
    }
}

/* ---- loop ---- */

struct look { // what one look into the basket found
    struct job *jobs;
    struct load *load;
    bool cancels;
    enum stop stop;
};

// Sleeps while there is nothing to do.
static void look(struct device *d, struct look *found) {
    struct engine *g = d->engine;
    pthread_mutex_lock(&g->lock);
    while (!d->jobs && !d->inbox && !d->load && !d->retires && g->stop != STOP_CLOSE) pthread_cond_wait(&d->bell, &g->lock);
    *found = (struct look){.jobs = d->inbox, .load = d->load, .cancels = d->cancels, .stop = g->stop};
    d->inbox = NULL;
    d->inbox_end = &d->inbox;
    d->cancels = d->retires = false;
    pthread_mutex_unlock(&g->lock);
}

static void give_back(struct device *d) { // the loader may go on
    pthread_mutex_lock(&d->engine->lock);
    d->load = NULL;
    pthread_cond_signal(&d->engine->built);
    pthread_mutex_unlock(&d->engine->lock);
}

static void take_in(struct device *d, const struct look *found) {
    for (struct job *j = found->jobs, *next; j; j = next) {
        next = j->next;
        accept_job(d, j);
    }
    if (found->jobs) publish(d);
    if (found->stop >= STOP_CANCEL) end_all(d, EV_CANCELLED, NULL);
    if (found->cancels) drop_cancelled(d);
    if (!found->load) return;
    if (found->stop < STOP_CANCEL) install(d, found->load);
    give_back(d);
}

void *worker_main(void *arg) {
    struct device *d = arg;
    struct look found = {0};
    int by = d->engine->options.nice;
    // The reference computes on this very thread. Elsewhere the worker gives orders and hands out what is done, two thousandths of the processor time:
    // niced among compute threads it would keep finished images back for milliseconds.
    if (!strcmp(d->config.backend, "ref") && by && nice(by) == -1) log_warn("worker keeps its priority", log_int("nice", by));
    while (found.stop != STOP_CLOSE) {
        look(d, &found);
        take_in(d, &found);
        for (struct served *s = d->served; s; s = s->next) drop_late(d, s);
        struct served *s = next_with_work(d);
        if (s) turn(d, s);
        publish(d);
        drop_retired(d);
    }
    return NULL;
}
