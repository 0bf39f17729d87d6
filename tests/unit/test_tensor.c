// SPDX-License-Identifier: MIT
#include <math.h>

#include "core/tensor/tensor.h"
#include "tests/test.h"

TEST(f16_all_values_round_trip) {
    for (uint32_t h = 0; h < 65536; h++) {
        float f = f16_to_f32((uint16_t)h);
        bool nan = (h & 0x7c00) == 0x7c00 && (h & 0x3ff);
        CHECK(nan ? isnan(f) && (f32_to_f16(f) & 0x7fff) > 0x7c00 : f32_to_f16(f) == h);
    }
    CHECK(f16_to_f32(0x3c00) == 1 && f16_to_f32(0xc000) == -2 && f16_to_f32(1) == 0x1p-24f && f16_to_f32(0x7bff) == 65504 &&
          isinf(f16_to_f32(0x7c00)));
}

TEST(f16_rounds_to_nearest_even) {
    for (uint32_t h = 0; h < 0x7bff; h++) { // between each value and the next: below, at and above the middle
        float a = f16_to_f32((uint16_t)h), b = f16_to_f32((uint16_t)(h + 1)), middle = (a + b) / 2;
        CHECK(f32_to_f16(middle) == (h % 2 ? h + 1 : h));
        CHECK(f32_to_f16(nextafterf(middle, -1e30f)) == h && f32_to_f16(nextafterf(middle, 1e30f)) == h + 1);
        CHECK(f32_to_f16(-middle) == (0x8000 | (h % 2 ? h + 1 : h)));
    }
    CHECK(f32_to_f16(65519.996f) == 0x7bff && f32_to_f16(65520) == 0x7c00 && f32_to_f16(1e30f) == 0x7c00 &&
          f32_to_f16(-INFINITY) == 0xfc00);
    CHECK(f32_to_f16(0x1p-25f) == 0 && f32_to_f16(0x1.000002p-25f) == 1 && f32_to_f16(1e-30f) == 0 &&
          f32_to_f16(-0.0f) == 0x8000);
}

TEST(bf16_rounds_to_nearest_even) {
    for (uint32_t h = 0; h < 0x7f80; h++) {
        float a = bf16_to_f32((uint16_t)h);
        CHECK(f32_to_bf16(a) == h);
        uint32_t bits = h << 16 | 0x8000;
        float middle;
        memcpy(&middle, &bits, 4);
        CHECK(f32_to_bf16(middle) == (h % 2 ? h + 1 : h) && f32_to_bf16(nextafterf(middle, 0)) == h);
    }
    CHECK(isnan(bf16_to_f32(f32_to_bf16(NAN))) && isinf(bf16_to_f32(f32_to_bf16(INFINITY))) && f32_to_bf16(3.4e38f) == 0x7f80);
    uint32_t quiet = 0x7f800001; // a NaN whose payload would be cut away
    float nan;
    memcpy(&nan, &quiet, 4);
    CHECK(isnan(bf16_to_f32(f32_to_bf16(nan))));
}

static float converted(enum dtype t, const void *data) {
    char unaligned[16];
    memcpy(unaligned + 1, data, dtype_size(t));
    struct tensor x = {.name = "x", .dtype = t, .data = unaligned + 1, .bytes = dtype_size(t), .count = 1};
    struct err e = {0};
    float f = -1;
    CHECK_OK(tensor_to_f32(&f, &x, &e), &e);
    return f;
}

TEST(tensor_to_f32_types) {
    double d = -2.5;
    int64_t l = -(1LL << 40);
    int32_t i = -70000;
    int16_t s = -300;
    int8_t b = -3;
    uint8_t u = 250;
    CHECK(converted(DT_F64, &d) == -2.5f && converted(DT_I64, &l) == -0x1p40f && converted(DT_I32, &i) == -70000 &&
          converted(DT_I16, &s) == -300);
    CHECK(converted(DT_I8, &b) == -3 && converted(DT_U8, &u) == 250 && converted(DT_BOOL, &u) == 250 &&
          converted(DT_BF16, "\x80\x3f") == 1);
    CHECK(isnan(converted(DT_F32, "\0\0\xc0\x7f")));
    struct tensor x = {.name = "odd", .dtype = DT_OTHER, .data = &d, .count = 1};
    struct err e = {0};
    float f;
    CHECK(tensor_to_f32(&f, &x, &e) == E_UNSUPPORTED);
    CHECK_STR(e.param, "odd");
}

TEST(tensor_shapes) {
    struct tensor t[] = {{.name = "a", .ndim = 2, .shape = {3, 64}}, {.name = "b"}};
    struct tensor_table table = {t, 2};
    char text[64], small[6];
    tensor_shape_text(&t[0], text, sizeof text);
    CHECK_STR(text, "[3, 64]");
    tensor_shape_text(&t[0], small, sizeof small);
    CHECK(strlen(small) < sizeof small);
    tensor_shape_text(&t[1], text, sizeof text);
    CHECK_STR(text, "[]");
    CHECK(tensor_find(&table, "b") == &t[1] && !tensor_find(&table, "c"));
    CHECK(tensor_shape_is(&t[0], 2, (int64_t[]){3, 64}) && !tensor_shape_is(&t[0], 2, (int64_t[]){64, 3}) &&
          tensor_shape_is(&t[1], 0, NULL));
}

TEST(tensor_finite_as_float32) {
    static const struct {
        enum dtype type;
        uint64_t bits;
        bool finite;
    } values[] = {
        {DT_F32, 0x7f7fffff, true}, {DT_F32, 0x7f800000, false}, {DT_F32, 0xffc00000, false}, {DT_F16, 0x7bff, true},
        {DT_F16, 0xfc00, false}, {DT_F16, 0x7e00, false}, {DT_BF16, 0x7f7f, true}, {DT_BF16, 0x7f80, false}, {DT_BF16, 0xffc0, false},
        {DT_F64, 0x3ff0000000000000, true}, {DT_F64, 0x7ff8000000000000, false}, {DT_F64, 0x7e37e43c8800759c, false}, // 1e300
        {DT_I64, 0x7ff8000000000000, true}, {DT_I16, 0x7c00, true},
    };
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        char unaligned[40] = {0};
        size_t size = dtype_size(values[i].type);
        struct err e = {0};
        memcpy(unaligned + 1 + 2 * size, &values[i].bits, size);
        struct tensor t = {.name = "w", .dtype = values[i].type, .data = unaligned + 1, .bytes = 3 * size, .count = 3};
        CHECK(tensor_check_finite(&t, &e) == (values[i].finite ? OK : E_NONFINITE));
        CHECK_STR(e.param, values[i].finite ? "" : "w");
        CHECK(values[i].finite || strstr(e.text, "element 2"));
    }
}
