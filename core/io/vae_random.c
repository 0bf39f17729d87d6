// SPDX-License-Identifier: MIT
/*
 * vae_random: weights of an autoencoder of any size without a checkpoint (declared in vae_file.h).
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/vae_file.h"
#include "kernels/philox.h"

struct random_weights { // one allocation a kind
    char (*names)[112];
    float *data;
};

struct filling {
    struct vae_weights *w; // NULL: counting
    uint64_t seed;
    int n;
    size_t total;
};

static void add(struct filling *f, const char *name, const char *part, int ndim, const int64_t shape[4], float middle,
                float spread) {
    size_t count = 1;
    for (int i = 0; i < ndim; i++) count *= (size_t)shape[i];
    if (f->w) {
        struct random_weights *r = f->w->priv;
        float *data = r->data + f->total;
        struct tensor *t = &f->w->table.tensors[f->n];
        snprintf(r->names[f->n], sizeof r->names[0], "%s.%s", name, part);
        *t = (struct tensor){.name = r->names[f->n], .ndim = ndim, .data = data, .count = count, .bytes = count * sizeof *data};
        memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
        for (size_t i = 0; i < count; i += 4) {
            float four[4];
            philox_normal4(f->seed, (uint32_t)f->n, 0, (uint32_t)(i / 4), four);
            for (size_t j = 0; j < 4 && i + j < count; j++) data[i + j] = middle + spread * four[j];
        }
    }
    f->n++;
    f->total += count;
}

static int add_unit(void *ctx, const struct vae_unit *u) {
    int side = u->side < 0 ? 1 : u->side;
    int64_t weight[4] = {u->out, u->in, side, side};
    if (u->side == 0) add(ctx, u->name, "weight", 1, weight, 1, 0.1f);
    else add(ctx, u->name, "weight", u->side < 0 ? 2 : 4, weight, 0, 1 / sqrtf((float)(u->in * side * side)));
    add(ctx, u->name, "bias", 1, weight, 0, 0.05f);
    return OK;
}

int vae_random(struct vae_weights *w, const struct vae_arch *a, uint64_t seed, struct err *e) {
    struct filling f = {.seed = seed};
    *w = (struct vae_weights){0};
    vae_walk(a, add_unit, &f);
    struct random_weights *r = mem_alloc(sizeof *r);
    w->priv = r;
    w->table.tensors = mem_array((size_t)f.n, sizeof *w->table.tensors);
    if (r) r->names = mem_array((size_t)f.n, sizeof *r->names), r->data = mem_array(f.total, sizeof *r->data);
    if (!r || !w->table.tensors || !r->names || !r->data)
        return vae_weights_free(w), err_set(e, E_NOMEM, "no memory for %zu random weights", f.total);
    w->table.n = f.n;
    f = (struct filling){.w = w, .seed = seed};
    vae_walk(a, add_unit, &f);
    return OK;
}

void vae_weights_free(struct vae_weights *w) {
    struct random_weights *r = w->priv;
    if (r) mem_free(r->names), mem_free(r->data);
    mem_free(r);
    mem_free(w->table.tensors);
    *w = (struct vae_weights){0};
}
