// SPDX-License-Identifier: MIT
/*
 * sitd sample: images without a server.
 *
 * The flags become the body of a POST /v1/samples, which goes through the same codec and the same engine as in the daemon: one set of names,
 * defaults, ranges and messages, and the same bytes for the same request.
 */
#include <getopt.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/png.h"
#include "proto/request.h"
#include "server/cmd.h"

static const char help[] =
    "usage: sitd sample --model DIR [options] --out FILE.png\n\n"
    "Samples images without a server; one PNG, or a grid of several.\n\n"
    "  --model DIR            a model directory\n"
    "  --out FILE             a PNG of all images as a grid; with a %d in it, one file an image\n"
    "  --columns N            columns of the grid (default: 10 at most)\n"
    "  --classes LIST         labels or class numbers, separated by commas; 'null' is unconditional (default: each class once)\n"
    "  --n N                  so many of each class in turn (default 1)\n"
    "  --seed N               default: random, printed\n"
    "  --type ode|sde|ddpm|ddim|edm  --method NAME  --steps N  --interpolant linear|gvp|vp   (default: as the model's family is sampled)\n"
    "  --atol X  --rtol X  --max-evaluations N                                    ode, method dopri5\n"
    "  --w-t FORM|'[[T,W],...]'  --w-t-scale X  --w-t-eta X  --last-step NAME  --last-step-size X      sde\n"
    "  --spacing NAME  --clip true|false  --eta X                                 ddpm, ddim; ddim\n"
    "  --churn X  --s-min X  --s-max X  --s-noise X  --rho X  --sigma-min X  --sigma-max X             edm\n"
    "  --guidance X           guidance scale (default 1)\n"
    "  --request JSON         further fields, as in POST /v1/samples\n"
    "  --backend cpu|ref  --precision f32|bf16  --threads N  --max-rows N\n";

struct options {
    const char *model, *out, *classes, *request;
    int columns, n, max_rows, threads;
    const char *backend, *precision;
    json_t *body, *sampler; // sampler borrowed from body
};

static int usage(const char *what, const char *value) {
    fprintf(stderr, "sitd sample: %s%s\n`sitd sample --help` lists the options\n", what, value);
    return 2;
}

enum { O_MODEL = 256, O_OUT, O_COLUMNS, O_CLASSES, O_N, O_SEED, O_GUIDANCE, O_INTERPOLANT, O_REQUEST, O_BACKEND, O_PRECISION, O_THREADS,
       O_ROWS, O_HELP, O_SAMPLER }; // O_SAMPLER + i: sampler_fields[i]

static const struct { const char *flag, *field; enum { TEXT, WHOLE, REAL, JSON } type; } sampler_fields[] = {
    {"type", "type", TEXT},         {"method", "method", TEXT},       {"steps", "steps", WHOLE},
    {"w-t", "w_t", JSON},           {"w-t-scale", "w_t_scale", REAL}, {"last-step", "last_step", TEXT},
    {"last-step-size", "last_step_size", REAL}, {"atol", "atol", REAL}, {"rtol", "rtol", REAL},
    {"max-evaluations", "max_evaluations", WHOLE}, {"w-t-eta", "w_t_eta", REAL}, {"spacing", "spacing", TEXT}, {"eta", "eta", REAL},
    {"clip", "clip", JSON}, {"churn", "churn", REAL}, {"s-min", "s_min", REAL}, {"s-max", "s_max", REAL}, {"s-noise", "s_noise", REAL},
    {"rho", "rho", REAL}, {"sigma-min", "sigma_min", REAL}, {"sigma-max", "sigma_max", REAL},
};
#define SAMPLER_FIELDS (sizeof sampler_fields / sizeof *sampler_fields)

static bool whole(const char *text, long long least, long long most, long long *out) {
    char *end;
    *out = strtoll(text, &end, 10);
    return *text && !*end && *out >= least && *out <= most;
}

// A number as JSON: whole where it is written so, since the codec tells 50 from 50.0. NULL if it is no number.
static json_t *number(const char *text) {
    char *end;
    long long i = strtoll(text, &end, 10);
    if (*text && !*end) return json_integer(i);
    double d = strtod(text, &end);
    return *text && !*end ? json_real(d) : NULL;
}

// A list, true or false as they are; any other text is a name, for the codec to judge.
static json_t *name_or_json(const char *text) {
    json_t *v = json_loads(text, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, NULL);
    if (json_is_array(v) || json_is_boolean(v)) return v;
    json_decref(v);
    return json_string(text);
}

static int sampler_flag(struct options *o, int i, const char *value) {
    int type = sampler_fields[i].type;
    json_t *v = type == TEXT ? json_string(value) : type == JSON ? name_or_json(value) : number(value);
    char flag[64];
    snprintf(flag, sizeof flag, "--%s wants a number, not ", sampler_fields[i].flag);
    return v ? json_object_set_new(o->sampler, sampler_fields[i].field, v) : usage(flag, value);
}

static int option(struct options *o, int c) {
    long long v;
    json_t *j;
    switch (c) {
    case O_MODEL: o->model = optarg; return 0;
    case O_OUT: o->out = optarg; return 0;
    case O_CLASSES: o->classes = optarg; return 0;
    case O_REQUEST: o->request = optarg; return 0;
    case O_BACKEND: o->backend = optarg; return 0;
    case O_PRECISION: o->precision = optarg; return 0;
    case O_INTERPOLANT: return json_object_set_new(o->body, "interpolant", json_string(optarg));
    case O_SEED: return json_object_set_new(o->body, "seed", json_string(optarg));
    case O_GUIDANCE:
        j = number(optarg);
        return j ? json_object_set_new(o->body, "guidance", json_pack("{s:o}", "scale", j)) : usage("--guidance wants a number, not ", optarg);
    case O_COLUMNS: return whole(optarg, 1, 1024, &v) ? o->columns = (int)v, 0 : usage("--columns wants 1..1024, not ", optarg);
    case O_N: return whole(optarg, 1, 1024, &v) ? o->n = (int)v, 0 : usage("--n wants 1..1024, not ", optarg);
    case O_THREADS: return whole(optarg, 1, 4096, &v) ? o->threads = (int)v, 0 : usage("--threads wants 1..4096, not ", optarg);
    case O_ROWS: return whole(optarg, 2, 4096, &v) ? o->max_rows = (int)v, 0 : usage("--max-rows wants 2..4096, not ", optarg);
    default: return c >= O_SAMPLER && c < O_SAMPLER + (int)SAMPLER_FIELDS ? sampler_flag(o, c - O_SAMPLER, optarg) : usage("see the options", "");
    }
}

// 0, or the exit status + 1
static int parse(struct options *o, int argc, char **argv) {
    struct option longs[SAMPLER_FIELDS + 15] = {
        {"model", 1, 0, O_MODEL}, {"out", 1, 0, O_OUT}, {"columns", 1, 0, O_COLUMNS}, {"classes", 1, 0, O_CLASSES}, {"n", 1, 0, O_N},
        {"seed", 1, 0, O_SEED}, {"guidance", 1, 0, O_GUIDANCE}, {"interpolant", 1, 0, O_INTERPOLANT}, {"request", 1, 0, O_REQUEST},
        {"backend", 1, 0, O_BACKEND}, {"precision", 1, 0, O_PRECISION}, {"threads", 1, 0, O_THREADS}, {"max-rows", 1, 0, O_ROWS}, {"help", 0, 0, O_HELP}};
    for (size_t i = 0; i < SAMPLER_FIELDS; i++) longs[14 + i] = (struct option){sampler_fields[i].flag, 1, 0, O_SAMPLER + (int)i};
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        if (c == O_HELP) return fputs(help, stdout), 1;
        if (option(o, c)) return 1 + 2;
    }
    if (optind < argc) return 1 + usage("not an option: ", argv[optind]);
    if (!o->model) return 1 + usage("--model is missing", "");
    if (!o->out) return 1 + usage("--out is missing", "");
    const char *percent = strchr(o->out, '%');
    if (percent && (strncmp(percent, "%d", 2) || strchr(percent + 1, '%'))) return 1 + usage("--out may hold one %d and no other %, it is ", o->out);
    return 0;
}

/* ---- the request ---- */

static int add_class(json_t *classes, const char *name, size_t length, int n) {
    char text[256];
    long long id;
    snprintf(text, sizeof text, "%.*s", (int)length, name);
    for (int i = 0; i < n; i++)
        if (json_array_append_new(classes, !strcmp(text, "null") ? json_null() : whole(text, 0, 1 << 30, &id) ? json_integer(id) : json_string(text))) return -1;
    return 0;
}

// The "classes" of the request: each one of the list (or of the model), n times.
static json_t *class_list(const struct options *o, const struct engine_model *model) {
    json_t *classes = json_array();
    int rc = classes ? 0 : -1;
    char id[24];
    if (!o->classes)
        for (int i = 0; i < model->desc.arch.num_classes && i < 100 && rc == 0; i++)
            rc = add_class(classes, id, (size_t)snprintf(id, sizeof id, "%d", i), o->n);
    for (const char *s = o->classes; s && rc == 0;) {
        size_t length = strcspn(s, ",");
        rc = add_class(classes, s, length, o->n);
        s = s[length] ? s + length + 1 : NULL;
    }
    if (rc == 0) return classes;
    json_decref(classes);
    return NULL;
}

static int make_request(struct resolved *out, struct options *o, const struct engine_model *model) {
    uint64_t random;
    struct http_error he;
    struct request *request = NULL;
    char *text = NULL;
    if (getrandom(&random, sizeof random, 0) != sizeof random) return fprintf(stderr, "sitd sample: no random seed to be had\n"), 1;
    if (json_object_size(o->sampler) == 0) json_object_del(o->body, "sampler");
    json_error_t je;
    json_t *more = o->request ? json_loads(o->request, JSON_REJECT_DUPLICATES, &je) : NULL;
    if (o->request && !json_is_object(more)) return json_decref(more), usage("--request wants a JSON object, not ", o->request);
    if (more) json_object_update(o->body, more);
    json_decref(more);
    if (!json_object_get(o->body, "classes") && !json_object_get(o->body, "class"))
        json_object_set_new(o->body, "classes", class_list(o, model));
    text = json_dumps(o->body, JSON_COMPACT);
    int rc = text ? request_parse(&request, text, strlen(text), &he) : http_error_set(&he, 500, "no_memory", "", "no memory");
    if (rc == 0) rc = request_resolve(out, request, model, random >> 11, &he);
    if (rc) fprintf(stderr, "sitd sample: %s\n", he.message);
    request_free(request);
    free(text);
    return rc ? 2 : 0;
}

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

static double now(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static void draw_bar(const struct run *run, double seconds) {
    int filled = (int)(run->progress * 40);
    fprintf(stderr, "\r[%-40.*s] %3.0f %%  %d/%d images  ", filled, "########################################", 100 * run->progress, run->done, run->n);
    if (run->progress > 0.01) fprintf(stderr, "%.0f s left ", seconds * (1 / run->progress - 1));
}

static int wait_for(struct run *run, bool *flag, bool bar) {
    double start = now();
    pthread_mutex_lock(&run->lock);
    while (!*flag) {
        pthread_cond_wait(&run->changed, &run->lock);
        if (bar) draw_bar(run, now() - start);
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

static int write_grid(const struct options *o, const struct run *run) {
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

static int write_all(const struct options *o, const struct run *run, const struct resolved *resolved, const struct engine_model *model) {
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

static int sample(struct options *o, struct engine *engine, struct run *run) {
    const struct engine_model *model = engine_model_ref(engine, NULL);
    struct resolved resolved = {0};
    struct err e = {0};
    uint64_t id;
    int64_t retry_ms;
    int rc = make_request(&resolved, o, model);
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

int cmd_sample(int argc, char **argv) {
    struct options o = {.n = 1, .max_rows = 16, .backend = "cpu", .precision = "f32", .body = json_object(), .sampler = json_object()};
    struct run run = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    struct engine *engine;
    struct err e = {0};
    if (!o.body || json_object_set_new(o.body, "sampler", o.sampler)) return 1;
    int rc = parse(&o, argc, argv);
    if (rc) return json_decref(o.body), rc - 1;
    struct engine_options eo = {.models_dir = o.model, .backend = o.backend, .precision = o.precision, .max_rows = o.max_rows, .threads = o.threads,
                                .max_jobs = 1, .max_images = REQUEST_MAX_IMAGES, .event = on_event, .ctx = &run};
    if (engine_open(&engine, &eo, &e)) {
        fprintf(stderr, "sitd sample: %s\n", e.text);
        json_decref(o.body);
        return status_exit_code(e.status);
    }
    if (wait_for(&run, &run.loaded, false)) {
        fprintf(stderr, "sitd sample: %s\n", run.err.text);
        rc = status_exit_code(run.err.status);
    } else rc = sample(&o, engine, &run);
    engine_close(engine);
    json_decref(o.body);
    return rc;
}
