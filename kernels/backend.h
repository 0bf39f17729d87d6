// SPDX-License-Identifier: MIT
/*
 * backend: what back ends share inside kernels/ and nobody else includes: how they register, how they fail, and the 16-bit number
 * formats.
 */
#ifndef KERN_BACKEND_H
#define KERN_BACKEND_H
#include "kernels/kern.h"
#include <string.h>

// Writes the text of a failure to k->why and returns status.
int kern_fail(struct kern *, int status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

void kern_ref_fill(struct kern *); // every entry of the table
int kern_cpu_open(struct kern *,
                  const struct kern_config *); // replaces entries; on failure k->why has the text and nothing is held
int kern_cuda_open(struct kern *, const struct kern_config *); // the same
int kern_cuda_devices(char *why, size_t why_size);             // as kern_devices

// Checks that every back end makes alike. 0 or a status with k->why set.
int kern_check_linear(struct kern *, const struct kern_linear_spec *);
int kern_check_attention(struct kern *, int T, int H, int D);
int kern_check_cross(struct kern *, int T, int S, int H, int D);
int kern_check_conv(struct kern *, const struct kern_conv_spec *);
int kern_check_wide(struct kern *, int T, int C, int pictures);
void kern_conv_out(const struct kern_conv_spec *, int *height, int *width); // size of the output
size_t kern_alloc_size(size_t bytes); // rounded up to whole cache lines, at least one; 0 where that overflows

static inline float kern_bf16_to_f32(uint16_t h) {
    uint32_t b = (uint32_t)h << 16;
    float f;
    memcpy(&f, &b, 4);
    return f;
}

// Round to nearest even, as the processors' own conversion does; NaN stays a quiet NaN
static inline uint16_t kern_f32_to_bf16(float f) {
    uint32_t b;
    memcpy(&b, &f, 4);
    if ((b & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(b >> 16 | 0x40);
    return (uint16_t)((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}

static inline float kern_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = h >> 10 & 31, m = h & 0x3ffu, b;
    float f;
    if (e == 0) { // zero or subnormal: m 2^-24 is exact
        f = (float)m * 0x1p-24f;
        memcpy(&b, &f, 4);
        b |= sign;
    } else {
        b = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
    }
    memcpy(&f, &b, 4);
    return f;
}

static inline uint16_t kern_f32_to_f16(float f) { // to the nearest, ties to even
    uint32_t b, sign;
    memcpy(&b, &f, 4);
    sign = b >> 16 & 0x8000, b &= 0x7fffffff;
    if (b > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (b >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (b >= 0x38800000) return (uint16_t)(sign | (b + 0xfff + (b >> 13 & 1) - 0x38000000) >> 13);
    memcpy(&f, &b, 4);
    f += 0.5f; // whose last place is float16's smallest number
    memcpy(&b, &f, 4);
    return (uint16_t)(sign | (b - 0x3f000000));
}

// Element i of an array of the given type
static inline float kern_load(enum kern_dtype t, const void *p, size_t i) {
    if (t == KERN_F32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return t == KERN_BF16 ? kern_bf16_to_f32(h) : kern_f16_to_f32(h);
}
static inline void kern_store(enum kern_dtype t, void *p, size_t i, float v) {
    if (t == KERN_F32) ((float *)p)[i] = v;
    else ((uint16_t *)p)[i] = t == KERN_BF16 ? kern_f32_to_bf16(v) : kern_f32_to_f16(v);
}

#endif
