// SPDX-License-Identifier: MIT
// Backward ops of a block: what kernels/kern.h says, one output at a time.
#include "kernels/ref/ref.h"
#include "kernels/backend.h"

#include <math.h>

double ref_slope(enum kern_act act, double u) {
    if (act == KERN_GELU_TANH) {
        double t = tanh(0.79788456080286536 * (u + 0.044715 * u * u * u));
        return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * 0.79788456080286536 * (1 + 0.134145 * u * u);
    }
    if (act == KERN_SILU) {
        double s = 1 / (1 + exp(-u));
        return s * (1 + u * (1 - s));
    }
    return 1;
}

/* ---- norm and gate ---- */

// dx += what one token's norm passes on
static void norm_line(enum kern_dtype act, float *dx, const void *dy, const void *xhat, double rstd, const float *scale,
                      size_t at, size_t C) {
    double mean = 0, along = 0;
    for (size_t i = 0; i < C; i++) {
        double d = (double)kern_load(act, dy, at + i) * (1 + (double)scale[i]);
        mean += d;
        along += d * (double)kern_load(act, xhat, at + i);
    }
    for (size_t i = 0; i < C; i++) {
        double d = (double)kern_load(act, dy, at + i) * (1 + (double)scale[i]), x = (double)kern_load(act, xhat, at + i);
        dx[at + i] = (float)((double)dx[at + i] + rstd * (d - mean / (double)C - x * along / (double)C));
    }
}

// out[i] (+)= the sum over lines of a*b, b NULL: of a
static void sum_lines(float *out, bool add, enum kern_dtype at, const void *a, enum kern_dtype bt, const void *b, size_t first,
                      size_t lines, size_t C) {
    for (size_t i = 0; i < C; i++) {
        double sum = add ? (double)out[i] : 0;
        for (size_t l = first; l < first + lines; l++)
            sum += (double)kern_load(at, a, l * C + i) * (b ? (double)kern_load(bt, b, l * C + i) : 1);
        out[i] = (float)sum;
    }
}

int ref_gate_norm_backward(struct kern *k, const struct kern_norm_back *a) {
    size_t c = (size_t)a->C, t = (size_t)a->T, all = (size_t)a->R * t;
    for (size_t l = 0; l < all; l++) {
        size_t mod = l / t * (size_t)a->ld;
        for (size_t i = 0; a->y && i < c; i++) {
            double xhat = (double)kern_load(k->act, a->xhat, l * c + i);
            kern_store(k->act, a->y, l * c + i, (float)(xhat * (1 + (double)a->scale[mod + i]) + (double)a->shift[mod + i]));
        }
        if (a->dy) norm_line(k->act, a->dx, a->dy, a->xhat, (double)a->rstd[l], a->scale + mod, l * c, c);
        for (size_t i = 0; a->h && i < c; i++) kern_store(k->act, a->dh, l * c + i, a->gate[mod + i] * a->dx[l * c + i]);
    }
    if (a->dh_sum) ref_sum_lines(a->dh_sum, k->act, a->dh, all, c, 0, c, a->add);
    size_t groups = a->ld ? (size_t)a->R : 1, lines = a->ld ? t : all;
    for (size_t r = 0; r < groups; r++) {
        size_t mod = r * (size_t)a->ld;
        if (a->dy) sum_lines(a->dshift + mod, !a->ld, k->act, a->dy, KERN_F32, NULL, r * t, lines, c);
        if (a->dy) sum_lines(a->dscale + mod, !a->ld, k->act, a->dy, k->act, a->xhat, r * t, lines, c);
        if (a->dgate) sum_lines(a->dgate + mod, !a->ld, KERN_F32, a->dx, k->act, a->h, r * t, lines, c);
    }
    return KERN_OK;
}

/* ---- attention ---- */

struct head { // one row's head; elements of qkv and o at which its q, k, v and o begin
    enum kern_dtype act;
    const void *qkv, *d_o;
    const float *lse; // [T]
    size_t q, k, v, out, ld, C, D, T;
    double delta[KERN_MAX_TOKENS]; // of a query: the mean of dP, by the weights
};

static double dot(enum kern_dtype t, const void *a, size_t i, const void *b, size_t j, size_t n) {
    double sum = 0;
    for (size_t d = 0; d < n; d++) sum += (double)kern_load(t, a, i + d) * (double)kern_load(t, b, j + d);
    return sum;
}

// Query i's weight of key j; *dp: the gradient of that weight
static double weight(const struct head *h, size_t i, size_t j, double *dp) {
    *dp = dot(h->act, h->d_o, h->out + i * h->C, h->qkv, h->v + j * h->ld, h->D);
    return exp(dot(h->act, h->qkv, h->q + i * h->ld, h->qkv, h->k + j * h->ld, h->D) / sqrt((double)h->D) - (double)h->lse[i]);
}

static void attend_backward(struct head *h, void *dqkv) {
    double root = sqrt((double)h->D), dp;
    for (size_t i = 0; i < h->T; i++) {
        double sum = 0, along = 0;
        for (size_t j = 0; j < h->T; j++) {
            double p = weight(h, i, j, &dp);
            sum += p, along += p * dp;
        }
        h->delta[i] = along / sum;
    }
    for (size_t i = 0; i < h->T; i++) {
        double dq[128] = {0}, dk[128] = {0}, dv[128] = {0};
        for (size_t j = 0; j < h->T; j++) {
            double ds = weight(h, i, j, &dp) * (dp - h->delta[i]);
            for (size_t d = 0; d < h->D; d++) dq[d] += ds * (double)kern_load(h->act, h->qkv, h->k + j * h->ld + d);
            double p = weight(h, j, i, &dp); // now i is the key
            ds = p * (dp - h->delta[j]);
            for (size_t d = 0; d < h->D; d++) {
                dk[d] += ds * (double)kern_load(h->act, h->qkv, h->q + j * h->ld + d);
                dv[d] += p * (double)kern_load(h->act, h->d_o, h->out + j * h->C + d);
            }
        }
        for (size_t d = 0; d < h->D; d++) {
            kern_store(h->act, dqkv, h->q + i * h->ld + d, (float)(dq[d] / root));
            kern_store(h->act, dqkv, h->k + i * h->ld + d, (float)(dk[d] / root));
            kern_store(h->act, dqkv, h->v + i * h->ld + d, (float)dv[d]);
        }
    }
}

int ref_attention_backward(struct kern *k, void *dqkv, float *dqkv_sum, const void *d_o, const void *qkv, const void *o,
                           const float *lse, int R, int T, int H, int D, bool add) {
    int rc = kern_check_attention(k, T, H, D);
    if (rc < 0) return rc;
    (void)o;
    size_t C = (size_t)H * (size_t)D, t = (size_t)T;
    for (size_t r = 0; r < (size_t)R; r++)
        for (size_t n = 0; n < (size_t)H; n++) {
            size_t q = r * t * 3 * C + n * (size_t)D;
            struct head h = {.act = k->act,
                             .qkv = qkv,
                             .d_o = d_o,
                             .lse = lse + (r * (size_t)H + n) * t,
                             .q = q,
                             .k = q + C,
                             .v = q + 2 * C,
                             .out = r * t * C + n * (size_t)D,
                             .ld = 3 * C,
                             .C = C,
                             .D = (size_t)D,
                             .T = t};
            attend_backward(&h, dqkv);
        }
    if (dqkv_sum) ref_sum_lines(dqkv_sum, k->act, dqkv, (size_t)R * t, 3 * C, 0, 3 * C, add);
    return KERN_OK;
}

/* ---- cross-attention ---- */

// Query at element `at` of q and d_o; key j at k + j*ld, its value C behind it. p: weights, ds: gradients of the scaled scores
static void cross_weights(double p[KERN_CROSS_KEYS], double ds[KERN_CROSS_KEYS], enum kern_dtype act, const void *q,
                          const void *d_o, size_t at, const float *k, size_t ld, size_t C, int S, size_t D) {
    double top = -INFINITY, sum = 0, mean = 0;
    for (int j = 0; j < S; j++) {
        p[j] = ds[j] = 0;
        for (size_t d = 0; d < D; d++) {
            p[j] += (double)kern_load(act, q, at + d) * (double)k[(size_t)j * ld + d] / sqrt((double)D);
            ds[j] += (double)kern_load(act, d_o, at + d) * (double)k[(size_t)j * ld + C + d];
        }
        if (!(p[j] <= top)) top = p[j];
    }
    for (int j = 0; j < S; j++) sum += p[j] = exp(p[j] - top);
    for (int j = 0; j < S; j++) mean += (p[j] /= sum) * ds[j];
    for (int j = 0; j < S; j++) ds[j] = p[j] * (ds[j] - mean);
}

int ref_cross_attention_backward(struct kern *k, void *dq, float *dkv, const void *d_o, const void *q, const float *kv, int ld,
                                 int R, int T, int S, int H, int D) {
    int rc = kern_check_cross(k, T, S, H, D);
    if (rc < 0) return rc;
    size_t C = (size_t)H * (size_t)D, t = (size_t)T, n = (size_t)D, step = (size_t)ld;
    for (size_t i = 0; i < (size_t)R * (size_t)H; i++) { // one row's head
        size_t first = i / (size_t)H * t * C + i % (size_t)H * n, keys = i / (size_t)H * (size_t)S * step + i % (size_t)H * n;
        double p[KERN_CROSS_KEYS], ds[KERN_CROSS_KEYS], dk[KERN_CROSS_KEYS][128] = {0}, dv[KERN_CROSS_KEYS][128] = {0};
        for (size_t at = first; at < first + t * C; at += C) {
            cross_weights(p, ds, k->act, q, d_o, at, kv + keys, step, C, S, n);
            for (size_t d = 0; d < n; d++) {
                double sum = 0;
                for (size_t j = 0; j < (size_t)S; j++) {
                    sum += ds[j] * (double)kv[keys + j * step + d];
                    dk[j][d] += ds[j] * (double)kern_load(k->act, q, at + d);
                    dv[j][d] += p[j] * (double)kern_load(k->act, d_o, at + d);
                }
                kern_store(k->act, dq, at + d, (float)(sum / sqrt((double)D)));
            }
        }
        for (size_t j = 0; j < (size_t)S; j++)
            for (size_t d = 0; d < n; d++) {
                dkv[keys + j * step + d] = (float)(dk[j][d] / sqrt((double)D));
                dkv[keys + j * step + C + d] = (float)dv[j][d];
            }
    }
    return KERN_OK;
}

/* ---- tokens, labels, images ---- */

int ref_take_token(struct kern *k, float *v, const float *dx, int R, int T, int C, int at) {
    (void)k;
    for (size_t r = 0, c = (size_t)C; r < (size_t)R; r++) memcpy(v + r * c, dx + (r * (size_t)T + (size_t)at) * c, c * sizeof *v);
    return KERN_OK;
}

int ref_condition_backward(struct kern *k, float *dtable, const float *dc, const int32_t *y, int R, int C) {
    (void)k;
    for (size_t r = 0, c = (size_t)C; r < (size_t)R; r++)
        for (size_t i = 0; y[r] >= 0 && i < c; i++) dtable[(size_t)y[r] * c + i] += dc[r * c + i];
    return KERN_OK;
}

int ref_unpatchify_backward(struct kern *k, float *dtok, const float *dimg, int R, int Cout, int keep, int I, int P) {
    (void)k;
    size_t g = (size_t)(I / P), p = (size_t)P, side = (size_t)I;
    for (size_t t = 0; t < (size_t)R * g * g; t++)
        for (size_t e = 0; e < p * p; e++)
            for (size_t c = 0; c < (size_t)Cout; c++) {
                size_t plane = t / (g * g) * (size_t)keep + c, y = t / g % g * p + e / p, x = t % g * p + e % p;
                *dtok++ = c < (size_t)keep ? dimg[(plane * side + y) * side + x] : 0;
            }
    return KERN_OK;
}
