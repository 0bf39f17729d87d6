// SPDX-License-Identifier: MIT
// The samplers' three ops. Their float32 sums are part of the specification (fmaf, index order): every back end gives these very
// bits.
#include "kernels/ref/ref.h"
#include "kernels/exp.h"
#include "kernels/philox.h"

int ref_gather(struct kern *k, float *in, const float *cols, size_t numel, const struct kern_gather *g, int n) {
    (void)k;
    for (int r = 0; r < n; r++) {
        const float *col = cols + ((size_t)g[r].slot * KERN_COLS + (size_t)g[r].col) * numel;
        for (size_t e = 0; e < numel; e++) in[(size_t)r * numel + e] = g[r].scale * col[e];
    }
    return KERN_OK;
}

static float guided_out(const struct kern_row_update *u, const float *out, size_t ld, size_t e, size_t ch) {
    if (u->row_u < 0 || ch >= (size_t)u->guided) return out[(size_t)u->row_rest * ld + e];
    float without = out[(size_t)u->row_u * ld + e], with = out[(size_t)u->row_c * ld + e];
    return fmaf(u->scale, with - without, without);
}

static float combined(const float *c, float c_out, const float *cols, size_t numel, size_t e, float F) {
    float v = 0;
    for (size_t j = 0; j < KERN_COLS; j++)
        if (c[j] != 0) v = fmaf(c[j], cols[j * numel + e], v);
    return c_out != 0 ? fmaf(c_out, F, v) : v;
}

static float assigned(const struct kern_assign *a, const float *cols, size_t numel, size_t e, float F, float D, float Z) {
    float v = combined(a->c, a->c_out, cols, numel, e, F);
    if (a->c_clip != 0) v = fmaf(a->c_clip, D, v);
    if (a->c_noise != 0) v = fmaf(a->c_noise, Z, v);
    return v;
}

static float clipped(const struct kern_clip *c, const float *cols, size_t numel, size_t e, float F) {
    float v = combined(c->c, c->c_out, cols, numel, e, F);
    return v < -1 ? -1 : v > 1 ? 1 : v;
}

static float learned_scale(const struct kern_row_update *u, const float *out, size_t ld, size_t e, size_t ch) {
    float f = fmaf(0.5f, guided_out(u, out, ld, e, ch), 0.5f);
    return kern_expf(fmaf(f, u->log_span, u->log_lo));
}

static void update_slot(float *cols, size_t numel, size_t plane, const float *out, size_t ld, const float *noise,
                        const struct kern_row_update *u) {
    bool reads_out = false, reads_noise = false, reads_clip = false;
    for (int i = 0; i < u->n; i++) {
        reads_out |= u->assign[i].c_out != 0;
        reads_clip |= u->assign[i].c_clip != 0;
        reads_noise |= u->assign[i].c_noise != 0;
    }
    reads_out |= reads_clip && u->clip.c_out != 0;
    for (size_t e = 0; e < numel; e++) {
        float F = 0, D = 0, Z = 0, v[KERN_ASSIGN];
        if (reads_out) F = guided_out(u, out, ld, e, e / plane);
        if (reads_clip) D = clipped(&u->clip, cols, numel, e, F);
        if (reads_noise) Z = noise ? noise[e] : philox_normal(u->seed, u->image, u->draw, (uint32_t)e);
        if (reads_noise && u->learned) Z *= learned_scale(u, out, ld, numel + e, (numel + e) / plane);
        for (int i = 0; i < u->n; i++) v[i] = assigned(&u->assign[i], cols, numel, e, F, D, Z);
        for (int i = 0; i < u->n; i++) cols[(size_t)u->assign[i].dst * numel + e] = v[i];
    }
}

int ref_row_update(struct kern *k, float *cols, size_t numel, size_t plane, const float *out, size_t out_ld, const float *noise,
                   const struct kern_row_update *u, int n) {
    (void)k;
    for (int r = 0; r < n; r++)
        update_slot(cols + (size_t)u[r].slot * KERN_COLS * numel, numel, plane, out, out_ld,
                    noise ? noise + (size_t)u[r].slot * numel : NULL, &u[r]);
    return KERN_OK;
}

int ref_row_norm(struct kern *k, double *norms, const float *cols, size_t numel, const struct kern_norm *norm, int n) {
    (void)k;
    for (int r = 0; r < n; r++) {
        const struct kern_norm *m = &norm[r];
        const float *slot = cols + (size_t)m->slot * KERN_COLS * numel;
        double sum = 0;
        for (size_t e = 0; e < numel; e++) {
            double err = 0, a = fabs((double)slot[(size_t)m->a * numel + e]), b = fabs((double)slot[(size_t)m->b * numel + e]);
            for (size_t j = 0; j < KERN_COLS; j++)
                if (m->c[j] != 0) err += (double)m->c[j] * (double)slot[j * numel + e];
            err /= m->atol + m->rtol * (a > b ? a : b);
            sum += err * err;
        }
        norms[r] = sqrt(sum / (double)numel);
    }
    return KERN_OK;
}
