// SPDX-License-Identifier: MIT
// The three files hold one network: sit-tiny.pt in its "ema" ("model" is ema + 0.5), the safetensors as it is, the third rounded
// to bfloat16.
#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "tests/test.h"

static void open_ok(struct checkpoint *c, const char *path) {
    struct err e = {0};
    CHECK_OK(checkpoint_open(c, path, &e), &e);
}

TEST(checkpoint_ema_equals_safetensors) {
    struct checkpoint pt, st;
    struct arch a, b;
    struct err e = {0};
    open_ok(&pt, "tests/golden/sit-tiny.pt");
    open_ok(&st, "tests/golden/sit-tiny.safetensors");
    CHECK_STR(pt.format, "torch zip");
    CHECK_STR(pt.chosen, "ema");
    CHECK_STR(st.format, "safetensors");
    CHECK_STR(st.chosen, "");
    CHECK(pt.table.n == 32 && st.table.n == 32);
    for (int i = 0; i < pt.table.n; i++) {
        const struct tensor *p = &pt.table.tensors[i], *s = tensor_find(&st.table, p->name);
        CHECK(s && p->dtype == DT_F32 && s->dtype == DT_F32 && tensor_shape_is(s, p->ndim, p->shape));
        CHECK(p->bytes == s->bytes && memcmp(p->data, s->data, p->bytes) == 0);
    }
    CHECK_OK(arch_infer(&a, &pt.table, &e), &e);
    CHECK_OK(arch_infer(&b, &st.table, &e), &e);
    CHECK(a.hidden_size == 64 && a.depth == b.depth && a.input_size == 8 && a.learn_sigma);
    checkpoint_close(&pt);
    checkpoint_close(&st);
}

TEST(checkpoint_bare_bf16) {
    struct checkpoint bf, st;
    struct err e = {0};
    open_ok(&bf, "tests/golden/sit-tiny-bf16-bare.pt");
    open_ok(&st, "tests/golden/sit-tiny.safetensors");
    CHECK_STR(bf.chosen, "");
    CHECK(bf.table.n == 32);
    for (int i = 0; i < bf.table.n; i++) {
        const struct tensor *b = &bf.table.tensors[i], *s = tensor_find(&st.table, b->name);
        CHECK(s && b->dtype == DT_BF16 && b->count == s->count);
        float *x = mem_array(b->count, 4), *y = mem_array(b->count, 4);
        CHECK_OK(tensor_to_f32(x, b, &e), &e);
        CHECK_OK(tensor_to_f32(y, s, &e), &e);
        for (size_t k = 0; k < b->count; k++) CHECK(f32_to_bf16(y[k]) == f32_to_bf16(x[k]));
        mem_free(x);
        mem_free(y);
    }
    checkpoint_close(&bf);
    checkpoint_close(&st);
}

TEST(checkpoint_meta_text) {
    struct checkpoint pt, st;
    open_ok(&pt, "tests/golden/sit-tiny.pt");
    open_ok(&st, "tests/golden/sit-tiny.safetensors");
    CHECK_STR(checkpoint_meta(&pt, "num_heads"), "2");
    CHECK_STR(checkpoint_meta(&pt, "model"), "custom");
    CHECK_STR(checkpoint_meta(&pt, "learn_sigma"), "true");
    CHECK(!checkpoint_meta(&pt, "opt") && !checkpoint_meta(&pt, "ema"));
    CHECK_STR(checkpoint_meta(&st, "family"), "sit");
    checkpoint_close(&pt);
    checkpoint_close(&st);
}

TEST(checkpoint_no_such_file) {
    struct checkpoint c;
    struct err e = {0};
    CHECK(checkpoint_open(&c, "tests/golden/none.pt", &e) == E_NOTFOUND && strstr(e.text, "none.pt"));
    checkpoint_close(&c);
}
