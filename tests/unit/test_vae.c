// SPDX-License-Identifier: MIT
// The autoencoder network: against numbers of the authors' code, back ends and threads against each other, work in slices.
#include <math.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/model/vae.h"
#include "tests/test.h"

static const struct vae_arch small = {.image_channels = 3,
                                      .latent_channels = 4,
                                      .levels = 3,
                                      .layers = 1,
                                      .groups = 4,
                                      .width = {16, 24, 40},
                                      .encoder = true,
                                      .decoder = true,
                                      .quant = true,
                                      .post_quant = true,
                                      .attention = {true, true}};

static struct kern *open_kern(const char *backend, int threads) {
    struct kern_config config = {.backend = backend, .threads = threads};
    struct kern *k;
    char why[256] = "";
    if (kern_open(&k, &config, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    return k;
}

static float wave(size_t j, double a, double b) { return (float)(sin(a * (double)j) + 0.5 * cos(b * (double)j)); }

/* ---- the published numbers: CompVis' decoder and encoder, ch 32, mult 1 2 4 4, weights by formula ---- */

struct list { // in the order of CompVis' state dict
    struct vae_unit u[160];
    int n;
};
static int collect(void *ctx, const struct vae_unit *u) {
    struct list *l = ctx;
    l->u[l->n++] = *u;
    return 0;
}

// Where CompVis' modules stand: halves, then the convolutions round the latents; in a half the levels in order, the middle where
// its code has it.
static int order(const struct vae_unit *u) {
    const char *p = u->compvis;
    int half = !strncmp(p, "encoder.", 8)   ? 0
               : !strncmp(p, "decoder.", 8) ? 1
               : !strncmp(p, "quant", 5)    ? 2
                                            : 3,
        at = 0, level = 0, block = 0;
    if (half > 1) return half << 24;
    p += 8;
    if (!strncmp(p, "conv_in", 7)) at = 0;
    else if (!strncmp(p, "down.", 5)) at = 1, level = p[5] - '0', block = strstr(p, "block.") ? p[13] - '0' : 9;
    else if (!strncmp(p, "mid.", 4)) at = 2, block = !strncmp(p + 4, "block_1", 7) ? 0 : !strncmp(p + 4, "attn", 4) ? 1 : 2;
    else if (!strncmp(p, "up.", 3)) at = 3, level = p[3] - '0', block = strstr(p, "block.") ? p[11] - '0' : 9;
    else at = !strncmp(p, "norm_out", 8) ? 4 : 5;
    return half << 24 | at << 16 | level << 8 | block;
}

struct formula {
    struct tensor_table table;
    char names[320][112];
};

static void fill(struct formula *f, const struct vae_arch *a) {
    struct list l = {0};
    vae_walk(a, collect, &l);
    f->table.tensors = mem_array(320, sizeof *f->table.tensors);
    for (int i = 1; i < l.n; i++) // insertion, so that equals keep the walk's order
        for (int j = i; j > 0 && order(&l.u[j - 1]) > order(&l.u[j]); j--) {
            struct vae_unit u = l.u[j];
            l.u[j] = l.u[j - 1], l.u[j - 1] = u;
        }
    for (int i = 0; i < 2 * l.n; i++) {
        const struct vae_unit *u = &l.u[i / 2];
        int64_t side = u->side < 0 ? 1 : u->side, shape[4] = {u->out, u->in, side, side};
        bool weight = i % 2 == 0, norm = side == 0;
        struct tensor *t = &f->table.tensors[i];
        *t = (struct tensor){.name = f->names[i], .ndim = weight && !norm ? 4 : 1};
        snprintf(f->names[i], sizeof f->names[i], "first_stage_model.%s.%s", u->compvis, weight ? "weight" : "bias");
        memcpy(t->shape, shape, sizeof shape);
        t->count = t->ndim == 4 ? (size_t)(u->out * u->in * side * side) : (size_t)u->out;
        t->bytes = 4 * t->count;
        float *data = mem_array(t->count, 4);
        double scale = t->ndim == 4 ? 1 / sqrt((double)(u->in * side * side)) : weight ? 0.1 : 0.02;
        for (size_t j = 0; j < t->count; j++)
            data[j] = (float)(scale * sin(((double)j + 1) * 0.6180339887498949 + i) + (weight && norm ? 1 : 0));
        t->data = data;
    }
    f->table.n = 2 * l.n;
}

TEST_LIMIT(vae_numbers_of_the_authors_code, 120) {
    struct vae_arch a = {.image_channels = 3,
                         .latent_channels = 4,
                         .levels = 4,
                         .layers = 2,
                         .groups = 32,
                         .width = {32, 64, 128, 128},
                         .encoder = true,
                         .decoder = true,
                         .quant = true,
                         .post_quant = true,
                         .attention = {true, true}};
    struct formula *f = mem_alloc(sizeof *f);
    struct vae_file file = {.arch.groups = 32};
    struct kern *k = open_kern("cpu", 2);
    struct vae_size size = {.height = 4, .width = 4, .decode = true, .encode = true};
    struct vae *v;
    struct err e = {0};
    const char *prefix;
    fill(f, &a);
    CHECK_OK(vae_infer(&file.arch, &prefix, &f->table, &e), &e);
    CHECK(memcmp(&file.arch, &a, sizeof a) == 0);
    CHECK_OK(vae_match(&file, &f->table, prefix, &e), &e);
    CHECK_OK(vae_new(&v, k, &file.arch, &file.table, &size, &e), &e);
    float z[64], x[3 * 32 * 32], picture[3 * 32 * 32], moments[128];
    for (size_t j = 0; j < 64; j++) z[j] = wave(j, 0.37, 0.11) * 0.1f / 0.18215f;
    for (size_t j = 0; j < 3 * 32 * 32; j++) x[j] = 0.6f * wave(j, 0.013, 0.007);
    CHECK_OK(vae_run(v, VAE_DECODE, z, picture, &e), &e);
    CHECK_OK(vae_run(v, VAE_ENCODE, x, moments, &e), &e);
    double sum = 0, size_sum = 0, moment_sum = 0;
    for (size_t j = 0; j < 3 * 32 * 32; j++) sum += (double)picture[j], size_sum += fabs((double)picture[j]);
    for (size_t j = 0; j < 128; j++) moment_sum += (double)moments[j];
    // These weights amplify rounding: the reference, which sums in double, is 1.7e-3 from the recorded size, AVX2 4.0e-3.
    CHECK_NEAR(sum, -37.903926, 2e-3);
    CHECK_NEAR(size_sum, 287.598638, 6e-3);
    CHECK_NEAR(picture[0], -0.037977, 5e-6);
    CHECK_NEAR(picture[1], -0.076810, 5e-6);
    CHECK_NEAR(moment_sum, 0.797249, 1e-4);
    CHECK_NEAR(moments[0], 0.022955, 2e-6);
    CHECK_NEAR(moments[1], 0.042619, 2e-6);
    vae_free(v);
    mem_free(file.table.tensors), mem_free(file.names);
    for (int i = 0; i < f->table.n; i++) mem_free((void *)f->table.tensors[i].data);
    mem_free(f->table.tensors), mem_free(f);
    kern_close(k);
}

/* ---- the same picture, however it is made ---- */

enum { H = 6, W = 5, LATENT = 4 * H * W, PICTURE = 3 * 4 * H * 4 * W };

static struct vae *make(struct kern *k, const struct vae_weights *w) {
    struct vae_size size = {.height = H, .width = W, .decode = true, .encode = true};
    struct vae *v;
    struct err e = {0};
    CHECK_OK(vae_new(&v, k, &small, &w->table, &size, &e), &e);
    CHECK(vae_numel(v, VAE_DECODE) == PICTURE && vae_numel(v, VAE_ENCODE) == 2 * LATENT && vae_bytes(v) > 0);
    return v;
}

static double distance(const float *a, const float *b, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) num += pow((double)a[i] - (double)b[i], 2), den += pow((double)b[i], 2);
    return sqrt(num / den);
}

TEST(vae_same_picture_in_slices_on_any_threads) {
    struct kern *ref = open_kern("ref", 1), *one = open_kern("cpu", 1), *three = open_kern("cpu", 3);
    struct vae_weights w;
    struct err e = {0};
    float z[LATENT], other[LATENT], x[PICTURE], want[PICTURE], a[PICTURE], b[PICTURE], moments[2 * LATENT], m[2 * LATENT];
    CHECK_OK(vae_random(&w, &small, 3, &e), &e);
    for (size_t i = 0; i < LATENT; i++) z[i] = wave(i, 0.7, 0.2), other[i] = wave(i, 0.1, 1.7);
    for (size_t i = 0; i < PICTURE; i++) x[i] = 0.5f * wave(i, 0.03, 0.2);
    struct vae *r = make(ref, &w), *v = make(one, &w), *t = make(three, &w);
    CHECK_OK(vae_run(r, VAE_DECODE, z, want, &e), &e);
    CHECK_OK(vae_run(v, VAE_DECODE, z, a, &e), &e);
    CHECK(distance(a, want, PICTURE) < 1e-5);
    CHECK_OK(vae_run(r, VAE_ENCODE, x, moments, &e), &e);
    CHECK_OK(vae_run(v, VAE_ENCODE, x, m, &e), &e);
    CHECK(distance(m, moments, 2 * LATENT) < 1e-5);
    CHECK_OK(vae_run(t, VAE_DECODE, other, b, &e), &e); // what was done before must not show
    CHECK(distance(b, a, PICTURE) > 0.1);
    for (double flops = 1; flops < 1e8; flops *= 100) {
        int steps = 0, rc;
        CHECK_OK(vae_start(t, VAE_DECODE, z, 1, &e), &e);
        while ((rc = vae_step(t, flops, &e)) == 1) steps++;
        CHECK_OK(rc, &e);
        CHECK(steps > 5 || flops > 1);
        memset(b, 0, sizeof b);
        CHECK_OK(vae_read(t, b, &e), &e);
        CHECK(memcmp(a, b, sizeof a) == 0);
    }
    CHECK(vae_read(t, b, &e) == E_INTERNAL); // once only
    vae_free(r), vae_free(v), vae_free(t);
    vae_weights_free(&w);
    kern_close(ref), kern_close(one), kern_close(three);
}

TEST(vae_halves_and_bad_weights) {
    struct kern *k = open_kern("cpu", 1);
    struct vae_arch a = small;
    struct vae_weights w;
    struct vae *v;
    struct err e = {0};
    struct vae_size both = {.height = 2, .width = 2, .decode = true, .encode = true},
                    half = {.height = 2, .width = 2, .decode = true};
    a.encoder = false;
    CHECK_OK(vae_random(&w, &a, 3, &e), &e);
    CHECK(vae_new(&v, k, &a, &w.table, &both, &e) == E_CONFLICT && !v);
    CHECK_STR(e.param, "encoder");
    e = (struct err){0};
    CHECK_OK(vae_new(&v, k, &a, &w.table, &half, &e), &e);
    float z[16] = {0};
    CHECK(vae_start(v, VAE_ENCODE, z, 1, &e) == E_INTERNAL);
    vae_free(v);
    half.height = 1 << 15;
    e = (struct err){0};
    CHECK(vae_new(&v, k, &a, &w.table, &half, &e) == E_RANGE);
    half.height = 2;
    for (int i = 0; i < w.table.n; i += 7) {
        float *at = (float *)w.table.tensors[i].data + w.table.tensors[i].count - 1, was = *at;
        *at = i % 2 ? NAN : INFINITY;
        e = (struct err){0};
        CHECK(vae_new(&v, k, &a, &w.table, &half, &e) == E_NONFINITE && strstr(e.text, w.table.tensors[i].name));
        *at = was;
    }
    vae_weights_free(&w);
    kern_close(k);
}

TEST(vae_without_memory) {
    struct kern *k = open_kern("cpu", 1);
    struct vae_weights w;
    struct err e = {0};
    struct vae_size size = {.height = 1, .width = 1, .decode = true, .encode = true};
    CHECK_OK(vae_random(&w, &small, 3, &e), &e);
    for (long n = 1;; n++) {
        struct vae *v;
        e = (struct err){0};
        fault_arm(FAULT_ALLOC, n, false);
        int rc = vae_new(&v, k, &small, &w.table, &size, &e);
        fault_disarm();
        vae_free(v);
        if (rc == OK) break;
        CHECK(rc == E_NOMEM && !v && e.text[0]);
        CHECK(n < 1000);
    }
    vae_weights_free(&w);
    kern_close(k);
}
