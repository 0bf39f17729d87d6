// SPDX-License-Identifier: MIT
/*
 * adamw: one parameter's step, with the same bits everywhere.
 *
 * Order and rounding of torch.optim.AdamW (Loshchilov and Hutter 2019) with a fused multiply-add wherever a product meets a sum,
 * as in philox.h: shared by C, vectorised C and CUDA, compiled with -ffp-contract=off (nvcc: products meet sums only inside
 * fmaf). What is the same for all parameters is computed in double and rounded once.
 */
#ifndef KERN_ADAMW_H
#define KERN_ADAMW_H
#include "kernels/kern.h"
#include "kernels/philox.h"

struct adamw {
    float g, keep, m1, v1, v2, root2, eps, step; // g: grad_scale and clipping; root2: 1/sqrt(bias2); step: -lr/bias1
    float e1[KERN_MAX_EMA];
    int n_ema;
};

// The factor of the gradient. norm2 is read only with max_norm; a NaN in it reaches the weights
PHILOX_FN float adamw_scale(const struct kern_adamw *a, double norm2) {
    double clip = a->max_norm > 0 ? a->max_norm / (a->grad_scale * sqrt(norm2) + 1e-6) : 1;
    return (float)(a->grad_scale * (clip >= 1 ? 1 : clip));
}

PHILOX_FN struct adamw adamw_begin(const struct kern_adamw *a, float scale) {
    struct adamw s;
    s.g = scale;
    s.keep = (float)(1 - a->lr * a->decay);
    s.m1 = (float)(1 - a->beta1);
    s.v1 = (float)(1 - a->beta2);
    s.v2 = (float)a->beta2;
    s.root2 = (float)(1 / sqrt(a->bias2));
    s.eps = (float)a->eps;
    s.step = (float)(-a->lr / a->bias1);
    s.n_ema = a->n_ema;
    for (int i = 0; i < KERN_MAX_EMA; i++) s.e1[i] = (float)(1 - a->ema[i]);
    return s;
}

// Returns the new parameter
PHILOX_FN float adamw_element(const struct adamw *s, float p, float *m, float *v, float g) {
    g *= s->g;
    *m = fmaf(s->m1, g - *m, *m);
    *v = fmaf(s->v1 * g, g, s->v2 * *v);
    float over = fmaf(philox_sqrt(*v), s->root2, s->eps);
    return fmaf(s->step, *m / over, p * s->keep);
}
PHILOX_FN float adamw_ema(const struct adamw *s, int i, float e, float p) { return fmaf(s->e1[i], p - e, e); }

#endif
