// SPDX-License-Identifier: MIT
/*
 * tensor: a named, typed, shaped view of bytes in host memory, and conversion to float32.
 *
 * Checkpoint readers (core/io) hand out tables of these; models (core/model) look them up by name and shape. Data is little-endian
 * and row-major (readers straighten strides). Data is borrowed from the table that owns the file's bytes.
 */
#ifndef SITD_TENSOR_H
#define SITD_TENSOR_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"

#define TENSOR_MAX_DIMS 8

enum dtype { DT_F32, DT_F16, DT_BF16, DT_F64, DT_I64, DT_I32, DT_I16, DT_I8, DT_U8, DT_BOOL, DT_OTHER, DT_COUNT };

struct tensor {
    const char *name;
    enum dtype dtype;
    int ndim; // 0: a scalar, one element
    int64_t shape[TENSOR_MAX_DIMS];
    const void *data; // may be NULL when count is 0; aligned to nothing
    size_t bytes, count;
};

struct tensor_table { // owned by whoever filled it (safetensors_open, pt_open)
    struct tensor *tensors;
    int n;
};

const char *dtype_name(enum dtype); // "F32", as safetensors spells it
size_t dtype_size(enum dtype);      // bytes an element; 0 for DT_OTHER

const struct tensor *tensor_find(const struct tensor_table *, const char *name); // NULL if absent
bool tensor_shape_is(const struct tensor *, int ndim, const int64_t *shape);
void tensor_shape_text(const struct tensor *, char *dst, size_t size); // "[3, 64]"
// Converts any numeric dtype to float32. dst holds t->count floats. E_UNSUPPORTED for DT_OTHER.
int tensor_to_f32(float *dst, const struct tensor *, struct err *);
// E_NONFINITE, naming tensor and element, if a float is NaN or infinite or too large for float32. Integers are finite.
int tensor_check_finite(const struct tensor *, struct err *);
bool floats_finite(const float *, size_t n); // none of n is NaN or infinite

float f16_to_f32(uint16_t);
uint16_t f32_to_f16(float); // round to nearest even
float bf16_to_f32(uint16_t);
uint16_t f32_to_bf16(float); // round to nearest even; NaN stays NaN

#endif
