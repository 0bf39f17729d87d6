// SPDX-License-Identifier: MIT
/*
 * sitd sample: images without a server.
 *
 * The flags become the body of a POST /v1/samples, which goes through the same codec and the same engine as in the daemon: one set of names,
 * defaults, ranges and messages, and the same bytes for the same request.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/png.h"
#include "server/bar.h"
#include "server/cache.h"
#include "server/cmd.h"
#include "server/cmd_sample.h"


/* ---- running it ---- */

struct run { // shared with the engine's threads
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool loaded, ended;
    struct err err;
    struct engine_image *images; // [n], by index
    int n, done;
    double progress;
};

static void on_event(void *ctx, const struct engine_event *ev) {
    struct run *run = ctx;
    pthread_mutex_lock(&run->lock);
    switch (ev->kind) {
    case EV_MODEL: run->loaded = true, run->err = ev->err; break;
    case EV_PROGRESS: run->progress = ev->progress; break;
    case EV_IMAGE: run->images[ev->image.index] = ev->image, run->done++; break;
    case EV_DONE: run->ended = true; break;
    case EV_FAILED:
    case EV_CANCELLED: run->ended = true, run->err = ev->err; break;
    case EV_STARTED: break;
    }
    pthread_cond_signal(&run->changed);
    pthread_mutex_unlock(&run->lock);
}

void sample_bar(double part, double before, long long done, long long n, double seconds) {
    char text[64];
    double rate = (part - before) / seconds;
    snprintf(text, sizeof text, "%lld/%lld images", done, n);
    bar_draw(part, text, seconds > 0.5 && rate > 0 ? (1 - part) / rate : -1);
}

static int wait_for(struct run *run, bool *flag, bool bar) {
    double start = clock_seconds();
    pthread_mutex_lock(&run->lock);
    while (!*flag) {
        pthread_cond_wait(&run->changed, &run->lock);
        if (bar) sample_bar(run->progress, 0, run->done, run->n, clock_seconds() - start);
    }
    pthread_mutex_unlock(&run->lock);
    if (bar) fprintf(stderr, "\n");
    return run->err.status;
}

/* ---- writing ---- */

static int write_png(const char *path, const uint8_t *pixels, int w, int h, int channels, const char *request) {
    uint8_t *png;
    size_t size;
    struct err e = {0};
    struct png_text text = {"sitd-request", request};
    int rc = png_encode(&png, &size, pixels, w, h, channels, 6, &text, request ? 1 : 0, &e);
    if (rc == OK) {
        rc = file_write(path, png, size, &e);
        mem_free(png);
    }
    if (rc != OK) fprintf(stderr, "sitd sample: %s\n", e.text);
    return rc == OK ? 0 : status_exit_code(rc);
}

static int write_grid(const struct sample_options *o, const struct run *run) {
    const struct engine_image *first = &run->images[0];
    int columns = o->columns ? o->columns : 10, gap = 2;
    if (columns > run->n) columns = run->n;
    int rows = (run->n + columns - 1) / columns, ch = first->channels, w = columns * (first->width + gap) + gap, h = rows * (first->height + gap) + gap;
    if (run->n == 1) gap = 0, w = first->width, h = first->height;
    uint8_t *grid = mem_array((size_t)w * (size_t)h, (size_t)ch);
    if (!grid) return fprintf(stderr, "sitd sample: no memory for a grid of %d x %d\n", w, h), 1;
    for (int i = 0; i < run->n; i++) {
        int x = gap + i % columns * (first->width + gap), y = gap + i / columns * (first->height + gap), line = first->width * ch;
        for (int j = 0; j < first->height; j++)
            memcpy(grid + ((size_t)(y + j) * (size_t)w + (size_t)x) * (size_t)ch, run->images[i].pixels + (size_t)(j * line), (size_t)line);
    }
    int rc = write_png(o->out, grid, w, h, ch, NULL);
    mem_free(grid);
    return rc;
}

static int write_all(const struct sample_options *o, const struct run *run, const struct resolved *resolved, const struct engine_model *model) {
    if (!strchr(o->out, '%')) return write_grid(o, run);
    int rc = 0, before = (int)(strchr(o->out, '%') - o->out);
    for (int i = 0; i < run->n && rc == 0; i++) {
        char path[4096];
        char *request = request_normalised(resolved, model, i);
        snprintf(path, sizeof path, "%.*s%d%s", before, o->out, i, o->out + before + 2);
        const struct engine_image *im = &run->images[i];
        rc = request ? write_png(path, im->pixels, im->width, im->height, im->channels, request) : 1;
        mem_free(request);
    }
    return rc;
}

// Before the work rather than after it: can a file be made there?
static int check_out(const char *path) {
    struct file_out out;
    struct err e = {0};
    if (file_out_open(&out, path, &e)) return fprintf(stderr, "sitd sample: %s\n", e.text), status_exit_code(e.status);
    file_out_abort(&out);
    return 0;
}

static int sample(struct sample_options *o, struct engine *engine, struct run *run) {
    const struct engine_model *model = engine_model_ref(engine, NULL);
    struct resolved resolved = {0};
    struct err e = {0};
    uint64_t id;
    int64_t retry_ms;
    int rc = sample_request(&resolved, o, model);
    if (rc == 0) {
        run->n = resolved.job.n;
        run->images = mem_array((size_t)run->n, sizeof *run->images);
        resolved.job.progress = true;
        if (!run->images || engine_submit(engine, &resolved.job, &id, &retry_ms, &e)) rc = 1;
        else if (wait_for(run, &run->ended, isatty(STDERR_FILENO))) rc = status_exit_code(run->err.status), e = run->err;
        if (rc) fprintf(stderr, "sitd sample: %s\n", run->images ? e.text : "no memory");
    }
    if (rc == 0) rc = write_all(o, run, &resolved, model);
    if (rc == 0) {
        for (int i = 0; i < resolved.n_notes; i++) fprintf(stderr, "note: %s\n", resolved.notes[i]);
        printf("%s: %d image%s, seed %llu\n", o->out, run->n, run->n == 1 ? "" : "s", (unsigned long long)resolved.job.seed);
    }
    for (int i = 0; run->images && i < run->n; i++) mem_free(run->images[i].pixels);
    mem_free(run->images);
    resolved_deinit(&resolved);
    engine_model_unref(model);
    return rc;
}

int sample_open(struct engine **engine, const struct sample_options *o, int max_jobs, int max_images,
                void (*event)(void *, const struct engine_event *), void *ctx) {
    char cache[512];
    struct engine_options eo = {.models_dir = o->model, .cache = cache_folder("", cache, sizeof cache), .backend = o->backend, .precision = o->precision, .max_rows = o->max_rows, .threads = o->threads,
                                .max_jobs = max_jobs, .max_images = max_images, .event = event, .ctx = ctx};
    struct err e = {0};
    if (engine_open(engine, &eo, &e)) return fprintf(stderr, "sitd sample: %s\n", e.text), status_exit_code(e.status);
    return 0;
}

int cmd_sample(int argc, char **argv) {
    struct sample_options o = {.n = 1, .max_rows = 16, .backend = "cpu", .precision = "f32", .body = json_object(), .sampler = json_object()};
    struct run run = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    struct engine *engine;
    if (!o.body || json_object_set_new(o.body, "sampler", o.sampler)) return 1;
    int rc = sample_parse(&o, argc, argv);
    if (rc) return json_decref(o.body), rc - 1;
    if (o.npz) return rc = sample_export(&o), json_decref(o.body), rc;
    if ((rc = check_out(o.out)) != 0) return json_decref(o.body), rc;
    if ((rc = sample_open(&engine, &o, 1, REQUEST_MAX_IMAGES, on_event, &run)) != 0) return json_decref(o.body), rc;
    if (wait_for(&run, &run.loaded, false)) {
        fprintf(stderr, "sitd sample: %s\n", run.err.text);
        rc = status_exit_code(run.err.status);
    } else rc = sample(&o, engine, &run);
    engine_close(engine);
    json_decref(o.body);
    return rc;
}
