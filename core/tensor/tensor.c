// SPDX-License-Identifier: MIT
#include "core/tensor/tensor.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    size_t size;
} types[DT_COUNT] = {
    [DT_F32] = {"F32", 4}, [DT_F16] = {"F16", 2}, [DT_BF16] = {"BF16", 2}, [DT_F64] = {"F64", 8}, [DT_I64] = {"I64", 8}, [DT_I32] = {"I32", 4},
    [DT_I16] = {"I16", 2}, [DT_I8] = {"I8", 1},   [DT_U8] = {"U8", 1},     [DT_BOOL] = {"BOOL", 1}, [DT_OTHER] = {"other", 0},
};

const char *dtype_name(enum dtype t) { return types[t].name; }
size_t dtype_size(enum dtype t) { return types[t].size; }

const struct tensor *tensor_find(const struct tensor_table *table, const char *name) {
    for (int i = 0; i < table->n; i++)
        if (strcmp(table->tensors[i].name, name) == 0) return &table->tensors[i];
    return NULL;
}

bool tensor_shape_is(const struct tensor *t, int ndim, const int64_t *shape) {
    return t->ndim == ndim && (ndim == 0 || memcmp(t->shape, shape, (size_t)ndim * sizeof *shape) == 0);
}

void tensor_shape_text(const struct tensor *t, char *dst, size_t size) {
    size_t n = (size_t)snprintf(dst, size, "[");
    for (int i = 0; i < t->ndim && n < size; i++)
        n += (size_t)snprintf(dst + n, size - n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    if (n < size) snprintf(dst + n, size - n, "]");
}

float bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

uint16_t f32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, frac = h & 0x3ff, bits;
    if (exp == 31) bits = sign | 0x7f800000u | frac << 13;
    else if (exp) bits = sign | (exp + 112) << 23 | frac << 13;
    else { // zero or subnormal: frac * 2^-24 is exact in float32
        float f = (float)frac * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

uint16_t f32_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); // rounds to 2^16 or more
    if (bits < 0x38800000u) {                                  // subnormal: let float addition round at 2^-24
        float a, shift = 0x1p-1f;                              // ulp of 0.5 is 2^-24
        memcpy(&a, &bits, 4);
        a += shift;
        memcpy(&bits, &a, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return (uint16_t)(sign | (bits - 0x38000000u) >> 13);
}

// One element of a type that is neither float32 nor half a float32's size.
static float other_to_f32(enum dtype type, const char *at) {
    union { double d; int64_t l; int32_t w; int16_t s; int8_t b; } v;
    memcpy(&v, at, dtype_size(type));
    switch (type) {
    case DT_F64: return (float)v.d;
    case DT_I64: return (float)v.l;
    case DT_I32: return (float)v.w;
    case DT_I16: return (float)v.s;
    case DT_I8: return (float)v.b;
    default: return (float)(uint8_t)v.b; // DT_U8, DT_BOOL
    }
}

int tensor_to_f32(float *dst, const struct tensor *t, struct err *e) {
    const char *src = t->data;
    size_t size = dtype_size(t->dtype);
    if (!size) return err_param(e, E_UNSUPPORTED, t->name, "tensor '%s' has a type that sitd does not read", t->name);
    if (t->dtype == DT_F32) {
        if (t->count) memcpy(dst, src, t->count * size);
        return OK;
    }
    if (t->dtype != DT_F16 && t->dtype != DT_BF16) {
        for (size_t i = 0; i < t->count; i++) dst[i] = other_to_f32(t->dtype, src + i * size);
        return OK;
    }
    for (size_t i = 0; i < t->count; i++) {
        uint16_t h;
        memcpy(&h, src + i * size, size);
        dst[i] = t->dtype == DT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
    }
    return OK;
}

static bool is_finite(enum dtype type, const char *at) {
    union { uint16_t h; uint32_t w; double d; } v;
    memcpy(&v, at, dtype_size(type));
    switch (type) {
    case DT_F16: return (v.h & 0x7c00) != 0x7c00;
    case DT_BF16: return (v.h & 0x7f80) != 0x7f80;
    case DT_F32: return (v.w & 0x7f800000u) != 0x7f800000u;
    default: return isfinite((float)v.d);
    }
}

// Loops without a branch, which compilers turn into vector code: billions of weights pass here. n elements, of which any may be infinite or NaN.
static bool any_of_32(const char *at, size_t n) {
    uint32_t found = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t w;
        memcpy(&w, at + 4 * i, 4);
        found |= (w & 0x7f800000u) == 0x7f800000u;
    }
    return found;
}

static bool any_of_16(const char *at, size_t n, uint16_t exponent) {
    uint16_t found = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, at + 2 * i, 2);
        found |= (h & exponent) == exponent;
    }
    return found;
}

static bool all_finite(enum dtype type, const char *at, size_t n) {
    switch (type) {
    case DT_F32: return !any_of_32(at, n);
    case DT_F16: return !any_of_16(at, n, 0x7c00);
    case DT_BF16: return !any_of_16(at, n, 0x7f80);
    default: return false; // look at each
    }
}

bool floats_finite(const float *v, size_t n) { return !any_of_32((const char *)v, n); }

int tensor_check_finite(const struct tensor *t, struct err *e) {
    if (t->dtype != DT_F16 && t->dtype != DT_BF16 && t->dtype != DT_F32 && t->dtype != DT_F64) return OK;
    if (all_finite(t->dtype, t->data, t->count)) return OK;
    for (size_t i = 0, size = dtype_size(t->dtype); i < t->count; i++)
        if (!is_finite(t->dtype, (const char *)t->data + i * size))
            return err_param(e, E_NONFINITE, t->name, "tensor '%s' holds NaN or infinity at element %zu", t->name, i);
    return OK;
}
