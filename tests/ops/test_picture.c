// SPDX-License-Identifier: MIT
// Convolutions, group norm and wide attention: the cpu back end against the reference, against itself on other threads and in
// pieces.
#include <math.h>

#include "kernels/backend.h"
#include "tests/test.h"

static struct kern *open_kern(const char *backend, int threads) {
    struct kern *k;
    char why[256] = "";
    struct kern_config cfg = {.backend = backend, .act = KERN_F32, .threads = threads};
    if (kern_open(&k, &cfg, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s: %s", backend, why);
    return k;
}

static float *numbers(size_t n, uint32_t seed, float scale) {
    float *p = malloc(n * sizeof *p + 64);
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        p[i] = scale * ((float)(seed >> 8) / 8388608.0f - 1);
    }
    return p;
}

static float *on_device(struct kern *k, const float *host, size_t n) {
    void *p;
    CHECK(k->alloc(k, n * sizeof *host, &p) == 0);
    CHECK(k->upload(k, p, host, n * sizeof *host) == 0);
    return p;
}

static double distance(const float *a, const float *b, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) {
        num += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        den += (double)b[i] * (double)b[i];
    }
    return sqrt(num / den);
}

static const struct kern_conv_spec convs[] = {
    // kind, out, in, side, H, W, norm, act, add, x_f32, y_f32
    {KERN_CONV, 64, 32, 3, 16, 16, true, KERN_SILU, false, false, false},       {KERN_CONV, 32, 64, 3, 7, 9, true, KERN_SILU, true, false, false},
    {KERN_CONV, 48, 4, 3, 5, 3, false, KERN_NONE, false, false, false},         {KERN_CONV, 3, 32, 3, 40, 40, true, KERN_SILU, false, false, false},
    {KERN_CONV, 96, 32, 1, 6, 6, true, KERN_NONE, false, false, false},         {KERN_CONV, 32, 20, 1, 33, 5, false, KERN_NONE, true, false, false},
    {KERN_CONV, 4, 4, 1, 4, 4, false, KERN_NONE, false, false, false},          {KERN_CONV, 8, 16, 3, 1, 1, false, KERN_SILU, false, false, false},
    {KERN_CONV, 128, 128, 3, 64, 64, true, KERN_SILU, true, false, false},      {KERN_CONV, 40, 24, 3, 19, 12, true, KERN_SILU, false, false, false},
    {KERN_CONV_DOWN, 32, 32, 3, 16, 12, false, KERN_NONE, false, false, false}, {KERN_CONV_DOWN, 24, 8, 3, 70, 6, true, KERN_SILU, false, false, false},
    {KERN_CONV_DOWN, 16, 16, 3, 2, 2, false, KERN_NONE, false, false, false},   {KERN_CONV_UP, 32, 32, 3, 8, 8, false, KERN_NONE, false, false, false},
    {KERN_CONV_UP, 24, 40, 3, 35, 5, false, KERN_NONE, true, false, false},     {KERN_CONV_UP, 16, 8, 3, 1, 1, true, KERN_SILU, false, false, false},
    {KERN_CONV_UP, 64, 128, 3, 24, 24, false, KERN_NONE, false, false, false},
};
enum { CONVS = sizeof convs / sizeof *convs };

static size_t out_count(const struct kern_conv_spec *s) {
    int H, W;
    kern_conv_out(s, &H, &W);
    return (size_t)(H * W) * (size_t)s->out;
}

enum { PICTURES = 3 };

// The outputs of the first `pictures` of PICTURES on a back end; caller frees. pieces: strips one call at a time, the last first
static float *run_conv(struct kern *k, const struct kern_conv_spec *s, int pictures, bool pieces) {
    size_t in = (size_t)s->in, out = (size_t)s->out, nx = PICTURES * (size_t)(s->height * s->width) * in,
           ny = PICTURES * out_count(s), taps = (size_t)(s->side * s->side);
    float *hx = numbers(nx, 1, 2), *hy = numbers(ny, 2, 1), *w = numbers(out * in * taps, 3, 0.2f), *b = numbers(out, 4, 1),
          *hc = numbers(PICTURES * 2 * in, 5, 1);
    float *x = on_device(k, hx, nx), *y = on_device(k, hy, ny), *coef = on_device(k, hc, PICTURES * 2 * in);
    struct kern_conv *l;
    if (k->conv_new(k, s, w, b, &l)) test_fail(__FILE__, __LINE__, "%s: %s", k->name, k->why);
    int strips = k->conv_strips(k, l);
    CHECK(strips >= 1);
    for (int i = strips - 1; pieces && i >= 0; i--) CHECK(k->conv(k, l, y, x, s->norm ? coef : NULL, pictures, i, 1) == 0);
    if (!pieces) CHECK(k->conv(k, l, y, x, s->norm ? coef : NULL, pictures, 0, strips) == 0);
    CHECK(k->download(k, hy, y, ny * sizeof *hy) == 0);
    k->conv_free(k, l);
    k->free(k, x), k->free(k, y), k->free(k, coef);
    free(hx), free(w), free(b), free(hc);
    return hy;
}

static void check_convs(void) {
    struct kern *cpu = open_kern("cpu", 1), *three = open_kern("cpu", 3), *ref = open_kern("ref", 1);
    for (int i = 0; i < CONVS; i++) {
        const struct kern_conv_spec *s = &convs[i];
        size_t n = PICTURES * out_count(s);
        float *want = run_conv(ref, s, PICTURES, false), *one = run_conv(cpu, s, PICTURES, false),
              *many = run_conv(three, s, PICTURES, false), *pieces = run_conv(three, s, PICTURES, true),
              *alone = run_conv(cpu, s, 1, false);
        double d = distance(one, want, n);
        if (!(d < 1e-6))
            test_fail(__FILE__, __LINE__, "case %d (%d from %d channels, %d x %d): off by %.3g", i, s->out, s->in, s->height,
                      s->width, d);
        if (memcmp(one, many, n * sizeof *one)) test_fail(__FILE__, __LINE__, "case %d: three threads give other bytes", i);
        if (memcmp(one, pieces, n * sizeof *one)) test_fail(__FILE__, __LINE__, "case %d: strips one by one give other bytes", i);
        if (memcmp(one, alone, n / PICTURES * sizeof *one)) test_fail(__FILE__, __LINE__, "case %d: company gives other bytes", i);
        free(want), free(one), free(many), free(pieces), free(alone);
    }
    kern_close(cpu), kern_close(three), kern_close(ref);
}

TEST(picture_convolutions) { check_convs(); }
TEST(picture_convolutions_avx2) {
    setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
    check_convs();
}

TEST(picture_conv_refusals) {
    struct kern *cpu = open_kern("cpu", 1), *ref = open_kern("ref", 1);
    static const struct kern_conv_spec bad[] = {
        {KERN_CONV, 8, 8, 2, 8, 8, false, KERN_NONE, false, false, false},       {KERN_CONV, 0, 8, 3, 8, 8, false, KERN_NONE, false, false, false},
        {KERN_CONV_DOWN, 8, 8, 3, 7, 8, false, KERN_NONE, false, false, false},  {KERN_CONV_UP, 8, 8, 1, 8, 8, false, KERN_NONE, false, false, false},
        {KERN_CONV, 8, 8, 3, 8, 1 << 20, false, KERN_NONE, false, false, false}, {KERN_CONV, 8, 8, 3, 8, 8, false, KERN_GELU_TANH, false, false, false},
    };
    float w[8 * 8 * 9] = {0};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct kern_conv *l = (struct kern_conv *)w;
        CHECK(cpu->conv_new(cpu, &bad[i], w, NULL, &l) == KERN_EUNSUPPORTED && !l && cpu->why[0]);
        CHECK(ref->conv_new(ref, &bad[i], w, NULL, &l) == KERN_EUNSUPPORTED && !l && ref->why[0]);
    }
    kern_close(cpu), kern_close(ref);
}

static float *run_norm(struct kern *k, size_t n, int C, int groups) {
    size_t c = (size_t)C, m = PICTURES * 2 * c;
    float *hx = numbers(PICTURES * n * c, 7, 1), *g = numbers(c, 8, 1), *b = numbers(c, 9, 1), *coef = malloc(m * sizeof *coef);
    for (size_t i = 0; i < PICTURES * n * c; i++) hx[i] += 30; // a mean that float32 sums would drown in
    float *x = on_device(k, hx, PICTURES * n * c), *gamma = on_device(k, g, c), *beta = on_device(k, b, c);
    void *sums, *out;
    CHECK(k->alloc(k, KERN_NORM_PARTS * m * sizeof(double), &sums) == 0 && k->alloc(k, m * sizeof(float), &out) == 0);
    CHECK(k->group_norm(k, out, sums, x, gamma, beta, PICTURES, n, C, groups, 1e-6f) == 0);
    CHECK(k->download(k, coef, out, m * sizeof *coef) == 0);
    k->free(k, x), k->free(k, gamma), k->free(k, beta), k->free(k, sums), k->free(k, out);
    free(hx), free(g), free(b);
    return coef;
}

static float *run_wide(struct kern *k, int T, int C) {
    size_t n = PICTURES * (size_t)T * (size_t)C;
    float *h = numbers(3 * n, 11, 2), *o = malloc(n * sizeof *o), *qkv = on_device(k, h, 3 * n), *out = on_device(k, h, n);
    struct kern_wide *a;
    if (k->wide_new(k, T, C, PICTURES, &a)) test_fail(__FILE__, __LINE__, "%s: %s", k->name, k->why);
    int strips = k->wide_strips(k, a), half = strips / 2;
    CHECK(k->wide(k, a, out, qkv, PICTURES, half, strips - half) == 0);
    if (half) CHECK(k->wide(k, a, out, qkv, PICTURES, 0, half) == 0);
    CHECK(k->download(k, o, out, n * sizeof *o) == 0);
    k->wide_free(k, a);
    k->free(k, qkv), k->free(k, out);
    free(h);
    return o;
}

static void check_rest(void) {
    static const struct { int n, C, groups; } norms[] = {{256, 32, 8}, {1, 8, 8}, {77, 24, 2}, {5000, 64, 32}, {63, 20, 20}};
    static const struct { int T, C; } wides[] = {{64, 64}, {1, 16}, {100, 24}, {256, 512}, {65, 7}};
    struct kern *cpu = open_kern("cpu", 1), *three = open_kern("cpu", 3), *ref = open_kern("ref", 1);
    for (size_t i = 0; i < sizeof norms / sizeof *norms; i++) {
        size_t n = (size_t)norms[i].n, c = PICTURES * 2 * (size_t)norms[i].C;
        float *want = run_norm(ref, n, norms[i].C, norms[i].groups), *one = run_norm(cpu, n, norms[i].C, norms[i].groups);
        float *many = run_norm(three, n, norms[i].C, norms[i].groups);
        double d = distance(one, want, c);
        if (!(d < 1e-6)) test_fail(__FILE__, __LINE__, "group norm %zu: off by %.3g", i, d);
        CHECK(!memcmp(one, many, c * sizeof *one));
        free(want), free(one), free(many);
    }
    for (size_t i = 0; i < sizeof wides / sizeof *wides; i++) {
        size_t n = PICTURES * (size_t)wides[i].T * (size_t)wides[i].C;
        float *want = run_wide(ref, wides[i].T, wides[i].C), *one = run_wide(cpu, wides[i].T, wides[i].C),
              *many = run_wide(three, wides[i].T, wides[i].C);
        double d = distance(one, want, n);
        if (!(d < 2e-6)) test_fail(__FILE__, __LINE__, "attention %zu: off by %.3g", i, d);
        CHECK(!memcmp(one, many, n * sizeof *one));
        free(want), free(one), free(many);
    }
    kern_close(cpu), kern_close(three), kern_close(ref);
}

TEST(picture_norms_and_attention) { check_rest(); }
TEST(picture_norms_and_attention_avx2) {
    setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
    check_rest();
}
