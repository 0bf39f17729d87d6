// SPDX-License-Identifier: MIT
#include "core/diffusion/stream.h"

#define TORCH_BLOCK 16 // normals that torch.randn makes together

const char *rng_name(int i) {
    static const char *const names[RNG_COUNT] = {"native", "torch-cpu"};
    return i >= 0 && i < RNG_COUNT ? names[i] : "?";
}

static bool draws_as_it_goes(const struct sampler_spec *s) {
    if (s->type == SAMPLER_DDIM) return s->eta > 0;
    if (s->type == SAMPLER_EDM) return s->churn > 0;
    return s->type == SAMPLER_SDE || s->type == SAMPLER_DDPM;
}

int stream_check(const struct sampler_spec *s, const struct sampler_model *m, size_t numel, uint64_t first, uint64_t n,
                 struct err *e) {
    bool own = m->kind == MODEL_EDM, kicks = draws_as_it_goes(s);
    if (kicks && s->type == SAMPLER_EDM)
        return err_param(e, E_RANGE, "rng", "rng \"torch-cpu\" has no numbers for edm's churn, only for its start");
    if (own && kicks)
        return err_param(
            e, E_RANGE, "rng",
            "rng \"torch-cpu\" has no numbers for a sampler that draws noise as it goes with this model, only for its start");
    if (own) return OK;
    if (numel % TORCH_BLOCK)
        return err_param(e, E_RANGE, "rng", "rng \"torch-cpu\" needs images of a multiple of %d numbers; this model's have %zu",
                         TORCH_BLOCK, numel);
    if (kicks && (first || n != 1))
        return err_param(
            e, E_RANGE, "rng",
            "rng \"torch-cpu\" with a sampler that draws noise as it goes gives one image: one class and seed_index 0");
    if (first + n > STREAM_IMAGES)
        return err_param(e, E_RANGE, "seed_index",
                         "seed_index of the last image must be at most %d with rng \"torch-cpu\", not %llu", STREAM_IMAGES - 1,
                         (unsigned long long)(first + n - 1));
    return OK;
}

void stream_start(struct stream *st, const struct sampler_spec *s, const struct sampler_model *m, size_t numel, uint64_t seed,
                  uint32_t image) {
    bool own = m->kind == MODEL_EDM;
    st->numel = numel;
    st->before = own ? 0 : image * numel;
    st->gap = s->guidance == 1 ? 0 : numel; // the null half's
    st->at = 0;
    torch_rng_seed(&st->rng, own ? seed + image : seed);
}

void stream_draw(struct stream *st, uint32_t draw, float *x) {
    size_t place = draw ? st->numel + (draw - 1) * (st->numel + st->gap) : st->before;
    torch_rng_skip(&st->rng, place - st->at);
    torch_rng_normals(&st->rng, x, st->numel);
    st->at = place + st->numel;
}
