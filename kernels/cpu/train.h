// SPDX-License-Identifier: MIT
/*
 * train: inside of the cpu back end's training ops (train.c): the vectorised loops, one table an instruction set as simd.h.
 */
#ifndef KERN_CPU_TRAIN_H
#define KERN_CPU_TRAIN_H
#include "kernels/adamw.h"
#include "kernels/cpu/cpu.h"

/*
 * c [m, n] = a b, or c += a b. Element (i, j) of a is at a[i*ar + j*ak], where ar or ak is 1; b's lines are ldb apart. Each
 * element of c is summed over k in the same order wherever it stands and whatever m and n are.
 */
struct train_gemm {
    float *c;
    const float *a, *b;
    size_t ldc, ar, ak, ldb;
    size_t m, n, k;
    bool add;
    float *work; // TRAIN_WORK floats, 64-byte aligned
};
enum { TRAIN_LINES = 192, TRAIN_COLUMNS = 384 }; // of c in a block, which is summed over KERN_SUM_LINES at a time
#define TRAIN_WORK ((size_t)(TRAIN_LINES + TRAIN_COLUMNS) * (KERN_SUM_LINES + 4))

struct train_norm { // one row of gate_norm_backward; sums are added to dshift, dscale, dgate, each nullable
    float *dx, *dh, *y, *dshift, *dscale, *dgate;
    const float *dy, *xhat, *rstd, *h, *gate, *shift, *scale;
    size_t lines, C;
};

struct train_head { // one row's head, at token 0
    float *dq, *dk, *dv;
    const float *q, *k, *v, *d_o, *lse;
    size_t ld, o_ld; // floats from token to token
    int T, D;
    float *work; // at most half of CPU_OPS_SCRATCH
};

struct train_simd {
    void (*gemm)(const struct train_gemm *);
    void (*slope)(float *dx, const float *x, size_t n, enum kern_act); // dx *= act'(x)
    void (*norm)(const struct train_norm *);
    // out [n] += the sum over lines of a*b, b NULL: of a; rounded after every KERN_SUM_LINES. Lines are C floats apart
    void (*sum_lines)(float *out, const float *a, const float *b, size_t lines, size_t C, size_t n);
    void (*attention)(const struct train_head *);
    double (*sum_squares)(const float *x, size_t n);
    // As adamw.h, bit for bit. Returns the sum of squares of p's change
    double (*adamw)(const struct adamw *, float *p, float *m, float *v, float *const e[], size_t at, const float *g, size_t n);
};
extern const struct train_simd train_avx2, train_avx512;
const struct train_simd *cpu_train_simd(const struct cpu *); // NULL: none for this machine

void cpu_train_fill(struct kern *, const struct cpu *);

#endif
