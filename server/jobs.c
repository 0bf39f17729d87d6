// SPDX-License-Identifier: MIT
/*
 * A job's life on the loop: submitted -> its images come and go to the pool for encoding -> the engine is done and every image
 * encoded -> (JSON, parts) the answer's text is put together on the pool, as a thousand images of base64 are tens of megabytes ->
 * answered and forgotten. At any point it may end early; then the table forgets it and whatever still comes for its id is
 * dropped.
 */
#include "server/jobs.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "core/base/log.h"
#include "core/base/mem.h"

struct job {
    struct job *next;
    uint64_t id;
    struct exchange *ex;
    struct resolved resolved;         // moved into the assembly at the end
    const struct engine_model *model; // likewise
    enum answer_format format;
    int images, encoded, came; // asked for, encoded, out of the engine
    struct shot *shots;        // [images]
    bool started, executed;    // EV_STARTED, EV_DONE
    int64_t deadline_ms, executed_us;
    struct answer answer;
};

// ---- The table

static struct job **place(struct server *s, uint64_t id) {
    struct job **p = &s->jobs[id % JOB_BUCKETS];
    while (*p && (*p)->id != id) p = &(*p)->next;
    return p;
}

// Forgets a job and frees what is still its own.
static void job_free(struct server *s, struct job *j) {
    *place(s, j->id) = j->next;
    s->n_jobs--;
    for (int i = 0; j->shots && i < j->images; i++) shot_deinit(&j->shots[i]);
    mem_free(j->shots);
    resolved_deinit(&j->resolved);
    if (j->model) engine_model_unref(j->model);
    mem_free(j);
}

// The job's exchange learns its times and lets go of the job; whoever calls answers it.
static struct exchange *release(struct job *j) {
    struct exchange *ex = j->ex;
    ex->job = 0;
    ex->queue_ms = j->answer.queue_ms;
    ex->denoise_ms = j->answer.denoise_ms;
    ex->decode_ms = j->answer.decode_ms;
    ex->encode_ms = j->answer.encode_ms;
    return ex;
}

// Ends a job without its images. enum outcome: what the missing images count as.
static void job_fail(struct server *s, struct job *j, const struct http_error *e, enum outcome outcome, int64_t retry_ms) {
    if (!j->executed) engine_cancel(s->engine, j->id); // after EV_FAILED the id is unknown there, which is allowed
    metrics_images(&s->metrics, j->ex->model, outcome, (uint64_t)(j->images - j->encoded));
    http_answer_error(release(j), e, retry_ms);
    job_free(s, j);
}

static void job_fail_internal(struct server *s, struct job *j, const struct err *why) {
    struct http_error e;
    log_error("job failed", log_str("id", j->ex->id), log_str("status", status_name(why->status)), log_str("error", why->text));
    http_error_from(&e, why);
    job_fail(s, j, &e, e.status == 504 ? IMAGES_CANCELLED : IMAGES_FAILED, e.status == 503 ? 1000 : 0);
}

// ---- The answer

static void answer_headers(const struct job *j, const struct resolved *r, const struct engine_model *m,
                           struct MHD_Response *resp) {
    http_header(resp, "X-Seed", "%" PRIu64, r->job.seed);
    http_header(resp, "X-Model-Version", "%" PRId64, m->desc.step);
    http_header(resp, "X-Model-Digest", "%s", m->digest);
    http_header(resp, "Server-Timing", "queue;dur=%.3f, denoise;dur=%.3f, decode;dur=%.3f, encode;dur=%.3f", j->answer.queue_ms,
                j->answer.denoise_ms, j->answer.decode_ms, j->answer.encode_ms);
}

static void count_phases(struct server *s, const struct answer *a) {
    metrics_phase(&s->metrics, PHASE_QUEUE, a->queue_ms / 1000);
    metrics_phase(&s->metrics, PHASE_DENOISE, a->denoise_ms / 1000);
    metrics_phase(&s->metrics, PHASE_DECODE, a->decode_ms / 1000);
    metrics_phase(&s->metrics, PHASE_ENCODE, a->encode_ms / 1000);
}

// Takes the body.
static void succeed(struct server *s, struct job *j, const struct resolved *r, const struct engine_model *m, const char *type,
                    char *body, size_t n) {
    struct MHD_Response *resp = body ? http_response(body, n, type) : NULL;
    if (resp) answer_headers(j, r, m, resp);
    count_phases(s, &j->answer);
    struct exchange *ex = release(j);
    ex->bytes = n;
    http_answer(ex, 200, resp);
    job_free(s, j);
}

static void assemble(struct server *s, struct job *j) {
    struct assembly *a = mem_alloc(sizeof *a);
    if (a) {
        *a = (struct assembly){.server = s,
                               .job = j->id,
                               .format = j->format,
                               .answer = j->answer,
                               .executed_us = j->executed_us,
                               .resolved = j->resolved,
                               .model = j->model,
                               .shots = j->shots};
        snprintf(a->id, sizeof a->id, "%s", j->ex->id);
        j->resolved = (struct resolved){0};
        j->model = NULL;
        j->shots = NULL;
        if (!assembly_start(a)) return;
    }
    job_fail_internal(s, j, &(struct err){.status = E_NOMEM, .text = "no memory for the answer"});
}

static void finish_if_complete(struct server *s, struct job *j) {
    if (!j->executed || j->encoded < j->images) return;
    if (j->format != ANSWER_PNG) {
        assemble(s, j);
        return;
    }
    struct shot *shot = &j->shots[0];
    char *png = (char *)shot->png;
    shot->png = NULL;
    j->answer.encode_ms = (double)(now_us() - j->executed_us) / 1000;
    succeed(s, j, &j->resolved, j->model, "image/png", png, shot->png_size);
}

void jobs_assembled(struct server *s, struct assembly *a) {
    struct job *j = *place(s, a->job);
    if (!j) return;
    if (!a->text) {
        job_fail_internal(s, j, &(struct err){.status = E_NOMEM, .text = "no memory for the answer"});
        return;
    }
    char *text = a->text;
    a->text = NULL;
    j->answer.encode_ms = a->answer.encode_ms;
    succeed(s, j, &a->resolved, a->model,
            a->format == ANSWER_JSON ? "application/json" : "multipart/mixed; boundary=" MULTIPART_BOUNDARY, text, a->text_size);
}

// ---- What the engine and the pool say

static void on_image(struct server *s, struct job *j, struct engine_image *image) {
    if (image->index < 0 || image->index >= j->images || j->came >= j->images) {
        mem_free(image->pixels);
        return;
    }
    j->came++;
    char *normalised = request_normalised(&j->resolved, j->model, image->index);
    if (encode_start(s, j->id, image, normalised, j->model->desc.weights_sha256, j->resolved.compression,
                     j->format == ANSWER_JSON))
        job_fail_internal(s, j, &(struct err){.status = E_NOMEM, .text = "no memory to encode an image"});
}

static void on_done(struct server *s, struct job *j, const struct engine_event *ev) {
    j->executed = true;
    j->executed_us = now_us();
    j->answer.evaluations = ev->evaluations;
    j->answer.queue_ms = ev->queue_ms;
    j->answer.denoise_ms = ev->denoise_ms;
    j->answer.decode_ms = ev->decode_ms;
    finish_if_complete(s, j);
}

void jobs_event(struct server *s, struct engine_event *ev) {
    struct job *j = *place(s, ev->job);
    if (!j) {
        if (ev->kind == EV_IMAGE) mem_free(ev->image.pixels);
        return;
    }
    switch (ev->kind) {
    case EV_STARTED:
        j->started = true;
        break;
    case EV_IMAGE:
        on_image(s, j, &ev->image);
        break;
    case EV_DONE:
        on_done(s, j, ev);
        break;
    case EV_FAILED:
        job_fail_internal(s, j, &ev->err);
        break;
    case EV_CANCELLED:
        job_fail_internal(s, j, &(struct err){.status = E_CANCELLED, .text = "the daemon is stopping"});
        break;
    default:
        break;
    }
}

void jobs_encoded(struct server *s, struct encoding *w) {
    struct job *j = *place(s, w->job);
    if (!j) return;
    if (w->err.status) {
        job_fail_internal(s, j, &w->err);
        return;
    }
    shot_deinit(&j->shots[w->image.index]);
    j->shots[w->image.index] = w->shot;
    w->shot = (struct shot){0};
    j->encoded++;
    metrics_images(&s->metrics, j->ex->model, IMAGES_DONE, 1);
    finish_if_complete(s, j);
}

void jobs_abandon(struct server *s, uint64_t id) {
    struct job *j = *place(s, id);
    if (!j) return;
    s->metrics.cancelled[j->executed ? CANCEL_ENCODING : j->started ? CANCEL_RUNNING : CANCEL_QUEUED]++;
    metrics_images(&s->metrics, j->ex->model, IMAGES_CANCELLED, (uint64_t)(j->images - j->encoded));
    if (!j->executed) engine_cancel(s->engine, id);
    release(j);
    job_free(s, j);
}

void jobs_tick(struct server *s, int64_t now) {
    struct http_error e;
    for (int b = 0; b < JOB_BUCKETS && s->n_jobs; b++)
        for (struct job *j = s->jobs[b], *next; j; j = next) {
            next = j->next;
            if (now < j->deadline_ms) continue;
            http_error_set(&e, 504, "deadline_exceeded", "timeout_ms", "the deadline passed while the request was %s",
                           j->executed  ? "being encoded"
                           : j->started ? "running"
                                        : "queued");
            job_fail(s, j, &e, IMAGES_CANCELLED, 0);
        }
}

void jobs_give_up(struct server *s) {
    struct http_error e;
    http_error_set(&e, 503, "stopping", NULL, "the daemon stopped before the request was done");
    for (int b = 0; b < JOB_BUCKETS; b++)
        while (s->jobs[b]) job_fail(s, s->jobs[b], &e, IMAGES_CANCELLED, 1000);
}

// ---- POST /v1/samples

static uint64_t random53(void) {
    uint64_t r = 0;
    if (getrandom(&r, sizeof r, GRND_NONBLOCK) != (ssize_t)sizeof r) r = (uint64_t)now_us() * 0x9e3779b97f4a7c15u;
    return r >> 11;
}

// The model that a request names, or NULL and the error.
static const struct engine_model *find_model(struct server *s, const struct request *rq, struct http_error *e,
                                             int64_t *retry_ms) {
    char names[METRICS_MODELS][64];
    const struct engine_model *m = engine_model_ref(s->engine, request_model_name(rq));
    if (m) return m;
    if (!s->was_ready) {
        *retry_ms = 1000;
        s->metrics.rejected[REJECT_LOADING]++;
        http_error_set(e, 503, "loading", NULL, "models are still loading");
        return NULL;
    }
    int n = engine_model_names(s->engine, names, METRICS_MODELS);
    request_model_unknown(rq, (const char(*)[64])names, n, e);
    return NULL;
}

// The deadline: the request's own, or the default; more than the most is refused, not cut.
static int check_timeout(const struct config *c, struct resolved *r, struct http_error *e) {
    if (!r->job.timeout_ms) r->job.timeout_ms = c->default_timeout;
    if (r->job.timeout_ms <= c->max_timeout) return 0;
    return http_error_set(e, 422, "out_of_range", "timeout_ms", "timeout_ms is %" PRId64 ", outside 1..%" PRId64,
                          r->job.timeout_ms, c->max_timeout);
}

static int check_format(const struct exchange *ex, int n, enum answer_format *format, struct http_error *e) {
    char *accept = http_accept(ex);
    *format = accept_choose(accept, n);
    mem_free(accept);
    if (*format != ANSWER_NONE) return 0;
    return http_error_set(e, 406, "not_acceptable", NULL,
                          n == 1 ? "an answer is image/png, multipart/mixed or application/json"
                                 : "%d images cannot be one image/png: accept multipart/mixed or application/json",
                          n);
}

// 0, or the engine's status with the error filled.
static int submit(struct server *s, struct job *j, struct http_error *e, int64_t *retry_ms) {
    struct err err = {0};
    if (!engine_submit(s->engine, &j->resolved.job, &j->id, retry_ms, &err)) return 0;
    if (err.status == E_BUSY) s->metrics.rejected[REJECT_QUEUE_FULL]++;
    else *retry_ms = 0;
    if (err.status == E_DEVICE) s->metrics.rejected[REJECT_DEVICE]++;
    http_error_from(e, &err);
    if (e->status == 503 && *retry_ms <= 0) *retry_ms = 1000;
    return err.status;
}

// Everything between the body and the engine's queue, on the job's model. 0, or a status with the error filled.
static int prepare(struct exchange *ex, struct job *j, const struct request *rq, struct http_error *e, int64_t *retry_ms) {
    struct server *s = ex->server;
    if (!(j->model = find_model(s, rq, e, retry_ms))) return E_NOTFOUND;
    if (request_resolve(&j->resolved, rq, j->model, random53(), e)) {
        j->resolved = (struct resolved){0};
        return E_RANGE;
    }
    j->images = j->answer.n = j->resolved.job.n;
    if (check_timeout(s->config, &j->resolved, e) || check_format(ex, j->images, &j->format, e)) return E_RANGE;
    if (!(j->shots = mem_array((size_t)j->images, sizeof *j->shots)))
        return http_error_from(e, &(struct err){.status = E_NOMEM, .text = "no memory for the request"}), E_NOMEM;
    j->deadline_ms = now_ms() + j->resolved.job.timeout_ms;
    return submit(s, j, e, retry_ms);
}

static void job_discard(struct job *j) {
    mem_free(j->shots);
    resolved_deinit(&j->resolved);
    if (j->model) engine_model_unref(j->model);
    mem_free(j);
}

// Returns the job, in the table, or NULL and the error. A model that was swapped between look-up and submit is looked up again.
static struct job *make_job(struct exchange *ex, const struct request *rq, struct http_error *e, int64_t *retry_ms) {
    struct server *s = ex->server;
    for (int attempt = 0;; attempt++) {
        struct job *j = mem_alloc(sizeof *j);
        if (!j) {
            http_error_from(e, &(struct err){.status = E_NOMEM, .text = "no memory for the request"});
            return NULL;
        }
        int rc = prepare(ex, j, rq, e, retry_ms);
        if (!rc) {
            j->ex = ex;
            j->answer.created = (int64_t)time(NULL);
            *place(s, j->id) = j;
            s->n_jobs++;
            return j;
        }
        job_discard(j);
        if (rc != E_CONFLICT || attempt == 2) return NULL;
    }
}

void jobs_samples(struct exchange *ex) {
    struct server *s = ex->server;
    struct http_error e = {0};
    struct request *rq = NULL;
    struct job *j = NULL;
    int64_t retry_ms = 0;
    if (s->stage >= CLOSED) {
        s->metrics.rejected[REJECT_DRAINING]++;
        http_error_set(&e, 503, "draining", NULL, "the daemon is stopping");
        retry_ms = 1000;
    } else if (!request_parse(&rq, ex->body.p ? ex->body.p : "", ex->body.n, &e)) j = make_job(ex, rq, &e, &retry_ms);
    request_free(rq);
    text_deinit(&ex->body);
    if (!j) {
        if (e.status < 500) s->metrics.rejected[REJECT_INVALID]++;
        http_answer_error(ex, &e, retry_ms);
        return;
    }
    ex->job = j->id;
    ex->images = j->images;
    snprintf(ex->model, sizeof ex->model, "%s", j->model->name);
}
