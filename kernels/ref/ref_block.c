// SPDX-License-Identifier: MIT
// The transformer block's ops that are not matrix products with weights.
#include "kernels/ref/ref.h"
#include "kernels/backend.h"

#include <math.h>

// One token: y = LN(x)*(1 + scale) + shift
static void norm_line(enum kern_dtype act, void *y, const float *x, const float *shift, const float *scale, size_t at, int C,
                      float eps, void *save_xhat, float *save_rstd) {
    double sum = 0, squares = 0;
    for (int i = 0; i < C; i++) sum += (double)x[i];
    double mean = sum / C;
    for (int i = 0; i < C; i++) squares += ((double)x[i] - mean) * ((double)x[i] - mean);
    double rstd = 1 / sqrt(squares / C + (double)eps);
    for (int i = 0; i < C; i++) {
        double xhat = ((double)x[i] - mean) * rstd;
        if (save_xhat) kern_store(act, save_xhat, at * (size_t)C + (size_t)i, (float)xhat);
        kern_store(act, y, at * (size_t)C + (size_t)i, (float)(xhat * (1 + (double)scale[i]) + (double)shift[i]));
    }
    if (save_rstd) save_rstd[at] = (float)rstd;
}

int ref_norm_modulate(struct kern *k, void *y, const void *stream, const float *shift, const float *scale, int ld, int R, int T,
                      int C, float eps, void *save_xhat, float *save_rstd) {
    const float *x = stream;
    for (size_t i = 0; i < (size_t)R * (size_t)T; i++) {
        size_t m = i / (size_t)T * (size_t)ld;
        norm_line(k->act, y, x + i * (size_t)C, shift + m, scale + m, i, C, eps, save_xhat, save_rstd);
    }
    return KERN_OK;
}

int ref_gate_norm(struct kern *k, void *y, void *stream, const void *h, const float *gate, const float *shift, const float *scale,
                  int ld, int R, int T, int C, float eps, void *save_xhat, float *save_rstd) {
    for (size_t i = 0; i < (size_t)R * (size_t)T; i++) {
        size_t m = i / (size_t)T * (size_t)ld;
        float *xi = (float *)stream + i * (size_t)C;
        for (int j = 0; j < C; j++) xi[j] = fmaf(gate[m + (size_t)j], kern_load(k->act, h, i * (size_t)C + (size_t)j), xi[j]);
        if (y) norm_line(k->act, y, xi, shift + m, scale + m, i, C, eps, save_xhat, save_rstd);
    }
    return KERN_OK;
}

// One query of one head; q, k and v start at elements of qkv, lines are ld apart
static void attend(enum kern_dtype act, void *o, size_t o_at, const void *qkv, size_t q, size_t k, size_t v, size_t ld, int T,
                   int D, float *lse) {
    double p[KERN_MAX_TOKENS], out[128] = {0}, top = -INFINITY, sum = 0;
    for (int j = 0; j < T; j++) {
        double s = 0;
        for (size_t d = 0; d < (size_t)D; d++)
            s += (double)kern_load(act, qkv, q + d) * (double)kern_load(act, qkv, k + (size_t)j * ld + d);
        p[j] = s / sqrt((double)D);
        if (!(p[j] <= top)) top = p[j]; // NaN gets through
    }
    for (int j = 0; j < T; j++) sum += p[j] = exp(p[j] - top);
    for (int j = 0; j < T; j++)
        for (size_t d = 0; d < (size_t)D; d++) out[d] += p[j] * (double)kern_load(act, qkv, v + (size_t)j * ld + d);
    for (size_t d = 0; d < (size_t)D; d++) kern_store(act, o, o_at + d, (float)(out[d] / sum));
    if (lse) *lse = (float)(top + log(sum));
}

int ref_attention(struct kern *k, void *o, const void *qkv, int R, int T, int H, int D, float *save_lse) {
    int rc = kern_check_attention(k, T, H, D);
    if (rc < 0) return rc;
    size_t C = (size_t)H * (size_t)D, ld = 3 * C;
    for (size_t r = 0; r < (size_t)R; r++)
        for (size_t h = 0; h < (size_t)H; h++)
            for (size_t t = 0; t < (size_t)T; t++) {
                size_t row = r * (size_t)T * ld + h * (size_t)D;
                attend(k->act, o, (r * (size_t)T + t) * C + h * (size_t)D, qkv, row + t * ld, row + C, row + 2 * C, ld, T, D,
                       save_lse ? save_lse + (r * (size_t)H + h) * (size_t)T + t : NULL);
            }
    return KERN_OK;
}
