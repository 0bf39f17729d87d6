// SPDX-License-Identifier: MIT
// Convolution, group norm and wide attention of pictures, channels last. A strip is one line of the output (one token).
#include "kernels/ref/ref.h"
#include "kernels/backend.h"

#include <math.h>
#include <stdlib.h>

#define MAX_SIDE 16384
#define MAX_WIDTH 65536

/* ---- what every back end checks ---- */

int kern_check_conv(struct kern *k, const struct kern_conv_spec *s) {
    bool kind = s->kind == KERN_CONV ? s->side == 1 || s->side == 3
                                     : (s->kind == KERN_CONV_DOWN || s->kind == KERN_CONV_UP) && s->side == 3;
    if (!kind) return kern_fail(k, KERN_EUNSUPPORTED, "convolution of kind %d and side %d", (int)s->kind, s->side);
    if (s->out < 1 || s->in < 1 || s->out > MAX_WIDTH || s->in > MAX_WIDTH)
        return kern_fail(k, KERN_EUNSUPPORTED, "convolution from %d to %d channels", s->in, s->out);
    if (s->height < 1 || s->width < 1 || s->height > MAX_SIDE || s->width > MAX_SIDE ||
        (s->kind == KERN_CONV_DOWN && (s->height % 2 || s->width % 2)))
        return kern_fail(k, KERN_EUNSUPPORTED, "convolution of a picture of %d x %d", s->height, s->width);
    if (s->act != KERN_NONE && s->act != KERN_SILU)
        return kern_fail(k, KERN_EUNSUPPORTED, "activation %d before a convolution", (int)s->act);
    return KERN_OK;
}

int kern_check_wide(struct kern *k, int T, int C, int pictures) {
    if (pictures < 1 || T < 1 || T > 1 << 20 || C < 1 || C > MAX_WIDTH)
        return kern_fail(k, KERN_EUNSUPPORTED, "attention of %d tokens, %d wide", T, C);
    return KERN_OK;
}

void kern_conv_out(const struct kern_conv_spec *s, int *H, int *W) {
    *H = s->kind == KERN_CONV_UP ? 2 * s->height : s->kind == KERN_CONV_DOWN ? s->height / 2 : s->height;
    *W = s->kind == KERN_CONV_UP ? 2 * s->width : s->kind == KERN_CONV_DOWN ? s->width / 2 : s->width;
}

/* ---- convolution ---- */

struct ref_conv { // what struct kern_conv is here
    struct kern_conv_spec spec;
    float *wt; // [side, side, in, out]: the inner loop runs over outputs
    float *b;  // [out]
};

void ref_conv_free(struct kern *k, struct kern_conv *opaque) {
    struct ref_conv *l = (struct ref_conv *)opaque;
    (void)k;
    if (!l) return;
    free(l->wt);
    free(l->b);
    free(l);
}

int ref_conv_new(struct kern *k, const struct kern_conv_spec *s, const float *w, const float *b, struct kern_conv **out) {
    *out = NULL;
    int rc = kern_check_conv(k, s);
    if (rc < 0) return rc;
    size_t N = (size_t)s->out, C = (size_t)s->in, taps = (size_t)(s->side * s->side);
    struct ref_conv *l = calloc(1, sizeof *l);
    if (l) {
        l->spec = *s;
        l->wt = malloc(N * C * taps * sizeof(float));
        l->b = calloc(N, sizeof(float));
    }
    if (!l || !l->wt || !l->b) {
        ref_conv_free(k, (struct kern_conv *)l);
        return kern_fail(k, KERN_ENOMEM, "out of memory for a convolution from %d to %d channels", s->in, s->out);
    }
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < C; c++)
            for (size_t t = 0; t < taps; t++) l->wt[(t * C + c) * N + n] = w[(n * C + c) * taps + t];
    if (b) memcpy(l->b, b, N * sizeof(float));
    *out = (struct kern_conv *)l;
    return KERN_OK;
}

int ref_conv_strips(struct kern *k, const struct kern_conv *l) {
    int H, W;
    (void)k;
    kern_conv_out(&((const struct ref_conv *)l)->spec, &H, &W);
    return H;
}

// The input pixel under tap (i, j) of output pixel (y, x); NULL where zeros are
static const float *under(const struct kern_conv_spec *s, const float *x, int oy, int ox, int i, int j) {
    int y = oy + i - s->side / 2, xx = ox + j - s->side / 2, H = s->height, W = s->width;
    if (s->kind == KERN_CONV_DOWN) y = 2 * oy + i, xx = 2 * ox + j;
    if (s->kind == KERN_CONV_UP) H *= 2, W *= 2;
    if (y < 0 || y >= H || xx < 0 || xx >= W) return NULL;
    if (s->kind == KERN_CONV_UP) y /= 2, xx /= 2;
    return x + ((size_t)y * (size_t)s->width + (size_t)xx) * (size_t)s->in;
}

static void conv_pixel(const struct ref_conv *l, float *y, const float *x, const float *coef, int oy, int ox) {
    enum { BLOCK = 64 };
    const struct kern_conv_spec *s = &l->spec;
    size_t N = (size_t)s->out, C = (size_t)s->in;
    for (size_t n0 = 0; n0 < N; n0 += BLOCK) {
        double acc[BLOCK] = {0};
        size_t nb = N - n0 < BLOCK ? N - n0 : BLOCK;
        for (int t = 0; t < s->side * s->side; t++) {
            const float *p = under(s, x, oy, ox, t / s->side, t % s->side);
            for (size_t c = 0; p && c < C; c++) {
                double v = s->norm ? (double)p[c] * (double)coef[c] + (double)coef[C + c] : (double)p[c];
                if (s->act != KERN_NONE) v = ref_activation(s->act, v);
                const float *wt = l->wt + ((size_t)t * C + c) * N + n0;
                for (size_t j = 0; j < nb; j++) acc[j] += v * (double)wt[j];
            }
        }
        for (size_t j = 0; j < nb; j++) y[n0 + j] = (float)(acc[j] + (double)l->b[n0 + j] + (s->add ? (double)y[n0 + j] : 0));
    }
}

int ref_conv(struct kern *k, const struct kern_conv *opaque, void *y, const void *x, const float *coef, int pictures, int first,
             int n) {
    const struct ref_conv *l = (const struct ref_conv *)opaque;
    const struct kern_conv_spec *s = &l->spec;
    int H, W;
    (void)k;
    kern_conv_out(s, &H, &W);
    for (size_t p = 0; p < (size_t)pictures; p++) {
        const float *from = (const float *)x + p * (size_t)s->height * (size_t)s->width * (size_t)s->in,
                    *mine = coef ? coef + p * 2 * (size_t)s->in : NULL;
        for (int oy = first; oy < first + n; oy++)
            for (int ox = 0; ox < W; ox++)
                conv_pixel(l, (float *)y + ((p * (size_t)H + (size_t)oy) * (size_t)W + (size_t)ox) * (size_t)s->out, from, mine, oy,
                           ox);
    }
    return KERN_OK;
}

/* ---- group norm ---- */

static void norm_picture(float *coef, const float *x, const float *gamma, const float *beta, size_t n, int C, int groups, float eps) {
    size_t width = (size_t)(C / groups);
    for (size_t g = 0; g < (size_t)groups; g++) {
        double sum = 0, squares = 0, count = (double)n * (double)width;
        for (size_t i = 0; i < n; i++)
            for (size_t c = g * width; c < (g + 1) * width; c++) sum += (double)x[i * (size_t)C + c];
        for (size_t i = 0; i < n; i++)
            for (size_t c = g * width; c < (g + 1) * width; c++) {
                double d = (double)x[i * (size_t)C + c] - sum / count;
                squares += d * d;
            }
        for (size_t c = g * width; c < (g + 1) * width; c++) {
            double scale = (double)gamma[c] / sqrt(squares / count + (double)eps);
            coef[c] = (float)scale;
            coef[(size_t)C + c] = (float)((double)beta[c] - scale * sum / count);
        }
    }
}

int ref_group_norm(struct kern *k, float *coef, double *sums, const void *x, const float *gamma, const float *beta, int pictures,
                   size_t n, int C, int groups, float eps) {
    (void)k, (void)sums;
    for (size_t p = 0; p < (size_t)pictures; p++)
        norm_picture(coef + p * 2 * (size_t)C, (const float *)x + p * n * (size_t)C, gamma, beta, n, C, groups, eps);
    return KERN_OK;
}

/* ---- attention of one wide head ---- */

struct ref_wide {
    int T, C;
    double *score;
};

int ref_wide_new(struct kern *k, int T, int C, int pictures, struct kern_wide **out) {
    *out = NULL;
    int rc = kern_check_wide(k, T, C, pictures);
    if (rc < 0) return rc;
    struct ref_wide *a = malloc(sizeof *a);
    double *score = malloc((size_t)T * sizeof *score);
    if (!a || !score) {
        free(a);
        free(score);
        return kern_fail(k, KERN_ENOMEM, "out of memory for attention over %d tokens", T);
    }
    *a = (struct ref_wide){T, C, score};
    *out = (struct kern_wide *)a;
    return KERN_OK;
}

void ref_wide_free(struct kern *k, struct kern_wide *opaque) {
    struct ref_wide *a = (struct ref_wide *)opaque;
    (void)k;
    if (!a) return;
    free(a->score);
    free(a);
}

int ref_wide_strips(struct kern *k, const struct kern_wide *a) {
    (void)k;
    return ((const struct ref_wide *)a)->T;
}

static void wide_picture(const struct ref_wide *a, float *o, const float *qkv, int first, int n) {
    size_t T = (size_t)a->T, C = (size_t)a->C;
    for (size_t t = (size_t)first; t < (size_t)(first + n); t++) {
        double top = -INFINITY, sum = 0;
        for (size_t s = 0; s < T; s++) {
            a->score[s] = 0;
            for (size_t c = 0; c < C; c++) a->score[s] += (double)qkv[t * 3 * C + c] * (double)qkv[s * 3 * C + C + c];
            a->score[s] /= sqrt((double)C);
            if (!(a->score[s] <= top)) top = a->score[s];
        }
        for (size_t s = 0; s < T; s++) sum += a->score[s] = exp(a->score[s] - top);
        for (size_t c = 0; c < C; c++) {
            double v = 0;
            for (size_t s = 0; s < T; s++) v += a->score[s] / sum * (double)qkv[s * 3 * C + 2 * C + c];
            o[t * C + c] = (float)v;
        }
    }
}

int ref_wide(struct kern *k, const struct kern_wide *opaque, void *o, const void *qkv, int pictures, int first, int n) {
    const struct ref_wide *a = (const struct ref_wide *)opaque;
    size_t count = (size_t)a->T * (size_t)a->C;
    (void)k;
    for (size_t p = 0; p < (size_t)pictures; p++) wide_picture(a, (float *)o + p * count, (const float *)qkv + p * 3 * count, first, n);
    return KERN_OK;
}
