// SPDX-License-Identifier: MIT
/*
 * One version of one model, from a model directory's bytes to slots on the device that are known to work.
 *
 * Everything a step needs is reserved here, so that no step can fail for want of memory. The canary is one guided evaluation of
 * one image (or an unguided one where there is no null class): weights that are finite one by one can still overflow together,
 * and it is better to learn that before the first client does. It also gives the first measurement of a row's time, without which
 * Retry-After would start as a guess.
 */
#include "core/engine/engine_int.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"

void facts_unref(struct facts *f) {
    if (!f || atomic_fetch_sub(&f->refs, 1) != 1) return;
    model_desc_deinit(&f->model.desc);
    mem_free(f);
}

int served_check(const struct model_desc *d, struct sampler_model *sampler, struct err *e) {
    int path = path_parse(d->path), prediction = prediction_parse(d->prediction), channels = d->arch.in_channels;
    if (strcmp(d->family, "sit") != 0)
        return err_param(e, E_UNSUPPORTED, "family", "family '%s' is not served by this build (sit is)", d->family);
    if (path < 0) return err_param(e, E_UNSUPPORTED, "path", "no path is called '%s'", d->path);
    if (prediction < 0) return err_param(e, E_UNSUPPORTED, "prediction", "no prediction is called '%s'", d->prediction);
    if (channels != 1 && channels != 3)
        return err_param(
            e, E_UNSUPPORTED, "architecture.in_channels",
            "it makes latents of %d channels, which need a VAE to become pictures; this build serves models of 1 or 3 channels",
            channels);
    *sampler = (struct sampler_model){.path = (enum path_kind)path, .prediction = (enum prediction)prediction};
    return 0;
}

static int make_facts(struct served *s, const char *name, struct model_dir *dir, struct err *e) {
    struct facts *f = mem_alloc(sizeof *f);
    if (!f) return err_set(e, E_NOMEM, "no memory for a model");
    s->facts = f;
    atomic_init(&f->refs, 1);
    struct engine_model *m = &f->model;
    int rc = served_check(&dir->desc, &m->sampler, e);
    if (rc) return rc;
    snprintf(m->name, sizeof m->name, "%s", name);
    memcpy(m->digest, dir->digest, sizeof m->digest);
    m->image_size = dir->desc.arch.input_size;
    m->image_channels = dir->desc.arch.in_channels;
    m->guide_channels = dir->desc.guide_channels; // "the first three" of a model with fewer channels are all of them
    if (m->guide_channels < 0 || m->guide_channels > m->image_channels) m->guide_channels = m->image_channels;
    return 0;
}

static int make_slots(struct served *s, int slots, struct err *e) {
    size_t n = (size_t)slots;
    s->runs = mem_array(n, sizeof *s->runs);
    s->batch = mem_array(n, sizeof(struct runner_slot *));
    s->slots = mem_array(n, sizeof *s->slots);
    s->freed = mem_array(n, sizeof *s->freed);
    s->pixels = mem_array(runner_numel(s->runner), sizeof *s->pixels);
    if (!s->runs || !s->batch || !s->slots || !s->freed || !s->pixels)
        return err_set(e, E_NOMEM, "no memory for %d slots", slots);
    return 0;
}

int served_pixels(uint8_t *dst, const float *x, int channels, int side, struct err *e) {
    size_t plane = (size_t)side * (size_t)side;
    for (size_t i = 0; i < plane; i++)
        for (int c = 0; c < channels; c++) {
            float v = x[(size_t)c * plane + i];
            if (!isfinite(v)) return err_set(e, E_NONFINITE, "the sample is not finite: channel %d, pixel %zu", c, i);
            v = 127.5f * v + 128.0f; // as DiT and SiT write their samples: clamp, then cut
            *dst++ = v <= 0 ? 0 : v >= 255 ? 255 : (uint8_t)v;
        }
    return 0;
}

static int canary(struct served *s, double *row_ms, struct err *e) {
    const struct engine_model *m = &s->facts->model;
    struct runner_slot slot = {.slot = 0, .label = 0, .seed = 1, .null_of = -1}, *one = &slot;
    struct sampler_spec spec;
    int rows = 1;
    sampler_defaults(&spec, &m->sampler, SAMPLER_ODE);
    spec.method = METHOD_EULER;
    spec.steps = 1;
    spec.guide_from = 0;
    spec.guide_to = 1;
    spec.guidance = m->desc.arch.class_dropout ? 2 : 1;
    spec.guide_channels = m->guide_channels;
    int rc = runner_start(s->runner, one, &spec, &m->sampler, e);
    if (!rc && slot.done)
        rc = err_set(e, slot.err.status ? slot.err.status : E_INTERNAL, "the trial evaluation was not made: %s", slot.err.text);
    int64_t start = engine_now_us();
    if (!rc) rc = runner_step(s->runner, &one, 1, &rows, e);
    *row_ms = (double)(engine_now_us() - start) / 1000 / rows;
    if (!rc) rc = runner_read(s->runner, 0, s->pixels, e);
    size_t numel = runner_numel(s->runner);
    for (size_t i = 0; !rc && i < numel; i++)
        if (!isfinite(s->pixels[i]))
            rc = err_set(e, E_NONFINITE, "a trial evaluation of its network gave numbers that are not finite");
    return rc;
}

int served_new(struct served **out, struct kern *k, const struct sched_limits *limits, const char *name, struct model_dir *dir,
               double *row_ms, struct err *e) {
    *out = NULL;
    struct served *s = mem_alloc(sizeof *s);
    if (!s) return err_set(e, E_NOMEM, "no memory for a model");
    int rc = make_facts(s, name, dir, e), slots = limits->max_rows;
    if (!rc) rc = sched_new(&s->sched, limits, e);
    if (!rc) rc = runner_new(&s->runner, k, &dir->desc.arch, dir->weights, slots, limits->max_rows, e);
    if (!rc) rc = make_slots(s, slots, e);
    if (!rc) {
        s->facts->model.device_bytes = runner_bytes(s->runner);
        s->facts->model.desc.arch = dir->desc.arch; // what the canary reads; the rest follows on success
        rc = canary(s, row_ms, e);
    }
    if (rc) {
        served_free(s);
        return rc;
    }
    s->facts->model.desc = dir->desc;
    dir->desc = (struct model_desc){0};
    *out = s;
    return 0;
}

void served_free(struct served *s) {
    if (!s) return;
    runner_free(s->runner);
    sched_free(s->sched);
    facts_unref(s->facts);
    void *arrays[] = {s->runs, s->batch, s->slots, s->freed, s->pixels};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) mem_free(arrays[i]);
    mem_free(s);
}
