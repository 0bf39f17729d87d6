// SPDX-License-Identifier: MIT
#include "core/diffusion/torch_rng.h"

#include <math.h>

#define WORDS 624
#define APART 397
#define BLOCK 16

static const double two_pi = 6.28318530717958647693;

void torch_rng_seed(struct torch_rng *r, uint64_t seed) {
    r->state[0] = (uint32_t)seed;
    for (uint32_t i = 1; i < WORDS; i++) r->state[i] = 1812433253u * (r->state[i - 1] ^ r->state[i - 1] >> 30) + i;
    r->at = WORDS;
    r->has_spare = false;
}

static void renew(struct torch_rng *r) {
    for (int i = 0; i < WORDS; i++) {
        uint32_t y = (r->state[i] & 0x80000000u) | (r->state[(i + 1) % WORDS] & 0x7fffffffu);
        r->state[i] = r->state[(i + APART) % WORDS] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    r->at = 0;
}

uint32_t torch_rng_next(struct torch_rng *r) {
    if (r->at >= WORDS) renew(r);
    uint32_t y = r->state[r->at++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

void torch_rng_skip(struct torch_rng *r, size_t n) {
    while (n > 0) {
        if (r->at >= WORDS) renew(r);
        size_t here = (size_t)(WORDS - r->at) < n ? (size_t)(WORDS - r->at) : n;
        r->at += (int)here;
        n -= here;
    }
}

static uint64_t next64(struct torch_rng *r) { // the first word is the high one
    uint64_t high = torch_rng_next(r);
    return high << 32 | torch_rng_next(r);
}

uint64_t torch_rng_below(struct torch_rng *r, uint64_t range) {
    return range >= (uint64_t)1 << 32 ? next64(r) % range : torch_rng_next(r) % range;
}

static float uniform(struct torch_rng *r) { return (float)(torch_rng_next(r) & 0xffffff) * 0x1p-24f; }

void torch_rng_uniforms(struct torch_rng *r, float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = uniform(r);
}

/* normals */

static double uniform53(struct torch_rng *r) { return (double)(next64(r) & (((uint64_t)1 << 53) - 1)) * 0x1p-53; }

static double one_normal(struct torch_rng *r) {
    if (r->has_spare) {
        r->has_spare = false;
        return r->spare;
    }
    double u = uniform53(r), v = uniform53(r), radius = sqrt(-2 * log1p(-v)), angle = two_pi * u;
    r->spare = radius * sin(angle);
    r->has_spare = true;
    return radius * cos(angle);
}

// Sixteen uniforms become normals in place: the first eight are radii, the others angles.
static void block(float x[BLOCK]) {
    for (int j = 0; j < BLOCK / 2; j++) {
        float radius = sqrtf(-2 * logf(1 - x[j])), angle = (float)two_pi * x[j + BLOCK / 2];
        x[j] = radius * cosf(angle);
        x[j + BLOCK / 2] = radius * sinf(angle);
    }
}

void torch_rng_normals(struct torch_rng *r, float *x, size_t n) {
    if (n < BLOCK) {
        for (size_t i = 0; i < n; i++) x[i] = (float)one_normal(r);
        return;
    }
    torch_rng_uniforms(r, x, n);
    for (size_t i = 0; i + BLOCK <= n; i += BLOCK) block(x + i);
    if (n % BLOCK == 0) return;
    torch_rng_uniforms(r, x + n - BLOCK, BLOCK); // the last sixteen are drawn again
    block(x + n - BLOCK);
}
