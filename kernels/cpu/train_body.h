// SPDX-License-Identifier: MIT
/*
 * The vectorised loops of train.h, once for every width. The including file defines what simd_body.h lists (MR not), and
 *   GM      lines of a register tile (GM*2 accumulators)
 *   TRAIN   the table's name
 *
 * gemm is Goto's: a panel of b of KB x GN lies packed in the first-level cache, a in lines of its own or packed in the second.
 */
#include "kernels/cpu/simd_math.h"
#include "kernels/cpu/train.h"

#define GN ((size_t)(2 * W))
#define KB ((size_t)384)
#define QUERIES ((size_t)64) // attention works on tiles of scores
#define KEYS ((size_t)256)

typedef double vd __attribute__((vector_size(W * 8)));
#define V_DOUBLE(v) __builtin_convertvector(v, vd) // no function: a vector of this width as an argument would change the ABI

INLINE double sum_d(const vd *v) {
    double sum = 0;
    for (int i = 0; i < W; i++) sum += (*v)[i];
    return sum;
}
INLINE vf load(const float *p, size_t i, size_t n) { return act_load(false, p, i, n - i < W ? (int)(n - i) : W); }
INLINE void store(float *p, size_t i, size_t n, vf v) { act_store(false, p, i, v, n - i < W ? (int)(n - i) : W); }

/* ---- products ---- */

// c [m, n] of at most GM x GN; b packed [k][GN]. packed: a is [k][GM], else lines that are ar apart
INLINE void tile(float *c, size_t ldc, const float *a, size_t ar, bool packed, const float *b, size_t k, size_t m, size_t n,
                 bool add) {
    vf acc[GM][2] = {0};
    const float *line[GM];
    for (size_t r = 0; r < GM; r++) line[r] = a + (r < m ? r : m - 1) * ar; // lines past the end are computed and forgotten
    for (size_t i = 0; i < k; i++) {
        vf b0 = v_load(b + i * GN), b1 = v_load(b + i * GN + W);
        for (size_t r = 0; r < GM; r++) {
            vf x = v_all(packed ? a[i * GM + r] : line[r][i]);
            acc[r][0] = V_FMA(x, b0, acc[r][0]);
            acc[r][1] = V_FMA(x, b1, acc[r][1]);
        }
    }
    for (size_t r = 0; r < m; r++)
        for (size_t j = 0; j * W < n; j++) {
            float *to = c + r * ldc;
            store(to, j * W, n, add ? load(to, j * W, n) + acc[r][j] : acc[r][j]);
        }
}

// a's lines (of k) of m floats, ak apart -> [m/GM][k][GM]
static void pack_lines(float *to, const float *a, size_t ak, size_t m, size_t k) {
    for (; m >= GM; a += GM, m -= GM, to += k * GM)
        for (size_t i = 0; i < k; i++) memcpy(to + i * GM, a + i * ak, GM * sizeof *to);
    for (size_t i = 0; m && i < k; i++)
        for (size_t r = 0; r < GM; r++) to[i * GM + r] = r < m ? a[i * ak + r] : 0;
}

static void pack_panel(float *to, const float *b, size_t ldb, size_t n, size_t k) {
    for (size_t i = 0; i < k && n == GN; i++) {
        v_store(to + i * GN, v_load(b + i * ldb));
        v_store(to + i * GN + W, v_load(b + i * ldb + W));
    }
    for (size_t i = 0; i < k && n < GN; i++) {
        v_store(to + i * GN, load(b + i * ldb, 0, n));
        v_store(to + i * GN + W, n > W ? load(b + i * ldb, W, n) : (vf){0});
    }
}

static void gemm(const struct train_gemm *g) {
    float *panel = g->work, *lines = panel + KB * GN;
    bool packed = g->ak != 1;
    for (size_t k0 = 0; k0 < g->k; k0 += KB) {
        size_t k = g->k - k0 < KB ? g->k - k0 : KB;
        bool add = g->add || k0;
        const float *a = g->a + k0 * g->ak;
        if (packed) pack_lines(lines, a, g->ak, g->m, k);
        for (size_t n0 = 0; n0 < g->n; n0 += GN) {
            size_t n = g->n - n0 < GN ? g->n - n0 : GN;
            pack_panel(panel, g->b + k0 * g->ldb + n0, g->ldb, n, k);
            for (size_t m0 = 0; m0 < g->m; m0 += GM) {
                size_t m = g->m - m0 < GM ? g->m - m0 : GM;
                float *c = g->c + m0 * g->ldc + n0;
                if (packed) tile(c, g->ldc, lines + m0 * k, 0, true, panel, k, m, n, add);
                else tile(c, g->ldc, a + m0 * g->ar, g->ar, false, panel, k, m, n, add);
            }
        }
    }
}

/* ---- activations: with t = 1/(1 + exp(-q)), u t' the same for both: act = u t, act' = t (1 + u (1 - t) q') ---- */

static void slope(float *dx, const float *x, size_t n, enum kern_act act) {
    bool gelu = act == KERN_GELU_TANH;
    for (size_t i = 0; i < n; i += W) {
        vf u = load(x, i, n), k, rise; // k = -q log2(e)
        k = gelu ? u * V_FMA(u * u, v_all(-0.102943240f), v_all(-2.30220818f)) : u * -1.44269504f;
        rise = gelu ? V_FMA(u * u, v_all(0.214064417f), v_all(1.59576912f)) : v_all(1);
        vf t = over_one_plus_exp2(v_all(1), k);
        store(dx, i, n, load(dx, i, n) * t * V_FMA(u * rise, 1.0f - t, v_all(1)));
    }
}

/* ---- norm and gate ---- */

// Of one line with dy, the norm's two sums over it
INLINE void norm_sums(const struct train_norm *a, const float *dy, const float *xhat, float *mean, float *along) {
    vf s = {0}, t = {0};
    for (size_t i = 0; i < a->C; i += W) {
        vf d = load(dy, i, a->C) * (1.0f + load(a->scale, i, a->C));
        s += d;
        t = V_FMA(d, load(xhat, i, a->C), t);
    }
    *mean = V_SUM(s) / (float)a->C;
    *along = V_SUM(t) / (float)a->C;
}

INLINE void add_product(float *to, size_t i, size_t n, vf a, vf b) {
    if (to) store(to, i, n, V_FMA(a, b, load(to, i, n)));
}

INLINE void norm_line(const struct train_norm *a, size_t line, bool normed, bool gated) {
    size_t C = a->C, at = line * C;
    float mean = 0, along = 0, rstd = normed ? a->rstd[line] : 0;
    const float *dy = a->dy + at, *xhat = a->xhat + at;
    if (normed) norm_sums(a, dy, xhat, &mean, &along);
    for (size_t i = 0; i < C; i += W) {
        vf dx = load(a->dx + at, i, C);
        if (normed) {
            vf d = load(dy, i, C), x = load(xhat, i, C);
            add_product(a->dshift, i, C, d, v_all(1));
            add_product(a->dscale, i, C, d, x);
            if (a->y) store(a->y + at, i, C, V_FMA(x, 1.0f + load(a->scale, i, C), load(a->shift, i, C))); // as forward's
            d = V_FMA(d, load(a->scale, i, C), d);
            dx = V_FMA(v_all(rstd), V_FMA(x, v_all(-along), d - mean), dx);
            store(a->dx + at, i, C, dx);
        }
        if (gated) {
            store(a->dh + at, i, C, dx * load(a->gate, i, C));
            add_product(a->dgate, i, C, dx, load(a->h + at, i, C));
        }
    }
}

static void norm(const struct train_norm *a) {
    for (size_t i = 0; i < a->lines; i++) {
        if (a->dy && a->h) norm_line(a, i, true, true);
        else if (a->dy) norm_line(a, i, true, false);
        else norm_line(a, i, false, true);
    }
}

static void sum_lines(float *out, const float *a, const float *b, size_t lines, size_t C, size_t n) {
    for (size_t i = 0; i < n; i += W) {
        vd total = {0};
        for (size_t l = 0; l < lines;) {
            vf sum = {0};
            for (size_t end = lines - l < 64 ? lines : l + 64; l < end; l++) {
                vf x = load(a + l * C, i, n);
                sum = b ? V_FMA(x, load(b + l * C, i, n), sum) : sum + x;
            }
            total += V_DOUBLE(sum);
        }
        store(out, i, n, __builtin_convertvector(V_DOUBLE(load(out, i, n)) + total, vf));
    }
}

/* ---- attention ---- */

struct scores {     // parts of train_head.work
    float *p, *ds;  // [QUERIES][KEYS]
    float *kt, *vt; // [D][KEYS], this block's keys and values transposed
    float *delta;   // [T]: d_o along o
    float *gemm;
};

static void transpose(float *to, const float *from, size_t ld, size_t lines, size_t D) {
    for (size_t j = 0; j < lines; j++)
        for (size_t d = 0; d < D; d++) to[d * KEYS + j] = from[j * ld + d];
}

// p: products of queries and keys -> weights; ds: products of d_o and values -> gradients of the plain products
static void soften(const struct train_head *a, const struct scores *s, size_t q0, size_t queries, size_t keys) {
    float scale = 1 / sqrtf((float)a->D);
    for (size_t r = 0; r < queries; r++) {
        float *p = s->p + r * KEYS, *ds = s->ds + r * KEYS, lse = a->lse[q0 + r] * 1.44269504f, delta = s->delta[q0 + r];
        for (size_t j = 0; j < keys; j += W) {
            vf w = v_exp2(V_FMA(load(p, j, keys), v_all(scale * 1.44269504f), v_all(-lse)));
            store(p, j, keys, w);
            store(ds, j, keys, w * (load(ds, j, keys) - delta) * scale);
        }
    }
}

static void meet(const struct train_head *a, const struct scores *s, size_t q0, size_t k0) {
    size_t T = (size_t)a->T, D = (size_t)a->D, queries = T - q0 < QUERIES ? T - q0 : QUERIES,
           keys = T - k0 < KEYS ? T - k0 : KEYS;
    const float *q = a->q + q0 * a->ld, *d_o = a->d_o + q0 * a->o_ld;
    struct train_gemm g = {.c = s->p, .ldc = KEYS, .a = q, .ar = a->ld, .ak = 1, .b = s->kt, .ldb = KEYS, .work = s->gemm};
    g.m = queries, g.n = keys, g.k = D;
    gemm(&g);
    g.c = s->ds, g.a = d_o, g.ar = a->o_ld, g.b = s->vt;
    gemm(&g);
    soften(a, s, q0, queries, keys);
    g = (struct train_gemm){
        .c = a->dq + q0 * a->ld, .ldc = a->ld, .a = s->ds, .ar = KEYS, .ak = 1, .b = a->k + k0 * a->ld, .ldb = a->ld};
    g.m = queries, g.n = D, g.k = keys, g.add = k0 > 0, g.work = s->gemm;
    gemm(&g);
    g = (struct train_gemm){.c = a->dk + k0 * a->ld, .ldc = a->ld, .a = s->ds, .ar = 1, .ak = KEYS, .b = q, .ldb = a->ld};
    g.m = keys, g.n = D, g.k = queries, g.add = q0 > 0, g.work = s->gemm;
    gemm(&g);
    g.c = a->dv + k0 * a->ld, g.a = s->p, g.b = d_o, g.ldb = a->o_ld;
    gemm(&g);
}

static void attention(const struct train_head *a) {
    size_t T = (size_t)a->T, D = (size_t)a->D;
    struct scores s = {.p = a->work};
    s.ds = s.p + QUERIES * KEYS;
    s.kt = s.ds + QUERIES * KEYS;
    s.vt = s.kt + D * KEYS;
    s.gemm = s.vt + D * KEYS;
    s.delta = s.gemm + TRAIN_WORK;
    for (size_t i = 0; i < T; i++) {
        vf sum = {0};
        for (size_t d = 0; d < D; d += W) sum = V_FMA(load(a->o + i * a->o_ld, d, D), load(a->d_o + i * a->o_ld, d, D), sum);
        s.delta[i] = V_SUM(sum);
    }
    for (size_t k0 = 0; k0 < T; k0 += KEYS) {
        size_t keys = T - k0 < KEYS ? T - k0 : KEYS;
        transpose(s.kt, a->k + k0 * a->ld, a->ld, keys, D);
        transpose(s.vt, a->v + k0 * a->ld, a->ld, keys, D);
        for (size_t q0 = 0; q0 < T; q0 += QUERIES) meet(a, &s, q0, k0);
    }
}

/* ---- optimiser ---- */

static double sum_squares(const float *x, size_t n) {
    vd sum = {0};
    for (size_t i = 0; i < n; i += W) {
        vd v = V_DOUBLE(load(x, i, n));
        sum += v * v;
    }
    return sum_d(&sum);
}

static double adamw(const struct adamw *s, float *p, float *m, float *v, float *const e[], size_t at, const float *g, size_t n) {
    vd moved = {0};
    for (size_t i = 0; i < n; i += W) {
        vf was = load(p, i, n), grad = load(g, i, n) * s->g, m1 = load(m, i, n);
        m1 = V_FMA(v_all(s->m1), grad - m1, m1);
        vf v1 = V_FMA(s->v1 * grad, grad, s->v2 * load(v, i, n));
        vf over = V_FMA(V_SQRT(v1), v_all(s->root2), v_all(s->eps)), now = V_FMA(v_all(s->step), m1 / over, was * s->keep);
        store(m, i, n, m1);
        store(v, i, n, v1);
        store(p, i, n, now);
        for (int j = 0; j < s->n_ema; j++) {
            vf mean = load(e[j] + at, i, n);
            store(e[j] + at, i, n, V_FMA(v_all(s->e1[j]), now - mean, mean));
        }
        vd d = V_DOUBLE(now) - V_DOUBLE(was);
        for (int j = 0; n - i < W && j < W; j++) d[j] = (size_t)j < n - i ? d[j] : 0; // nothing over nothing behind the end
        moved += d * d;
    }
    return sum_d(&moved);
}

const struct train_simd TRAIN = {.gemm = gemm,
                                 .slope = slope,
                                 .norm = norm,
                                 .sum_lines = sum_lines,
                                 .attention = attention,
                                 .sum_squares = sum_squares,
                                 .adamw = adamw};
