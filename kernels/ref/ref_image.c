// SPDX-License-Identifier: MIT
// Images, tokens and conditioning.
#include "kernels/ref/ref.h"

#include <math.h>

int ref_patchify(struct kern *k, float *tok, const float *img, int R, int Cin, int I, int P) {
    (void)k;
    int g = I / P;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < g * g; t++)
            for (int c = 0; c < Cin; c++)
                for (int i = 0; i < P; i++)
                    for (int j = 0; j < P; j++)
                        *tok++ = img[(((size_t)r * (size_t)Cin + (size_t)c) * (size_t)I + (size_t)(t / g * P + i)) * (size_t)I +
                                     (size_t)(t % g * P + j)];
    return KERN_OK;
}

int ref_unpatchify(struct kern *k, float *img, const float *tok, int R, int Cout, int keep, int I, int P) {
    (void)k;
    int g = I / P;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < keep; c++)
            for (int y = 0; y < I; y++)
                for (int x = 0; x < I; x++) {
                    size_t t = (size_t)r * (size_t)(g * g) + (size_t)(y / P * g + x / P);
                    *img++ = tok[(t * (size_t)(P * P) + (size_t)(y % P * P + x % P)) * (size_t)Cout + (size_t)c];
                }
    return KERN_OK;
}

int ref_add_table(struct kern *k, void *stream, const float *table, int R, int T, int C) {
    (void)k;
    float *x = stream;
    size_t n = (size_t)T * (size_t)C;
    for (int r = 0; r < R; r++)
        for (size_t i = 0; i < n; i++) x[(size_t)r * n + i] += table[i];
    return KERN_OK;
}

// The authors compute the frequencies and t*f in float32; only exp, cos and sin themselves are finer here.
int ref_timestep_embed(struct kern *k, float *out, const float *t, int R, int F) {
    (void)k;
    int half = F / 2;
    for (int r = 0; r < R; r++)
        for (int i = 0; i < half; i++) {
            float power = -9.210340371976184f * (float)i / (float)half;
            float angle = t[r] * (float)exp((double)power);
            out[(size_t)r * (size_t)F + (size_t)i] = (float)cos((double)angle);
            out[(size_t)r * (size_t)F + (size_t)(half + i)] = (float)sin((double)angle);
        }
    return KERN_OK;
}

int ref_condition(struct kern *k, float *silu_c, const float *temb, const float *table, const int32_t *y, int R, int C,
                  float *save_c) {
    (void)k;
    for (int r = 0; r < R; r++)
        for (int i = 0; i < C; i++) {
            size_t at = (size_t)r * (size_t)C + (size_t)i;
            float c = temb[at];
            if (y[r] >= 0) c += table[(size_t)y[r] * (size_t)C + (size_t)i];
            if (save_c) save_c[at] = c;
            silu_c[at] = (float)((double)c / (1 + exp(-(double)c)));
        }
    return KERN_OK;
}
