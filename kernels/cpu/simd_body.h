// SPDX-License-Identifier: MIT
/*
 * The vectorised loops, once for every width. The including file defines
 *   W            floats a vector            SIMD, SIMD_NAME   the table to define, its name for people
 *   V_FMA(a,b,c) a*b + c in one rounding    V_SQRT(x)
 *   V_MAX(a,b), V_MIN(a,b)                  as the processor: the second operand if one is NaN
 *   V_NARROW(x)  (optional)                 to bfloat16
 *   V_SUM(x), V_TOP(x)                      of all elements, in a fixed order
 *   MR           lines of a register tile in attention (MR*2 accumulators)
 * GCC's vector extensions do the rest. Sums run in a fixed order that depends on sizes only. NaNs are never lost on the way: a
 * broken weight or image must show up at the end.
 *
 * Attention follows Dao et al., "FlashAttention" (2022), on registers and caches: a head's keys are packed transposed and its
 * values converted, once; then MR queries at a time meet KEYS keys at a time, with a running maximum and sum per query, so that
 * the scores never leave the first-level cache. Up to KEYS tokens this is plain softmax. Scores are kept in units of log2, so
 * that exp is exp2.
 */
#include "kernels/backend.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/exp.h"
#include "kernels/philox.h"

#define NR (2 * W)
#define KEYS 256

/* ---- norm and gate ---- */

// x += gate*h over one line; y = LN(x)*(1 + scale) + shift
INLINE void norm_line(const struct simd_norm *a, size_t line, bool bf16, bool gated) {
    size_t C = (size_t)a->C, at = line * C;
    int tail = a->C % W ? a->C % W : W;
    float *x = a->x + at;
    vf sum = {0}, squares = {0}, last = {0};
    for (size_t i = 0; i < C; i += W) {
        int n = i + W <= C ? W : tail;
        last = n == W ? v_load(x + i) : v_load_n(x + i, n);
        if (gated) {
            vf g = n == W ? v_load(a->gate + i) : v_load_n(a->gate + i, n);
            last = V_FMA(g, act_load(bf16, a->h, at + i, n), last);
            if (n == W) v_store(x + i, last);
            else v_store_n(x + i, last, n);
        }
        sum += last;
    }
    if (!a->y) return;
    float mean = V_SUM(sum) / (float)a->C;
    for (size_t i = 0; i + W <= C; i += W) {
        vf d = v_load(x + i) - mean;
        squares = V_FMA(d, d, squares);
    }
    for (int i = 0; i < tail && tail < W; i++) squares[i] += (last[i] - mean) * (last[i] - mean);
    float rstd = 1.0f / sqrtf(V_SUM(squares) / (float)a->C + a->eps);
    for (size_t i = 0; i < C; i += W) {
        int n = i + W <= C ? W : tail;
        vf v = n == W ? v_load(x + i) : v_load_n(x + i, n), sc = n == W ? v_load(a->scale + i) : v_load_n(a->scale + i, n);
        vf sh = n == W ? v_load(a->shift + i) : v_load_n(a->shift + i, n);
        vf xhat = (v - mean) * rstd;
        if (a->save_xhat) act_store(bf16, a->save_xhat, at + i, xhat, n);
        act_store(bf16, a->y, at + i, V_FMA(xhat, 1.0f + sc, sh), n);
    }
    if (a->save_rstd) a->save_rstd[line] = rstd;
}

static void norm(const struct simd_norm *a) {
    bool bf16 = a->act == KERN_BF16;
    for (size_t i = 0; i < (size_t)a->lines; i++) {
        if (a->h && bf16) norm_line(a, i, true, true);
        else if (a->h) norm_line(a, i, false, true);
        else if (bf16) norm_line(a, i, true, false);
        else norm_line(a, i, false, false);
    }
}

/* ---- activations ---- */

INLINE void activate_lines(const struct simd_activate *a, bool bf16, bool gelu) {
    for (size_t m = 0; m < (size_t)a->lines; m++)
        for (size_t i = 0; i < (size_t)a->n; i += W) {
            int n = i + W <= (size_t)a->n ? W : a->n % W;
            vf u = act_load(false, a->pre, m * a->pre_ld + i, n);
            if (a->save) act_store(bf16, a->save, m * a->y_ld + i, u, n);
            act_store(bf16, a->y, m * a->y_ld + i, gelu ? v_gelu(u) : v_silu(u), n);
        }
}

static void activate(const struct simd_activate *a) {
    bool bf16 = a->y_type == KERN_BF16, gelu = a->act == KERN_GELU_TANH;
    if (bf16 && gelu) activate_lines(a, true, true);
    else if (bf16) activate_lines(a, true, false);
    else if (gelu) activate_lines(a, false, true);
    else activate_lines(a, false, false);
}

static void to_bf16(uint16_t *dst, const float *src, size_t n) {
    for (size_t i = 0; i < n; i += W) {
        int count = i + W <= n ? W : (int)(n % W);
        act_store(true, dst, i, act_load(false, src, i, count), count);
    }
}

static void condition(float *silu_c, const float *temb, const float *label, int C, float *save_c) {
    for (int i = 0; i < C; i += W) {
        int n = i + W <= C ? W : C % W;
        vf c = act_load(false, temb, (size_t)i, n);
        if (label) c += act_load(false, label, (size_t)i, n);
        if (save_c) act_store(false, save_c, (size_t)i, c, n);
        act_store(false, silu_c, (size_t)i, v_silu(c), n);
    }
}

/* ---- attention ---- */

struct head_tile { // parts of simd_head.work
    int padded_T, padded_D;
    float *kt; // [padded_T/NR][D][NR]
    float *v;  // [padded_T][padded_D]
    float *q;  // [MR][D], scaled
    float *p;  // [MR][KEYS]
    float *o;  // [MR][padded_D]
};

static size_t attention_floats(int T, int D) {
    size_t t = KERN_ROUND_UP((size_t)T, NR), d = KERN_ROUND_UP((size_t)D, W);
    return t * (size_t)D + t * d + MR * ((size_t)D + KEYS + d) + 16 * 5;
}

static float *part(float **at, size_t floats) {
    float *p = *at;
    *at += KERN_ROUND_UP(floats, 16);
    return p;
}

INLINE void pack_head(const struct simd_head *a, const struct head_tile *t, bool bf16) {
    size_t D = (size_t)a->D, es = bf16 ? 2 : 4;
    for (size_t j = 0; j < (size_t)t->padded_T; j += 8) {
        float *panel = t->kt + j / NR * D * NR + j % NR;
        bool full = j + 8 <= (size_t)a->T;
        for (size_t d = 0; d < D && full; d += 8)
            transpose8(panel + d * NR, NR, (const char *)a->k + (j * a->ld + d) * es, a->ld, bf16);
        for (size_t d = 0; d < D && !full; d++)
            for (size_t i = 0; i < 8; i++)
                panel[d * NR + i] = j + i < (size_t)a->T ? kern_load(a->act, a->k, (j + i) * a->ld + d) : 0;
    }
    for (size_t j = 0; j < (size_t)t->padded_T; j++)
        for (size_t d = 0; d < (size_t)t->padded_D; d += W) {
            int n = d + W <= D ? W : (int)(D - d);
            v_store(t->v + j * (size_t)t->padded_D + d, j < (size_t)a->T ? act_load(bf16, a->v, j * a->ld + d, n) : (vf){0});
        }
}

// p[MR][NR] = q kt: lines q of D, a panel kt [D][NR]; lines of p are ld apart
INLINE void panel_product(const float *q, const float *kt, int D, float *p, int ld) {
    vf acc[MR][2] = {0};
    for (int d = 0; d < D; d++) {
        vf k0 = v_load(kt + d * NR), k1 = v_load(kt + d * NR + W);
        for (int r = 0; r < MR; r++) {
            vf a = v_all(q[r * D + d]);
            acc[r][0] = V_FMA(a, k0, acc[r][0]);
            acc[r][1] = V_FMA(a, k1, acc[r][1]);
        }
    }
    for (int r = 0; r < MR; r++) {
        v_store(p + r * ld, acc[r][0]);
        v_store(p + r * ld + W, acc[r][1]);
    }
}

// o[MR][nv*W] = o*decay + p v over n keys
INLINE void weigh_values(float *o, const float *p, const float *v, const float decay[MR], int n, int ld, int nv) {
    vf acc[MR][2];
    for (int r = 0; r < MR; r++)
        for (int c = 0; c < nv; c++) acc[r][c] = v_load(o + r * ld + c * W) * decay[r];
    for (int j = 0; j < n; j++) {
        vf v0 = v_load(v + j * ld), v1 = nv > 1 ? v_load(v + j * ld + W) : v0;
        for (int r = 0; r < MR; r++) {
            vf a = v_all(p[r * KEYS + j]);
            acc[r][0] = V_FMA(a, v0, acc[r][0]);
            if (nv > 1) acc[r][1] = V_FMA(a, v1, acc[r][1]);
        }
    }
    for (int r = 0; r < MR; r++)
        for (int c = 0; c < nv; c++) v_store(o + r * ld + c * W, acc[r][c]);
}

// One query's scores -> exp2(score - top); returns what earlier sums shrink by
INLINE float soften(float *p, int n, float *top, float *sum) {
    vf m = v_all(*top), s = {0};
    for (int j = 0; j < n; j += W) { // V_MAX(new, old) would forget a NaN in new; a NaN score comes back in s
        vf x = v_load(p + j);
        m = V_MAX(x, m);
    }
    float m1 = V_TOP(m);
    for (int j = 0; j < n; j += W) {
        vf e = v_exp2(v_load(p + j) - m1);
        v_store(p + j, e);
        s += e;
    }
    float decay = v_exp2(v_all(*top - m1))[0];
    *sum = *sum * decay + V_SUM(s);
    *top = m1;
    return decay;
}

INLINE void meet_keys(const struct simd_head *a, const struct head_tile *t, int k0, float top[MR], float sum[MR]) {
    int n = t->padded_T - k0 < KEYS ? t->padded_T - k0 : KEYS, ld = t->padded_D;
    float decay[MR];
    for (int j = 0; j < n; j += NR) panel_product(t->q, t->kt + (size_t)(k0 + j) * (size_t)a->D, a->D, t->p + j, KEYS);
    for (int r = 0; r < MR; r++) {
        for (int j = a->T - k0; j < n; j++) t->p[r * KEYS + j] = -INFINITY; // padding
        decay[r] = soften(t->p + r * KEYS, n, &top[r], &sum[r]);
    }
    const float *v = t->v + (size_t)k0 * (size_t)ld;
    int d = 0;
    for (; d + NR <= ld; d += NR) weigh_values(t->o + d, t->p, v + d, decay, n, ld, 2);
    if (d < ld) weigh_values(t->o + d, t->p, v + d, decay, n, ld, 1);
}

INLINE void attend(const struct simd_head *a, const struct head_tile *t, int q0, bool bf16) {
    float top[MR], sum[MR] = {0}, scale = 1.44269504f / sqrtf((float)a->D);
    for (int r = 0; r < MR; r++) {
        top[r] = -INFINITY;
        for (int d = 0; d < a->D; d += W) {
            int n = d + W <= a->D ? W : a->D - d;
            act_store(false, t->q, (size_t)(r * a->D + d),
                      q0 + r < a->T ? scale * act_load(bf16, a->q, (size_t)(q0 + r) * a->ld + (size_t)d, n) : (vf){0}, n);
        }
    }
    memset(t->o, 0, sizeof(float) * MR * (size_t)t->padded_D);
    for (int k0 = 0; k0 < a->T; k0 += KEYS) meet_keys(a, t, k0, top, sum);
    for (int r = 0; r < MR && q0 + r < a->T; r++) {
        for (int d = 0; d < a->D; d += W)
            act_store(bf16, a->o, (size_t)(q0 + r) * a->o_ld + (size_t)d, v_load(t->o + r * t->padded_D + d) / sum[r],
                      d + W <= a->D ? W : a->D - d);
        if (a->save_lse) a->save_lse[q0 + r] = top[r] * 0.693147181f + logf(sum[r]);
    }
}

static void attention(const struct simd_head *a) {
    struct head_tile t = {.padded_T = KERN_ROUND_UP(a->T, NR), .padded_D = KERN_ROUND_UP(a->D, W)};
    float *at = a->work;
    t.kt = part(&at, (size_t)t.padded_T * (size_t)a->D);
    t.v = part(&at, (size_t)t.padded_T * (size_t)t.padded_D);
    t.q = part(&at, MR * (size_t)a->D);
    t.p = part(&at, MR * KEYS);
    t.o = part(&at, MR * (size_t)t.padded_D);
    if (a->act == KERN_BF16) pack_head(a, &t, true);
    else pack_head(a, &t, false);
    for (int q = 0; q < a->T; q += MR) {
        if (a->act == KERN_BF16) attend(a, &t, q, true);
        else attend(a, &t, q, false);
    }
}

/* ---- linear layers of vectors ---- */

static void vectors(float *y, size_t ld, const float *x, int in, const float *w, const float *bias, int n) {
    for (int m = 0; m < KERN_VEC; m += MR) {
        float p[MR * NR];
        panel_product(x + (size_t)m * (size_t)in, w, in, p, NR);
        for (size_t r = 0; r < MR; r++)
            for (int i = 0; i < n; i++) y[((size_t)m + r) * ld + (size_t)i] = p[r * NR + (size_t)i] + bias[i];
    }
}

/* ---- row update: ref_sampler.c in pieces, the same operations on each element ---- */

enum { PIECE = 64, BLOCKS = PIECE / 4 + 1 };

// Normals of blocks b0 .. b0+BLOCKS-1; loops over plain arrays, which the compiler turns into vectors
static void normals(float z[4 * BLOCKS], uint64_t seed, uint32_t image, uint32_t draw, uint32_t b0) {
    enum { N = KERN_ROUND_UP(BLOCKS, W) };
    uint32_t c0[N], c1[N], c2[N], c3[N], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    float r[N], r2[N], cs[N], sn[N];
    for (uint32_t i = 0; i < N; i++) c0[i] = b0 + i, c1[i] = draw, c2[i] = image, c3[i] = 0;
    for (int i = 0; i < N; i++) {
        uint32_t x[4] = {c0[i], c1[i], c2[i], c3[i]};
        philox_rounds(x, k0, k1);
        c0[i] = x[0], c1[i] = x[1], c2[i] = x[2], c3[i] = x[3];
    }
    for (int pair = 0; pair < 2; pair++) {
        const uint32_t *radius = pair ? c2 : c0, *angle = pair ? c3 : c1;
        for (int i = 0; i < N; i++) r2[i] = philox_minus2_log(radius[i]);
        for (int i = 0; i < N; i += W) v_store(r + i, V_SQRT(v_load(r2 + i)));
        for (int i = 0; i < N; i++) philox_cos_sin(angle[i], &cs[i], &sn[i]);
        for (int i = 0; i < BLOCKS; i++) {
            z[4 * i + 2 * pair] = r[i] * cs[i];
            z[4 * i + 2 * pair + 1] = r[i] * sn[i];
        }
    }
}

static void combined_piece(float *v, const float *c, float c_out, const float *cols, size_t numel, const float *F, size_t n) {
    for (size_t i = 0; i < n; i++) v[i] = 0;
    for (size_t j = 0; j < KERN_COLS; j++)
        for (size_t i = 0; i < n && c[j] != 0; i++) v[i] = fmaf(c[j], cols[j * numel + i], v[i]);
    for (size_t i = 0; i < n && c_out != 0; i++) v[i] = fmaf(c_out, F[i], v[i]);
}

static void assign_piece(float *v, const struct kern_assign *a, const float *cols, size_t numel, const float *F, const float *D,
                         const float *Z, size_t n) {
    combined_piece(v, a->c, a->c_out, cols, numel, F, n);
    for (size_t i = 0; i < n && a->c_clip != 0; i++) v[i] = fmaf(a->c_clip, D[i], v[i]);
    for (size_t i = 0; i < n && a->c_noise != 0; i++) v[i] = fmaf(a->c_noise, Z[i], v[i]);
}

static void clip_piece(float *D, const struct kern_clip *c, const float *cols, size_t numel, const float *F, size_t n) {
    combined_piece(D, c->c, c->c_out, cols, numel, F, n);
    for (size_t i = 0; i < n; i++) D[i] = D[i] < -1 ? -1 : D[i] > 1 ? 1 : D[i];
}

static void guided_piece(float *F, const struct kern_row_update *u, const float *out, size_t ld, size_t e, size_t n,
                         size_t plane) {
    if (u->row_u < 0 || e / plane >= (size_t)u->guided) {
        memcpy(F, out + (size_t)u->row_rest * ld + e, n * sizeof *F);
        return;
    }
    const float *without = out + (size_t)u->row_u * ld + e, *with = out + (size_t)u->row_c * ld + e;
    for (size_t i = 0; i < n; i++) F[i] = fmaf(u->scale, with[i] - without[i], without[i]);
}

// Zs <- Z times what the network's second half of channels says of the noise's size
static void learned_piece(float *Zs, const float *Z, const struct kern_row_update *u, const float *out, size_t ld, size_t e,
                          size_t n, size_t plane) {
    float v[PIECE];
    guided_piece(v, u, out, ld, e, n, plane);
    for (size_t i = 0; i < n; i++) Zs[i] = Z[i] * kern_expf(fmaf(fmaf(0.5f, v[i], 0.5f), u->log_span, u->log_lo));
}

static void row_update(float *cols, size_t numel, size_t plane, const float *out, size_t out_ld, const float *noise,
                       const struct kern_row_update *u) {
    bool reads_out = false, reads_noise = false, reads_clip = false;
    for (int i = 0; i < u->n; i++) {
        reads_out |= u->assign[i].c_out != 0;
        reads_clip |= u->assign[i].c_clip != 0;
        reads_noise |= u->assign[i].c_noise != 0;
    }
    reads_out |= reads_clip && u->clip.c_out != 0;
    for (size_t e = 0, n; e < numel; e += n) { // a piece lies in one channel, and so does its place in the second half
        float F[PIECE], D[PIECE], scaled[PIECE], z[4 * BLOCKS], v[KERN_ASSIGN][PIECE];
        const float *Z = noise ? noise + e : z + e % 4;
        n = plane - e % plane < PIECE ? plane - e % plane : PIECE;
        if (n > numel - e) n = numel - e;
        if (reads_out) guided_piece(F, u, out, out_ld, e, n, plane);
        if (reads_clip) clip_piece(D, &u->clip, cols + e, numel, F, n);
        if (reads_noise && !noise) normals(z, u->seed, u->image, u->draw, (uint32_t)(e / 4));
        if (reads_noise && u->learned) {
            learned_piece(scaled, Z, u, out, out_ld, numel + e, n, plane);
            Z = scaled;
        }
        for (int i = 0; i < u->n; i++) assign_piece(v[i], &u->assign[i], cols + e, numel, F, D, Z, n);
        for (int i = 0; i < u->n; i++) memcpy(cols + (size_t)u->assign[i].dst * numel + e, v[i], n * sizeof(float));
    }
}

static void mix(float *xt, float *x0, const float *x1, size_t numel, const struct kern_mix *m) {
    for (size_t e = 0; e < numel; e += PIECE) {
        float z[4 * BLOCKS];
        normals(z, m->seed, m->image, m->draw, (uint32_t)(e / 4));
        for (size_t i = 0; i < PIECE && e + i < numel; i++) {
            x0[e + i] = z[i];
            xt[e + i] = fmaf(m->a0, z[i], m->a1 * x1[e + i]);
        }
    }
}

const struct simd SIMD = {
    .name = SIMD_NAME,
    .block = NR,
    .norm = norm,
    .activate = activate,
    .attention = attention,
    .attention_floats = attention_floats,
    .vectors = vectors,
    .to_bf16 = to_bf16,
    .condition = condition,
    .row_update = row_update,
    .mix = mix,
};
