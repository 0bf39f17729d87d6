// SPDX-License-Identifier: MIT
// What in-context conditioning and cross-attention add to the adaLN networks.
#include "kernels/ref/ref.h"
#include "kernels/backend.h"

#include <math.h>

int ref_set_token(struct kern *k, void *x, enum kern_dtype t, const float *v, int R, int T, int C, int at) {
    (void)k;
    for (int r = 0; r < R; r++)
        for (int i = 0; i < C; i++)
            kern_store(t, x, ((size_t)r * (size_t)T + (size_t)at) * (size_t)C + (size_t)i, v[(size_t)r * (size_t)C + (size_t)i]);
    return KERN_OK;
}

// One query of one head: q and o start at element `at`, key j at k + j*ld, its value C behind it
static void attend(enum kern_dtype act, void *o, const void *q, size_t at, const float *k, size_t ld, size_t C, int S, int D) {
    double p[KERN_CROSS_KEYS], top = -INFINITY, sum = 0;
    for (int j = 0; j < S; j++) {
        double s = 0;
        for (size_t d = 0; d < (size_t)D; d++) s += (double)kern_load(act, q, at + d) * (double)k[(size_t)j * ld + d];
        p[j] = s / sqrt((double)D);
        if (!(p[j] <= top)) top = p[j]; // NaN gets through
    }
    for (int j = 0; j < S; j++) sum += p[j] = exp(p[j] - top);
    for (size_t d = 0; d < (size_t)D; d++) {
        double out = 0;
        for (int j = 0; j < S; j++) out += p[j] * (double)k[(size_t)j * ld + C + d];
        kern_store(act, o, at + d, (float)(out / sum));
    }
}

int ref_cross_attention(struct kern *k, void *o, const void *q, const float *kv, int ld, int R, int T, int S, int H, int D) {
    int rc = kern_check_cross(k, T, S, H, D);
    if (rc < 0) return rc;
    size_t C = (size_t)H * (size_t)D;
    for (size_t i = 0; i < (size_t)R * (size_t)T; i++)
        for (size_t h = 0; h < (size_t)H; h++) {
            size_t head = h * (size_t)D;
            attend(k->act, o, q, i * C + head, kv + i / (size_t)T * (size_t)S * (size_t)ld + head, (size_t)ld, C, S, D);
        }
    return KERN_OK;
}
