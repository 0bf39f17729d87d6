// SPDX-License-Identifier: MIT
/*
 * The loader: reads, checks and builds versions of models, and frees them, so that the worker never waits for a disk or a build.
 *
 * A version goes its whole way here, on a back end handle of its own: bytes hashed and held against model.json, tensors against
 * the architecture, network built, one trial evaluation. Only a version that has passed is handed to the worker, which puts it in
 * its place between two steps. One is in hand at a time, so no more than one checkpoint is in host memory.
 *
 * What is new is told by the SHA-256 of model.json alone: it is the file that a writer changes last. A failed attempt is
 * remembered by that digest and made again after a pause that doubles (the weights may still be on their way, memory may come
 * free); another digest is tried at once. A model.json that goes back to what is served ends the attempts.
 */
#include "core/engine/engine_int.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"

#define RETRY_MS 1000
#define RETRY_DOUBLINGS 8 // up to 256 times the first pause

/* ---- one attempt ---- */

static int open_vae(struct source *from, const char *dir, struct err *e) {
    const struct latent *l = &from->dir.desc.latent;
    if (!l->vae_file[0]) return OK;
    char *path = mem_printf("%s/%s", dir, l->vae_file);
    int rc = path ? vae_file_open(&from->vae, path, l->vae_sha256, e) : err_set(e, E_NOMEM, "no memory for a path");
    from->has_vae = rc == OK;
    mem_free(path);
    return rc;
}

// To the worker of its device and back, when it has taken or refused the version. E_DEVICE, E_CANCELLED
static int hand_over(struct engine *g, struct served *s) {
    struct load load = {.served = s, .status = E_CANCELLED};
    pthread_mutex_lock(&g->lock);
    if (g->stop < STOP_CANCEL) {
        s->device->load = &load;
        pthread_cond_signal(&s->device->bell);
        while (s->device->load) pthread_cond_wait(&g->built, &g->lock);
    }
    pthread_mutex_unlock(&g->lock);
    return load.status;
}

// Is there room for another version beside what serves? Asked before the first byte is read: who overdraws host memory is not
// refused but killed. What is loaded at the start is not asked: it has nothing to lose.
static int check_room(const struct engine *g, const struct entry *entry, struct source *from, struct err *e) {
    struct model_desc d;
    struct stat st = {0};
    if (entry->state == ENTRY_LOADING || model_dir_desc(&d, from->dir.digest, entry->dir, NULL))
        return OK; // model_dir_begin says what is wrong
    char *path = mem_printf("%s/%s", entry->dir, d.weights_file);
    if (path && stat(path, &st)) st.st_size = 0;
    mem_free(path);
    from->bytes = served_estimate(&d, &g->limits);
    if (from->before && from->before->device_bytes > from->bytes) from->bytes = from->before->device_bytes;
    model_desc_deinit(&d);
    return served_room(NULL, (size_t)st.st_size + (g->on_host ? (size_t)g->n_devices * from->bytes : 0), e);
}

static bool device_ok(struct engine *g, int i) {
    pthread_mutex_lock(&g->lock);
    bool ok = g->devices[i].published.device_ok;
    pthread_mutex_unlock(&g->lock);
    return ok;
}

// Builds the version on every device that works. The first failure ends it, unless the device failed meanwhile.
static int build(struct engine *g, struct served **on, struct facts *facts, const struct source *from, struct err *e) {
    int n = 0;
    for (int i = 0; i < g->n_devices; i++) {
        struct err here = {0};
        if (!device_ok(g, i)) continue;
        int rc = served_new(&on[i], &g->devices[i], facts, from, &here);
        if (rc && g->n_devices > 1) err_prefix(&here, "%s", g->devices[i].name);
        if (rc && device_ok(g, i)) return *e = here, rc;
        n += !rc;
    }
    return n ? OK : err_set(e, E_DEVICE, "the device has failed");
}

// Hands the version to the devices' workers, then gives it to new jobs. What no worker took stays in `on`.
static int install(struct engine *g, struct entry *entry, struct served **on, struct facts *facts, struct err *e) {
    int taken = 0, rc = OK;
    for (int i = 0; i < g->n_devices && rc != E_CANCELLED; i++) {
        if (!on[i]) continue;
        rc = hand_over(g, on[i]);
        if (!rc) on[i] = NULL, taken++;
    }
    pthread_mutex_lock(&g->lock);
    if (rc != E_CANCELLED && taken) {
        engine_retire(g, entry->current);
        atomic_fetch_add(&facts->refs, 1);
        entry->current = facts;
        entry->state = ENTRY_READY;
    }
    pthread_mutex_unlock(&g->lock);
    if (rc == E_CANCELLED) return err_set(e, rc, "the engine is stopping");
    return taken ? OK : err_set(e, E_DEVICE, "the device has failed");
}

// How long each part of a load takes, for whoever wonders
static void told(const struct entry *entry, const char *part, int64_t *since) {
    int64_t now = engine_now_us();
    log_debug("load", log_str("model", entry->name), log_str("part", part), log_int("ms", (now - *since) / 1000));
    *since = now;
}

static int put_on_devices(struct engine *g, struct entry *entry, struct source *from, struct err *e) {
    struct served **on = mem_array((size_t)g->n_devices, sizeof(struct served *));
    struct facts *facts = NULL;
    int rc = on ? facts_new(&facts, from, e) : err_set(e, E_NOMEM, "no memory for a model");
    int64_t since = engine_now_us();
    if (!rc) rc = build(g, on, facts, from, e);
    if (!rc) told(entry, "built and tried", &since);
    if (!rc) rc = model_dir_verify(&from->dir, e);
    if (!rc) told(entry, "weights hashed", &since);
    if (!rc) facts_take(facts, from);
    if (!rc) rc = install(g, entry, on, facts, e);
    for (int i = 0; on && i < g->n_devices; i++) served_free(on[i]);
    facts_unref(facts);
    mem_free(on);
    return rc;
}

// What broken bytes led to is told as what it is.
static int blame_digest(const struct model_dir *dir, int rc, struct err *e) {
    struct err digest = {0};
    return model_dir_verify(dir, &digest) == E_CONFLICT ? *e = digest, E_CONFLICT : rc;
}

// digest: of the model.json that was tried.
static int load_version(struct engine *g, struct entry *entry, char digest[DIGEST_HEX], struct err *e) {
    int64_t since = engine_now_us();
    struct source from = {.name = entry->name, .before = entry->current ? &entry->current->model : NULL};
    struct sampler_model sampler;
    int rc = check_room(g, entry, &from, e); // sets the digest too
    if (!rc) rc = model_dir_begin(&from.dir, entry->dir, e);
    strcpy(digest, from.dir.digest);
    if (rc) return err_set(e, rc, "it could not be opened");
    told(entry, "weights read", &since);
    rc = open_vae(&from, entry->dir, e);
    if (!rc) told(entry, "VAE read and hashed", &since);
    if (!rc)
        rc = served_check(&from.dir.desc, from.has_vae ? &from.vae.arch : NULL, &sampler, e); // before the device is troubled
    if (!rc) rc = put_on_devices(g, entry, &from, e);
    if (rc && rc != E_CANCELLED) rc = blame_digest(&from.dir, rc, e);
    vae_file_close(&from.vae);
    model_dir_close(&from.dir);
    return rc;
}

static void settle(struct engine *g, struct entry *entry, const char *reason) {
    pthread_mutex_lock(&g->lock);
    if (*reason && !entry->current) entry->state = ENTRY_FAILED;
    snprintf(entry->reason, sizeof entry->reason, "%s", reason);
    pthread_mutex_unlock(&g->lock);
    if (*reason) return;
    entry->failures = 0;
    entry->retry_us = 0;
}

static void plan_retry(struct engine *g, struct entry *entry, const char *digest) {
    if (strcmp(entry->tried, digest) != 0) entry->failures = 0;
    strcpy(entry->tried, digest);
    int doublings = entry->failures < RETRY_DOUBLINGS ? entry->failures : RETRY_DOUBLINGS;
    int64_t first = g->options.retry_ms ? g->options.retry_ms : RETRY_MS;
    entry->failures++;
    entry->retry_us = engine_now_us() + (first << doublings) * 1000;
}

static void report(struct engine *g, const struct entry *entry, const struct err *err) {
    struct engine_event ev = {.kind = EV_MODEL, .err = *err};
    snprintf(ev.model, sizeof ev.model, "%s", entry->name);
    if (err->status)
        log_error("model not loaded", log_str("model", entry->name), log_str("error", err->text), log_str("param", err->param),
                  log_int("failures", entry->failures), log_int("retry_ms", (entry->retry_us - engine_now_us()) / 1000));
    else {
        const struct engine_model *m = &entry->current->model;
        log_info("model loaded", log_str("model", entry->name), log_int("version", m->desc.step), log_str("digest", m->digest));
    }
    engine_emit(g, &ev);
}

static void free_dropped(struct engine *g) {
    pthread_mutex_lock(&g->lock);
    struct served *dropped = g->dropped;
    g->dropped = NULL;
    pthread_mutex_unlock(&g->lock);
    for (struct served *next; dropped; dropped = next) {
        next = dropped->next;
        served_free(dropped);
    }
}

static void attempt(struct engine *g, struct entry *entry) {
    char digest[DIGEST_HEX];
    struct err err = {0};
    free_dropped(g); // makes room
    int rc = load_version(g, entry, digest, &err);
    if (rc == E_CANCELLED) return;
    if (rc) {
        err_prefix(&err, "model '%s'", entry->name);
        plan_retry(g, entry, digest);
    }
    settle(g, entry, err.text);
    report(g, entry, &err);
}

/* ---- when ---- */

static bool take_asked(struct engine *g, struct entry *entry) {
    pthread_mutex_lock(&g->lock);
    bool asked = entry->asked;
    entry->asked = false;
    pthread_mutex_unlock(&g->lock);
    return asked;
}

static void look(struct engine *g, struct entry *entry) {
    char digest[DIGEST_HEX];
    struct model_desc desc;
    bool asked = take_asked(g, entry);
    int rc = model_dir_desc(&desc, digest, entry->dir, NULL);
    if (!rc) model_desc_deinit(&desc);
    if (rc == E_NOTFOUND) return; // being replaced, or gone: repository_scan sees to that
    if (entry->current && strcmp(digest, entry->current->model.digest) == 0) settle(g, entry, "");
    else if (asked || !entry->failures || strcmp(digest, entry->tried) != 0 || entry->retry_us <= engine_now_us())
        attempt(g, entry);
}

static int64_t earliest(int64_t a, int64_t b) { return !a || (b && b < a) ? b : a; } // 0: never

// Sleeps until there is something to look at; false: the engine stops.
static bool wait_for_work(struct engine *g) {
    int64_t due = 0;
    for (const struct entry *entry = g->entries; entry; entry = entry->next)
        due = earliest(due, earliest(entry->retry_us, entry->gone_us));
    struct timespec until = {.tv_sec = due / 1000000, .tv_nsec = due % 1000000 * 1000};
    for (;;) {
        free_dropped(g);
        pthread_mutex_lock(&g->lock);
        int rc = 0;
        while (g->stop == STOP_NOT && !g->scan && !g->dropped && rc != ETIMEDOUT)
            rc = due ? pthread_cond_timedwait(&g->built, &g->lock, &until) : pthread_cond_wait(&g->built, &g->lock);
        bool stop = g->stop != STOP_NOT, work = g->scan || rc == ETIMEDOUT;
        if (work) g->scan = false;
        pthread_mutex_unlock(&g->lock);
        if (stop || work) return !stop;
    }
}

static bool stopping(struct engine *g) {
    pthread_mutex_lock(&g->lock);
    bool stop = g->stop != STOP_NOT;
    pthread_mutex_unlock(&g->lock);
    return stop;
}

void *loader_main(void *arg) {
    struct engine *g = arg;
    if (g->options.nice && nice(g->options.nice) == -1) log_warn("loader keeps its priority", log_int("nice", g->options.nice));
    for (struct entry *entry = g->entries; entry && !stopping(g); entry = entry->next) attempt(g, entry);
    while (wait_for_work(g)) {
        repository_scan(g);
        for (struct entry *entry = g->entries; entry && !stopping(g); entry = entry->next) look(g, entry);
    }
    return NULL;
}
