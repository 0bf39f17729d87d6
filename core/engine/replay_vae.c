// SPDX-License-Identifier: MIT
// Cases of kind "vae": x -> mean, std of the posterior; z -> dec, the picture of a latent in the diffusion model's units.
#include <math.h>

#include "core/base/mem.h"
#include "core/engine/replay_int.h"
#include "core/model/vae.h"

// Tensor `name` [n, C, H, W] of the case, C given, n that of the case's other tensors if *n is set.
static const struct tensor *pictures(const struct recorded *c, const char *name, int channels, int64_t *n, struct err *e) {
    const struct tensor *t = tensor_find(&c->file.table, name);
    bool fits = t && t->ndim == 4 && t->shape[0] >= 1 && t->shape[0] <= 4096 && (!*n || t->shape[0] == *n);
    if (fits && t->shape[1] == channels && t->shape[2] >= 1 && t->shape[2] <= 16384 && t->shape[3] >= 1 && t->shape[3] <= 16384)
        return *n = t->shape[0], t;
    err_param(e, t ? E_CONFLICT : E_FORMAT, name, t ? "the case's '%s' is not [n, %d, H, W]" : "the case has no tensor '%s'",
              name, channels);
    return NULL;
}

static int run(struct vae *v, enum vae_way way, const float *in, float *out, int64_t n, struct err *e) {
    size_t in_count = vae_numel(v, way == VAE_DECODE ? VAE_ENCODE : VAE_DECODE), out_count = vae_numel(v, way);
    if (way == VAE_DECODE) in_count /= 2; // moments are mean and variance
    for (int64_t i = 0; i < n; i++)
        if (vae_run(v, way, in + (size_t)i * in_count, out + (size_t)i * out_count, e)) return e->status;
    return OK;
}

static int replay_decode(struct vae *v, const struct vae_file *f, struct recorded *c, int64_t n, struct difference *d,
                         struct err *e) {
    size_t latent = vae_numel(v, VAE_ENCODE) / 2 * (size_t)n, picture = vae_numel(v, VAE_DECODE) * (size_t)n;
    int rc = replay_tensor(&c->x, c, "z", latent, e);
    if (rc == OK) rc = replay_tensor(&c->out, c, "dec", picture, e);
    if (rc == OK && !(c->ours = mem_array(picture, sizeof *c->ours)))
        rc = err_set(e, E_NOMEM, "no memory for the case's pictures");
    for (size_t i = 0; rc == OK && i < latent; i++) c->x[i] = c->x[i] / (float)f->scale + (float)f->shift;
    if (rc == OK) rc = run(v, VAE_DECODE, c->x, c->ours, n, e);
    if (rc == OK) replay_compare(d, c->ours, c->out, picture);
    return rc;
}

static int replay_encode(struct vae *v, struct recorded *c, int64_t n, struct difference *d, struct err *e) {
    size_t moments = vae_numel(v, VAE_ENCODE), half = moments / 2;
    float *mean = NULL, *std = NULL, *ours = mem_array(moments * (size_t)n, sizeof *ours);
    int rc = ours ? OK : err_set(e, E_NOMEM, "no memory for the case's latents");
    if (rc == OK) rc = replay_tensor(&c->x, c, "x", vae_numel(v, VAE_DECODE) * (size_t)n, e);
    if (rc == OK) rc = replay_tensor(&mean, c, "mean", half * (size_t)n, e);
    if (rc == OK) rc = replay_tensor(&std, c, "std", half * (size_t)n, e);
    if (rc == OK) rc = run(v, VAE_ENCODE, c->x, ours, n, e);
    for (size_t i = 0; rc == OK && i < (size_t)n; i++) {
        float *m = ours + i * moments, *s = m + half;
        for (size_t j = 0; j < half; j++) s[j] = expf(0.5f * s[j]);
        replay_compare(d, m, mean + i * half, half);
        replay_compare(d, s, std + i * half, half);
    }
    mem_free(mean), mem_free(std), mem_free(ours);
    return rc;
}

static int check_sizes(const struct vae_arch *a, const struct tensor *x, const struct tensor *z, struct err *e) {
    int64_t factor = vae_factor(a);
    if (x->shape[2] == z->shape[2] * factor && x->shape[3] == z->shape[3] * factor) return OK;
    return err_param(e, E_CONFLICT, "x", "the case's 'x' is not %lld times as large as its 'z'", (long long)factor);
}

int replay_vae(struct replay *r, struct recorded *c, struct replay_result *result, struct err *e) {
    const struct vae_file *f = &r->vae;
    struct difference d = {.finite = true};
    struct vae *v = NULL;
    int64_t n = 0;
    if (!r->is_vae) return err_param(e, E_CONFLICT, "kind", "the case is of an autoencoder; the model is none and names none");
    const struct tensor *x = pictures(c, "x", f->arch.image_channels, &n, e),
                        *z = x ? pictures(c, "z", f->arch.latent_channels, &n, e) : NULL;
    if (!z || check_sizes(&f->arch, x, z, e)) return e->status;
    struct vae_size size = {.height = (int)z->shape[2], .width = (int)z->shape[3], .decode = true, .encode = true};
    int rc = vae_new(&v, r->k, &f->arch, &f->table, &size, e);
    if (rc == OK) rc = replay_encode(v, c, n, &d, e);
    if (rc == OK) rc = replay_decode(v, f, c, n, &d, e);
    if (rc == OK) replay_conclude(result, &d, 1e-5);
    vae_free(v);
    return rc;
}
