// SPDX-License-Identifier: MIT
// Training ops of the CUDA back end against the reference, and against themselves: the same call gives the same bytes. Needs a
// GPU.
#include <math.h>

#include "kernels/backend.h"
#include "tests/test.h"

struct pair { // the reference and the GPU
    struct kern *k[2];
    double tol; // relative L2
    int failed;
};

static struct pair pair_open(enum kern_dtype act) {
    struct pair p = {.tol = act == KERN_F32 ? 4e-6 : 6e-3};
    char why[256] = "";
    for (int i = 0; i < 2; i++)
        if (kern_open(&p.k[i], &(struct kern_config){.backend = i ? "cuda" : "ref", .act = act, .exact_stream = true}, why,
                      sizeof why))
            test_fail(__FILE__, __LINE__, "%s", why);
    return p;
}

static void pair_close(struct pair *p) {
    for (int i = 0; i < 2; i++) kern_close(p->k[i]);
    CHECK(p->failed == 0);
}

struct buf { // the same contents on both
    void *p[2];
    size_t n;
    enum kern_dtype t;
    void *host;
};

static float random_value(uint32_t seed, size_t i) {
    uint32_t h = (uint32_t)i * 2654435761u + seed * 0x9E3779B9u;
    h = (h ^ h >> 15) * 2246822519u;
    h = (h ^ h >> 13) * 3266489917u;
    return (float)(int32_t)(h ^ h >> 16) * 0x1p-31f;
}

static void buf_reset(struct pair *p, struct buf *b) {
    for (int i = 0; i < 2; i++) CHECK(p->k[i]->upload(p->k[i], b->p[i], b->host, b->n * kern_dtype_size(b->t)) == 0);
}

static struct buf buf_new(struct pair *p, enum kern_dtype t, size_t n, float scale, uint32_t seed) {
    struct buf b = {.n = n, .t = t, .host = malloc(n * 4 + 4)};
    for (size_t i = 0; i < n; i++) kern_store(t, b.host, i, scale * random_value(seed, i));
    for (int i = 0; i < 2; i++) CHECK(p->k[i]->alloc(p->k[i], n * 4 + 4, &b.p[i]) == 0);
    buf_reset(p, &b);
    return b;
}

static void buf_free(struct pair *p, struct buf *b) {
    for (int i = 0; i < 2; i++) p->k[i]->free(p->k[i], b->p[i]);
    free(b->host);
}

// Relative L2 distance between the two, `bytes_differ`: how many bytes
static double distance(struct pair *p, const struct buf *b, size_t *bytes_differ) {
    size_t bytes = b->n * kern_dtype_size(b->t);
    char *x[2];
    double num = 0, den = 0;
    for (int i = 0; i < 2; i++) {
        x[i] = malloc(bytes + 1);
        CHECK(p->k[i]->download(p->k[i], x[i], b->p[i], bytes) == 0);
    }
    for (size_t i = 0; i < b->n; i++) {
        double r = (double)kern_load(b->t, x[0], i), c = (double)kern_load(b->t, x[1], i);
        num += (r - c) * (r - c), den += r * r;
    }
    *bytes_differ = 0;
    for (size_t i = 0; i < bytes; i++) *bytes_differ += x[0][i] != x[1][i];
    free(x[0]), free(x[1]);
    return num == 0 ? 0 : sqrt(num / den);
}

static void expect(struct pair *p, const struct buf *b, const char *what, double tol) {
    size_t bytes;
    double d = distance(p, b, &bytes);
    if (d <= tol && (tol > 0 || bytes == 0)) return;
    p->failed++;
    printf("    %s is off by %.3g (%zu bytes), allowed %.3g\n", what, d, bytes, tol);
}

static void both(struct pair *p, const int rc[2], const char *what) {
    for (int i = 0; i < 2; i++)
        if (rc[i]) test_fail(__FILE__, __LINE__, "%s on %s: %d %s", what, p->k[i]->name, rc[i], p->k[i]->why);
}
#define BOTH(p, what, call)                                                                                                      \
    do {                                                                                                                         \
        int rc_[2];                                                                                                              \
        for (int i = 0; i < 2; i++) {                                                                                            \
            struct kern *k = (p)->k[i];                                                                                          \
            rc_[i] = (call);                                                                                                     \
        }                                                                                                                        \
        both(p, rc_, what);                                                                                                      \
    } while (0)
#define P(b) ((b).p[i])

/* ---- linear ---- */

struct linear_case {
    int out, in, unit, units;
    bool x_f32, y_f32, y_stream, no_bias;
    enum kern_act act, before;
};

static void linear_case(struct pair *p, const struct linear_case *c) {
    const enum kern_dtype act = p->k[0]->act, xt = c->x_f32 ? KERN_F32 : act, yt = c->y_f32 ? KERN_F32 : act;
    const size_t lines = (size_t)c->unit * (size_t)c->units, N = (size_t)c->out, K = (size_t)c->in;
    struct kern_linear_spec spec = {.out = c->out,
                                    .in = c->in,
                                    .unit = c->unit,
                                    .act = c->act,
                                    .w_store = KERN_F32,
                                    .x_f32 = c->x_f32,
                                    .y_f32 = c->y_f32,
                                    .y_stream = c->y_stream};
    struct buf w = buf_new(p, KERN_F32, N * K, 0.05f, 1), b = buf_new(p, KERN_F32, N, 1, 2), x = buf_new(p, xt, lines * K, 1, 3),
               dy = buf_new(p, yt, lines * N, 1, 4), y = buf_new(p, yt, lines * N, 1, 5), pre = buf_new(p, yt, lines * N, 1, 6),
               x_pre = buf_new(p, xt, lines * K, 2, 7), dx = buf_new(p, xt, lines * K, 1, 8),
               dw = buf_new(p, KERN_F32, N * K, 1, 9), db = buf_new(p, KERN_F32, N, 1, 10),
               part = buf_new(p, KERN_F32, N * K, 1, 11), dx_sum = buf_new(p, KERN_F32, K, 1, 12),
               db_part = buf_new(p, KERN_F32, N, 1, 13);
    const int first = c->out / 3 / 8 * 8, count = c->out < 16 ? c->out : c->out / 2 / 8 * 8; // a part that begins on 16 bytes
    struct kern_linear *l[2];
    BOTH(p, "linear_wrap", k->linear_wrap(k, &spec, P(w), c->no_bias ? NULL : P(b), &l[i]));
    for (size_t i = 0; i < N * K; i++) ((float *)w.host)[i] *= -0.5f; // they learned
    buf_reset(p, &w);
    BOTH(p, "linear_refresh", k->linear_refresh(k, l[i]));
    BOTH(p, "linear", k->linear(k, l[i], P(y), P(x), c->units, P(pre)));
    BOTH(p, "linear_gradients",
         k->linear_gradients(k, l[i], P(dw), c->no_bias ? NULL : P(db), P(dy), P(x), c->units, 0, c->out, true));
    BOTH(p, "linear_gradients", k->linear_gradients(k, l[i], P(part), P(db_part), P(dy), P(x), c->units, first, count, false));
    BOTH(p, "linear_backward", k->linear_backward(k, l[i], P(dx), P(dx_sum), P(dy), c->before, P(x_pre), c->units, !c->no_bias));
    char what[96];
    const char *name[] = {"y", "pre", "dx", "dw", "db", "dw of a part", "db of a part", "sums of dx"};
    const struct buf *out[] = {&y, &pre, &dx, &dw, &db, &part, &db_part, &dx_sum};
    for (int i = 0; i < 8; i++) {
        snprintf(what, sizeof what, "linear %d x %d, %zu lines: %s", c->out, c->in, lines, name[i]);
        // vectors in a bfloat16 run: float16 weights forward, TF32 backward
        expect(p, out[i], what, act == KERN_BF16 && c->x_f32 && c->y_f32 ? 1.5e-3 : p->tol);
    }
    BOTH(p, "linear_free", (k->linear_free(k, l[i]), 0));
    struct buf *all[] = {&w, &b, &x, &dy, &y, &pre, &x_pre, &dx, &dw, &db, &part, &db_part, &dx_sum};
    for (int i = 0; i < 13; i++) buf_free(p, all[i]);
}

static void linear_cases(enum kern_dtype act) {
    static const struct linear_case cases[] = {
        {.out = 288, .in = 96, .unit = 64, .units = 3},
        {.out = 384, .in = 96, .unit = 64, .units = 3, .act = KERN_GELU_TANH},
        {.out = 96, .in = 384, .unit = 64, .units = 3, .before = KERN_GELU_TANH},
        {.out = 40, .in = 72, .unit = 9, .units = 5, .before = KERN_GELU_TANH, .act = KERN_GELU_TANH},
        {.out = 32, .in = 96, .unit = 64, .units = 3, .y_f32 = true},
        {.out = 8, .in = 192, .unit = 49, .units = 4, .y_f32 = true},
        {.out = 4, .in = 192, .unit = 49, .units = 4, .y_f32 = true},
        {.out = 36, .in = 20, .unit = 6, .units = 4, .before = KERN_GELU_TANH},
        {.out = 96, .in = 16, .unit = 64, .units = 3, .x_f32 = true, .y_f32 = true, .y_stream = true},
        {.out = 192, .in = 4, .unit = 49, .units = 4, .x_f32 = true, .y_f32 = true, .y_stream = true},
        {.out = 96, .in = 256, .unit = KERN_VEC, .units = 2, .x_f32 = true, .y_f32 = true, .act = KERN_SILU},
        {.out = 96, .in = 96, .unit = KERN_VEC, .units = 9, .x_f32 = true, .y_f32 = true, .before = KERN_SILU},
        {.out = 1152, .in = 96, .unit = KERN_VEC, .units = 8, .x_f32 = true, .y_f32 = true, .before = KERN_SILU, .no_bias = true},
    };
    struct pair p = pair_open(act);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) linear_case(&p, &cases[i]);
    pair_close(&p);
}
TEST_LIMIT(cuda_train_linear_f32, 120) { linear_cases(KERN_F32); }
TEST_LIMIT(cuda_train_linear_bf16, 120) { linear_cases(KERN_BF16); }

/* ---- norms ---- */

static void norm_case(struct pair *p, int C, int T, bool shared, bool gate, bool norm) {
    enum { R = 3 };
    const enum kern_dtype act = p->k[0]->act;
    const size_t n = (size_t)R * (size_t)T * (size_t)C;
    const int ld = shared ? 0 : 3 * C;
    struct buf dx = buf_new(p, KERN_F32, n, 1, 1), dh = buf_new(p, act, n, 1, 2),
               dmod = buf_new(p, KERN_F32, (size_t)(R * 3 * C), 1, 3), dy = buf_new(p, act, n, 1, 4),
               xhat = buf_new(p, act, n, 2, 5), rstd = buf_new(p, KERN_F32, (size_t)(R * T), 1, 6), h = buf_new(p, act, n, 1, 7),
               mod = buf_new(p, KERN_F32, (size_t)(R * 3 * C), 1, 8), y = buf_new(p, act, n, 1, 9),
               dh_sum = buf_new(p, KERN_F32, (size_t)C, 1, 10);
    BOTH(p, "gate_norm_backward", ({
             struct kern_norm_back a = {
                 .dx = P(dx), .xhat = P(xhat), .rstd = P(rstd), .ld = ld, .R = R, .T = T, .C = C, .add = shared};
             float *d = P(dmod), *m = P(mod);
             if (gate) a.dh = P(dh), a.dh_sum = P(dh_sum), a.dgate = d + 2 * C, a.h = P(h), a.gate = m;
             if (norm) a.dshift = d, a.dscale = d + C, a.dy = P(dy), a.y = P(y), a.shift = m + 2 * C, a.scale = m + C;
             k->gate_norm_backward(k, &a);
         }));
    char what[96];
    snprintf(what, sizeof what, "norm of %d channels, %d tokens, %s%s%s: dx, dh, vectors", C, T, gate ? "gate " : "",
             norm ? "norm " : "", shared ? "shared" : "");
    expect(p, &dx, what, 2e-6);
    expect(p, &dh, what, p->tol);
    expect(p, &dmod, what, 4e-6);
    expect(p, &y, what, p->tol);
    expect(p, &dh_sum, what, p->tol);
    struct buf *all[] = {&dx, &dh, &dmod, &dy, &xhat, &rstd, &h, &mod, &y, &dh_sum};
    for (int i = 0; i < 10; i++) buf_free(p, all[i]);
}

static void norm_cases(enum kern_dtype act) {
    struct pair p = pair_open(act);
    static const int widths[] = {40, 37, 192, 768, 1152, 1280, 1536, 2048};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        norm_case(&p, widths[i], 70, false, true, true);
        norm_case(&p, widths[i], 33, true, false, true);
    }
    norm_case(&p, 192, 64, false, true, false);
    norm_case(&p, 192, 65, true, true, true);
    pair_close(&p);
}
TEST_LIMIT(cuda_train_norm_f32, 120) { norm_cases(KERN_F32); }
TEST_LIMIT(cuda_train_norm_bf16, 120) { norm_cases(KERN_BF16); }

/* ---- attention ---- */

static void attention_case(struct pair *p, int T, int D) {
    enum { R = 2, H = 2 };
    const enum kern_dtype act = p->k[0]->act;
    const size_t n = (size_t)(R * T * H * D);
    struct buf qkv = buf_new(p, act, 3 * n, 1.5f, 1), o = buf_new(p, act, n, 1, 2), d_o = buf_new(p, act, n, 1, 3),
               dqkv = buf_new(p, act, 3 * n, 1, 4), lse = buf_new(p, KERN_F32, (size_t)(R * H * T), 1, 5),
               sum = buf_new(p, KERN_F32, (size_t)(3 * H * D), 1, 6);
    char what[96];
    BOTH(p, "attention", k->attention(k, P(o), P(qkv), R, T, H, D, P(lse)));
    BOTH(p, "attention_backward", k->attention_backward(k, P(dqkv), P(sum), P(d_o), P(qkv), P(o), P(lse), R, T, H, D, T & 1));
    snprintf(what, sizeof what, "attention of %d tokens, heads of %d: dqkv", T, D);
    expect(p, &dqkv, what, act == KERN_F32 ? 5e-6 : 9e-3);
    expect(p, &sum, what, act == KERN_F32 ? 5e-5 : 2e-2); // the keys' part is what rounding leaves of 0
    // again: the same bytes
    struct kern *k = p->k[1];
    char *one = malloc(6 * n), *two = malloc(6 * n);
    size_t bytes = 3 * n * 2;
    CHECK(k->download(k, one, dqkv.p[1], bytes) == 0 && k->zero(k, dqkv.p[1], bytes) == 0);
    CHECK(k->attention_backward(k, dqkv.p[1], NULL, d_o.p[1], qkv.p[1], o.p[1], lse.p[1], R, T, H, D, true) == 0);
    CHECK(k->download(k, two, dqkv.p[1], bytes) == 0 && memcmp(one, two, bytes) == 0);
    free(one), free(two);
    struct buf *all[] = {&qkv, &o, &d_o, &dqkv, &lse, &sum};
    for (int i = 0; i < 6; i++) buf_free(p, all[i]);
}

static void attention_cases(enum kern_dtype act) {
    struct pair p = pair_open(act);
    for (int D = 8; D <= 128; D += 8) attention_case(&p, D % 16 ? 69 : 50, D);
    attention_case(&p, 1, 64), attention_case(&p, 64, 72), attention_case(&p, 196, 64), attention_case(&p, 256, 72);
    attention_case(&p, 129, 72), attention_case(&p, 256, 64), attention_case(&p, 257, 72);
    pair_close(&p);
}
TEST_LIMIT(cuda_train_attention_f32, 180) { attention_cases(KERN_F32); }
TEST_LIMIT(cuda_train_attention_bf16, 180) { attention_cases(KERN_BF16); }

static void cross_cases(enum kern_dtype act) {
    enum { R = 2, H = 3, S = 2, T = 150 };
    struct pair p = pair_open(act);
    for (int D = 8; D <= 128; D += 40) {
        const size_t n = (size_t)(R * T * H * D);
        const int ld = 4 * H * D;
        struct buf q = buf_new(&p, act, n, 1, 1), d_o = buf_new(&p, act, n, 1, 2), dq = buf_new(&p, act, n, 1, 3),
                   kv = buf_new(&p, KERN_F32, (size_t)(R * S * ld), 1, 4),
                   dkv = buf_new(&p, KERN_F32, (size_t)(R * S * ld), 1, 5);
        BOTH(&p, "cross_attention_backward",
             k->cross_attention_backward(k, P(dq), (float *)P(dkv) + 2 * H * D, P(d_o), P(q), (const float *)P(kv) + 2 * H * D,
                                         ld, R, T, S, H, D));
        expect(&p, &dq, "cross-attention: dq", p.tol);
        expect(&p, &dkv, "cross-attention: dkv", 5e-6);
        struct buf *all[] = {&q, &d_o, &dq, &kv, &dkv};
        for (int i = 0; i < 5; i++) buf_free(&p, all[i]);
    }
    pair_close(&p);
}
TEST_LIMIT(cuda_train_cross_attention_f32, 60) { cross_cases(KERN_F32); }
TEST_LIMIT(cuda_train_cross_attention_bf16, 60) { cross_cases(KERN_BF16); }

/* ---- tokens, labels, images ---- */

TEST(cuda_train_small_ops) {
    enum { R = 5, T = 9, C = 24, LABELS = 4, I = 6, SIDE = 2, OUT = 6, KEEP = 3 };
    struct pair p = pair_open(KERN_F32);
    struct buf v = buf_new(&p, KERN_F32, R * C, 1, 1), dx = buf_new(&p, KERN_F32, R * T * C, 1, 2),
               table = buf_new(&p, KERN_F32, LABELS * C, 1, 3), tok = buf_new(&p, KERN_F32, R * I * I * OUT, 1, 4),
               img = buf_new(&p, KERN_F32, R * I * I * KEEP, 1, 5), y = buf_new(&p, KERN_F32, R, 1, 6);
    memcpy(y.host, (int32_t[R]){2, 0, 2, -1, 0}, R * 4);
    buf_reset(&p, &y);
    BOTH(&p, "condition_backward", k->condition_backward(k, P(table), P(v), (const int32_t *)P(y), R, C));
    BOTH(&p, "take_token", k->take_token(k, P(v), P(dx), R, T, C, 7));
    BOTH(&p, "unpatchify_backward", k->unpatchify_backward(k, P(tok), P(img), R, OUT, KEEP, I, SIDE));
    BOTH(&p, "zero", k->zero(k, P(img), R * I * I * KEEP * 4));
    struct buf *all[] = {&table, &v, &tok, &img, &dx, &y};
    for (int i = 0; i < 4; i++) expect(&p, all[i], (const char *[]){"condition", "take_token", "unpatchify", "zero"}[i], 0);
    for (int i = 0; i < 6; i++) buf_free(&p, all[i]);
    pair_close(&p);
}

/* ---- the step outside the network ---- */

TEST(cuda_train_noise_has_the_reference_bits) {
    enum { R = 3, N = 1027 };
    struct pair p = pair_open(KERN_F32);
    struct kern_mix mix[R] = {{7, 0, 0, 0.3f, 0.7f}, {(uint64_t)1 << 40, 5, 2, 1, 0}, {9, 1u << 30, 77, 0, 1}};
    struct buf x1 = buf_new(&p, KERN_F32, R * N, 1, 1), x0 = buf_new(&p, KERN_F32, R * N, 1, 2),
               xt = buf_new(&p, KERN_F32, R * N, 1, 3);
    BOTH(&p, "mix", k->mix(k, P(xt), P(x0), P(x1), N, mix, R));
    expect(&p, &x0, "noise", 0);
    expect(&p, &xt, "noised image", 0);
    struct buf *all[] = {&x1, &x0, &xt};
    for (int i = 0; i < 3; i++) buf_free(&p, all[i]);
    pair_close(&p);
}

TEST(cuda_train_losses) {
    enum { R = 3, N = 784, LD = 2 * N + 16 };
    struct pair p = pair_open(KERN_F32);
    struct kern_loss loss[R] = {{.c_out = 1, .c1 = -1, .c0 = 1, .weight = 1.5f, .grad = 0.25f},
                                {.c_out = 1,
                                 .c0 = -1,
                                 .weight = 1,
                                 .grad = 1,
                                 .hybrid = true,
                                 .log_lo = -9,
                                 .log_span = 4,
                                 .lv_true = -8,
                                 .recip = 1.2f,
                                 .recip_m1 = 0.6f,
                                 .posterior = 0.1f},
                                {.c_out = 1,
                                 .c0 = -1,
                                 .weight = 1,
                                 .grad = 1,
                                 .hybrid = true,
                                 .first = true,
                                 .log_lo = -9,
                                 .log_span = 3,
                                 .lv_true = -8,
                                 .recip = 1.01f,
                                 .recip_m1 = 0.1f,
                                 .posterior = 1}};
    struct buf out = buf_new(&p, KERN_F32, R * LD, 1, 1), dout = buf_new(&p, KERN_F32, R * LD, 1, 2),
               x1 = buf_new(&p, KERN_F32, R * N, 1, 3), x0 = buf_new(&p, KERN_F32, R * N, 1, 4),
               xt = buf_new(&p, KERN_F32, R * N, 1, 5), sums = buf_new(&p, KERN_F32, 2 * R, 1, 6);
    BOTH(&p, "loss", k->loss(k, P(dout), P(sums), P(out), LD, P(x1), P(x0), P(xt), N, loss, R));
    expect(&p, &dout, "gradient of the loss", 2e-7);
    expect(&p, &sums, "loss", 2e-7);
    struct buf *all[] = {&out, &dout, &x1, &x0, &xt, &sums};
    for (int i = 0; i < 6; i++) buf_free(&p, all[i]);
    pair_close(&p);
}

TEST(cuda_train_adamw_has_the_reference_bits) {
    enum { N = 300007 };
    struct pair p = pair_open(KERN_F32);
    for (int round = 0; round < 2; round++) { // the second: float by float
        const size_t n = N - 3 - (size_t)round;
        struct buf w = buf_new(&p, KERN_F32, n, 1, 1), m = buf_new(&p, KERN_F32, n, 0.1f, 2),
                   v = buf_new(&p, KERN_F32, n, 0.1f, 3), e0 = buf_new(&p, KERN_F32, n, 1, 4),
                   e1 = buf_new(&p, KERN_F32, n, 1, 5), g = buf_new(&p, KERN_F32, n, 1, 6), sums = buf_new(&p, KERN_F32, 4, 1, 7);
        for (size_t i = 0; i < n; i++) ((float *)v.host)[i] = fabsf(((float *)v.host)[i]);
        buf_reset(&p, &v);
        struct kern_adamw a = {1e-3, 0.9, 0.999, 1e-8, 0.1, 0.19, 0.002, 0.5, 1, 2, {0.9999, 0.99}};
        BOTH(&p, "zero", k->zero(k, P(sums), 16));
        BOTH(&p, "sum_squares", k->sum_squares(k, P(sums), P(g), n));
        double sum[2], moved[2];
        for (int i = 0; i < 2; i++) CHECK(p.k[i]->download(p.k[i], &sum[i], sums.p[i], 8) == 0);
        CHECK_NEAR(sum[1] / sum[0], 1, 1e-12);
        CHECK(p.k[1]->upload(p.k[1], sums.p[1], &sum[0], 8) == 0); // the last bits of a norm must not count here
        BOTH(&p, "adamw", k->adamw(k, P(w), P(m), P(v), (float *[]){P(e0), P(e1)}, P(g), n, &a, P(sums), (double *)P(sums) + 1));
        for (int i = 0; i < 2; i++) CHECK(p.k[i]->download(p.k[i], &moved[i], (double *)sums.p[i] + 1, 8) == 0);
        CHECK_NEAR(moved[1] / moved[0], 1, 1e-6);
        struct buf *all[] = {&w, &m, &v, &e0, &e1, &g, &sums};
        for (int i = 0; i < 5; i++)
            expect(&p, all[i], (const char *[]){"weights", "first moment", "second moment", "EMA", "second EMA"}[i], 0);
        for (int i = 0; i < 7; i++) buf_free(&p, all[i]);
    }
    pair_close(&p);
}
