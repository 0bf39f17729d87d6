// SPDX-License-Identifier: MIT
/*
 * philox: counter-based noise that is the same everywhere.
 *
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) keyed by the request's seed; the counter
 * holds (element block, draw, image, 0), so a number depends on (seed, image, draw, element) and never on how many calls came
 * before. Integers are exact by construction. The normals are Box-Muller with our own log and sin/cos polynomials in explicit
 * fma, compiled with -ffp-contract=off (nvcc: the only products that meet a sum are inside fmaf), so that CPU and GPU agree bit
 * for bit: no libm transcendental, no table, no division; sqrt is correctly rounded by IEEE 754. One counter gives four normals:
 * elements 4b .. 4b+3.
 *
 *   radius: u = (x >> 1) 2^-31 + 2^-32 in [2^-32, 1], r = sqrt(-2 ln u), so |normal| <= 6.67 (a 24-bit u would stop at 5.8)
 *   angle:  the top two bits of x choose the quadrant, the other 30 the place phi in [-pi/4, pi/4) in it. Measuring from -pi/4
 *           turns the circle by a constant, which a uniform angle does not notice, and keeps the polynomials on a short interval.
 * The polynomials were fitted by weighted least squares (Lawson) in double and rounded; errors stay below 2e-7 relative.
 *
 * Header-only so that C, vectorised C and CUDA compile the same text. philox_normal4 and philox_normal are the interface; the
 * steps below them are visible for the vectorised version in kernels/cpu and for tests.
 */
#ifndef KERN_PHILOX_H
#define KERN_PHILOX_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define PHILOX_FN static __host__ __device__ __forceinline__
#else
#define PHILOX_FN static inline __attribute__((always_inline, unused))
#endif

// Ten rounds; ctr is replaced by the output block.
PHILOX_FN void philox_rounds(uint32_t ctr[4], uint32_t k0, uint32_t k1) {
    for (int i = 0; i < 10; i++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * ctr[0], p1 = (uint64_t)0xCD9E8D57u * ctr[2];
        uint32_t c1 = ctr[1], c3 = ctr[3];
        ctr[0] = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        ctr[1] = (uint32_t)p1;
        ctr[2] = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        ctr[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

PHILOX_FN float philox_bits_float(uint32_t b) {
    float f;
    memcpy(&f, &b, 4);
    return f;
}
PHILOX_FN uint32_t philox_float_bits(float f) {
    uint32_t b;
    memcpy(&b, &f, 4);
    return b;
}

// -2 ln(u) for the u in [2^-32, 1] that 32 random bits stand for; never negative
PHILOX_FN float philox_minus2_log(uint32_t x) {
    float u = fmaf((float)(int32_t)(x >> 1), 0x1p-31f, 0x1p-32f);
    uint32_t b = philox_float_bits(u);
    int32_t e = (int32_t)(b - 0x3f3504f3u) >> 23; // u = m 2^e, m in [sqrt(1/2), sqrt(2))
    float f = philox_bits_float(b - ((uint32_t)e << 23)) - 1.0f, n = (float)e;
    float p = -0x1.38b4ccp-4f; // ln(1+f) = f - f^2/2 + f^3 P(f)
    p = fmaf(p, f, 0x1.055b46p-3f);
    p = fmaf(p, f, -0x1.0d8552p-3f);
    p = fmaf(p, f, 0x1.22da22p-3f);
    p = fmaf(p, f, -0x1.547244p-3f);
    p = fmaf(p, f, 0x1.99a008p-3f);
    p = fmaf(p, f, -0x1.000228p-2f);
    p = fmaf(p, f, 0x1.555554p-2f);
    p = fmaf(p, f, -0.5f);
    p = fmaf(f * f, p, f);
    p = fmaf(n, -0x1.05c610p-29f, p); // ln 2 = 0x1.62e430p-1 - 0x1.05c610p-29
    p = fmaf(n, 0x1.62e430p-1f, p);
    return -2.0f * p;
}

// cos and sin of the angle that 32 random bits stand for
PHILOX_FN void philox_cos_sin(uint32_t x, float *c, float *s) {
    float a = (float)((int32_t)(x & 0x3fffffffu) - 0x20000000);
    float phi = fmaf(a, 0x1.921fb6p-30f, 0x1.921fb6p-31f); // pi/2 2^-30 (a + 1/2)
    float z = phi * phi;
    float ps = fmaf(fmaf(-0x1.994eb2p-13f, z, 0x1.110760p-7f), z, -0x1.555546p-3f);
    float pc = fmaf(fmaf(0x1.9a0258p-16f, z, -0x1.6c0c8cp-10f), z, 0x1.55554ap-5f);
    float sn = fmaf(phi * z, ps, phi);
    float cs = fmaf(z, fmaf(z, pc, -0.5f), 1.0f);
    uint32_t q = x >> 30; // quadrant: (c, s), (-s, c), (-c, -s), (s, -c)
    float cq = (q & 1) ? sn : cs, sq = (q & 1) ? cs : sn;
    *c = philox_bits_float(philox_float_bits(cq) ^ (((q ^ (q >> 1)) & 1u) << 31));
    *s = philox_bits_float(philox_float_bits(sq) ^ ((q >> 1) << 31));
}

PHILOX_FN float philox_sqrt(float x) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(x);
#else
    return sqrtf(x);
#endif
}

// The four normals of elements 4*block .. 4*block+3
PHILOX_FN void philox_normal4(uint64_t seed, uint32_t image, uint32_t draw, uint32_t block, float out[4]) {
    uint32_t x[4] = {block, draw, image, 0};
    philox_rounds(x, (uint32_t)seed, (uint32_t)(seed >> 32));
    for (int i = 0; i < 4; i += 2) {
        float r = philox_sqrt(philox_minus2_log(x[i])), c, s;
        philox_cos_sin(x[i + 1], &c, &s);
        out[i] = r * c;
        out[i + 1] = r * s;
    }
}

PHILOX_FN float philox_normal(uint64_t seed, uint32_t image, uint32_t draw, uint32_t element) {
    float z[4];
    philox_normal4(seed, image, draw, element >> 2, z);
    return z[element & 3];
}

#endif
