// SPDX-License-Identifier: MIT
/*
 * From latents to pictures.
 *
 * A latent model's finished sample leaves its slot at once, as a copy of some kilobytes, and waits here for the VAE, so that its
 * rows serve other images meanwhile. The worker alternates: one network evaluation, then decoding for as long as that took. So
 * neither starves the other, and a picture of 256 pixels, seconds of work on a processor, never makes the samples in progress
 * wait for more than an evaluation does. A VAE has one picture in hand; the next begins when it is done, in the order in which
 * samples were finished. How the work is cut changes no picture (core/model/vae.h).
 *
 * With few steps, samples can be finished faster than pictures: once as many wait as there are slots, the worker decodes only,
 * the slots stay taken and the queue fills up to its bounds, as with any other work.
 */
#include <string.h>

#include "core/base/mem.h"
#include "core/engine/engine_int.h"

// Work between two looks at the clock: found by doubling and halving until it takes SLICE_US to 4 times that
#define SLICE_US 1000
#define SLICE_LEAST 1e6
#define SLICE_MOST 1e12

int decode_add(struct served *s, struct job *j, int index, const float *latent, struct err *e) {
    size_t n = runner_numel(s->runner);
    struct decode *d = mem_alloc(sizeof *d + n * sizeof *latent);
    if (!d) return err_set(e, E_NOMEM, "no memory for a latent");
    d->job = j;
    d->index = index;
    memcpy(d->latent, latent, n * sizeof *latent);
    struct decode **end = &s->decodes;
    while (*end) end = &(*end)->next;
    *end = d;
    s->n_decodes++;
    j->decoding++;
    return OK;
}

void decode_drop(struct served *s, const struct job *j) {
    for (struct decode **at = &s->decodes, *d; (d = *at);) {
        if (j && d->job != j) {
            at = &d->next;
            continue;
        }
        if (d == s->decodes) s->in_hand = false;
        *at = d->next;
        s->n_decodes--;
        d->job->decoding--;
        mem_free(d);
    }
}

static int begin(struct served *s, const struct decode *d, struct err *e) {
    const struct model_desc *desc = &s->facts->model.desc;
    const struct latent *l = &desc->latent;
    size_t plane = (size_t)desc->arch.input_size * (size_t)desc->arch.input_size;
    for (int c = 0; c < desc->arch.in_channels; c++) {
        float std = l->std ? (float)l->std[c] : l->scale > 0 ? (float)(1 / l->scale) : 1, mean = l->mean ? (float)l->mean[c] : 0;
        for (size_t i = (size_t)c * plane; i < (size_t)(c + 1) * plane; i++) s->z[i] = d->latent[i] * std + mean;
    }
    int rc = vae_start(s->vae, VAE_DECODE, s->z, e);
    s->in_hand = rc == OK;
    return rc;
}

static int slice(struct served *s, struct err *e) {
    int64_t start = engine_now_us();
    if (s->slice_flops < SLICE_LEAST) s->slice_flops = SLICE_LEAST;
    int rc = vae_step(s->vae, s->slice_flops, e);
    int64_t took = engine_now_us() - start;
    if (took < SLICE_US && s->slice_flops < SLICE_MOST) s->slice_flops *= 2;
    if (took > 4 * SLICE_US && s->slice_flops > 2 * SLICE_LEAST) s->slice_flops /= 2;
    return rc;
}

int decode_work(struct served *s, int64_t until_us, struct err *e) {
    struct decode *d = s->decodes;
    if (!d) return 0;
    int64_t start = engine_now_us();
    int rc = s->in_hand ? OK : begin(s, d, e), more = 1;
    while (rc == OK && more == 1) {
        more = slice(s, e);
        if (more < 0) rc = more;
        if (more == 1 && engine_now_us() >= until_us) break;
    }
    if (rc == OK && more == 0) rc = vae_read(s->vae, s->picture, e);
    d->job->decode_ms += (double)(engine_now_us() - start) / 1000;
    if (rc == OK && more == 1) return 0;
    s->in_hand = false;
    return rc < 0 ? rc : 1;
}

void decode_pop(struct served *s) {
    struct decode *d = s->decodes;
    s->decodes = d->next;
    s->n_decodes--;
    d->job->decoding--;
    mem_free(d);
}
