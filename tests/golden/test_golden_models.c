// SPDX-License-Identifier: MIT
/*
 * Recorded evaluations of every family and conditioning design, on the reference and on the fast back end, and the rule that a
 * row's bytes do not depend on its company, for the listings that test_engine's models do not reach. tests/golden/README.md says
 * where the cases come from.
 */
#include "core/base/mem.h"
#include "core/engine/replay.h"
#include "core/io/checkpoint.h"
#include "core/model/dit.h"
#include "tests/test.h"

static struct kern *open_kern(const char *backend) {
    struct kern_config config = {.backend = backend, .threads = 2};
    struct kern *k;
    char why[256] = "";
    if (kern_open(&k, &config, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    return k;
}

// Replays a case on both back ends and judges each result.
static void replay_both(const char *model, const char *path,
                        void (*judge)(const char *path, const char *on, const struct replay_result *)) {
    static const char *const backends[] = {"ref", "cpu"};
    for (int i = 0; i < 2; i++) {
        struct kern *k = open_kern(backends[i]);
        struct replay_result result;
        struct replay *r;
        struct err e = {0};
        CHECK_OK(replay_open(&r, k, model, 0, &e), &e);
        CHECK_OK(replay_case(r, path, &result, &e), &e);
        judge(path, k->name, &result);
        replay_close(r);
        kern_close(k);
    }
}

static void judge_forward(const char *path, const char *on, const struct replay_result *r) {
    if (!r->finite || !(r->rel_l2 <= 2e-6)) test_fail(__FILE__, __LINE__, "%s on %s: relative L2 %g", path, on, r->rel_l2);
}
static void forward_agrees(const char *model, const char *path) { replay_both(model, path, judge_forward); }

TEST(golden_dit_forward) { forward_agrees("tests/golden/dit-tiny.safetensors", "tests/golden/dit-tiny.forward.safetensors"); }
TEST(golden_maskdit_forward) {
    forward_agrees("tests/golden/maskdit-tiny.safetensors", "tests/golden/maskdit-tiny.forward.safetensors");
}
TEST(golden_diffusers_forward) {
    forward_agrees("tests/golden/dit-diffusers-tiny", "tests/golden/dit-diffusers-tiny.forward.safetensors");
}

static const char *const designs[BLOCK_COUNT] = {"adaln-zero", "adaln", "cross-attention", "in-context"};

TEST(golden_designs_forward) {
    for (int i = 0; i < BLOCK_COUNT; i++) {
        char model[96], path[96];
        snprintf(model, sizeof model, "tests/golden/designs/%s.safetensors", designs[i]);
        snprintf(path, sizeof path, "tests/golden/designs/%s.forward.safetensors", designs[i]);
        forward_agrees(model, path);
    }
}

// Losses and gradients, recorded in float64.
static void judge_gradients(const char *path, const char *on, const struct replay_result *r) {
    if (!r->finite || !(r->rel_l2 <= 1e-5) || !(r->loss <= 1e-6))
        test_fail(__FILE__, __LINE__, "%s on %s: gradient of %s %g, loss %g", path, on, r->worst, r->rel_l2, r->loss);
}
static void learns_as_recorded(const char *model, const char *path) { replay_both(model, path, judge_gradients); }

TEST(golden_train_sit) {
    static const char *const cases[] = {
        "Linear.velocity.None",
        "GVP.noise.likelihood",
        "VP.score.velocity",
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[96];
        snprintf(path, sizeof path, "tests/golden/train/train.%s.safetensors", cases[i]);
        learns_as_recorded("tests/golden/sit-tiny.safetensors", path);
    }
}
TEST(golden_train_dit) {
    learns_as_recorded("tests/golden/dit-tiny.safetensors", "tests/golden/train/train.dit.hybrid.safetensors");
}

// SiT's loss on the linear path, for every design, by the reading that make_designs.py is.
TEST(golden_train_designs) {
    for (int i = 0; i < BLOCK_COUNT; i++) {
        char model[96], path[96];
        snprintf(model, sizeof model, "tests/golden/designs/%s.safetensors", designs[i]);
        snprintf(path, sizeof path, "tests/golden/designs/%s.train.safetensors", designs[i]);
        learns_as_recorded(model, path);
    }
}

/* ---- rows ---- */

enum { ROWS = 5 };
struct rows { // a network and ROWS inputs for it
    struct kern *k;
    struct arch a;
    struct checkpoint c;
    struct dit *m;
    size_t in, out; // floats a row
    float *x, t[ROWS];
    int32_t y[ROWS];
};

static void open_rows(struct rows *r, const char *model, int heads, int decoder_heads) {
    struct err e = {0};
    *r = (struct rows){.k = open_kern("cpu")};
    CHECK_OK(checkpoint_open(&r->c, model, &e), &e);
    CHECK_OK(arch_infer(&r->a, &r->c.table, &e), &e);
    r->a.num_heads = heads, r->a.decoder.num_heads = decoder_heads;
    if (!r->a.input_size) r->a.input_size = 8;
    size_t side2 = (size_t)r->a.input_size * (size_t)r->a.input_size;
    r->in = side2 * (size_t)r->a.in_channels, r->out = side2 * (size_t)dit_channels(&r->a);
    r->x = mem_array(r->in * ROWS, sizeof *r->x);
    for (size_t i = 0; i < r->in * ROWS; i++) r->x[i] = (float)((i * 2654435761u >> 8) % 2001) / 1000 - 1;
    for (int i = 0; i < ROWS; i++) r->t[i] = 0.17f * (float)i, r->y[i] = i == 3 ? r->a.num_classes : i;
}

static void make_net(struct rows *r) {
    struct err e = {0};
    CHECK_OK(dit_new(&r->m, r->k, &r->a, &r->c.table, dit_channels(&r->a), ROWS, &e), &e);
}

static void close_rows(struct rows *r) {
    dit_free(r->m);
    checkpoint_close(&r->c);
    kern_close(r->k);
    mem_free(r->x);
}

static float *evaluate(struct rows *r, int first, int n) {
    struct err e = {0};
    float *out = mem_array(r->out * (size_t)n, sizeof *out);
    CHECK(out && r->k->upload(r->k, dit_x(r->m), r->x + (size_t)first * r->in, (size_t)n * r->in * sizeof(float)) == 0);
    CHECK_OK(dit_forward(r->m, n, r->t + first, r->y + first, &e), &e);
    CHECK(r->k->download(r->k, out, dit_out(r->m), (size_t)n * r->out * sizeof(float)) == 0);
    return out;
}

static void rows_are_alone(const char *model, int heads, int decoder_heads) {
    struct rows r;
    open_rows(&r, model, heads, decoder_heads);
    make_net(&r);
    float *all = evaluate(&r, 0, ROWS);
    for (int i = 0; i < ROWS; i++) {
        float *one = evaluate(&r, i, 1);
        if (memcmp(one, all + (size_t)i * r.out, r.out * sizeof *one))
            test_fail(__FILE__, __LINE__, "%s: row %d differs when alone", model, i);
        mem_free(one);
    }
    mem_free(all);
    close_rows(&r);
}

TEST(model_rows_are_alone) {
    rows_are_alone("tests/golden/designs/adaln-zero.safetensors", 3, 0);
    rows_are_alone("tests/golden/designs/adaln.safetensors", 2, 0);
    rows_are_alone("tests/golden/designs/cross-attention.safetensors", 3, 0);
    rows_are_alone("tests/golden/designs/in-context.safetensors", 2, 0);
    rows_are_alone("tests/golden/maskdit-tiny.safetensors", 2, 3);
    rows_are_alone("tests/golden/dit-diffusers-tiny", 2, 0);
}

// A null label is no label vector for MaskDiT, and num_classes is its number in every family.
TEST(model_one_hot_null) {
    struct rows r;
    open_rows(&r, "tests/golden/maskdit-tiny.safetensors", 2, 3);
    make_net(&r);
    float *named = evaluate(&r, 3, 1);
    r.y[3] = -1;
    float *none = evaluate(&r, 3, 1);
    CHECK(memcmp(named, none, r.out * sizeof *none) == 0);
    r.y[3] = 0;
    float *other = evaluate(&r, 3, 1);
    CHECK(memcmp(named, other, r.out * sizeof *other) != 0);
    mem_free(named), mem_free(none), mem_free(other);
    close_rows(&r);
}

// A network of reversed time is the same network at 1 - t; its velocity changes sign, its noise does not.
TEST(model_reversed_time) {
    struct rows plain, turned;
    open_rows(&plain, "tests/golden/sit-tiny.safetensors", 2, 0);
    for (int i = 0; i < ROWS; i++) plain.t[i] = 0.125f * (float)i; // exact when turned
    make_net(&plain);
    float *want = evaluate(&plain, 0, ROWS);
    for (int velocity = 0; velocity < 2; velocity++) {
        open_rows(&turned, "tests/golden/sit-tiny.safetensors", 2, 0);
        turned.a.reversed = true, turned.a.negated = velocity;
        for (int i = 0; i < ROWS; i++) turned.t[i] = 1 - 0.125f * (float)i;
        make_net(&turned);
        float *got = evaluate(&turned, 0, ROWS);
        for (size_t i = 0; i < ROWS * plain.out; i++) CHECK(got[i] == (velocity ? -want[i] : want[i]));
        mem_free(got);
        close_rows(&turned);
    }
    mem_free(want);
    close_rows(&plain);
}

TEST(model_refuses_what_does_not_fit) {
    struct rows r;
    struct err e = {0};
    open_rows(&r, "tests/golden/maskdit-tiny.safetensors", 2, 3);
    r.a.mlp_ratio = 2;
    CHECK(dit_new(&r.m, r.k, &r.a, &r.c.table, 4, 1, &e) == E_CONFLICT && strstr(e.param, "mlp.fc"));
    err_clear(&e);
    r.a.mlp_ratio = 4;
    r.a.decoder.depth = 1;
    CHECK(dit_new(&r.m, r.k, &r.a, &r.c.table, 4, 1, &e) == E_CONFLICT && strstr(e.param, "decoder_blocks.1."));
    err_clear(&e);
    r.a.decoder.depth = 2;
    float nan = __builtin_nanf("");
    struct tensor *t = (struct tensor *)tensor_find(&r.c.table, "decoder_blocks.1.mlp.fc2.bias");
    float *bad = mem_dup(t->data, t->bytes);
    bad[3] = nan, t->data = bad;
    CHECK(dit_new(&r.m, r.k, &r.a, &r.c.table, 4, 1, &e) == E_NONFINITE);
    CHECK_STR(e.param, "decoder_blocks.1.mlp.fc2.bias");
    mem_free(bad);
    close_rows(&r);
}
