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

int tensor_to_f32(float *dst, const struct tensor *t, struct err *e) {
    const char *src = t->data;
    for (size_t i = 0; i < t->count; i++) {
        union { uint16_t h; float f; double d; int64_t l; int32_t w; int16_t s; int8_t b; } v;
        memcpy(&v, src + i * dtype_size(t->dtype), dtype_size(t->dtype));
        switch (t->dtype) {
        case DT_F32: dst[i] = v.f; break;
        case DT_F16: dst[i] = f16_to_f32(v.h); break;
        case DT_BF16: dst[i] = bf16_to_f32(v.h); break;
        case DT_F64: dst[i] = (float)v.d; break;
        case DT_I64: dst[i] = (float)v.l; break;
        case DT_I32: dst[i] = (float)v.w; break;
        case DT_I16: dst[i] = (float)v.s; break;
        case DT_I8: dst[i] = (float)v.b; break;
        case DT_U8:
        case DT_BOOL: dst[i] = (float)(uint8_t)v.b; break;
        default: return err_param(e, E_UNSUPPORTED, t->name, "tensor '%s' has a type that sitd does not read", t->name);
        }
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

int tensor_check_finite(const struct tensor *t, struct err *e) {
    if (t->dtype != DT_F16 && t->dtype != DT_BF16 && t->dtype != DT_F32 && t->dtype != DT_F64) return OK;
    for (size_t i = 0, size = dtype_size(t->dtype); i < t->count; i++)
        if (!is_finite(t->dtype, (const char *)t->data + i * size))
            return err_param(e, E_NONFINITE, t->name, "tensor '%s' holds NaN or infinity at element %zu", t->name, i);
    return OK;
}
