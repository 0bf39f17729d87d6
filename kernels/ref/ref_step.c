// SPDX-License-Identifier: MIT
// A training step outside the network: the noised images, the loss, the optimiser.
#include "kernels/adamw.h"
#include "kernels/backend.h"
#include "kernels/ref/ref.h"

int ref_zero(struct kern *k, void *dst, size_t bytes) {
    (void)k;
    if (bytes) memset(dst, 0, bytes);
    return KERN_OK;
}

int ref_mix(struct kern *k, float *xt, float *x0, const float *x1, size_t numel, const struct kern_mix *mix, int R) {
    (void)k;
    for (size_t r = 0; r < (size_t)R; r++)
        for (size_t e = 0; e < numel; e++) {
            float z = philox_normal(mix[r].seed, mix[r].image, mix[r].draw, (uint32_t)e);
            x0[r * numel + e] = z;
            xt[r * numel + e] = fmaf(mix[r].a0, z, mix[r].a1 * x1[r * numel + e]);
        }
    return KERN_OK;
}

/* ---- loss ---- */

#define BITS 1.4426950408889634 // 1/ln 2

// Normal CDF, DiT's approximation, and its slope
static double cdf(double x, double *slope) {
    double t = tanh(0.79788456080286536 * (x + 0.044715 * x * x * x));
    *slope = 0.5 * (1 - t * t) * 0.79788456080286536 * (1 + 0.134145 * x * x);
    return 0.5 * (1 + t);
}

// -log2 of the probability of x1's level, d = x1 - mean, and its slope in lv
static double level_bits(double x1, double d, double lv, double *slope) {
    double scale = exp(-0.5 * lv), above = scale * (d + 1.0 / 255), below = scale * (d - 1.0 / 255), sa, sb;
    double p = cdf(above, &sa), q = cdf(below, &sb);
    if (x1 > 0.999) p = 1, sa = 0; // the last level reaches to infinity, the first one down to it
    if (x1 < -0.999) q = 0, sb = 0;
    double mass = p - q, least = 1e-12;
    *slope = mass < least ? 0 : 0.5 * BITS * (sa * above - sb * below) / mass;
    return -BITS * log(mass < least ? least : mass);
}

// Variational bound of one element in bits, and its slope in lv
static double bound_bits(const struct kern_loss *l, double x1, double xt, double out, double lv, double *slope) {
    double d = (double)l->posterior * (x1 - ((double)l->recip * xt - (double)l->recip_m1 * out));
    if (l->first) return level_bits(x1, d, lv, slope);
    double ratio = exp((double)l->lv_true - lv), far = d * d * exp(-lv);
    *slope = 0.5 * BITS * (1 - ratio - far);
    return 0.5 * BITS * (lv - (double)l->lv_true - 1 + ratio + far);
}

void ref_loss_image(float *dout, float loss[2], const float *out, size_t out_ld, const float *x1, const float *x0,
                    const float *xt, size_t numel, const struct kern_loss *l) {
    double squares = 0, bits = 0, n = (double)numel, slope;
    for (size_t e = 0; e < numel; e++) {
        double r = (double)l->c_out * (double)out[e] + (double)l->c1 * (double)x1[e] + (double)l->c0 * (double)x0[e];
        squares += r * r;
        dout[e] = (float)((double)l->grad * (double)l->weight * 2 * (double)l->c_out * r / n);
    }
    for (size_t e = 0; l->hybrid && e < numel; e++) {
        double lv = (double)l->log_lo + ((double)out[numel + e] + 1) / 2 * (double)l->log_span;
        bits += bound_bits(l, (double)x1[e], (double)xt[e], (double)out[e], lv, &slope);
        dout[numel + e] = (float)((double)l->grad * slope * (double)l->log_span / 2 / n);
    }
    for (size_t e = l->hybrid ? 2 * numel : numel; e < out_ld; e++) dout[e] = 0;
    loss[0] = (float)((double)l->weight * squares / n);
    loss[1] = (float)(bits / n);
}

int ref_loss(struct kern *k, float *dout, float *loss, const float *out, size_t out_ld, const float *x1, const float *x0,
             const float *xt, size_t numel, const struct kern_loss *l, int R) {
    (void)k;
    for (size_t r = 0; r < (size_t)R; r++)
        ref_loss_image(dout + r * out_ld, loss + 2 * r, out + r * out_ld, out_ld, x1 + r * numel, x0 + r * numel, xt + r * numel,
                       numel, &l[r]);
    return KERN_OK;
}

/* ---- optimiser ---- */

int ref_sum_squares(struct kern *k, double *sum, const float *x, size_t n) {
    (void)k;
    double v = 0;
    for (size_t i = 0; i < n; i++) v += (double)x[i] * (double)x[i];
    *sum += v;
    return KERN_OK;
}

int ref_adamw(struct kern *k, float *p, float *m, float *v, float *const e[], const float *g, size_t n,
              const struct kern_adamw *a, const double *norm2, double *moved2) {
    (void)k;
    struct adamw s = adamw_begin(a, adamw_scale(a, norm2 ? *norm2 : 0));
    double moved = 0;
    for (size_t i = 0; i < n; i++) {
        float now = adamw_element(&s, p[i], &m[i], &v[i], g[i]);
        for (int j = 0; j < s.n_ema; j++) e[j][i] = adamw_ema(&s, j, e[j][i], now);
        moved += ((double)now - (double)p[i]) * ((double)now - (double)p[i]);
        p[i] = now;
    }
    if (moved2) *moved2 += moved;
    return KERN_OK;
}
