// SPDX-License-Identifier: MIT
/*
 * simd: the vectorised loops of the cpu back end, one table per instruction set. kernels/cpu/simd_body.h is their one text;
 * simd_avx2.c compiles it for 8 lanes, simd_avx512.c and simd_avx512bf16.c for 16. Only those files may hold vector instructions:
 * they are never entered on a processor that lacks them.
 */
#ifndef KERN_CPU_SIMD_H
#define KERN_CPU_SIMD_H
#include "kernels/kern.h"

struct simd_norm { // LN(x)*(1 + scale) + shift over lines of C; gate and h may be NULL: x += gate*h first
    enum kern_dtype act;
    void *y;  // may be NULL with gate
    float *x; // only written with gate
    const void *h;
    const float *gate, *shift, *scale;
    void *save_xhat;
    float *save_rstd;
    int lines, C;
    float eps;
};

struct simd_head { // one row's head: qkv at token 0, ld elements between tokens
    enum kern_dtype act;
    void *o;
    const void *q, *k, *v;
    size_t ld, o_ld;
    int T, D;
    float *save_lse; // [T], may be NULL
    float *work;     // simd->attention_floats(T, D) floats, 64-byte aligned
};

struct simd_activate { // y = act(pre), [lines, n]; save: pre as it is, may be NULL
    enum kern_act act;
    enum kern_dtype y_type;
    void *y, *save;
    const float *pre;
    size_t y_ld, pre_ld;
    int lines, n;
};

struct simd {
    const char *name;
    int block; // outputs that `vectors` computes at a time
    void (*norm)(const struct simd_norm *);
    void (*activate)(const struct simd_activate *);
    void (*attention)(const struct simd_head *);
    size_t (*attention_floats)(int T, int D);
    // y[KERN_VEC, n] = x[KERN_VEC, in] w + bias, w [in][block]; y lines are ld apart, n <= block
    void (*vectors)(float *y, size_t ld, const float *x, int in, const float *w, const float *bias, int n);
    void (*to_bf16)(uint16_t *dst, const float *src, size_t n);
    void (*condition)(float *silu_c, const float *temb, const float *label, int C, float *save_c); // one row; label may be NULL
    // one slot; cols and noise (may be NULL) are that slot's own. As ref_sampler.c, bit for bit
    void (*row_update)(float *cols, size_t numel, size_t plane, const float *out, size_t out_ld, const float *noise,
                       const struct kern_row_update *);
    void (*mix)(float *xt, float *x0, const float *x1, size_t numel,
                const struct kern_mix *); // one image, as ref_step.c, bit for bit
};

extern const struct simd simd_avx2, simd_avx512, simd_avx512bf16;

#endif
