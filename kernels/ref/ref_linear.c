// SPDX-License-Identifier: MIT
#include "kernels/ref/ref.h"
#include "kernels/backend.h"

#include <math.h>
#include <stdlib.h>

struct ref_linear { // what struct kern_linear is here
    struct kern_linear_spec spec;
    enum kern_dtype mul; // the type that the product's factors are rounded to
    float *wt;           // [in, out]: transposed, so that the inner loop runs over outputs and keeps each sum in index order
    float *b;            // [out]
    const float *w_live, *b_live; // of linear_wrap: the caller's
};

static float rounded(enum kern_dtype t, float v) {
    return t == KERN_BF16 ? kern_bf16_to_f32(kern_f32_to_bf16(v)) : t == KERN_F16 ? kern_f16_to_f32(kern_f32_to_f16(v)) : v;
}

void ref_linear_free(struct kern *k, struct kern_linear *opaque) {
    struct ref_linear *l = (struct ref_linear *)opaque;
    (void)k;
    if (!l) return;
    free(l->wt);
    free(l->b);
    free(l);
}

int ref_linear_new(struct kern *k, const struct kern_linear_spec *s, const void *w, const float *b, struct kern_linear **out) {
    *out = NULL;
    int rc = kern_check_linear(k, s);
    if (rc < 0) return rc;
    size_t N = (size_t)s->out, K = (size_t)s->in;
    struct ref_linear *l = calloc(1, sizeof *l);
    if (l) {
        l->spec = *s;
        l->mul = s->x_f32 && s->y_f32 ? KERN_F32 : k->act;
        l->wt = malloc(N * K * sizeof(float));
        l->b = calloc(N, sizeof(float));
    }
    if (!l || !l->wt || !l->b) {
        ref_linear_free(k, (struct kern_linear *)l);
        return kern_fail(k, KERN_ENOMEM, "out of memory for a linear layer of %d x %d", s->out, s->in);
    }
    for (size_t n = 0; n < N; n++)
        for (size_t i = 0; i < K; i++) l->wt[i * N + n] = rounded(l->mul, kern_load(s->w_store, w, n * K + i));
    if (b) memcpy(l->b, b, N * sizeof(float));
    *out = (struct kern_linear *)l;
    return KERN_OK;
}

int ref_linear_wrap(struct kern *k, const struct kern_linear_spec *s, const float *w, const float *b, struct kern_linear **out) {
    int rc = ref_linear_new(k, s, w, b, out);
    if (rc < 0) return rc;
    ((struct ref_linear *)*out)->w_live = w;
    ((struct ref_linear *)*out)->b_live = b;
    return KERN_OK;
}

int ref_linear_refresh(struct kern *k, struct kern_linear *opaque) {
    struct ref_linear *l = (struct ref_linear *)opaque;
    size_t N = (size_t)l->spec.out, K = (size_t)l->spec.in;
    (void)k;
    for (size_t n = 0; n < N; n++)
        for (size_t i = 0; i < K; i++) l->wt[i * N + n] = rounded(l->mul, l->w_live[n * K + i]);
    if (l->b_live) memcpy(l->b, l->b_live, N * sizeof(float));
    return KERN_OK;
}

double ref_activation(enum kern_act act, double u) {
    if (act == KERN_GELU_TANH) return 0.5 * u * (1 + tanh(0.79788456080286536 * (u + 0.044715 * u * u * u)));
    if (act == KERN_SILU) return u / (1 + exp(-u));
    return u;
}

int ref_linear(struct kern *k, const struct kern_linear *opaque, void *y, const void *x, int units, void *save_pre) {
    enum { BLOCK = 64 };
    const struct ref_linear *l = (const struct ref_linear *)opaque;
    size_t N = (size_t)l->spec.out, K = (size_t)l->spec.in, lines = (size_t)units * (size_t)l->spec.unit;
    enum kern_dtype xt = l->spec.x_f32 ? KERN_F32 : k->act, yt = l->spec.y_f32 ? KERN_F32 : k->act;
    for (size_t m = 0; m < lines; m++)
        for (size_t n0 = 0; n0 < N; n0 += BLOCK) {
            double acc[BLOCK] = {0};
            size_t nb = N - n0 < BLOCK ? N - n0 : BLOCK;
            for (size_t i = 0; i < K; i++) {
                double xi = (double)rounded(l->mul, kern_load(xt, x, m * K + i));
                const float *wt = l->wt + i * N + n0;
                for (size_t j = 0; j < nb; j++) acc[j] += xi * (double)wt[j];
            }
            for (size_t j = 0; j < nb; j++) {
                double u = acc[j] + (double)l->b[n0 + j];
                if (save_pre) kern_store(yt, save_pre, m * N + n0 + j, (float)u);
                kern_store(yt, y, m * N + n0 + j, (float)ref_activation(l->spec.act, u));
            }
        }
    return KERN_OK;
}

/* ---- backward ---- */

enum { COLUMNS = 64 }; // outputs whose sums run side by side

struct grads { // w [N, K]; element types of x and dy; mul: what factors are rounded to
    enum kern_dtype xt, yt, mul;
    const void *dy, *x;
    const float *w;
    size_t lines, N, K;
};

static double factor(const struct grads *g, enum kern_dtype t, const void *p, size_t i) {
    return (double)rounded(g->mul, kern_load(t, p, i));
}

static void pass_down(const struct grads *g, void *dx, enum kern_act before, const void *x_pre) {
    for (size_t m = 0; m < g->lines; m++)
        for (size_t i0 = 0; i0 < g->K; i0 += COLUMNS) {
            double acc[COLUMNS] = {0};
            size_t nb = g->K - i0 < COLUMNS ? g->K - i0 : COLUMNS;
            for (size_t n = 0; n < g->N; n++) {
                double d = factor(g, g->yt, g->dy, m * g->N + n);
                for (size_t j = 0; j < nb; j++) acc[j] += d * factor(g, KERN_F32, g->w, n * g->K + i0 + j);
            }
            for (size_t j = 0; j < nb; j++) {
                size_t at = m * g->K + i0 + j;
                double slope = before == KERN_NONE ? 1 : ref_slope(before, (double)kern_load(g->xt, x_pre, at));
                kern_store(g->xt, dx, at, (float)(acc[j] * slope));
            }
        }
}

// dw: of outputs [first, first + count)
static void pass_to_weights(const struct grads *g, float *dw, size_t first, size_t count, bool add) {
    for (size_t n = first; n < first + count; n++, dw += g->K)
        for (size_t i0 = 0; i0 < g->K; i0 += COLUMNS) {
            double acc[COLUMNS] = {0};
            size_t nb = g->K - i0 < COLUMNS ? g->K - i0 : COLUMNS;
            for (size_t m = 0; m < g->lines; m++) {
                double d = factor(g, g->yt, g->dy, m * g->N + n);
                for (size_t j = 0; j < nb; j++) acc[j] += d * factor(g, g->xt, g->x, m * g->K + i0 + j);
            }
            for (size_t j = 0; j < nb; j++) dw[i0 + j] = (add ? dw[i0 + j] : 0) + (float)acc[j];
        }
}

void ref_sum_lines(float *sum, enum kern_dtype t, const void *a, size_t lines, size_t ld, size_t first, size_t n, bool add) {
    for (size_t i = 0; i < n; i++) {
        double total = 0;
        for (size_t m = 0; m < lines; m++) total += (double)kern_load(t, a, m * ld + first + i);
        sum[i] = (add ? sum[i] : 0) + (float)total;
    }
}

static int grads_of(struct kern *k, struct grads *g, const struct kern_linear_spec *s, const float *w, int units) {
    *g = (struct grads){.xt = s->x_f32 ? KERN_F32 : k->act,
                        .yt = s->y_f32 ? KERN_F32 : k->act,
                        .mul = s->x_f32 && s->y_f32 ? KERN_F32 : k->act,
                        .w = w,
                        .lines = (size_t)units * (size_t)s->unit,
                        .N = (size_t)s->out,
                        .K = (size_t)s->in};
    return w ? KERN_OK : kern_fail(k, KERN_EUNSUPPORTED, "a linear layer whose weights were copied does not learn");
}

int ref_linear_dx(struct kern *k, const struct kern_linear_spec *s, const float *w, void *dx, float *dx_sum, const void *dy,
                  enum kern_act before, const void *x_pre, int units, bool add) {
    struct grads g;
    int rc = grads_of(k, &g, s, w, units);
    if (rc < 0) return rc;
    g.dy = dy;
    pass_down(&g, dx, before, x_pre);
    if (dx_sum) ref_sum_lines(dx_sum, g.xt, dx, g.lines, g.K, 0, g.K, add);
    return KERN_OK;
}

int ref_linear_dw(struct kern *k, const struct kern_linear_spec *s, const float *w, float *dw, float *db, const void *dy,
                  const void *x, int units, int first, int count, bool add) {
    struct grads g;
    int rc = grads_of(k, &g, s, w, units);
    if (rc < 0) return rc;
    g.dy = dy, g.x = x;
    pass_to_weights(&g, dw, (size_t)first, (size_t)count, add);
    if (db) ref_sum_lines(db, g.yt, dy, g.lines, g.N, (size_t)first, (size_t)count, add);
    return KERN_OK;
}

int ref_linear_backward(struct kern *k, const struct kern_linear *opaque, void *dx, float *dx_sum, const void *dy,
                        enum kern_act before, const void *x_pre, int units, bool add) {
    const struct ref_linear *l = (const struct ref_linear *)opaque;
    return ref_linear_dx(k, &l->spec, l->w_live, dx, dx_sum, dy, before, x_pre, units, add);
}

int ref_linear_gradients(struct kern *k, const struct kern_linear *opaque, float *dw, float *db, const void *dy, const void *x,
                         int units, int first, int count, bool add) {
    const struct ref_linear *l = (const struct ref_linear *)opaque;
    return ref_linear_dw(k, &l->spec, l->w_live, dw, db, dy, x, units, first, count, add);
}
