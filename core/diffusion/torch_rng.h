// SPDX-License-Identifier: MIT
/*
 * torch_rng: the numbers that PyTorch's CPU generator gives after torch.manual_seed, for requests with "rng": "torch-cpu".
 *
 * MT19937 (Matsumoto and Nishimura 1998) seeded with the seed's low 32 bits, and torch.randn's two ways of making normals of it:
 * below 16 elements one by one in double, from 16 on in blocks of sixteen in float32 (models-and-math section 8.6). Whole calls
 * count, not elements: normals(3) then normals(3) are not normals(6). Integers are exact; normals agree to three ulp, since
 * torch's logarithm and cosine depend on its build. The struct holds no pointers. Thread: its owner's.
 */
#ifndef SITD_TORCH_RNG_H
#define SITD_TORCH_RNG_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct torch_rng {
    uint32_t state[624];
    int at;         // next word of state; 624: to be made anew
    bool has_spare; // the second normal of a pair, of calls below 16 elements
    double spare;
};
void torch_rng_seed(struct torch_rng *, uint64_t seed);          // torch.manual_seed(seed)
uint32_t torch_rng_next(struct torch_rng *);                     // 32 random bits
void torch_rng_skip(struct torch_rng *, size_t n);         // n times 32 bits are not wanted
void torch_rng_normals(struct torch_rng *, float *x, size_t n);  // torch.randn(n)
void torch_rng_uniforms(struct torch_rng *, float *x, size_t n); // torch.rand(n)
uint64_t torch_rng_below(struct torch_rng *, uint64_t range);    // one element of torch.randint(range, ...); range >= 1

#endif
