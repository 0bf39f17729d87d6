// SPDX-License-Identifier: MIT
/*
 * stream: whose random numbers an image gets, for requests with "rng": "torch-cpu".
 *
 * Native noise is Philox and made by the kernels (kernels/philox.h). torch-cpu gives an image the numbers that the authors'
 * scripts drew on the CPU after torch.manual_seed(seed), as a function of (seed, image) and never of batch mates: path and
 * discrete models (SiT, DiT sample.py)   the initial noise is slice `image` of torch.randn(n, C, H, W); it is the same for every
 * n above `image`, since torch makes normals in blocks of sixteen and C*H*W is a multiple of that edm models (MaskDiT
 * generate.py)                torch.randn(C, H, W) of a generator of its own, seeded with seed + image Samplers that draw noise
 * as they go consume the numbers of the whole script's batch at each step. Only the script run for one image can be given then:
 * image 0 of path and discrete models, with both halves' noise drawn where guidance doubles the batch, as the scripts do. EDM's
 * churn is drawn in double precision there, which is another sequence: refused.
 */
#ifndef SITD_STREAM_H
#define SITD_STREAM_H
#include "core/diffusion/sampler.h"
#include "core/diffusion/torch_rng.h"

enum rng_kind { RNG_NATIVE, RNG_TORCH_CPU, RNG_COUNT };
const char *rng_name(int); // "native", "torch-cpu"

#define STREAM_IMAGES 1024 // of path and discrete models: those before an image are run through to get at its numbers

// Can torch-cpu give images first .. first + n - 1 of `numel` numbers each? E_RANGE, param "rng" or "seed_index".
int stream_check(const struct sampler_spec *, const struct sampler_model *, size_t numel, uint64_t first, uint64_t n,
                 struct err *);

struct stream { // one image's torch-cpu numbers. Holds no pointers. Thread: its owner's
    struct torch_rng rng;
    size_t numel, before, gap; // words before the initial noise; words between the draws of two steps
    size_t at;                 // words drawn so far
};
void stream_start(struct stream *, const struct sampler_spec *, const struct sampler_model *, size_t numel, uint64_t seed,
                  uint32_t image);
void stream_draw(struct stream *, uint32_t draw, float *x); // x [numel]: draw 0 is the initial noise; draws come in rising order

#endif
