// SPDX-License-Identifier: MIT
#include "server/encode.h"

#include <string.h>

#include "core/base/mem.h"
#include "core/io/png.h"
#include "server/jobs.h"
#include "server/text.h"

void shot_deinit(struct shot *s) {
    mem_free(s->png);
    mem_free(s->b64);
    *s = (struct shot){0};
}

static char *base64(const uint8_t *p, size_t n) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if (n > (size_t)-1 / 2) return NULL;
    char *out = mem_alloc((n + 2) / 3 * 4 + 1), *o = out;
    for (size_t i = 0; out && i < n; i += 3) {
        size_t left = n - i;
        uint32_t v = (uint32_t)p[i] << 16 | (left > 1 ? (uint32_t)p[i + 1] << 8 : 0) | (left > 2 ? p[i + 2] : 0);
        *o++ = digits[v >> 18];
        *o++ = digits[v >> 12 & 63];
        *o++ = left > 1 ? digits[v >> 6 & 63] : '=';
        *o++ = left > 2 ? digits[v & 63] : '=';
    }
    return out;
}

static void encode_run(uv_work_t *work) { // on the pool
    struct encoding *w = work->data;
    const struct engine_image *im = &w->image;
    digest_hex(w->shot.sha256, im->pixels, (size_t)im->width * (size_t)im->height * (size_t)im->channels);
    const struct png_text text[] = {
        {"sitd-request", w->normalised}, {"sitd-weights", w->weights}, {"sitd-pixels-sha256", w->shot.sha256}};
    if (png_encode(&w->shot.png, &w->shot.png_size, im->pixels, im->width, im->height, im->channels, w->compression, text, 3,
                   &w->err))
        return;
    if (w->want_b64 && !(w->shot.b64 = base64(w->shot.png, w->shot.png_size)))
        err_set(&w->err, E_NOMEM, "no memory for an image's base64");
}

static void encoding_free(struct encoding *w) {
    mem_free(w->image.pixels);
    mem_free(w->normalised);
    shot_deinit(&w->shot);
    mem_free(w);
}

static void encode_finish(uv_work_t *work, int status) { // on the loop
    struct encoding *w = work->data;
    if (status) err_set(&w->err, E_CANCELLED, "encoding was cancelled");
    jobs_encoded(w->server, w);
    encoding_free(w);
}

int encode_start(struct server *s, uint64_t job, struct engine_image *take, char *take_normalised, const char *weights,
                 int compression, bool want_b64) {
    struct encoding *w = mem_alloc(sizeof *w);
    if (!w || !take_normalised) {
        mem_free(take->pixels);
        mem_free(take_normalised);
        mem_free(w);
        return E_NOMEM;
    }
    *w = (struct encoding){.work.data = w,
                           .server = s,
                           .job = job,
                           .image = *take,
                           .normalised = take_normalised,
                           .compression = compression,
                           .want_b64 = want_b64};
    memcpy(w->weights, weights, sizeof w->weights);
    if (!uv_queue_work(&s->uv, &w->work, encode_run, encode_finish)) return 0;
    encoding_free(w);
    return E_INTERNAL;
}

// The JSON answer, with the images inside it or (parts) without.
static char *answer_text(struct assembly *a, bool inside) {
    struct answer_image *images = mem_array((size_t)a->answer.n, sizeof *images);
    if (!images) return NULL;
    for (int i = 0; i < a->answer.n; i++)
        images[i] = (struct answer_image){.label = a->resolved.job.classes[i],
                                          .seed_index = a->resolved.job.seed_index + (uint32_t)i,
                                          .sha256 = a->shots[i].sha256,
                                          .b64 = inside ? a->shots[i].b64 : NULL};
    a->answer.images = images;
    char *text = answer_json(&a->answer, &a->resolved, a->model);
    mem_free(images);
    a->answer.images = NULL;
    return text;
}

static void multipart(struct assembly *a, struct text *t) {
    char *json = answer_text(a, false);
    if (!json) {
        t->failed = true;
        return;
    }
    text_printf(t, "--" MULTIPART_BOUNDARY "\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", strlen(json));
    text_add(t, json, strlen(json));
    mem_free(json);
    for (int i = 0; i < a->answer.n; i++) {
        text_printf(t,
                    "\r\n--" MULTIPART_BOUNDARY
                    "\r\nContent-Type: image/png\r\nContent-Length: %zu\r\nContent-Disposition: attachment; filename=\"%d.png\""
                    "\r\n\r\n",
                    a->shots[i].png_size, i);
        text_add(t, a->shots[i].png, a->shots[i].png_size);
    }
    text_printf(t, "\r\n--" MULTIPART_BOUNDARY "--\r\n");
}

static void assembly_run(uv_work_t *work) { // on the pool
    struct assembly *a = work->data;
    a->answer.id = a->id;
    a->answer.encode_ms = (double)(now_us() - a->executed_us) / 1000;
    if (a->format == ANSWER_MULTIPART) {
        struct text t = {0};
        multipart(a, &t);
        a->text = text_take(&t, &a->text_size);
    } else if ((a->text = answer_text(a, true))) a->text_size = strlen(a->text);
}

static void assembly_free(struct assembly *a) {
    for (int i = 0; a->shots && i < a->answer.n; i++) shot_deinit(&a->shots[i]);
    mem_free(a->shots);
    resolved_deinit(&a->resolved);
    engine_model_unref(a->model);
    mem_free(a->text);
    mem_free(a);
}

static void assembly_finish(uv_work_t *work, int status) { // on the loop
    struct assembly *a = work->data;
    (void)status; // cancelled work has no text, which says it
    jobs_assembled(a->server, a);
    assembly_free(a);
}

int assembly_start(struct assembly *a) {
    a->work.data = a;
    if (!uv_queue_work(&a->server->uv, &a->work, assembly_run, assembly_finish)) return 0;
    assembly_free(a);
    return E_INTERNAL;
}
