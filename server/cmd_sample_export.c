// SPDX-License-Identifier: MIT
/*
 * sitd sample --npz: as many images as an evaluation wants, into one numpy archive.
 *
 * Image i is a function of the request and i alone: its noise is stream (seed, seed_index + i), its label a draw from the same seed at the same
 * index or i modulo the classes. So it does not matter in how many runs the file is made, nor how the images are cut into jobs.
 *
 * Images become ready out of order, the file grows in order. A window of WINDOW jobs of half a batch each is in the engine at any time: enough
 * to keep every row busy while the oldest image is awaited, and all the memory that is needed, however many images there are.
 */
#include "server/cmd_sample.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/io/npz.h"
#include "kernels/philox.h"
#include "server/cmd.h"

#define WINDOW 6
#define SYNC_SECONDS 1.0  // how much work a kill may cost
#define BAR_SECONDS 0.1
#define LABEL_DRAW 0x4c41424cu // fourth counter word; noise has 0 there

struct part { // a job in the engine
    uint64_t id; // 0: none
    uint64_t first;
    int n;
    double progress;
};
struct export {
    pthread_mutex_t lock; // of what the engine's threads touch: all down to ended
    pthread_cond_t changed;
    bool loaded;
    struct err err;
    struct part parts[WINDOW];
    uint8_t **ring;       // [ring_n]: pixels of image i at i % ring_n, NULL: not ready
    int ring_n, channels;
    uint64_t ended;       // images of parts that are through
    // main thread only
    struct engine *engine;
    struct engine_job job; // what all parts share
    struct npz_out npz;
    bool balanced, bar;
    int classes, chunk;
    uint64_t submitted;    // images, those of earlier runs too
    uint64_t before;       // images of earlier runs
    double start, synced, drawn;
};

/* ---- events ---- */

static struct part *find_part(struct export *x, uint64_t id) {
    for (int i = 0; i < WINDOW; i++)
        if (x->parts[i].id == id) return &x->parts[i];
    return NULL;
}

static void on_event(void *ctx, const struct engine_event *ev) {
    struct export *x = ctx;
    pthread_mutex_lock(&x->lock); // engine_submit is called under it, so the part is known
    struct part *part = ev->kind == EV_MODEL ? NULL : find_part(x, ev->job);
    switch (ev->kind) {
    case EV_MODEL: x->loaded = true, x->err = ev->err; break;
    case EV_STARTED: break;
    case EV_PROGRESS: part->progress = ev->progress; break;
    case EV_IMAGE:
        x->channels = ev->image.channels;
        x->ring[(part->first + (uint64_t)ev->image.index) % (uint64_t)x->ring_n] = ev->image.pixels;
        break;
    case EV_DONE: x->ended += (uint64_t)part->n, *part = (struct part){0}; break;
    case EV_FAILED:
    case EV_CANCELLED:
        *part = (struct part){0};
        if (x->err.status == OK) x->err = ev->err;
        break;
    }
    pthread_cond_signal(&x->changed);
    pthread_mutex_unlock(&x->lock);
}

/* ---- in ---- */

static int32_t label(const struct export *x, uint64_t i) {
    if (x->balanced) return (int32_t)(i % (uint64_t)x->classes);
    uint32_t counter[4] = {0, 0, x->job.seed_index + (uint32_t)i, LABEL_DRAW};
    philox_rounds(counter, (uint32_t)x->job.seed, (uint32_t)(x->job.seed >> 32));
    return (int32_t)((uint64_t)counter[0] * (uint64_t)x->classes >> 32);
}

static int submit(struct export *x, struct part *part, struct err *e) { // lock held
    uint64_t left = x->npz.n - x->submitted;
    int n = left < (uint64_t)x->chunk ? (int)left : x->chunk;
    int32_t *labels = mem_array((size_t)n, sizeof *labels);
    struct engine_job job = x->job;
    if (!labels) return err_set(e, E_NOMEM, "no memory for a job");
    for (int i = 0; i < n; i++) labels[i] = label(x, x->submitted + (uint64_t)i);
    job.n = n;
    job.classes = labels;
    job.seed_index += (uint32_t)x->submitted;
    job.progress = x->bar;
    *part = (struct part){.first = x->submitted, .n = n};
    int rc = engine_submit(x->engine, &job, &part->id, NULL, e);
    if (rc == OK) x->submitted += (uint64_t)n;
    mem_free(labels);
    return rc;
}

static int fill(struct export *x, struct err *e) { // lock held
    int rc = OK;
    for (struct part *part; rc == OK && x->submitted < x->npz.n && (part = find_part(x, 0));) {
        if (x->submitted + (uint64_t)x->chunk - x->npz.done > (uint64_t)x->ring_n) break; // places in the ring
        rc = submit(x, part, e);
    }
    return rc;
}

/* ---- out ---- */

static void draw(struct export *x) { // lock held
    double now = clock_seconds(), n = (double)x->npz.n, made = (double)(x->before + x->ended);
    if (!x->bar || (now - x->drawn < BAR_SECONDS && x->npz.done < x->npz.n)) return;
    for (int i = 0; i < WINDOW; i++) made += x->parts[i].progress * x->parts[i].n;
    x->drawn = now;
    sample_bar(made < n ? made / n : 1, (double)x->before / n, (long long)x->npz.done, (long long)x->npz.n, now - x->start);
}

// Waits for the next image in line; NULL: something failed
static uint8_t *next_image(struct export *x, int *channels, struct err *e) {
    uint8_t **place = &x->ring[x->npz.done % (uint64_t)x->ring_n], *pixels;
    pthread_mutex_lock(&x->lock);
    int rc = fill(x, e);
    while (rc == OK && !*place && x->err.status == OK) {
        draw(x);
        pthread_cond_wait(&x->changed, &x->lock);
        rc = fill(x, e);
    }
    if (rc == OK && !*place) *e = x->err;
    pixels = e->status == OK ? *place : NULL;
    if (pixels) *place = NULL;
    *channels = x->channels;
    pthread_mutex_unlock(&x->lock);
    return pixels;
}

static int write_images(struct export *x, struct err *e) {
    int rc = OK;
    x->start = x->synced = clock_seconds();
    while (rc == OK && x->npz.done < x->npz.n) {
        int channels;
        uint8_t *pixels = next_image(x, &channels, e);
        if (!pixels) break;
        rc = npz_add(&x->npz, pixels, 1, channels, e);
        mem_free(pixels);
        if (rc == OK && clock_seconds() - x->synced >= SYNC_SECONDS) {
            rc = npz_sync(&x->npz, e);
            x->synced = clock_seconds();
        }
    }
    pthread_mutex_lock(&x->lock);
    draw(x);
    pthread_mutex_unlock(&x->lock);
    if (x->bar) fprintf(stderr, "\n");
    if (e->status == OK) return npz_commit(&x->npz, e);
    npz_sync(&x->npz, NULL); // best effort: the cause is known already
    return e->status;
}

/* ---- all of it ---- */

static int open_file(struct export *x, const struct sample_options *o, const struct resolved *r, const struct engine_model *m, struct err *e) {
    char digest[DIGEST_HEX];
    char *one = request_normalised(r, m, 0);
    char *all = one ? mem_printf("%s\nlabels %s, back end %s, precision %s\n", one, x->balanced ? "balanced" : "random", o->backend, o->precision) : NULL;
    int rc = all ? digest_hex(digest, all, strlen(all)) : E_NOMEM;
    mem_free(one);
    mem_free(all);
    if (rc != OK) return err_set(e, rc, "no memory for the request");
    struct npz_spec spec = {.n = (uint64_t)o->num, .height = m->image_size, .width = m->image_size, .request = digest, .model = m->digest};
    return npz_open(&x->npz, o->npz, &spec, e);
}

static int run(struct export *x, const struct sample_options *o, const struct resolved *r, const struct engine_model *m, struct err *e) {
    x->job = r->job;
    x->classes = m->desc.arch.num_classes;
    x->balanced = o->labels && strcmp(o->labels, "balanced") == 0;
    x->chunk = o->max_rows / 2;
    x->ring_n = WINDOW * x->chunk;
    x->bar = isatty(STDERR_FILENO);
    if ((uint64_t)r->job.seed_index + (uint64_t)o->num - 1 > UINT32_MAX)
        return err_param(e, E_RANGE, "num", "seed_index %u + %lld images passes 2^32 - 1", (unsigned)r->job.seed_index, o->num);
    if (x->job.rng != RNG_NATIVE) {
        size_t numel = (size_t)m->desc.arch.in_channels * (size_t)m->desc.arch.input_size * (size_t)m->desc.arch.input_size;
        if (stream_check(&x->job.sampler, &m->sampler, numel, x->job.seed_index, (uint64_t)o->num, e)) return e->status;
    }
    x->ring = mem_array((size_t)x->ring_n, sizeof *x->ring);
    if (!x->ring) return err_set(e, E_NOMEM, "no memory for %d images", x->ring_n);
    if (open_file(x, o, r, m, e)) return e->status;
    x->before = x->submitted = x->npz.done;
    if (x->before) fprintf(stderr, "%s.part holds %llu of %lld images already\n", o->npz, (unsigned long long)x->before, o->num);
    int rc = write_images(x, e);
    if (rc != OK && x->npz.done) fprintf(stderr, "%llu images stay in %s.part; the same command continues there\n", (unsigned long long)x->npz.done, o->npz);
    return rc;
}

static int with_model(struct export *x, struct sample_options *o) {
    const struct engine_model *model = engine_model_ref(x->engine, NULL);
    struct resolved resolved = {0};
    struct err e = {0};
    int rc = sample_request(&resolved, o, model);
    if (rc == 0) {
        for (int i = 0; i < resolved.n_notes; i++) fprintf(stderr, "note: %s\n", resolved.notes[i]);
        rc = status_exit_code(run(x, o, &resolved, model, &e));
        if (e.status != OK) fprintf(stderr, "sitd sample: %s\n", e.text);
        else printf("%s: %lld images, seed %llu, %s labels\n", o->npz, o->num, (unsigned long long)resolved.job.seed, x->balanced ? "balanced" : "random");
    }
    resolved_deinit(&resolved);
    engine_model_unref(model);
    return rc;
}

int sample_export(struct sample_options *o) {
    struct export x = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER, .npz = {.fd = -1}};
    struct err e = {0};
    int rc = sample_open(&x.engine, o, WINDOW, WINDOW * (o->max_rows / 2), on_event, &x);
    if (rc) return rc;
    pthread_mutex_lock(&x.lock);
    while (!x.loaded) pthread_cond_wait(&x.changed, &x.lock);
    e = x.err;
    pthread_mutex_unlock(&x.lock);
    if (e.status != OK) fprintf(stderr, "sitd sample: %s\n", e.text);
    rc = e.status != OK ? status_exit_code(e.status) : with_model(&x, o);
    engine_close(x.engine); // no event after it: the rest is ours alone
    npz_close(&x.npz);
    for (int i = 0; x.ring && i < x.ring_n; i++) mem_free(x.ring[i]);
    mem_free(x.ring);
    return rc;
}
