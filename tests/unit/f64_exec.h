// SPDX-License-Identifier: MIT
/*
 * f64_exec: runs a sampler's steps in double precision on a network that is a C function.
 *
 * The driver without kernels, and a referee: it fails the test when a column is read before it was written, when two assignments
 * of a step have one target, or when a number is not finite. The struct holds no pointers to its own columns, so it can be copied
 * mid-run.
 */
#ifndef F64_EXEC_H
#define F64_EXEC_H
#include "core/diffusion/sampler.h"

#define F64_MAX 16384 // elements at most

struct f64_exec {
    int n;
    // x is scaled already; f has room for 2n: the second n are the variance's logits (0 if not written)
    void (*net)(void *ctx, const struct sampler_step *, const double *x, double *f, int n);
    void *ctx;
    uint64_t seed;
    const double *noise; // NULL: a test generator; else draw d (from 1) of element e at noise[(d - 1)*n + e]
    double *col[SAMPLER_COLS];
    bool written[SAMPLER_COLS];
    double norms[2];
    bool norms_given;
    int evaluations, steps;
    uint32_t last_draw;
};
void f64_exec_init(struct f64_exec *, int n);
void f64_exec_deinit(struct f64_exec *);
void f64_exec_set_x(struct f64_exec *, const double *x0);
void f64_exec_copy(struct f64_exec *dst, const struct f64_exec *src); // dst initialised with the same n
int f64_exec_step(struct f64_exec *, struct sampler *, struct sampler_step *out,
                  struct err *);                                     // 1 done one, 0 finished, < 0 failed
int f64_exec_run(struct f64_exec *, struct sampler *, struct err *); // to the end: 0 or < 0
double f64_normal(uint64_t seed, uint32_t draw, int element);

#endif
