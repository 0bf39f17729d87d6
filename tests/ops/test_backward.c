// SPDX-License-Identifier: MIT
/*
 * The reference's backward ops against numerical derivatives of its forward ops.
 *
 * The loss is a sum of outputs times fixed numbers, in double; its derivative in one input is a fourth-order difference, whose
 * error here is that of the float32 outputs, some 1e-5 of the gradient.
 */
#include <math.h>

#include "tests/ops/cases.h"
#include "tests/test.h"

#define TOL 3e-4 // of the gradient's root mean square

static struct kern *ref(void) {
    struct kern *k;
    CHECK(kern_open(&k, &(struct kern_config){.backend = "ref"}, NULL, 0) == 0);
    return k;
}

enum { ROOM = 1 << 17 };
static float pool[64][ROOM];
static int used;

// n numbers of variance 1, repeatable; the next of the pool's arrays
static float *numbers(size_t n) {
    CHECK(n <= ROOM && used < 64);
    float *p = pool[used];
    for (size_t i = 0; i < n; i++)
        p[i] = (float)(sin(12.9898 * (double)(i + 1) + 78.233 * used) + cos(4.1 * (double)i * (used + 1)));
    used++;
    return p;
}

static double weighed(const float *y, const float *c, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)y[i] * (double)c[i];
    return sum;
}

// grad [n] is d loss / d x, for a loss that reads x
static void check_gradient(const char *what, float *x, const float *grad, size_t n, double (*loss)(void *), void *ctx) {
    const double h = 0x1p-5;
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += (double)grad[i] * (double)grad[i];
    double rms = sqrt(squares / (double)n);
    CHECK(rms > 1e-4);
    for (size_t i = 0; i < n; i += n < 64 ? 1 : n / 61) {
        float was = x[i];
        double l[4];
        for (int j = 0; j < 4; j++) {
            static const double at[4] = {-2, -1, 1, 2};
            x[i] = (float)((double)was + h * at[j]);
            l[j] = loss(ctx);
        }
        x[i] = was;
        double d = (l[0] - 8 * l[1] + 8 * l[2] - l[3]) / (12 * h);
        if (!(fabs(d - (double)grad[i]) <= TOL * (rms + fabs(d))))
            test_fail(__FILE__, __LINE__, "%s: element %zu has gradient %.7g, the difference says %.7g", what, i, (double)grad[i],
                      d);
    }
}

/* ---- two linear layers with an activation between them ---- */

struct mlp {
    struct kern *k;
    struct kern_linear *one, *two;
    float *x, *w1, *b1, *w2, *b2, *c, *pre, *mid, *y;
    int units;
    size_t n;
};

static double mlp_loss(void *arg) {
    struct mlp *m = arg;
    CHECK(m->k->linear_refresh(m->k, m->one) == 0 && m->k->linear_refresh(m->k, m->two) == 0);
    CHECK(m->k->linear(m->k, m->one, m->mid, m->x, m->units, m->pre) == 0);
    CHECK(m->k->linear(m->k, m->two, m->y, m->mid, m->units, NULL) == 0);
    return weighed(m->y, m->c, m->n);
}

static void check_mlp(enum kern_act act) {
    enum { UNIT = 3, UNITS = 2, LINES = UNIT * UNITS, IN = 5, MID = 9, OUT_ = 4 };
    struct mlp m = {
        .k = ref(), .units = UNITS, .n = LINES * OUT_, .x = numbers(LINES * IN), .w1 = numbers(MID * IN), .b1 = numbers(MID)};
    m.w2 = numbers(OUT_ * MID), m.b2 = numbers(OUT_), m.c = numbers(m.n);
    m.pre = numbers(LINES * MID), m.mid = numbers(LINES * MID), m.y = numbers(m.n);
    struct kern_linear_spec one = {.out = MID, .in = IN, .unit = UNIT, .act = act}, two = {.out = OUT_, .in = MID, .unit = UNIT};
    CHECK(m.k->linear_wrap(m.k, &one, m.w1, m.b1, &m.one) == 0 && m.k->linear_wrap(m.k, &two, m.w2, m.b2, &m.two) == 0);
    mlp_loss(&m);
    float dw1[MID * IN] = {0}, db1[MID] = {0}, dw2[OUT_ * MID] = {0}, db2[OUT_] = {0}, dmid[LINES * MID], dx[LINES * IN];
    struct kern *k = m.k;
    CHECK(k->linear_gradients(k, m.two, dw2, db2, m.c, m.mid, UNITS, 0, OUT_, false) == 0);
    CHECK(k->linear_backward(k, m.two, dmid, db1, m.c, act, m.pre, UNITS, false) == 0); // sums dmid
    CHECK(k->linear_gradients(k, m.one, dw1, NULL, dmid, m.x, UNITS, 0, 4, false) == 0);
    CHECK(k->linear_gradients(k, m.one, dw1 + 4 * IN, NULL, dmid, m.x, UNITS, 4, MID - 4, true) == 0); // to zeros
    CHECK(k->linear_backward(k, m.one, dx, NULL, dmid, KERN_NONE, NULL, UNITS, false) == 0);
    check_gradient("x", m.x, dx, LINES * IN, mlp_loss, &m);
    check_gradient("w1", m.w1, dw1, MID * IN, mlp_loss, &m);
    check_gradient("b1", m.b1, db1, MID, mlp_loss, &m);
    check_gradient("w2", m.w2, dw2, OUT_ * MID, mlp_loss, &m);
    check_gradient("b2", m.b2, db2, OUT_, mlp_loss, &m);
    m.k->linear_free(m.k, m.one);
    m.k->linear_free(m.k, m.two);
    kern_close(m.k);
}
TEST(backward_linear_and_gelu) { check_mlp(KERN_GELU_TANH); }
TEST(backward_linear_and_silu) { check_mlp(KERN_SILU); }

/* ---- norm, with and without a gate ---- */

struct norm {
    struct kern *k;
    float *x, *h, *mod, *cx, *cy, *y, *xhat, *rstd, *work; // mod: shift, scale, gate
    int ld, R, T, C;
    bool gated, only_gate;
};

static double norm_loss(void *arg) {
    struct norm *s = arg;
    size_t n = (size_t)s->R * (size_t)s->T * (size_t)s->C;
    const float *shift = s->mod, *scale = s->mod + s->C, *gate = s->mod + 2 * s->C;
    memcpy(s->work, s->x, n * sizeof *s->work);
    if (!s->gated)
        CHECK(s->k->norm_modulate(s->k, s->y, s->work, shift, scale, s->ld, s->R, s->T, s->C, 1e-6f, s->xhat, s->rstd) == 0);
    else
        CHECK(s->k->gate_norm(s->k, s->only_gate ? NULL : s->y, s->work, s->h, gate, shift, scale, s->ld, s->R, s->T, s->C, 1e-6f,
                              s->xhat, s->rstd) == 0);
    return weighed(s->work, s->cx, n) + (s->only_gate ? 0 : weighed(s->y, s->cy, n));
}

static void check_norm(bool gated, bool only_gate, bool shared) {
    enum { R = 3, T = 4, C = 7, N = R * T * C };
    struct norm s = {.k = ref(), .R = R, .T = T, .C = C, .ld = shared ? 0 : 3 * C, .gated = gated, .only_gate = only_gate};
    s.x = numbers(N), s.h = numbers(N), s.mod = numbers(3 * R * C), s.cx = numbers(N), s.cy = numbers(N);
    s.y = numbers(N), s.xhat = numbers(N), s.rstd = numbers(R * T), s.work = numbers(N);
    norm_loss(&s);
    float dx[N], dh[N], dmod[3 * R * C] = {0};
    memcpy(dx, s.cx, sizeof dx);
    struct kern_norm_back a = {
        .dx = dx, .dshift = dmod, .dscale = dmod + C, .dy = only_gate ? NULL : s.cy, .xhat = s.xhat, .rstd = s.rstd};
    if (gated) a.dh = dh, a.dgate = dmod + 2 * C, a.h = s.h, a.gate = s.mod + 2 * C;
    a.scale = s.mod + C, a.ld = s.ld, a.R = R, a.T = T, a.C = C;
    CHECK(s.k->gate_norm_backward(s.k, &a) == 0);
    check_gradient("x", s.x, dx, N, norm_loss, &s);
    if (gated) check_gradient("h", s.h, dh, N, norm_loss, &s);
    check_gradient("mod", s.mod, dmod, (size_t)(shared ? 1 : R) * 3 * C, norm_loss, &s);
    kern_close(s.k);
}
TEST(backward_norm) { check_norm(false, false, false), check_norm(false, false, true); }
TEST(backward_gate_and_norm) { check_norm(true, false, false), check_norm(true, false, true); }
TEST(backward_gate) { check_norm(true, true, false), check_norm(true, true, true); }

/* ---- attention ---- */

struct heads {
    struct kern *k;
    float *qkv, *c, *o, *lse, *q, *kv;
    int R, T, H, D, S;
};

static double heads_loss(void *arg) {
    struct heads *s = arg;
    CHECK(s->k->attention(s->k, s->o, s->qkv, s->R, s->T, s->H, s->D, s->lse) == 0);
    return weighed(s->o, s->c, (size_t)(s->R * s->T * s->H * s->D));
}

TEST(backward_attention) {
    enum { R = 2, T = 5, H = 2, D = 8, C = H * D };
    struct heads s = {.k = ref(), .R = R, .T = T, .H = H, .D = D, .qkv = numbers(R * T * 3 * C), .c = numbers(R * T * C)};
    s.o = numbers(R * T * C), s.lse = numbers(R * H * T);
    heads_loss(&s);
    float dqkv[R * T * 3 * C];
    CHECK(s.k->attention_backward(s.k, dqkv, NULL, s.c, s.qkv, s.o, s.lse, R, T, H, D, false) == 0);
    check_gradient("qkv", s.qkv, dqkv, R * T * 3 * C, heads_loss, &s);
    kern_close(s.k);
}

static double cross_loss(void *arg) {
    struct heads *s = arg;
    int C = s->H * s->D;
    CHECK(s->k->cross_attention(s->k, s->o, s->q, s->kv + C, 3 * C, s->R, s->T, s->S, s->H, s->D) == 0);
    return weighed(s->o, s->c, (size_t)(s->R * s->T * C));
}

TEST(backward_cross_attention) {
    enum { R = 2, T = 5, H = 2, D = 8, C = H * D, S = 3 }; // keys and values lie behind something else
    struct heads s = {.k = ref(), .R = R, .T = T, .H = H, .D = D, .S = S, .q = numbers(R * T * C), .kv = numbers(R * S * 3 * C)};
    s.c = numbers(R * T * C), s.o = numbers(R * T * C);
    float dq[R * T * C], dkv[R * S * 3 * C] = {0};
    CHECK(s.k->cross_attention_backward(s.k, dq, dkv + C, s.c, s.q, s.kv + C, 3 * C, R, T, S, H, D) == 0);
    check_gradient("q", s.q, dq, R * T * C, cross_loss, &s);
    check_gradient("kv", s.kv, dkv, R * S * 3 * C, cross_loss, &s);
    CHECK(s.k->cross_attention_backward(s.k, dq, dkv, s.c, s.q, s.kv, 3 * C, R, T, KERN_CROSS_KEYS + 1, H, D) ==
          KERN_EUNSUPPORTED);
    kern_close(s.k);
}

/* ---- tokens, labels, images: linear, so one product says all ---- */

TEST(backward_of_linear_moves) {
    enum { R = 3, C = 4, T = 5, P = 2, I = 6, COUT = 3, KEEP = 2, IMG = R * KEEP * I * I, TOK = R * COUT * I * I };
    struct kern *k = ref();
    float *tok = numbers(TOK), *cimg = numbers(IMG), *img = numbers(IMG), *dtok = numbers(TOK);
    CHECK(k->unpatchify(k, img, tok, R, COUT, KEEP, I, P) == 0 &&
          k->unpatchify_backward(k, dtok, cimg, R, COUT, KEEP, I, P) == 0);
    CHECK_NEAR(weighed(img, cimg, IMG), weighed(tok, dtok, TOK), 1e-5);
    int zeros = 0;
    for (int i = 0; i < TOK; i++) zeros += dtok[i] == 0;
    CHECK(zeros == TOK - IMG);

    float x[R * T * C] = {0}, *v = numbers(R * C), *cx = numbers(R * T * C), *dv = numbers(R * C);
    CHECK(k->set_token(k, x, KERN_F32, v, R, T, C, 3) == 0 && k->take_token(k, dv, cx, R, T, C, 3) == 0);
    CHECK_NEAR(weighed(x, cx, R * T * C), weighed(v, dv, R * C), 1e-5);

    const int32_t y[R] = {1, -1, 1}; // one class twice, one row without
    float temb[R * C] = {0}, silu[R * C], c[R * C], dtable[2 * C], *table = numbers(2 * C), *dc = numbers(R * C);
    for (int i = 0; i < 2 * C; i++) dtable[i] = 1;
    CHECK(k->condition(k, silu, temb, table, y, R, C, c) == 0 && k->condition_backward(k, dtable, dc, y, R, C) == 0);
    double ones = 0;
    for (int i = 0; i < 2 * C; i++) ones += (double)table[i];
    CHECK_NEAR(weighed(c, dc, R * C), weighed(table, dtable, 2 * C) - ones, 1e-5);
    kern_close(k);
}

/* ---- loss ---- */

struct lossy {
    struct kern *k;
    struct kern_loss l;
    float *out, *x1, *x0, *xt;
    bool bits; // which of the two losses
};
enum { NUMEL = 11 };

static double loss_loss(void *arg) {
    struct lossy *s = arg;
    float dout[2 * NUMEL], loss[2];
    CHECK(s->k->loss(s->k, dout, loss, s->out, 2 * NUMEL, s->x1, s->x0, s->xt, NUMEL, &s->l, 1) == 0);
    return (double)s->l.grad * (double)loss[s->bits];
}

static void check_loss(bool hybrid, bool first) {
    struct lossy s = {.k = ref(), .out = numbers(2 * NUMEL), .x1 = numbers(NUMEL), .x0 = numbers(NUMEL), .xt = numbers(NUMEL)};
    float dout[2 * NUMEL], loss[2];
    s.l = (struct kern_loss){.c_out = 0.8f, .c1 = -0.7f, .c0 = 0.4f, .weight = 1.5f, .grad = 3, .hybrid = hybrid, .first = first};
    s.l.log_lo = -1, s.l.log_span = 0.7f, s.l.lv_true = -0.9f, s.l.recip = 1.01f, s.l.recip_m1 = 0.1f,
    s.l.posterior = first ? 1 : 0.6f;
    s.x1[0] = 0.9995f, s.x1[1] = -0.9995f, s.x1[2] = 40; // the outermost levels; one so far off that its probability is cut
    CHECK(s.k->loss(s.k, dout, loss, s.out, 2 * NUMEL, s.x1, s.x0, s.xt, NUMEL, &s.l, 1) == 0);
    check_gradient("out", s.out, dout, NUMEL, loss_loss, &s);
    s.bits = true;
    if (hybrid) check_gradient("variance", s.out + NUMEL, dout + NUMEL, NUMEL, loss_loss, &s);
    for (int i = NUMEL; i < 2 * NUMEL && !hybrid; i++) CHECK(dout[i] == 0);
    if (first) CHECK(dout[NUMEL + 2] == 0);
    kern_close(s.k);
}
TEST(backward_loss) { check_loss(false, false); }
TEST(backward_loss_with_variance) { check_loss(true, false), check_loss(true, true); }

/* ---- the optimiser ---- */

TEST(mix_is_noise_and_image) {
    struct kern *k = ref();
    float *x1 = numbers(100), *xt = numbers(100), *x0 = numbers(100);
    struct kern_mix m[2] = {{.seed = 3, .image = 1, .draw = 2, .a1 = 1}, {.seed = 3, .image = 2, .draw = 2, .a0 = 1}};
    CHECK(k->mix(k, xt, x0, x1, 50, m, 2) == 0);
    CHECK(memcmp(xt, x1, 50 * sizeof *xt) == 0 && memcmp(xt + 50, x0 + 50, 50 * sizeof *xt) == 0);
    CHECK(memcmp(x0, x0 + 50, 50 * sizeof *x0) != 0);
    kern_close(k);
}

// Three steps of torch 2.15's AdamW with clip_grad_norm_ (at 3, which the first step's gradient does not reach) and an average,
// and no gradient at all for the last number
TEST(adamw_as_torch) {
    enum { N = 5 };
    static const float want[4][N] = {{0.468673468f, -1.23570657f, 1.96417797f, -0.02883102f, 0},
                                     {0.0520792939f, -0.000950102927f, 0.260396481f, 0.694390535f, 0},
                                     {0.00532137835f, 2.36505675e-05f, 0.133034468f, 0.946022809f, 0},
                                     {0.494135946f, -1.24672961f, 1.99329507f, -0.00458426168f, 0}};
    static const float start[N] = {0.5f, -1.25f, 2, 1e-3f, 0}, g1[N] = {0.3f, -0.02f, 1.5f, 4, 0};
    const char *names[] = {"ref", "cpu"};
    for (int b = 0; b < 2; b++) {
        struct kern *k;
        CHECK(kern_open(&k, &(struct kern_config){.backend = names[b], .threads = 2}, NULL, 0) == 0);
        float p[N], m[N] = {0}, v[N] = {0}, e[N], *averages[] = {e};
        memcpy(p, start, sizeof p), memcpy(e, start, sizeof e);
        for (int step = 1; step <= 3; step++) {
            struct kern_adamw a = {.lr = 1e-2,
                                   .beta1 = 0.9,
                                   .beta2 = 0.95,
                                   .eps = 1e-8,
                                   .decay = 0.1,
                                   .grad_scale = 0.5,
                                   .max_norm = 3,
                                   .n_ema = 1,
                                   .ema = {0.9}};
            a.bias1 = 1 - pow(a.beta1, step), a.bias2 = 1 - pow(a.beta2, step);
            float g[N], was[N];
            double norm2 = 0, moved2 = 1, moved = 1; // both are added to
            for (int i = 0; i < N; i++) g[i] = g1[i] * (float)(i == 1 && step == 2 ? -step : step);
            memcpy(was, p, sizeof was);
            CHECK(k->sum_squares(k, &norm2, g, N) == 0);
            CHECK(k->adamw(k, p, m, v, averages, g, N, &a, &norm2, &moved2) == 0);
            for (int i = 0; i < N; i++) moved += ((double)p[i] - (double)was[i]) * ((double)p[i] - (double)was[i]);
            CHECK_NEAR(moved2, moved, 1e-12 * moved);
        }
        const float *got[] = {p, m, v, e};
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < N; j++) CHECK_NEAR((double)got[i][j], (double)want[i][j], 3e-7 * fabs((double)want[i][j]));
        kern_close(k);
    }
}

TEST(adamw_lets_nan_through) {
    struct kern *k = ref();
    float p[2] = {1, 1}, m[2] = {0}, v[2] = {0}, g[2] = {NAN, 1};
    double norm2 = 0;
    struct kern_adamw a = {.lr = 1, .bias1 = 1, .bias2 = 1, .grad_scale = 1, .max_norm = 1};
    CHECK(k->sum_squares(k, &norm2, g, 2) == 0 && k->adamw(k, p, m, v, NULL, g, 2, &a, &norm2, NULL) == 0);
    CHECK(isnan(norm2) && isnan(p[0]) && isnan(p[1]));
    kern_close(k);
}

TEST(sum_squares_for_any_number_of_threads) {
    enum { MOST = 300007 };
    float *x = malloc(MOST * sizeof *x);
    CHECK(x);
    for (int i = 0; i < MOST; i++) x[i] = (float)sin(0.37 * i);
    static const size_t sizes[] = {0, 1, 63, 1000, MOST};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        double want = 0, got[3] = {0};
        struct kern *k = ref();
        CHECK(k->sum_squares(k, &want, x, sizes[s]) == 0);
        kern_close(k);
        for (int t = 0; t < 3; t++) {
            CHECK(kern_open(&k, &(struct kern_config){.backend = "cpu", .threads = t + 1}, NULL, 0) == 0);
            CHECK(k->sum_squares(k, &got[t], x, sizes[s]) == 0);
            kern_close(k);
            CHECK_NEAR(got[t], want, 1e-12 * want);
            CHECK(memcmp(&got[t], &got[0], sizeof *got) == 0);
        }
    }
    free(x);
}

// Calls for some rows after the others, of multiples of KERN_SUM_LINES lines, give the bits of one call, whatever the threads
TEST(backward_in_parts_gives_the_same_bits) {
    enum { T = 64, ROWS = 13, PART = 4, LINES = ROWS * T, IN = 40, WIDE = 100 };
    float *w = numbers(WIDE * IN), *x = numbers(LINES * IN), *dy = numbers(LINES * WIDE), *rstd = numbers(LINES),
          *scale = numbers(IN);
    float *kept = NULL;
    for (int run = 0; run < 4; run++) {
        int each = run % 2 ? PART : ROWS;
        struct kern *k;
        CHECK(kern_open(&k, &(struct kern_config){.backend = "cpu", .threads = 1 + run / 2}, NULL, 0) == 0);
        if (!k->back_lines) return kern_close(k); // no vector code: all at once
        CHECK(k->back_lines % KERN_SUM_LINES == 0);
        size_t all = LINES * IN * 2 + WIDE * IN + WIDE + 3 * IN;
        float *dx = calloc(all, sizeof *dx), *stream = dx + LINES * IN, *dw = stream + LINES * IN, *db = dw + WIDE * IN,
              *dshift = db + WIDE, *dscale = dshift + IN, *sum = dscale + IN;
        struct kern_linear *l;
        CHECK(dx && k->linear_wrap(k, &(struct kern_linear_spec){.out = WIDE, .in = IN, .unit = T}, w, NULL, &l) == 0);
        for (int r = 0; r < ROWS; r += each) {
            int n = ROWS - r < each ? ROWS - r : each, line = r * T, at = line * IN;
            struct kern_norm_back norm = {.dx = stream + at, .dshift = dshift, .dscale = dscale, .dy = dx + at, .xhat = x + at};
            norm.rstd = rstd + line, norm.scale = scale, norm.R = n, norm.T = T, norm.C = IN;
            CHECK(k->linear_backward(k, l, dx + at, sum, dy + line * WIDE, KERN_NONE, NULL, n, r > 0) == 0);
            CHECK(k->linear_gradients(k, l, dw, db, dy + line * WIDE, x + at, n, 0, WIDE, r > 0) == 0);
            CHECK(k->gate_norm_backward(k, &norm) == 0);
        }
        if (!kept) kept = dx;
        CHECK(memcmp(dx, kept, all * sizeof *dx) == 0);
        if (kept != dx) free(dx);
        k->linear_free(k, l);
        kern_close(k);
    }
    free(kept);
}

// A layer made by linear_new keeps copies of its weights, so there is nothing to pass gradients back through
TEST(backward_needs_a_wrapped_layer) {
    const char *names[] = {"ref", "cpu"};
    for (int b = 0; b < 2; b++) {
        struct kern *k;
        CHECK(kern_open(&k, &(struct kern_config){.backend = names[b], .threads = 1}, NULL, 0) == 0);
        float w[4] = {1, 2, 3, 4}, dw[4] = {0}, dy[2] = {1, 1}, x[2] = {1, 1};
        struct kern_linear *l;
        CHECK(k->linear_new(k, &(struct kern_linear_spec){.out = 2, .in = 2, .unit = 1}, w, NULL, &l) == 0);
        CHECK(k->linear_gradients(k, l, dw, NULL, dy, x, 1, 0, 2, true) == KERN_EUNSUPPORTED && strstr(k->why, "learn"));
        CHECK(k->linear_backward(k, l, dw, NULL, dy, KERN_NONE, NULL, 1, true) == KERN_EUNSUPPORTED && strstr(k->why, "learn"));
        k->linear_free(k, l);
        kern_close(k);
    }
}

// New weights are seen after linear_refresh, biases too, by layers of both kinds and by both back ends
TEST(linear_refresh_reads_the_weights_again) {
    const char *names[] = {"ref", "cpu"};
    for (int b = 0; b < 4; b++) {
        enum { IN = 3, OUT_ = 5 };
        struct kern *k;
        CHECK(kern_open(&k, &(struct kern_config){.backend = names[b / 2], .threads = 2}, NULL, 0) == 0);
        float *w = numbers(OUT_ * IN), *bias = numbers(OUT_), *x = numbers(KERN_VEC * IN), *y = numbers(KERN_VEC * OUT_);
        struct kern_linear *l;
        struct kern_linear_spec s = {.out = OUT_, .in = IN, .unit = b % 2 ? KERN_VEC : 4};
        CHECK(k->linear_wrap(k, &s, w, bias, &l) == 0);
        for (int i = 0; i < OUT_ * IN; i++) w[i] *= -2;
        for (int i = 0; i < OUT_; i++) bias[i] += 1;
        CHECK(k->linear_refresh(k, l) == 0 && k->linear(k, l, y, x, KERN_VEC / s.unit, NULL) == 0);
        for (int o = 0; o < OUT_; o++) CHECK_NEAR((double)y[o], weighed(w + o * IN, x, IN) + (double)bias[o], 1e-5);
        k->linear_free(k, l);
        kern_close(k);
    }
}
