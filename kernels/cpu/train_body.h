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
#define KB ((size_t)KERN_SUM_LINES)
#define QUERIES ((size_t)64) // attention works on tiles of scores
#define KEYS ((size_t)256)

typedef double vd __attribute__((vector_size(W * 8)));
#define V_DOUBLE(v) __builtin_convertvector(v, vd) // no function: a vector of this width as an argument would change the ABI

INLINE double sum_d(const vd *v) {
    double sum = 0;
    for (int i = 0; i < W; i++) sum += (*v)[i];
    return sum;
}
INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }
INLINE vf load(const float *p, size_t i, size_t n) { return act_load(false, p, i, n - i < W ? (int)(n - i) : W); }
INLINE void store(float *p, size_t i, size_t n, vf v) { act_store(false, p, i, v, n - i < W ? (int)(n - i) : W); }

/* ---- products ---- */

// A packed tile or panel is 16 floats longer than it need be: at distances of whole pages all would share a few places of the
// first-level cache.
#define PACKED(k, width) ((k) * (width) + 16)

// a of a product, in tiles of GM lines: tile i begins at p + i*step, its element (r, k) is at [r*ld + k] or, across, at [k*ld +
// r]
struct factor {
    const float *p;
    size_t step, ld;
    bool across;
};

// c [m, n] of at most `most` x GN; b packed [k][GN]
INLINE void tile(float *c, size_t ldc, const float *a, size_t ld, bool across, const float *b, size_t k, size_t m, size_t n,
                 bool add, size_t most) {
    vf acc[GM][2] = {0};
    const float *line[GM];
    for (size_t r = 0; r < most; r++) line[r] = a + (r < m ? r : m - 1) * ld; // lines past the end are computed and forgotten
    for (size_t r = 0; r < m; r++)
        __builtin_prefetch(c + r * ldc, 1), __builtin_prefetch(c + r * ldc + W, 1); // wanted at the end
    for (size_t i = 0; i < k; i++) {
        vf b0 = v_load(b + i * GN), b1 = v_load(b + i * GN + W);
        for (size_t r = 0; r < most; r++) {
            vf x = v_all(across ? a[i * ld + (r < m ? r : m - 1)] : line[r][i]);
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

#define TILE(name, m, n, most)                                                                                                   \
    static void name(float *c, size_t ldc, const float *a, size_t ld, bool across, const float *b, size_t k, size_t lines,       \
                     size_t columns, bool add) {                                                                                 \
        (void)lines, (void)columns;                                                                                              \
        if (across) tile(c, ldc, a, ld, true, b, k, m, n, add, most);                                                            \
        else tile(c, ldc, a, ld, false, b, k, m, n, add, most);                                                                  \
    }
TILE(whole_tile, GM, GN, GM)
TILE(short_tile, lines, columns, GM / 3)
TILE(any_tile, lines, columns, GM)

static void tiles(float *c, size_t ldc, struct factor a, const float *panels, size_t m, size_t n, size_t k, bool add) {
    for (size_t j = 0; j < n; j += GN, panels += PACKED(k, GN))
        for (size_t i = 0; i < m; i += GM) {
            size_t lines = m - i < GM ? m - i : GM, columns = n - j < GN ? n - j : GN;
            (lines == GM && columns == GN ? whole_tile
             : lines <= GM / 3
                 ? short_tile
                 : any_tile)(c + i * ldc + j, ldc, a.p + i / GM * a.step, a.ld, a.across, panels, k, lines, columns, add);
        }
}

// a's lines (of k) of m floats, ak apart -> [m/GM] of [k][GM]; a line is read from end to end
static struct factor pack_lines(float *to, const float *a, size_t ak, size_t m, size_t k) {
    size_t step = PACKED(k, GM), whole = m / GM, rest = m % GM;
    for (size_t i = 0; i < k; i++, a += ak) {
        for (size_t t = 0; t < whole; t++) memcpy(to + t * step + i * GM, a + t * GM, GM * sizeof *to);
        if (rest) memcpy(to + whole * step + i * GM, a + whole * GM, rest * sizeof *to);
    }
    return (struct factor){to, step, GM, true};
}

// b's lines (of k) of n floats, ldb apart -> [n/GN] of [k][GN]
static void pack_panels(float *to, const float *b, size_t ldb, size_t n, size_t k) {
    for (size_t i = 0; i < k; i++, b += ldb, to += GN)
        for (size_t j = 0; j < n; j += W) v_store(to + j / GN * PACKED(k, GN) + j % GN, load(b, j, n));
}

static void gemm(const struct train_gemm *g) {
    float *panels = g->work, *lines = panels + TRAIN_COLUMNS / GN * PACKED(KB, GN);
    for (size_t n0 = 0; n0 < g->n; n0 += TRAIN_COLUMNS)
        for (size_t k0 = 0; k0 < g->k; k0 += KB) {
            size_t n = least(TRAIN_COLUMNS, g->n - n0), k = least(KB, g->k - k0);
            pack_panels(panels, g->b + k0 * g->ldb + n0, g->ldb, n, k);
            for (size_t m0 = 0; m0 < g->m; m0 += TRAIN_LINES) {
                size_t m = least(TRAIN_LINES, g->m - m0);
                const float *from = g->a + m0 * g->ar + k0 * g->ak;
                struct factor a =
                    g->ak == 1 ? (struct factor){from, GM * g->ar, g->ar, false} : pack_lines(lines, from, g->ak, m, k);
                tiles(g->c + m0 * g->ldc + n0, g->ldc, a, panels, m, n, k, g->add || k0);
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

// Of at most KERN_SUM_LINES lines and W columns
INLINE vf sum_part(const float *a, const float *b, size_t lines, size_t C, size_t n) {
    vd total = {0};
    for (size_t l = 0; l < lines;) {
        vf sum = {0};
        for (size_t end = least(lines, l + 64); l < end; l++) {
            vf x = load(a + l * C, 0, n);
            sum = b ? V_FMA(x, load(b + l * C, 0, n), sum) : sum + x;
        }
        total += V_DOUBLE(sum);
    }
    return __builtin_convertvector(total, vf);
}

static void sum_lines(float *out, const float *a, const float *b, size_t lines, size_t C, size_t n) {
    for (size_t l = 0; l < lines; l += KERN_SUM_LINES)
        for (size_t i = 0; i < n; i += W) {
            size_t at = l * C + i;
            store(out, i, n, load(out, i, n) + sum_part(a + at, b ? b + at : NULL, least(KERN_SUM_LINES, lines - l), C, n - i));
        }
}

/* ---- attention ---- */

struct scores {     // parts of train_head.work
    float *p, *ds;  // [QUERIES] lines of LINE
    float *kt, *vt; // this block's keys and values transposed, as panels of columns of scores
    float *keys;    // its keys as they are, as panels of channels
    float *queries; // of some queries or their d_o, panels of channels
    float *total, *delta; // [T]: a query's sum of weights; its sum of weights times dP, then the mean of dP by the weights
    bool known;           // the means are
};
#define LINE (KEYS + 16) // a line of scores, also read across

// Lines of D floats -> their transpose as panels: [lines/GN] of [D][GN]
static void pack_across(float *to, const float *from, size_t ld, size_t lines, size_t D) {
    for (size_t j = 0; j < lines; j += 8)
        for (size_t d = 0; d < D; d += 8) {
            float *at = to + j / GN * PACKED(D, GN) + d * GN + j % GN;
            const float *line = from + j * ld + d;
            if (lines - j >= 8) transpose8(at, GN, line, ld, false);
            else
                for (size_t r = 0; r < lines - j; r++)
                    for (size_t i = 0; i < 8; i++) at[i * GN + r] = line[r * ld + i];
        }
}

// p: products of queries and keys -> weights, whose sums are added up; ds: products of d_o and values
static void soften(const struct train_head *a, const struct scores *s, size_t q0, size_t queries, size_t keys) {
    const float scale = 1.44269504f / sqrtf((float)a->D);
    for (size_t r = 0; r < queries; r++) {
        float *p = s->p + r * LINE, *ds = s->ds + r * LINE, lse = a->lse[q0 + r] * 1.44269504f;
        vf total = {0}, along = {0};
        for (size_t j = 0; j < keys; j += W) {
            store(p, j, keys, v_exp2(V_FMA(load(p, j, keys), v_all(scale), v_all(-lse))));
            vf w = load(p, j, keys);
            total += w, along = V_FMA(w, load(ds, j, keys), along);
        }
        if (!s->known) s->total[q0 + r] += V_SUM(total), s->delta[q0 + r] += V_SUM(along);
    }
}

static void means(const struct scores *s, size_t q0, size_t queries) {
    for (size_t i = q0; i < q0 + queries; i++) s->delta[i] /= s->total[i];
}

// ds -> gradients of the plain products
static void slopes(const struct train_head *a, const struct scores *s, size_t q0, size_t queries, size_t keys) {
    const float scale = 1 / sqrtf((float)a->D);
    for (size_t r = 0; r < queries; r++)
        for (size_t j = 0; j < keys; j += W) {
            float *p = s->p + r * LINE, *ds = s->ds + r * LINE;
            store(ds, j, keys, load(p, j, keys) * (load(ds, j, keys) - s->delta[q0 + r]) * scale);
        }
}

// A tile's weights, and the gradients of those
static void weigh(const struct train_head *a, const struct scores *s, size_t q0, size_t k0) {
    size_t D = (size_t)a->D, nq = least(QUERIES, (size_t)a->T - q0), nk = least(KEYS, (size_t)a->T - k0);
    const struct factor q = {a->q + q0 * a->ld, GM * a->ld, a->ld, false},
                        d_o = {a->d_o + q0 * a->o_ld, GM * a->o_ld, a->o_ld, false};
    tiles(s->p, LINE, q, s->kt, nq, nk, D, false);
    tiles(s->ds, LINE, d_o, s->vt, nq, nk, D, false);
    soften(a, s, q0, nq, nk);
}

static void meet(const struct train_head *a, const struct scores *s, size_t q0, size_t k0) {
    size_t D = (size_t)a->D, ld = a->ld, nq = least(QUERIES, (size_t)a->T - q0), nk = least(KEYS, (size_t)a->T - k0);
    const float *q = a->q + q0 * ld, *d_o = a->d_o + q0 * a->o_ld;
    const struct factor ds = {s->ds, GM * LINE, LINE, false}, ds_across = {s->ds, GM, LINE, true},
                        p_across = {s->p, GM, LINE, true};
    weigh(a, s, q0, k0);
    if (!s->known) means(s, q0, nq);
    slopes(a, s, q0, nq, nk);
    tiles(a->dq + q0 * ld, ld, ds, s->keys, nq, D, nk, k0 > 0);
    pack_panels(s->queries, q, ld, D, nq);
    tiles(a->dk + k0 * ld, ld, ds_across, s->queries, nk, D, nq, q0 > 0);
    pack_panels(s->queries, d_o, a->o_ld, D, nq);
    tiles(a->dv + k0 * ld, ld, p_across, s->queries, nk, D, nq, q0 > 0);
}

static void pack_keys(const struct train_head *a, const struct scores *s, size_t k0) {
    size_t keys = least(KEYS, (size_t)a->T - k0), at = k0 * a->ld;
    pack_across(s->kt, a->k + at, a->ld, keys, (size_t)a->D);
    pack_across(s->vt, a->v + at, a->ld, keys, (size_t)a->D);
    pack_panels(s->keys, a->k + at, a->ld, (size_t)a->D, keys);
}

// A query's mean of dP needs all its keys: more than a tile has are gone through twice
static void attention(const struct train_head *a) {
    size_t T = (size_t)a->T, D = (size_t)a->D, channels = (D + GN - 1) / GN;
    struct scores s = {.p = a->work};
    s.ds = s.p + QUERIES * LINE;
    s.kt = s.ds + QUERIES * LINE;
    s.vt = s.kt + KEYS / GN * PACKED(D, GN);
    s.keys = s.vt + KEYS / GN * PACKED(D, GN);
    s.queries = s.keys + channels * PACKED(KEYS, GN);
    s.total = s.queries + channels * PACKED(QUERIES, GN);
    s.delta = s.total + T;
    memset(s.total, 0, 2 * T * sizeof *s.total);
    for (size_t k0 = 0; T > KEYS && k0 < T; k0 += KEYS) {
        pack_keys(a, &s, k0);
        for (size_t q0 = 0; q0 < T; q0 += QUERIES) weigh(a, &s, q0, k0);
    }
    if (T > KEYS) means(&s, 0, T), s.known = true;
    for (size_t k0 = 0; k0 < T; k0 += KEYS) {
        pack_keys(a, &s, k0);
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
