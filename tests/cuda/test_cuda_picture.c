// SPDX-License-Identifier: MIT
// Pictures on the GPU: convolutions, norms and wide attention against the reference, pictures against themselves in other company, the whole
// autoencoder. Needs a GPU.
#include <math.h>

#include "core/model/vae.h"
#include "kernels/backend.h"
#include "tests/published_vae.h"
#include "tests/test.h"

enum { PICTURES = 3 };

static struct kern *open_kern(const char *backend, enum kern_dtype act) {
    struct kern *k;
    char why[256] = "";
    struct kern_config cfg = {.backend = backend, .act = act};
    if (kern_open(&k, &cfg, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s: %s", backend, why);
    return k;
}

// n numbers that both types hold exactly
static float *numbers(size_t n, uint32_t seed, float scale) {
    float *p = malloc(n * sizeof *p + 64);
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        p[i] = kern_bf16_to_f32(kern_f32_to_bf16(scale * ((float)(seed >> 8) / 8388608.0f - 1)));
    }
    return p;
}

static void *on_device(struct kern *k, const float *host, size_t n, enum kern_dtype t) {
    void *p, *raw = malloc(n * 4 + 64);
    for (size_t i = 0; i < n; i++) kern_store(t, raw, i, host[i]);
    CHECK(k->alloc(k, n * 4, &p) == 0 && k->upload(k, p, raw, n * kern_dtype_size(t)) == 0);
    free(raw);
    return p;
}

static void from_device(struct kern *k, float *host, const void *p, size_t n, enum kern_dtype t) {
    void *raw = malloc(n * 4 + 64);
    CHECK(k->download(k, raw, p, n * kern_dtype_size(t)) == 0);
    for (size_t i = 0; i < n; i++) host[i] = kern_load(t, raw, i);
    free(raw);
}

static double distance(const float *a, const float *b, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) num += pow((double)a[i] - (double)b[i], 2), den += pow((double)b[i], 2);
    return sqrt(num / den);
}

#define PLAIN KERN_NONE
#define SILU KERN_SILU
static const struct kern_conv_spec convs[] = {
    // kind, out, in, side, H, W, norm, act, add, x_f32, y_f32
    {KERN_CONV, 64, 32, 3, 16, 16, true, SILU, false, false, false},   {KERN_CONV, 32, 64, 3, 7, 9, true, SILU, true, false, false},
    {KERN_CONV, 48, 4, 3, 5, 3, false, PLAIN, false, true, false},     {KERN_CONV, 3, 32, 3, 40, 40, true, SILU, false, false, true},
    {KERN_CONV, 96, 32, 1, 6, 6, true, PLAIN, false, false, false},    {KERN_CONV, 32, 20, 1, 33, 5, false, PLAIN, true, false, false},
    {KERN_CONV, 4, 4, 1, 4, 4, false, PLAIN, false, true, true},       {KERN_CONV, 8, 16, 3, 1, 1, false, SILU, false, false, false},
    {KERN_CONV, 128, 128, 3, 24, 40, true, SILU, true, false, false},  {KERN_CONV, 40, 24, 3, 19, 12, true, SILU, false, false, false},
    {KERN_CONV, 256, 200, 3, 17, 9, true, SILU, true, false, false},   {KERN_CONV, 136, 512, 1, 9, 31, false, PLAIN, true, false, false},
    {KERN_CONV, 20, 64, 3, 18, 10, true, SILU, true, false, true},     {KERN_CONV_DOWN, 32, 32, 3, 16, 12, false, PLAIN, false, false, false},
    {KERN_CONV_DOWN, 24, 8, 3, 70, 6, true, SILU, false, false, false}, {KERN_CONV_DOWN, 16, 16, 3, 2, 2, false, PLAIN, false, false, false},
    {KERN_CONV_UP, 32, 32, 3, 8, 8, false, PLAIN, false, false, false}, {KERN_CONV_UP, 24, 40, 3, 35, 5, false, PLAIN, true, false, false},
    {KERN_CONV_UP, 16, 8, 3, 1, 1, true, SILU, false, false, false},   {KERN_CONV_UP, 136, 128, 3, 24, 24, false, PLAIN, false, false, false},
};
enum { CONVS = sizeof convs / sizeof *convs };

static size_t out_count(const struct kern_conv_spec *s) {
    int H, W;
    kern_conv_out(s, &H, &W);
    return (size_t)(H * W) * (size_t)s->out;
}

// The outputs of pictures first .. first+n-1 of PICTURES; caller frees
static float *run_conv(struct kern *k, const struct kern_conv_spec *s, int first, int n) {
    size_t in = (size_t)s->in, out = (size_t)s->out, nx = (size_t)(s->height * s->width) * in, ny = out_count(s),
           taps = (size_t)(s->side * s->side), at = (size_t)first, m = (size_t)n;
    float *hx = numbers(PICTURES * nx, 1, 2), *hy = numbers(PICTURES * ny, 2, 1), *w = numbers(out * in * taps, 3, 0.2f),
          *b = numbers(out, 4, 1), *hc = numbers(PICTURES * 2 * in, 5, 1);
    enum kern_dtype xt = s->x_f32 ? KERN_F32 : k->picture, yt = s->y_f32 ? KERN_F32 : k->picture;
    void *x = on_device(k, hx + at * nx, m * nx, xt), *y = on_device(k, hy + at * ny, m * ny, yt),
         *coef = on_device(k, hc + at * 2 * in, m * 2 * in, KERN_F32);
    struct kern_conv *l;
    if (k->conv_new(k, s, w, b, &l)) test_fail(__FILE__, __LINE__, "%s: %s", k->name, k->why);
    if (k->conv(k, l, y, x, s->norm ? coef : NULL, n, 0, k->conv_strips(k, l))) test_fail(__FILE__, __LINE__, "%s", k->why);
    from_device(k, hy, y, m * ny, yt);
    k->conv_free(k, l);
    k->free(k, x), k->free(k, y), k->free(k, coef);
    free(hx), free(w), free(b), free(hc);
    return hy;
}

// Where the first outputs that are far off lie
static void show(const struct kern_conv_spec *s, const float *got, const float *want, size_t n) {
    size_t shown = 0, far = 0, N = (size_t)s->out;
    for (size_t i = 0; i < n; i++) {
        if (fabsf(got[i] - want[i]) <= 0.05f * (1 + fabsf(want[i]))) continue;
        far++;
        if (shown++ < 4) printf("        pixel %zu, output %zu: %g, not %g\n", i / N, i % N, (double)got[i], (double)want[i]);
    }
    printf("        %zu of %zu are far off\n", far, n);
}

static void check_convs(enum kern_dtype act, double most) {
    struct kern *cuda = open_kern("cuda", act), *ref = open_kern("ref", KERN_F32);
    int failed = 0;
    double worst = 0;
    for (int i = 0; i < CONVS; i++) {
        const struct kern_conv_spec *s = &convs[i];
        size_t one = out_count(s);
        float *want = run_conv(ref, s, 0, PICTURES), *got = run_conv(cuda, s, 0, PICTURES), *alone = run_conv(cuda, s, 1, 1);
        double d = distance(got, want, PICTURES * one);
        bool same = !memcmp(alone, got + one, one * sizeof(float));
        if (d > worst) worst = d;
        if (!(d < most) || !same)
            failed++, printf("    convolution %d (kind %d, %d from %d channels, %d x %d): off by %.3g%s\n", i, s->kind, s->out, s->in,
                             s->height, s->width, d, same ? "" : ", depends on company"),
                show(s, got, want, PICTURES * one);
        free(want), free(got), free(alone);
    }
    printf("    convolutions: at most %.3g\n", worst);
    kern_close(cuda), kern_close(ref);
    CHECK(failed == 0);
}

TEST_LIMIT(cuda_picture_convolutions_f32, 120) { check_convs(KERN_F32, 2e-6); }
TEST_LIMIT(cuda_picture_convolutions_bf16, 120) { check_convs(KERN_BF16, 4e-3); }

static float *run_norm(struct kern *k, size_t n, int C, int groups, int pictures) {
    size_t c = (size_t)C, m = (size_t)pictures * 2 * c;
    float *hx = numbers(PICTURES * n * c, 7, 1), *g = numbers(c, 8, 1), *b = numbers(c, 9, 1), *coef = malloc(m * sizeof *coef);
    for (size_t i = 0; i < PICTURES * n * c; i++) hx[i] = kern_bf16_to_f32(kern_f32_to_bf16(hx[i] + 2));
    void *x = on_device(k, hx, (size_t)pictures * n * c, k->picture), *gamma = on_device(k, g, c, KERN_F32),
         *beta = on_device(k, b, c, KERN_F32), *sums, *out;
    CHECK(k->alloc(k, KERN_NORM_PARTS * m * sizeof(double), &sums) == 0 && k->alloc(k, m * sizeof(float), &out) == 0);
    CHECK(k->group_norm(k, out, sums, x, gamma, beta, pictures, n, C, groups, 1e-6f) == 0);
    from_device(k, coef, out, m, KERN_F32);
    k->free(k, x), k->free(k, gamma), k->free(k, beta), k->free(k, sums), k->free(k, out);
    free(hx), free(g), free(b);
    return coef;
}

static float *run_wide(struct kern *k, int T, int C, int pictures) {
    size_t one = (size_t)T * (size_t)C, n = (size_t)pictures * one;
    float *h = numbers(3 * PICTURES * one, 11, 2), *o = malloc(n * sizeof *o);
    void *qkv = on_device(k, h, 3 * n, k->picture), *out = on_device(k, h, n, k->picture);
    struct kern_wide *a;
    if (k->wide_new(k, T, C, pictures, &a)) test_fail(__FILE__, __LINE__, "%s: %s", k->name, k->why);
    if (k->wide(k, a, out, qkv, pictures, 0, k->wide_strips(k, a))) test_fail(__FILE__, __LINE__, "%s", k->why);
    from_device(k, o, out, n, k->picture);
    k->wide_free(k, a);
    k->free(k, qkv), k->free(k, out);
    free(h);
    return o;
}

static void check_rest(enum kern_dtype act, double norm_most, double wide_most) {
    static const struct { int n, C, groups; } norms[] = {{256, 32, 8}, {1, 8, 8}, {77, 24, 2}, {5000, 128, 32}, {63, 20, 20}, {90, 3000, 4}};
    static const struct { int T, C; } wides[] = {{64, 64}, {1, 16}, {100, 24}, {256, 512}, {65, 7}, {1096, 40}};
    struct kern *cuda = open_kern("cuda", act), *ref = open_kern("ref", KERN_F32);
    for (size_t i = 0; i < sizeof norms / sizeof *norms; i++) {
        size_t n = (size_t)norms[i].n, c = 2 * (size_t)norms[i].C;
        if (act == KERN_BF16 && n == 1) continue; // nothing varies: only rounding is left
        float *want = run_norm(ref, n, norms[i].C, norms[i].groups, PICTURES), *got = run_norm(cuda, n, norms[i].C, norms[i].groups, PICTURES),
              *alone = run_norm(cuda, n, norms[i].C, norms[i].groups, 1);
        double d = distance(got, want, PICTURES * c);
        if (!(d < norm_most)) test_fail(__FILE__, __LINE__, "group norm %zu: off by %.3g", i, d);
        CHECK(!memcmp(got, alone, c * sizeof *got));
        free(want), free(got), free(alone);
    }
    for (size_t i = 0; i < sizeof wides / sizeof *wides; i++) {
        size_t n = (size_t)wides[i].T * (size_t)wides[i].C;
        float *want = run_wide(ref, wides[i].T, wides[i].C, PICTURES), *got = run_wide(cuda, wides[i].T, wides[i].C, PICTURES),
              *alone = run_wide(cuda, wides[i].T, wides[i].C, 1);
        double d = distance(got, want, PICTURES * n);
        printf("    attention of %d x %d: off by %.3g\n", wides[i].T, wides[i].C, d);
        if (!(d < wide_most)) test_fail(__FILE__, __LINE__, "attention %zu: off by %.3g", i, d);
        CHECK(!memcmp(got, alone, n * sizeof *got));
        free(want), free(got), free(alone);
    }
    kern_close(cuda), kern_close(ref);
}

TEST_LIMIT(cuda_picture_norms_and_attention_f32, 120) { check_rest(KERN_F32, 1e-6, 5e-6); }
TEST_LIMIT(cuda_picture_norms_and_attention_bf16, 120) { check_rest(KERN_BF16, 2e-5, 6e-3); }

/* ---- the autoencoder ---- */

enum { SIDE = 16, FACTOR = 8, LATENT = 4 * SIDE * SIDE, PICTURE = 3 * SIDE * FACTOR * SIDE * FACTOR };

static struct vae *make(struct kern *k, const struct vae_weights *w) {
    struct vae_size size = {.height = SIDE, .width = SIDE, .decode = true, .encode = true};
    struct vae *v;
    struct err e = {0};
    CHECK_OK(vae_new(&v, k, &published_vae, &w->table, &size, &e), &e);
    return v;
}

// bfloat16 beside float32 on the GPU, float32 there beside the cpu back end; eight pictures together beside each alone
TEST_LIMIT(cuda_vae_of_the_published_size, 300) {
    struct kern *cpu = open_kern("cpu", KERN_F32), *f32 = open_kern("cuda", KERN_F32), *bf16 = open_kern("cuda", KERN_BF16);
    struct vae_weights w;
    struct err e = {0};
    enum { N = 8 };
    float *z = numbers(N * LATENT, 3, 3), *want = malloc(PICTURE * 4), *exact = malloc(PICTURE * 4), *all = malloc(N * PICTURE * 4),
          *one = malloc(PICTURE * 4), *moments = malloc(4 * 2 * LATENT), *near_moments = malloc(4 * 2 * LATENT);
    CHECK_OK(vae_random(&w, &published_vae, 3, &e), &e);
    struct vae *c = make(cpu, &w), *x = make(f32, &w), *v = make(bf16, &w);
    vae_weights_free(&w);
    CHECK(vae_pictures(v) >= N);
    CHECK_OK(vae_run(c, VAE_DECODE, z, want, &e), &e);
    CHECK_OK(vae_run(x, VAE_DECODE, z, exact, &e), &e);
    CHECK_OK(vae_start(v, VAE_DECODE, z, N, &e), &e);
    CHECK_OK(vae_step(v, INFINITY, &e), &e);
    CHECK_OK(vae_read(v, all, &e), &e);
    double f32_off = distance(exact, want, PICTURE), off = distance(all, exact, PICTURE);
    for (int i = 0; i < N; i++) {
        CHECK_OK(vae_run(v, VAE_DECODE, z + i * LATENT, one, &e), &e);
        if (memcmp(one, all + (size_t)i * PICTURE, PICTURE * 4)) test_fail(__FILE__, __LINE__, "picture %d depends on its company", i);
    }
    CHECK_OK(vae_run(x, VAE_ENCODE, want, moments, &e), &e);
    CHECK_OK(vae_run(v, VAE_ENCODE, want, near_moments, &e), &e);
    double encode_off = distance(near_moments, moments, 2 * LATENT);
    printf("    decode: float32 %.3g from the cpu's, bfloat16 %.3g; encode: bfloat16 %.3g\n", f32_off, off, encode_off);
    CHECK(f32_off < 2e-5);
    CHECK(off < 2e-2);
    CHECK(encode_off < 2e-2);
    vae_free(c), vae_free(x), vae_free(v);
    kern_close(cpu), kern_close(f32), kern_close(bf16);
    free(z), free(want), free(exact), free(all), free(one), free(moments), free(near_moments);
}
