// SPDX-License-Identifier: MIT
/*
 * Group norm and wide attention of pictures, and the handling of oneDNN primitives that conv.c shares.
 *
 * group_norm adds in double, over KERN_NORM_PARTS parts of fixed extent and then over the parts in order: a sum over 65,536
 * pixels in float32 would cost the fifth digit, and the order must not depend on the threads.
 *
 * Attention of one head as wide as the model (512 in the VAE) over up to a million tokens takes TOKENS queries at a time against
 * all keys: two oneDNN products with a softmax between, in scratch of TOKENS x T floats. It is 1 % of a decode's work at 256
 * pixels and 2 % at 512.
 */
#include "kernels/cpu/picture.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/cpu/simd.h"

/* ---- primitives ---- */

const struct picture_simd *cpu_picture_simd(const struct cpu *cpu) {
#if defined(__x86_64__)
    if (cpu->simd) return strcmp(cpu->simd->name, "AVX2") == 0 ? &picture_avx2 : &picture_avx512;
#endif
    (void)cpu;
    return NULL;
}

static dnnl_status_t create(struct prim *p, const struct cpu *cpu, const_dnnl_op_desc_t op, dnnl_primitive_attr_t attr,
                            dnnl_post_ops_t add) {
    dnnl_primitive_desc_t pd = NULL;
    dnnl_status_t st = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
    if (st == dnnl_success && add) st = dnnl_post_ops_append_sum(add, 1);
    if (st == dnnl_success && add) st = dnnl_primitive_attr_set_post_ops(attr, add);
    if (st == dnnl_success) st = dnnl_primitive_desc_create(&pd, op, attr, cpu->engine, NULL);
    if (st != dnnl_success) return st;
    p->desc[PRIM_WEIGHTS] = *dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
    p->desc[PRIM_PAD] = *dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
    p->pad_bytes = dnnl_memory_desc_get_size(&p->desc[PRIM_PAD]);
    st = dnnl_primitive_create(&p->run, pd);
    dnnl_primitive_desc_destroy(pd);
    return st;
}

int prim_init(struct prim *p, const struct cpu *cpu, const_dnnl_op_desc_t op, bool add) {
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t ops = NULL;
    size_t lanes = (size_t)cpu->threads + 1;
    dnnl_status_t st = dnnl_primitive_attr_create(&attr);
    if (st == dnnl_success && add) st = dnnl_post_ops_create(&ops);
    if (st == dnnl_success) st = create(p, cpu, op, attr, ops);
    if (ops) dnnl_post_ops_destroy(ops);
    if (attr) dnnl_primitive_attr_destroy(attr);
    if (st != dnnl_success)
        return st == dnnl_out_of_memory ? KERN_ENOMEM : st == dnnl_unimplemented ? KERN_EUNSUPPORTED : KERN_EDEVICE;
    p->operands = calloc(lanes, sizeof *p->operands);
    if (!p->operands) return KERN_ENOMEM;
    for (size_t i = 0; i < lanes; i++)
        for (int o = 0; o < PRIM_OPERANDS; o++) {
            if (o == PRIM_BIAS && !p->bias) continue;
            if (dnnl_memory_create(&p->operands[i][o], &p->desc[o], cpu->engine, DNNL_MEMORY_NONE) != dnnl_success)
                return KERN_ENOMEM;
        }
    return KERN_OK;
}

void prim_deinit(struct prim *p, const struct cpu *cpu) {
    for (int i = 0; p->operands && i <= cpu->threads; i++)
        for (int o = 0; o < PRIM_OPERANDS; o++)
            if (p->operands[i][o]) dnnl_memory_destroy(p->operands[i][o]);
    free(p->operands);
    if (p->run) dnnl_primitive_destroy(p->run);
}

int prim_run(const struct prim *p, struct lane *lane, const void *src, const void *weights, const void *bias, void *dst,
             void *pad) {
    static const int arg[PRIM_OPERANDS] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_BIAS, DNNL_ARG_DST, DNNL_ARG_SCRATCHPAD};
    const void *at[PRIM_OPERANDS] = {src, weights, bias, dst, pad};
    dnnl_exec_arg_t args[PRIM_OPERANDS];
    dnnl_status_t st = dnnl_success;
    int n = 0;
    for (int o = 0; o < PRIM_OPERANDS && st == dnnl_success; o++) {
        dnnl_memory_t m = p->operands[lane->id][o];
        if (!m) continue;
        st = dnnl_memory_set_data_handle(m, (void *)at[o]);
        args[n++] = (dnnl_exec_arg_t){arg[o], m};
    }
    if (st == dnnl_success) st = dnnl_primitive_execute(p->run, lane->stream, n, args);
    return st == dnnl_success ? KERN_OK : kern_fail(&lane->kern, KERN_EDEVICE, "oneDNN status %d", (int)st);
}

/* ---- group norm ---- */

struct norm_call {
    const struct picture_simd *simd;
    double *sums; // [parts, 2, C]
    const float *x;
    size_t n, part; // pixels of a picture, of a part
    int C;
};

static int sums_task(struct lane *lane, int task, void *arg) {
    const struct norm_call *c = arg;
    size_t C = (size_t)c->C, picture = (size_t)task / KERN_NORM_PARTS, from = (size_t)task % KERN_NORM_PARTS * c->part,
           n = from >= c->n ? 0 : c->n - from < c->part ? c->n - from : c->part;
    double *sum = c->sums + (size_t)task * 2 * C;
    (void)lane;
    c->simd->sums(sum, sum + C, c->x + (n ? (picture * c->n + from) * C : 0), n, c->C);
    return KERN_OK;
}

static void norm_coef(float *coef, const double *sums, const float *gamma, const float *beta, size_t n, int C, int groups, float eps) {
    size_t width = (size_t)(C / groups), all = (size_t)C;
    for (size_t g = 0; g < (size_t)groups; g++) {
        double sum = 0, squares = 0, count = (double)n * (double)width;
        for (size_t p = 0; p < KERN_NORM_PARTS; p++)
            for (size_t i = g * width; i < (g + 1) * width; i++)
                sum += sums[p * 2 * all + i], squares += sums[p * 2 * all + all + i];
        double mean = sum / count, variance = squares / count - mean * mean;
        if (variance < 0) variance = 0; // rounding; a NaN stays
        for (size_t i = g * width; i < (g + 1) * width; i++) {
            double scale = (double)gamma[i] / sqrt(variance + (double)eps);
            coef[i] = (float)scale;
            coef[all + i] = (float)((double)beta[i] - scale * mean);
        }
    }
}

int cpu_group_norm(struct kern *k, float *coef, double *sums, const void *x, const float *gamma, const float *beta, int pictures,
                   size_t n, int C, int groups, float eps) {
    size_t all = 2 * (size_t)C;
    struct norm_call c = {.simd = cpu_picture_simd(LANE(k)->cpu),
                          .sums = sums,
                          .x = x,
                          .n = n,
                          .part = (n + KERN_NORM_PARTS - 1) / KERN_NORM_PARTS,
                          .C = C};
    int rc = cpu_run(k, pictures * KERN_NORM_PARTS, 4.0 * (double)n * C * pictures, sums_task, &c);
    for (size_t p = 0; rc >= 0 && p < (size_t)pictures; p++)
        norm_coef(coef + p * all, sums + p * KERN_NORM_PARTS * all, gamma, beta, n, C, groups, eps);
    return rc;
}

/* ---- attention ---- */

#define TOKENS 64

struct cpu_wide {
    int T, C, tokens, strips, last;   // queries a strip, of the last one
    struct prim scores[2], values[2]; // [is the last]
    size_t score_bytes;
};

static int make_products(struct cpu_wide *a, const struct cpu *cpu, int last) {
    dnnl_dim_t M = last ? a->last : a->tokens, T = a->T, C = a->C, ld = 3 * C;
    dnnl_dims_t q = {M, C}, q_s = {ld, 1}, kt = {C, T}, kt_s = {1, ld}, s = {M, T}, s_s = {T, 1}, v = {T, C}, v_s = {ld, 1},
                o = {M, C}, o_s = {C, 1};
    struct prim *p = &a->scores[last];
    dnnl_matmul_desc_t desc;
    dnnl_status_t st = dnnl_memory_desc_init_by_strides(&p->desc[PRIM_SRC], 2, q, dnnl_f32, q_s);
    if (st == dnnl_success) st = dnnl_memory_desc_init_by_strides(&p->desc[PRIM_WEIGHTS], 2, kt, dnnl_f32, kt_s);
    if (st == dnnl_success) st = dnnl_memory_desc_init_by_strides(&p->desc[PRIM_DST], 2, s, dnnl_f32, s_s);
    if (st == dnnl_success)
        st = dnnl_matmul_desc_init(&desc, &p->desc[PRIM_SRC], &p->desc[PRIM_WEIGHTS], NULL, &p->desc[PRIM_DST]);
    int rc = st == dnnl_success ? prim_init(p, cpu, &desc, false) : KERN_EDEVICE;
    if (rc < 0) return rc;
    p = &a->values[last];
    st = dnnl_memory_desc_init_by_strides(&p->desc[PRIM_SRC], 2, s, dnnl_f32, s_s);
    if (st == dnnl_success) st = dnnl_memory_desc_init_by_strides(&p->desc[PRIM_WEIGHTS], 2, v, dnnl_f32, v_s);
    if (st == dnnl_success) st = dnnl_memory_desc_init_by_strides(&p->desc[PRIM_DST], 2, o, dnnl_f32, o_s);
    if (st == dnnl_success)
        st = dnnl_matmul_desc_init(&desc, &p->desc[PRIM_SRC], &p->desc[PRIM_WEIGHTS], NULL, &p->desc[PRIM_DST]);
    return st == dnnl_success ? prim_init(p, cpu, &desc, false) : KERN_EDEVICE;
}

void cpu_wide_free(struct kern *k, struct kern_wide *opaque) {
    struct cpu_wide *a = (struct cpu_wide *)opaque;
    for (int i = 0; a && i < 2; i++) {
        prim_deinit(&a->scores[i], LANE(k)->cpu);
        prim_deinit(&a->values[i], LANE(k)->cpu);
    }
    free(a);
}

int cpu_wide_new(struct kern *k, int T, int C, int pictures, struct kern_wide **out) {
    *out = NULL;
    int rc = kern_check_wide(k, T, C, pictures);
    if (rc < 0) return rc;
    struct cpu_wide *a = calloc(1, sizeof *a);
    if (!a) return kern_fail(k, KERN_ENOMEM, "out of memory for attention over %d tokens", T);
    *a = (struct cpu_wide){.T = T, .C = C, .tokens = T < TOKENS ? T : TOKENS};
    a->strips = (T + a->tokens - 1) / a->tokens;
    a->last = T - (a->strips - 1) * a->tokens;
    a->score_bytes = kern_alloc_size((size_t)a->tokens * (size_t)T * sizeof(float));
    int was = cpu_omp_single(1);
    rc = make_products(a, LANE(k)->cpu, 0);
    if (rc >= 0 && a->last != a->tokens) rc = make_products(a, LANE(k)->cpu, 1);
    cpu_omp_single(was);
    size_t pad = 0;
    for (int i = 0; i < 2; i++) {
        if (a->scores[i].pad_bytes > pad) pad = a->scores[i].pad_bytes;
        if (a->values[i].pad_bytes > pad) pad = a->values[i].pad_bytes;
    }
    if (rc >= 0) rc = cpu_reserve(k, a->score_bytes + pad);
    if (rc >= 0) return *out = (struct kern_wide *)a, KERN_OK;
    cpu_wide_free(k, (struct kern_wide *)a);
    return kern_fail(k, rc, "cannot make attention over %d tokens, %d wide", T, C);
}

int cpu_wide_strips(struct kern *k, const struct kern_wide *a) {
    (void)k;
    return ((const struct cpu_wide *)a)->strips;
}

struct wide_call {
    const struct cpu_wide *a;
    const struct picture_simd *simd;
    float *o;
    const float *qkv;
    int first, n;
};

static int wide_task(struct lane *lane, int task, void *arg) {
    const struct wide_call *c = arg;
    const struct cpu_wide *a = c->a;
    int strip = c->first + task % c->n, last = strip == a->strips - 1 && a->last != a->tokens;
    size_t token = (size_t)strip * (size_t)a->tokens, C = (size_t)a->C, n = (size_t)(last ? a->last : a->tokens),
           T = (size_t)a->T, picture = (size_t)(task / c->n) * T * C;
    const float *qkv = c->qkv + 3 * picture;
    float *score = lane->scratch;
    void *pad = (char *)lane->scratch + a->score_bytes;
    int rc = prim_run(&a->scores[last], lane, qkv + token * 3 * C, qkv + C, NULL, score, pad);
    for (size_t i = 0; i < n && rc >= 0; i++) c->simd->softmax(score + i * T, T, 1 / sqrtf((float)a->C));
    return rc >= 0 ? prim_run(&a->values[last], lane, score, qkv + 2 * C, NULL, c->o + picture + token * C, pad) : rc;
}

int cpu_wide(struct kern *k, const struct kern_wide *opaque, void *o, const void *qkv, int pictures, int first, int n) {
    struct wide_call c = {
        .a = (const struct cpu_wide *)opaque, .simd = cpu_picture_simd(LANE(k)->cpu), .o = o, .qkv = qkv, .first = first, .n = n};
    return cpu_run(k, n * pictures, CPU_WORTH_SHARING, wide_task, &c);
}

void cpu_picture_fill(struct kern *k, const struct cpu *cpu) {
    if (!cpu_picture_simd(cpu)) return;
    k->conv_new = cpu_conv_new;
    k->conv_free = cpu_conv_free;
    k->conv_strips = cpu_conv_strips;
    k->conv = cpu_conv;
    k->group_norm = cpu_group_norm;
    k->wide_new = cpu_wide_new;
    k->wide_free = cpu_wide_free;
    k->wide_strips = cpu_wide_strips;
    k->wide = cpu_wide;
}
