// SPDX-License-Identifier: MIT
/*
 * The vector type and the functions of one number that simd_body.h and picture_body.h share, for the width and the macros that
 * the including file defines (listed in simd_body.h). It holds definitions: one source file includes it once.
 */
#include <stdint.h>

#include "kernels/backend.h"

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

/* ---- loads and stores; the _n ones move n < W elements, missing ones read as zero ---- */

INLINE vf v_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void v_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf v_all(float x) { return x - (vf){0}; }
INLINE vf v_load_n(const float *p, int n) {
    vf v = {0};
    memcpy(&v, p, (size_t)n * 4);
    return v;
}
INLINE void v_store_n(float *p, vf v, int n) { memcpy(p, &v, (size_t)n * 4); }

INLINE vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
INLINE vh narrow(vf v) { // as kern_f32_to_bf16
#ifdef V_NARROW
    return V_NARROW(v);
#else
    vu b = (vu)v, up = (b + 0x7fff + (b >> 16 & 1)) >> 16, nan = (vu)((b & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((up & ~nan) | ((b >> 16 | 0x40) & nan), vh);
#endif
}

// W elements of an act buffer; n < W for the last, incomplete vector of a line
INLINE vf act_load(bool bf16, const void *p, size_t at, int n) {
    vh h = {0};
    if (!bf16) return n == W ? v_load((const float *)p + at) : v_load_n((const float *)p + at, n);
    if (n == W) memcpy(&h, (const uint16_t *)p + at, sizeof h);
    else memcpy(&h, (const uint16_t *)p + at, (size_t)n * 2);
    return widen(h);
}
INLINE void act_store(bool bf16, void *p, size_t at, vf v, int n) {
    vh h;
    if (!bf16) {
        if (n == W) v_store((float *)p + at, v);
        else v_store_n((float *)p + at, v, n);
        return;
    }
    h = narrow(v);
    if (n == W) memcpy((uint16_t *)p + at, &h, sizeof h);
    else memcpy((uint16_t *)p + at, &h, (size_t)n * 2);
}

// 8 x 8 elements of an act buffer, transposed to floats; ld: elements from line to line
INLINE void transpose8(float *dst, size_t dst_ld, const void *src, size_t ld, bool bf16) {
    __m256 r[8], s[8];
    for (int i = 0; i < 8; i++) {
        if (!bf16) r[i] = _mm256_loadu_ps((const float *)src + (size_t)i * ld);
        else {
            __m128i h = _mm_loadu_si128((const __m128i *)(const void *)((const uint16_t *)src + (size_t)i * ld));
            r[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
        }
    }
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(dst + (size_t)i * dst_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(dst + (size_t)(i + 4) * dst_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// 2^x for x <= 127, 0 below 2^-126; within 1e-7
INLINE vf v_exp2(vf x) {
    vf shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f); // adding 1.5 2^23 leaves round(x) in the low bits
    vf p = v_all(0x1.41d32ep-13f);
    p = V_FMA(p, f, v_all(0x1.5f456ap-10f));
    p = V_FMA(p, f, v_all(0x1.3b2dbcp-7f));
    p = V_FMA(p, f, v_all(0x1.c6aed4p-5f));
    p = V_FMA(p, f, v_all(0x1.ebfbdap-3f));
    p = V_FMA(p, f, v_all(0x1.62e430p-1f));
    p = V_FMA(p, f, v_all(1.0f));
    return (vf)(((vu)p + ((vu)shifted << 23)) & ~(vu)(x < -126.0f));
}

// u / (1 + 2^k), the shape of both activations; k is capped where the quotient is 0 anyway
INLINE vf over_one_plus_exp2(vf u, vf k) { return u / (1.0f + v_exp2(V_MIN(v_all(126.0f), k))); }
INLINE vf v_silu(vf u) { return over_one_plus_exp2(u, u * -1.44269504f); }
// u/2 (1 + tanh z) = u / (1 + exp(-2z)), z = sqrt(2/pi) (u + 0.044715 u^3); the constants are -2 log2(e) sqrt(2/pi) and 0.044715
// of that
INLINE vf v_gelu(vf u) { return over_one_plus_exp2(u, u * V_FMA(u * u, v_all(-0.102943240f), v_all(-2.30220818f))); }
