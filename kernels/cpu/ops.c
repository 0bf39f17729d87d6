// SPDX-License-Identifier: MIT
// The ops that are not linear layers: each cut into tasks over the vector code. Small ones stay with the reference.
#include "kernels/cpu/cpu.h"

#include <math.h>

#include "kernels/cpu/simd.h"

#define NORM_LINES 64 // lines a task

struct norm_call {
    struct simd_norm all; // as for the first line
    int ld, T, pieces;    // pieces: tasks a row
};

static int norm_task(struct lane *lane, int task, void *arg) {
    const struct norm_call *c = arg;
    struct simd_norm a = c->all;
    size_t row = (size_t)(task / c->pieces), t0 = (size_t)(task % c->pieces) * NORM_LINES, mod = row * (size_t)c->ld;
    size_t line = row * (size_t)c->T + t0, at = line * (size_t)a.C, es = kern_dtype_size(a.act);
    a.lines = c->T - (int)t0 < NORM_LINES ? c->T - (int)t0 : NORM_LINES;
    a.x += at;
    if (a.y) a.y = (char *)a.y + at * es;
    if (a.h) a.h = (const char *)a.h + at * es;
    if (a.gate) a.gate += mod;
    if (a.shift) a.shift += mod;
    if (a.scale) a.scale += mod;
    if (a.save_xhat) a.save_xhat = (char *)a.save_xhat + at * es;
    if (a.save_rstd) a.save_rstd += line;
    lane->cpu->simd->norm(&a);
    return KERN_OK;
}

static int run_norm(struct kern *k, struct norm_call *c, int R) {
    c->all.act = k->act;
    c->pieces = (c->T + NORM_LINES - 1) / NORM_LINES;
    return cpu_run(k, R * c->pieces, 16.0 * R * c->T * c->all.C, norm_task, c);
}

static int cpu_norm_modulate(struct kern *k, void *y, const void *x, const float *shift, const float *scale, int ld, int R, int T,
                             int C, float eps, void *save_xhat, float *save_rstd) {
    struct norm_call c = {.ld = ld,
                          .T = T,
                          .all = {.y = y,
                                  .x = (float *)x,
                                  .shift = shift,
                                  .scale = scale,
                                  .C = C,
                                  .eps = eps, // x is only read
                                  .save_xhat = save_xhat,
                                  .save_rstd = save_rstd}};
    return run_norm(k, &c, R);
}

static int cpu_gate_norm(struct kern *k, void *y, void *x, const void *h, const float *gate, const float *shift,
                         const float *scale, int ld, int R, int T, int C, float eps, void *save_xhat, float *save_rstd) {
    struct norm_call c = {.ld = ld,
                          .T = T,
                          .all = {.y = y,
                                  .x = x,
                                  .h = h,
                                  .gate = gate,
                                  .shift = shift,
                                  .scale = scale,
                                  .C = C,
                                  .eps = eps,
                                  .save_xhat = save_xhat,
                                  .save_rstd = save_rstd}};
    return run_norm(k, &c, R);
}

struct attention_call {
    char *o;
    const char *qkv;
    int T, H, D;
    float *save_lse;
};

static int attention_task(struct lane *lane, int task, void *arg) { // one head of one row
    const struct attention_call *c = arg;
    size_t row = (size_t)(task / c->H), h = (size_t)(task % c->H), T = (size_t)c->T, D = (size_t)c->D, C = (size_t)c->H * D;
    size_t es = kern_dtype_size(lane->kern.act);
    const char *q = c->qkv + (row * T * 3 * C + h * D) * es;
    struct simd_head a = {.act = lane->kern.act,
                          .o = c->o + (row * T * C + h * D) * es,
                          .q = q,
                          .k = q + C * es,
                          .v = q + 2 * C * es,
                          .ld = 3 * C,
                          .o_ld = C,
                          .T = c->T,
                          .D = c->D,
                          .work = lane->scratch};
    if (c->save_lse) a.save_lse = c->save_lse + (size_t)task * T;
    lane->cpu->simd->attention(&a);
    return KERN_OK;
}

static int cpu_attention(struct kern *k, void *o, const void *qkv, int R, int T, int H, int D, float *save_lse) {
    int rc = kern_check_attention(k, T, H, D);
    if (rc < 0) return rc;
    struct attention_call c = {.o = o, .qkv = qkv, .T = T, .H = H, .D = D, .save_lse = save_lse};
    return cpu_run(k, R * H, 4.0 * R * H * T * T * D, attention_task, &c);
}

static int cpu_condition(struct kern *k, float *silu_c, const float *temb, const float *table, const int32_t *y, int R, int C,
                         float *save_c) {
    const struct simd *simd = LANE(k)->cpu->simd;
    for (size_t r = 0, c = (size_t)C; r < (size_t)R; r++)
        simd->condition(silu_c + r * c, temb + r * c, y[r] >= 0 ? table + (size_t)y[r] * c : NULL, C,
                        save_c ? save_c + r * c : NULL);
    return KERN_OK;
}

// As the reference, with each frequency computed once
static int cpu_timestep_embed(struct kern *k, float *out, const float *t, int R, int F) {
    (void)k;
    int half = F / 2;
    for (int i = 0; i < half; i++) {
        float f = (float)exp((double)(-9.210340371976184f * (float)i / (float)half));
        for (int r = 0; r < R; r++) {
            double angle = (double)(t[r] * f);
            out[(size_t)r * (size_t)F + (size_t)i] = (float)cos(angle);
            out[(size_t)r * (size_t)F + (size_t)(half + i)] = (float)sin(angle);
        }
    }
    return KERN_OK;
}

struct update_call {
    float *cols;
    size_t numel, plane, out_ld;
    const float *out, *noise;
    const struct kern_row_update *u;
};

static int update_task(struct lane *lane, int task, void *arg) {
    const struct update_call *c = arg;
    const struct kern_row_update *u = &c->u[task];
    size_t slot = (size_t)u->slot;
    lane->cpu->simd->row_update(c->cols + slot * KERN_COLS * c->numel, c->numel, c->plane, c->out, c->out_ld,
                                c->noise ? c->noise + slot * c->numel : NULL, u);
    return KERN_OK;
}

static int cpu_row_update(struct kern *k, float *cols, size_t numel, size_t plane, const float *out, size_t out_ld,
                          const float *noise, const struct kern_row_update *u, int n) {
    struct update_call c = {.cols = cols, .numel = numel, .plane = plane, .out_ld = out_ld, .out = out, .noise = noise, .u = u};
    return cpu_run(k, n, 20.0 * n * (double)numel, update_task, &c);
}

void cpu_ops_fill(struct kern *k, const struct cpu *cpu) {
    k->timestep_embed = cpu_timestep_embed;
    if (!cpu->simd) return;
    k->norm_modulate = cpu_norm_modulate;
    k->gate_norm = cpu_gate_norm;
    k->attention = cpu_attention;
    k->condition = cpu_condition;
    k->row_update = cpu_row_update;
}
