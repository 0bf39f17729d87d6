// SPDX-License-Identifier: MIT
/*
 * The door: what callers of any thread may do. Nothing here waits for the device.
 *
 * A job is checked completely before it is accepted, so that a refusal comes back as a status from engine_submit and never as an
 * event. The bounds are judged by the account that the worker publishes each turn plus what went into the inbox since; both are
 * read and written under the lock, so that two callers cannot both get the last place.
 */
#include "core/engine/engine.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/base/fault.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/engine/engine_int.h"

int64_t engine_now_us(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

void engine_emit(struct engine *g, struct engine_event *ev) {
    if (g->options.event) g->options.event(g->options.ctx, ev);
    else mem_free(ev->image.pixels); // nobody took them
}

int engine_thread(pthread_t *t, void *(*run)(void *), void *arg, const char *what, struct err *e) {
    int rc = fault_hit(FAULT_THREAD) ? -1 : pthread_create(t, NULL, run, arg);
    return rc ? err_set(e, E_DEVICE, "the %s thread could not be made", what) : 0;
}

/* ---- open and close ---- */

// Can it be had at all? Every version then opens it for itself.
static int check_device(struct device *d, struct err *e) {
    const char *name = d->engine->backend;
    struct kern *k;
    char why[256] = "";
    int rc = kern_open(&k, &d->config, why, sizeof why);
    if (rc == KERN_ENOMEM) return err_param(e, E_NOMEM, "backend", "back end '%s': %s", name, why);
    if (rc == KERN_EUNSUPPORTED) return err_param(e, E_UNSUPPORTED, "backend", "back end '%s': %s", name, why);
    if (rc) return err_param(e, E_DEVICE, "backend", "back end '%s': %s", name, why);
    snprintf(d->name, sizeof d->name, "%s", k->device);
    d->engine->on_host = !k->device_memory;
    kern_close(k);
    return OK;
}

static int choose_backend(struct engine *g, const struct engine_options *o, struct err *e) {
    char why[256] = "";
    const char *name = o->backend;
    if (!strcmp(name, "auto")) {
        name = kern_auto(why, sizeof why);
        if (*why) log_info("no GPU to use: the CPU computes", log_str("why", why));
    }
    if (strlen(name) >= sizeof g->backend) return err_param(e, E_UNSUPPORTED, "backend", "there is no back end '%s'", name);
    strcpy(g->backend, name);
    return OK;
}

static int open_devices(struct engine *g, const struct engine_options *o, struct err *e) {
    struct kern_config config = {.backend = g->backend, .threads = o->threads}; // no niceness: its threads have the loader's, which makes them
    config.any_bits = o->any_bits, config.exact_stream = o->exact_residual;
    char why[256] = "";
    if (o->cache && strlen(o->cache) < sizeof g->cache) config.cache = strcpy(g->cache, o->cache);
    if (o->precision && !kern_precision(&config, o->precision))
        return err_param(e, E_RANGE, "precision", "precision '%s': known are %s", o->precision, KERN_PRECISIONS);
    int n = o->n_devices == ENGINE_ALL ? kern_devices(g->backend, why, sizeof why) : o->n_devices ? o->n_devices : 1;
    if (n < 1) return err_param(e, E_DEVICE, "backend", "back end '%s': %s", g->backend, why);
    if (n > ENGINE_DEVICES) n = ENGINE_DEVICES;
    g->devices = mem_array((size_t)n, sizeof *g->devices);
    if (!g->devices) return err_set(e, E_NOMEM, "no memory for the engine");
    for (int i = 0; i < n; i++) {
        struct device *d = &g->devices[g->n_devices++];
        d->engine = g;
        d->config = config;
        d->config.device = o->n_devices > 0 ? o->devices[i] : i;
        d->inbox_end = &d->inbox;
        d->counters.device_ok = d->published.device_ok = true;
        pthread_cond_init(&d->bell, NULL);
        int rc = check_device(d, e);
        if (rc) return rc;
        size_t at = strlen(g->names);
        snprintf(g->names + at, sizeof g->names - at, "%s%s", i ? "; " : "", d->name);
    }
    return OK;
}

static int check_options(const struct engine_options *o, struct err *e) {
    if (!o->models_dir) return err_param(e, E_RANGE, "models", "no models folder was given");
    if (!o->backend) return err_param(e, E_RANGE, "backend", "no back end was given");
    if (o->max_rows < 2)
        return err_param(e, E_RANGE, "max_rows", "max_rows is %d: a guided image needs 2 rows at once", o->max_rows);
    if (o->max_jobs < 1) return err_param(e, E_RANGE, "max_jobs", "max_jobs is %d, at least 1", o->max_jobs);
    if (o->max_images < 1) return err_param(e, E_RANGE, "max_images", "max_images is %d, at least 1", o->max_images);
    if (o->threads < 0) return err_param(e, E_RANGE, "threads", "threads is %d", o->threads);
    if (o->n_devices > ENGINE_DEVICES) return err_param(e, E_RANGE, "devices", "%d devices, at most %d", o->n_devices, ENGINE_DEVICES);
    for (int i = 0; i < o->n_devices; i++)
        for (int j = 0; j < i; j++)
            if (o->devices[i] == o->devices[j]) return err_param(e, E_RANGE, "devices", "device %d is named twice", o->devices[i]);
    return 0;
}

static void free_versions(struct served *s) {
    for (struct served *next; s; s = next) {
        next = s->next;
        served_free(s);
    }
}

static void engine_free(struct engine *g) { // threads are gone
    for (int i = 0; i < g->n_devices; i++) {
        free_versions(g->devices[i].served);
        pthread_cond_destroy(&g->devices[i].bell);
    }
    free_versions(g->dropped);
    repository_close(g);
    mem_free(g->devices);
    pthread_cond_destroy(&g->built);
    pthread_mutex_destroy(&g->lock);
    mem_free(g);
}

static void set_stop(struct engine *g, enum stop stop) {
    pthread_mutex_lock(&g->lock);
    if (g->stop < stop) g->stop = stop;
    for (int i = 0; i < g->n_devices; i++) pthread_cond_signal(&g->devices[i].bell);
    pthread_cond_signal(&g->built);
    pthread_mutex_unlock(&g->lock);
}

static int start_threads(struct engine *g, struct err *e) {
    int rc = OK, n = 0;
    while (!rc && n < g->n_devices) {
        rc = engine_thread(&g->devices[n].worker, worker_main, &g->devices[n], "worker", e);
        if (!rc) n++;
    }
    if (!rc) rc = engine_thread(&g->loader, loader_main, g, "loader", e);
    if (!rc) return OK;
    set_stop(g, STOP_CLOSE);
    for (int i = 0; i < n; i++) pthread_join(g->devices[i].worker, NULL);
    return rc;
}

int engine_open(struct engine **out, const struct engine_options *o, struct err *e) {
    *out = NULL;
    int rc = check_options(o, e);
    if (rc) return rc;
    struct engine *g = mem_alloc(sizeof *g);
    if (!g) return err_set(e, E_NOMEM, "no memory for the engine");
    g->options = *o;
    g->limits = (struct sched_limits){o->max_rows, o->max_jobs, o->max_images};
    pthread_mutex_init(&g->lock, NULL);
    pthread_condattr_t clock; // the loader waits by the clock of engine_now_us
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&g->built, &clock);
    pthread_condattr_destroy(&clock);
    rc = repository_open(g, o->models_dir, e);
    if (!rc) rc = choose_backend(g, o, e);
    if (!rc) rc = open_devices(g, o, e);
    if (!rc) rc = start_threads(g, e);
    if (rc) {
        engine_free(g);
        return rc;
    }
    *out = g;
    return 0;
}

void engine_stop(struct engine *g, bool finish) { set_stop(g, finish ? STOP_FINISH : STOP_CANCEL); }

void engine_close(struct engine *g) {
    if (!g) return;
    set_stop(g, STOP_CLOSE);
    for (int i = 0; i < g->n_devices; i++) pthread_join(g->devices[i].worker, NULL); // they give a waiting loader its model back
    pthread_join(g->loader, NULL);
    engine_free(g);
}

/* ---- models ---- */

// Lock held. The only one, those that are still to be loaded at the start counted too; or the one marked default.
static struct entry *default_entry(struct engine *g) {
    struct entry *only = NULL, *marked = NULL;
    int n = 0;
    for (struct entry *entry = g->entries; entry; entry = entry->next) {
        if (!entry->current && entry->state != ENTRY_LOADING) continue;
        only = entry;
        n++;
        if (!marked && entry->current && entry->current->model.desc.is_default) marked = entry;
    }
    return n == 1 ? only : marked;
}

const struct engine_model *engine_model_ref(struct engine *g, const char *name) {
    pthread_mutex_lock(&g->lock);
    struct entry *entry = name ? repository_find(g, name) : default_entry(g);
    struct facts *f = entry ? entry->current : NULL;
    if (f) atomic_fetch_add(&f->refs, 1);
    pthread_mutex_unlock(&g->lock);
    return f ? &f->model : NULL;
}

void engine_model_unref(const struct engine_model *m) { facts_unref((struct facts *)m); }

int engine_model_names(struct engine *g, char names[][64], int max) {
    int n = 0;
    pthread_mutex_lock(&g->lock);
    for (const struct entry *entry = g->entries; entry && n < max; entry = entry->next)
        if (entry->current) strcpy(names[n++], entry->name);
    pthread_mutex_unlock(&g->lock);
    return n;
}

const char *engine_device(struct engine *g) { return g->names; }

/* ---- submit ---- */

static int check_classes(const struct engine_job *job, const struct engine_model *m, struct err *e) {
    const struct arch *a = &m->desc.arch;
    if (job->n < 1) return err_param(e, E_RANGE, "classes", "no image was asked for");
    for (int i = 0; i < job->n; i++) {
        int32_t c = job->classes[i];
        if (c == -1 && !a->class_dropout)
            return err_param(e, E_RANGE, "classes", "classes[%d]: model '%s' has no null class, so no unconditional image", i,
                             m->name);
        if (c < -1 || c >= a->num_classes)
            return err_param(e, E_RANGE, "classes", "classes[%d] is %d; model '%s' has the classes 0 to %d", i, (int)c, m->name,
                             a->num_classes - 1);
    }
    return 0;
}

static int check_seed(const struct engine_job *job, const struct engine_model *m, struct err *e) {
    size_t side = (size_t)m->desc.arch.input_size, numel = (size_t)m->desc.arch.in_channels * side * side;
    if ((uint64_t)job->seed_index + (uint64_t)job->n - 1 > UINT32_MAX)
        return err_param(e, E_RANGE, "seed_index", "seed_index + %d images passes 2^32 - 1", job->n);
    return job->rng == RNG_NATIVE ? OK : stream_check(&job->sampler, &m->sampler, numel, job->seed_index, (uint64_t)job->n, e);
}

static int check_job(const struct engine_job *job, const struct engine_model *m, struct err *e) {
    const struct sampler_spec *spec = &job->sampler;
    int rc = check_classes(job, m, e);
    if (!rc) rc = sampler_check(spec, &m->sampler, e);
    if (rc) return rc;
    if (spec->guidance != 1 && !m->desc.arch.class_dropout)
        return err_param(e, E_RANGE, "guidance.scale", "model '%s' has no null class, so guidance.scale must be 1", m->name);
    if (spec->guide_channels < 0 || spec->guide_channels > m->max_guide_channels)
        return err_param(e, E_RANGE, "guidance.channels", "guidance.channels is %d; model '%s' has %d", spec->guide_channels,
                         m->name, m->max_guide_channels);
    if (job->timeout_ms < 0) return err_param(e, E_RANGE, "timeout_ms", "timeout_ms is negative");
    return check_seed(job, m, e);
}

static int64_t deadline(int64_t now_us, int64_t timeout_ms) {
    int64_t now_ms = now_us / 1000;
    if (!timeout_ms) return 0;
    return timeout_ms > INT64_MAX / 2 - now_ms ? INT64_MAX / 2 : now_ms + timeout_ms;
}

void job_free(struct job *j) {
    if (!j) return;
    mem_free(j->classes);
    mem_free(j->todo);
    mem_free(j->handed);
    mem_free(j);
}

static struct job *job_new(const struct engine_job *from, const struct engine_model *m, struct err *e) {
    struct job *j = mem_alloc(sizeof *j);
    int32_t *classes = mem_dup(from->classes, (size_t)from->n * sizeof *classes);
    int *todo = mem_array((size_t)from->n, sizeof *todo);
    bool *handed = mem_array((size_t)from->n, sizeof *handed);
    if (!j || !classes || !todo || !handed) {
        void *parts[] = {j, classes, todo, handed};
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) mem_free(parts[i]);
        err_set(e, E_NOMEM, "no memory for a request");
        return NULL;
    }
    for (int i = 0; i < from->n; i++) todo[i] = i;
    *j = (struct job){.n = from->n,
                      .left = from->n,
                      .todo = todo,
                      .handed = handed,
                      .priority = from->priority,
                      .classes = classes,
                      .seed = from->seed,
                      .seed_index = from->seed_index,
                      .rng = from->rng,
                      .spec = from->sampler,
                      .progress = from->progress,
                      .submit_us = engine_now_us()};
    j->peak_rows = sampler_peak_rows(&from->sampler);
    j->evaluations_each = sampler_evaluations(&from->sampler, &m->sampler);
    int decode = (m->decode_rows + j->peak_rows - 1) / j->peak_rows; // as if the network were evaluated so many times more
    j->evaluations_each += decode;
    j->decode_share = (double)decode / (j->evaluations_each > 0 ? j->evaluations_each : 1);
    j->deadline_ms = deadline(j->submit_us, from->timeout_ms);
    return j;
}

/* ---- places (lock held) ---- */

static int64_t rows_left(const struct device *d) {
    int64_t rows = 0;
    for (const struct served *s = d->served; s; s = s->next) rows += s->published.rows_left + s->pending.rows_left;
    return rows;
}

static struct served *version_on(const struct device *d, const struct facts *f) {
    struct served *s = d->served;
    while (s && s->facts != f) s = s->next;
    return s;
}

#define ALIKE 1.25  // devices whose rows take times within this factor count as equally fast
#define MEASURED 50 // batches before which a device's time counts as unknown

// Would d be done before the best so far? A row's time is an average over batches of any size, and over the first few a guess: between
// devices of one kind the differences are noise, which would give one of them more of a burst of requests for good.
static bool done_before(const struct device *d, const struct device *best) {
    double a = d->published.row_ms, b = best->published.row_ms, rows = (double)rows_left(d), best_rows = (double)rows_left(best);
    bool measured = d->published.batches >= MEASURED && best->published.batches >= MEASURED;
    if (measured && (a > ALIKE * b || b > ALIKE * a)) rows *= a, best_rows *= b;
    return rows < best_rows;
}

struct served *engine_place(struct engine *g, const struct facts *f) {
    struct served *best = NULL;
    for (int i = 0; i < g->n_devices && g->stop < STOP_CANCEL; i++) {
        const struct device *d = &g->devices[i];
        struct served *s = d->published.device_ok ? version_on(d, f) : NULL;
        if (s && (!best || done_before(d, best->device))) best = s;
    }
    return best;
}

void engine_enqueue(struct served *s, struct job *j) {
    struct device *d = s->device;
    j->next = NULL;
    *d->inbox_end = j;
    d->inbox_end = &j->next;
    s->pending.jobs++;
    s->pending.queued_images += j->left;
    s->pending.rows_left += (int64_t)j->left * j->evaluations_each * j->peak_rows;
    pthread_cond_signal(&d->bell);
}

void engine_retire(struct engine *g, struct facts *f) {
    for (int i = 0; f && i < g->n_devices; i++) {
        struct served *s = version_on(&g->devices[i], f);
        if (!s) continue;
        s->retired = g->devices[i].retires = true;
        pthread_cond_signal(&g->devices[i].bell);
    }
    facts_unref(f);
}

static int64_t work_ms(struct engine *g) { // the time that all accepted work will take
    double ms = 0;
    int n = 0;
    for (int i = 0; i < g->n_devices; i++) {
        const struct device *d = &g->devices[i];
        if (!d->published.device_ok) continue;
        ms += (double)rows_left(d) * d->published.row_ms;
        n++;
    }
    ms /= n ? n : 1;
    return ms < 1 ? 1 : ms > 1e12 ? (int64_t)1e12 : (int64_t)ms;
}

// The bounds are of all devices together.
static int check_room(struct engine *g, const struct job *j, const struct facts *f, int64_t *retry_ms, struct err *e) {
    int images = 0, jobs = 0;
    for (int i = 0; i < g->n_devices; i++) {
        const struct served *s = version_on(&g->devices[i], f);
        if (!s) continue;
        images += s->published.queued_images + s->pending.queued_images;
        jobs += s->published.jobs + s->pending.jobs;
    }
    if (j->peak_rows > g->limits.max_rows)
        return err_set(e, E_RANGE, "an image needs %d rows at once, the largest batch has %d", j->peak_rows, g->limits.max_rows);
    if (j->n > g->limits.max_images)
        return err_param(e, E_RANGE, "classes", "a request of %d images: 1 to %d are allowed", j->n, g->limits.max_images);
    if (jobs < g->limits.max_jobs && images <= g->limits.max_images - j->n) return OK;
    *retry_ms = work_ms(g);
    return err_set(e, E_BUSY, "the queue of model '%s' is full: %d requests (limit %d), %d images waiting (limit %d)", f->model.name, jobs,
                   g->limits.max_jobs, images, g->limits.max_images);
}

static int admit(struct engine *g, struct job *j, const struct engine_model *checked, int64_t *retry_ms, struct err *e) {
    struct entry *entry = repository_find(g, checked->name);
    if (g->stop != STOP_NOT) {
        *retry_ms = work_ms(g);
        return err_set(e, E_BUSY, "the engine is stopping");
    }
    if (!entry || !entry->current || &entry->current->model != checked) // what was checked may not hold any more
        return err_param(e, E_CONFLICT, "digest", "model '%s' has just been replaced", checked->name);
    j->on = engine_place(g, entry->current);
    if (!j->on) return err_set(e, E_DEVICE, g->n_devices > 1 ? "every device has failed" : "the device has failed");
    int rc = check_room(g, j, entry->current, retry_ms, e);
    if (rc) return rc;
    j->id = ++g->last_id;
    j->alive_next = g->alive;
    if (g->alive) g->alive->alive_prev = j;
    g->alive = j;
    engine_enqueue(j->on, j);
    return OK;
}

static int not_there(struct engine *g, const char *name, int64_t *retry_ms, struct err *e) {
    pthread_mutex_lock(&g->lock);
    struct entry *entry = repository_find(g, name);
    bool loading = entry && entry->state == ENTRY_LOADING && g->stop == STOP_NOT;
    pthread_mutex_unlock(&g->lock);
    if (!entry) return err_param(e, E_NOTFOUND, "model", "there is no model '%s'", name);
    if (!loading) return err_param(e, E_NOTFOUND, "model", "model '%s' could not be loaded", name);
    *retry_ms = 1000; // nothing is known of how long a load takes
    return err_param(e, E_BUSY, "model", "model '%s' is still being loaded", name);
}

static int submit_to(struct engine *g, const struct engine_model *m, const struct engine_job *job, uint64_t *id,
                     int64_t *retry_ms, struct err *e) {
    if (job->digest[0] && strcmp(job->digest, m->digest) != 0)
        return err_param(e, E_CONFLICT, "digest", "model '%s' is now version %lld, digest %s", m->name, (long long)m->desc.step,
                         m->digest);
    int rc = check_job(job, m, e);
    if (rc) return rc;
    struct job *j = job_new(job, m, e);
    if (!j) return E_NOMEM;
    pthread_mutex_lock(&g->lock);
    rc = admit(g, j, m, retry_ms, e);
    if (!rc) *id = j->id;
    pthread_mutex_unlock(&g->lock);
    if (rc) job_free(j);
    return rc;
}

int engine_submit(struct engine *g, const struct engine_job *job, uint64_t *id, int64_t *retry_ms, struct err *e) {
    int64_t ignored;
    if (!retry_ms) retry_ms = &ignored;
    *id = 0;
    *retry_ms = 0;
    if (!memchr(job->model, 0, sizeof job->model) || !memchr(job->digest, 0, sizeof job->digest))
        return err_param(e, E_NOTFOUND, "model", "a model's name or digest has no end");
    const struct engine_model *m = engine_model_ref(g, job->model);
    if (!m) return not_there(g, job->model, retry_ms, e);
    int rc = submit_to(g, m, job, id, retry_ms, e);
    engine_model_unref(m);
    return rc;
}

void engine_cancel(struct engine *g, uint64_t id) {
    pthread_mutex_lock(&g->lock);
    for (struct job *j = g->alive; j; j = j->alive_next)
        if (j->id == id) {
            atomic_store_explicit(&j->cancel, true, memory_order_relaxed);
            j->on->device->cancels = true;
            break;
        }
    pthread_mutex_unlock(&g->lock);
}

/* ---- state ---- */

static void add_stats(struct engine_stats *out, const struct device *d) { // lock held
    const struct engine_stats *p = &d->published;
    out->devices++;
    out->devices_failed += !p->device_ok;
    out->device_ok |= p->device_ok;
    out->evaluations += p->evaluations;
    out->batches += p->batches;
    out->images_done += p->images_done;
    out->images_failed += p->images_failed;
    out->images_cancelled += p->images_cancelled;
    out->jobs_moved += p->jobs_moved;
    out->overflows += p->overflows;
    out->busy_seconds += p->busy_seconds;
    out->device_bytes += p->device_bytes;
    if (p->row_ms > out->row_ms) out->row_ms = p->row_ms;
    for (size_t i = 0; i < sizeof p->steps / sizeof *p->steps; i++) out->steps[i] += p->steps[i];
    for (size_t i = 0; i < sizeof p->batch_rows / sizeof *p->batch_rows; i++) out->batch_rows[i] += p->batch_rows[i];
    for (const struct served *s = d->served; s; s = s->next) {
        out->jobs += s->published.jobs + s->pending.jobs;
        out->queued_images += s->published.queued_images + s->pending.queued_images;
        out->running_images += s->published.running_images;
        out->running_rows += s->published.running_rows;
    }
}

void engine_stats(struct engine *g, struct engine_stats *out) {
    *out = (struct engine_stats){.max_rows = g->limits.max_rows};
    pthread_mutex_lock(&g->lock);
    for (int i = 0; i < g->n_devices; i++) add_stats(out, &g->devices[i]);
    for (const struct entry *entry = g->entries; entry; entry = entry->next) {
        out->models_ready += entry->current != NULL;
        out->models_loading += entry->state == ENTRY_LOADING || entry->state == ENTRY_ADDED;
        out->models_failed += entry->state == ENTRY_FAILED;
    }
    pthread_mutex_unlock(&g->lock);
}

bool engine_ready(struct engine *g) {
    int ready = 0, loading = 0;
    bool ok = false;
    pthread_mutex_lock(&g->lock);
    for (const struct entry *entry = g->entries; entry; entry = entry->next) {
        ready += entry->current != NULL;
        loading += entry->state == ENTRY_LOADING; // not what came later
    }
    for (int i = 0; i < g->n_devices; i++) ok |= g->devices[i].published.device_ok;
    ok = ok && g->stop == STOP_NOT;
    pthread_mutex_unlock(&g->lock);
    return ok && ready && !loading;
}
