// SPDX-License-Identifier: MIT
// The reference's ops, one file a family; ref.c puts them in the table. Back ends may call them for ops that they do not beat.
#ifndef KERN_REF_H
#define KERN_REF_H
#include "kernels/kern.h"

double ref_activation(enum kern_act, double);
double ref_slope(enum kern_act, double); // its derivative
int ref_linear_new(struct kern *, const struct kern_linear_spec *, const void *w, const float *b, struct kern_linear **);
void ref_linear_free(struct kern *, struct kern_linear *);
int ref_linear(struct kern *, const struct kern_linear *, void *y, const void *x, int units, void *save_pre);
int ref_linear_wrap(struct kern *, const struct kern_linear_spec *, const float *w, const float *b, struct kern_linear **);
int ref_linear_refresh(struct kern *, struct kern_linear *);
int ref_linear_backward(struct kern *, const struct kern_linear *, void *dx, float *dx_sum, const void *dy, enum kern_act before,
                        const void *x_pre, int units, bool add);
int ref_linear_gradients(struct kern *, const struct kern_linear *, float *dw, float *db, const void *dy, const void *x, int units,
                         int first, int count, bool add);
// The same on plain weights [out, in]; w NULL: of a layer that does not learn
int ref_linear_dx(struct kern *, const struct kern_linear_spec *, const float *w, void *dx, float *dx_sum, const void *dy,
                  enum kern_act before, const void *x_pre, int units, bool add);
int ref_linear_dw(struct kern *, const struct kern_linear_spec *, const float *w, float *dw, float *db, const void *dy,
                  const void *x, int units, int first, int count, bool add);
// sum [n] (+)= the sums of n columns of a, lines ld elements apart
void ref_sum_lines(float *sum, enum kern_dtype, const void *a, size_t lines, size_t ld, size_t first, size_t n, bool add);
int ref_patchify(struct kern *, float *tok, const float *img, int R, int Cin, int I, int P);
int ref_unpatchify(struct kern *, float *img, const float *tok, int R, int Cout, int keep, int I, int P);
int ref_add_table(struct kern *, void *x, const float *table, int R, int T, int C);
int ref_timestep_embed(struct kern *, float *out, const float *t, int R, int F);
int ref_condition(struct kern *, float *silu_c, const float *temb, const float *table, const int32_t *y, int R, int C,
                  float *save_c);
int ref_norm_modulate(struct kern *, void *y, const void *x, const float *shift, const float *scale, int ld, int R, int T, int C,
                      float eps, void *save_xhat, float *save_rstd);
int ref_gate_norm(struct kern *, void *y, void *x, const void *h, const float *gate, const float *shift, const float *scale,
                  int ld, int R, int T, int C, float eps, void *save_xhat, float *save_rstd);
int ref_attention(struct kern *, void *o, const void *qkv, int R, int T, int H, int D, float *save_lse);
int ref_conv_new(struct kern *, const struct kern_conv_spec *, const float *w, const float *b, struct kern_conv **);
void ref_conv_free(struct kern *, struct kern_conv *);
int ref_conv_strips(struct kern *, const struct kern_conv *);
int ref_conv(struct kern *, const struct kern_conv *, void *y, const void *x, const float *coef, int pictures, int first, int n);
int ref_group_norm(struct kern *, float *coef, double *sums, const void *x, const float *gamma, const float *beta, int pictures, size_t n, int C, int groups,
                   float eps);
int ref_wide_new(struct kern *, int T, int C, int pictures, struct kern_wide **);
void ref_wide_free(struct kern *, struct kern_wide *);
int ref_wide_strips(struct kern *, const struct kern_wide *);
int ref_wide(struct kern *, const struct kern_wide *, void *o, const void *qkv, int pictures, int first, int n);

int ref_set_token(struct kern *, void *x, enum kern_dtype t, const float *v, int R, int T, int C, int at);
int ref_cross_attention(struct kern *, void *o, const void *q, const float *kv, int ld, int R, int T, int S, int H, int D);
int ref_gather(struct kern *, float *in, const float *cols, size_t numel, const struct kern_gather *, int n);
int ref_row_update(struct kern *, float *cols, size_t numel, size_t plane, const float *out, size_t out_ld, const float *noise,
                   const struct kern_row_update *, int n);
int ref_row_norm(struct kern *, double *norms, const float *cols, size_t numel, const struct kern_norm *, int n);

int ref_zero(struct kern *, void *dst, size_t bytes);
int ref_gate_norm_backward(struct kern *, const struct kern_norm_back *);
int ref_attention_backward(struct kern *, void *dqkv, float *dqkv_sum, const void *d_o, const void *qkv, const void *o,
                           const float *lse, int R, int T, int H, int D, bool add);
int ref_cross_attention_backward(struct kern *, void *dq, float *dkv, const void *d_o, const void *q, const float *kv, int ld,
                                 int R, int T, int S, int H, int D);
int ref_take_token(struct kern *, float *v, const float *dx, int R, int T, int C, int at);
int ref_condition_backward(struct kern *, float *dtable, const float *dc, const int32_t *y, int R, int C);
int ref_unpatchify_backward(struct kern *, float *dtok, const float *dimg, int R, int Cout, int keep, int I, int P);
int ref_mix(struct kern *, float *xt, float *x0, const float *x1, size_t numel, const struct kern_mix *, int R);
int ref_loss(struct kern *, float *dout, float *loss, const float *out, size_t out_ld, const float *x1, const float *x0,
             const float *xt, size_t numel, const struct kern_loss *, int R);
// One image of it
void ref_loss_image(float *dout, float loss[2], const float *out, size_t out_ld, const float *x1, const float *x0,
                    const float *xt, size_t numel, const struct kern_loss *);
int ref_sum_squares(struct kern *, double *sum, const float *x, size_t n);
int ref_adamw(struct kern *, float *p, float *m, float *v, float *const e[], const float *g, size_t n, const struct kern_adamw *,
              const double *norm2, double *moved2);

#endif
