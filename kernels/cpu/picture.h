// SPDX-License-Identifier: MIT
/*
 * picture: inside of the cpu back end's convolutions and what goes with them (conv.c, picture.c): the vectorised loops, one table
 * an instruction set as simd.h, and what the two files share.
 */
#ifndef KERN_CPU_PICTURE_H
#define KERN_CPU_PICTURE_H
#include "kernels/cpu/cpu.h"

struct picture_simd {
    // y [n, C] = silu?(x*scale[c] + shift[c]); coef NULL: x itself
    void (*prepare)(float *y, const float *x, const float *coef, size_t n, int C, bool silu);
    // sum [C] and squares [C] of x [n, C], added in the order of n
    void (*sums)(double *sum, double *squares, const float *x, size_t n, int C);
    void (*softmax)(float *x, size_t n, float scale); // of scale*x, in place
};
extern const struct picture_simd picture_avx2, picture_avx512;
const struct picture_simd *cpu_picture_simd(const struct cpu *); // NULL: none for this machine

// A oneDNN primitive and what each lane needs to run it
enum { PRIM_SRC, PRIM_WEIGHTS, PRIM_BIAS, PRIM_DST, PRIM_PAD, PRIM_OPERANDS };
struct prim {
    dnnl_primitive_t run;
    dnnl_memory_desc_t desc[PRIM_OPERANDS];
    bool bias;
    size_t pad_bytes;
    dnnl_memory_t (*operands)[PRIM_OPERANDS]; // [lanes]
};
// Makes the primitive of an operation descriptor and the lanes' memory objects. desc[PRIM_SRC, BIAS, DST] are given, the others
// asked of oneDNN.
int prim_init(struct prim *, const struct cpu *, const_dnnl_op_desc_t, bool add);
void prim_deinit(struct prim *, const struct cpu *);
int prim_run(const struct prim *, struct lane *, const void *src, const void *weights, const void *bias, void *dst, void *pad);

/* conv.c */
int cpu_conv_new(struct kern *, const struct kern_conv_spec *, const float *w, const float *b, struct kern_conv **);
void cpu_conv_free(struct kern *, struct kern_conv *);
int cpu_conv_strips(struct kern *, const struct kern_conv *);
int cpu_conv(struct kern *, const struct kern_conv *, void *y, const void *x, const float *coef, int pictures, int first, int n);
/* picture.c */
int cpu_group_norm(struct kern *, float *coef, double *sums, const void *x, const float *gamma, const float *beta,
                   int pictures, size_t n, int C, int groups, float eps);
int cpu_wide_new(struct kern *, int T, int C, int pictures, struct kern_wide **);
void cpu_wide_free(struct kern *, struct kern_wide *);
int cpu_wide_strips(struct kern *, const struct kern_wide *);
int cpu_wide(struct kern *, const struct kern_wide *, void *o, const void *qkv, int pictures, int first, int n);
void cpu_picture_fill(struct kern *, const struct cpu *);

#endif
