// SPDX-License-Identifier: MIT
/*
 * From latents to pictures.
 *
 * A latent model's finished sample leaves its slot at once, as a copy of some kilobytes, and waits here for the VAE, so that its
 * rows serve other images meanwhile. The worker alternates: one network evaluation, then decoding for as long as that took. So
 * neither starves the other, and a picture of 256 pixels, seconds of work on a processor, never makes the samples in progress
 * wait for more than an evaluation does. A VAE has one picture in hand, on a GPU up to vae_pictures of those that wait (the queue's first); the
 * next begin when they are done, in the order in which samples were finished. How the work is cut and who is decoded together changes no
 * picture (core/model/vae.h).
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
    d->at = -1;
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
        if (d->at >= 0 && !d->ready) s->in_hand = 0; // the others begin anew
        *at = d->next;
        s->n_decodes--;
        d->job->decoding--;
        mem_free(d);
    }
}

static int begin(struct served *s, struct err *e) {
    int n = 0;
    for (struct decode *d = s->decodes; d && n < vae_pictures(s->vae); d = d->next) {
        model_desc_to_vae(&s->facts->model.desc, s->z + (size_t)n * runner_numel(s->runner), d->latent);
        d->at = n++;
    }
    int rc = vae_start(s->vae, VAE_DECODE, s->z, n, e);
    s->in_hand = rc == OK ? n : 0;
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

// The pictures in hand are there, or took so long
static void account(struct served *s, double ms, bool ready) {
    struct decode *d = s->decodes;
    for (int i = 0, n = s->in_hand; i < n; i++, d = d->next) {
        d->job->decode_ms += ms / n;
        d->ready = ready;
    }
}

int decode_work(struct served *s, int64_t until_us, struct err *e) {
    if (!s->decodes) return 0;
    if (s->decodes->ready) return 1;
    int64_t start = engine_now_us();
    int rc = s->in_hand ? OK : begin(s, e), more = 1;
    while (rc == OK && more == 1) {
        more = slice(s, e);
        if (more < 0) rc = more;
        if (more == 1 && engine_now_us() >= until_us) break;
    }
    if (rc == OK && more == 0) rc = vae_read(s->vae, s->picture, e);
    bool ready = rc == OK && more == 0;
    account(s, (double)(engine_now_us() - start) / 1000, ready);
    if (rc == OK && more == 1) return 0;
    s->in_hand = 0;
    return rc < 0 ? rc : 1;
}

const float *decode_picture(const struct served *s) {
    return s->picture + (size_t)s->decodes->at * vae_numel(s->vae, VAE_DECODE);
}

void decode_pop(struct served *s) {
    struct decode *d = s->decodes;
    s->decodes = d->next;
    s->n_decodes--;
    d->job->decoding--;
    mem_free(d);
}
