// SPDX-License-Identifier: MIT
// What the training files of the CUDA back end share: scratch memory, backward products, the ops.
#ifndef KERN_CUDA_TRAIN_CUH
#define KERN_CUDA_TRAIN_CUH
#include "kernels/cuda/linear.cuh"

/* train.cu */
void cuda_train_fill(struct kern *); // the table's training entries
void cuda_scratch_free(struct cuda *);
// Scratch of one op, valid until the next op asks: at least `bytes`. Grows when an op runs with larger sizes than any before,
// which is refused while recording; outgrown memory stays, recorded work may use it.
int cuda_scratch(struct kern *, size_t bytes, void **);

/* product.cu: cuBLASLt products of training, algorithms chosen by trying at first use */
enum product_kind {
    PRODUCT_FORWARD,      // y[M, N] = x[M, K] w[N, K]^T + bias
    PRODUCT_FORWARD_GELU, // pre[M, N] = the same, y = gelu(pre)
    PRODUCT_DX,           // y = dx[M, K] = dy[M, N] w[N, K]
    PRODUCT_DX_GELU,      // the same, times gelu'(pre[M, K])
    PRODUCT_DW,           // y = dw[N, K] (+)= dy[M, N]^T x[M, K]
};
struct product_key {
    enum product_kind kind;
    int N, K;
    long M;
    enum kern_dtype t, yt; // of both factors; of y
    bool tf32;             // float32 factors may be rounded to 11 bits
    int ld;                // dw: from line to line of dy
};
// a, b: the factors in the order above; add: dw is added to. KERN_EUNSUPPORTED: cuBLASLt has no such product.
int product_run(struct kern *, const struct product_key *, void *y, const void *a, const void *b, void *bias, void *pre,
                bool add);
void products_free(struct cuda *);

/* column_sums.cu: sums of lines, in an order that depends on sizes only */
size_t column_scratch(long lines, int N); // bytes of scratch that column_sums wants for its parts
// sum [N] (+)= the sums of N columns of a [lines, ld], float32 or bfloat16
int column_sums(struct kern *, float *sum, float *part, const void *a, bool f32, long lines, int N, int ld, bool add);
int column_add(struct kern *, float *sum, const float *part, int count, int N, bool add); // of part [count, N]

/* attention_back_f32.cu */
int attention_back_f32(struct kern *, float *dqkv, const float *d_o, const float *qkv, const float *o, const float *lse,
                       float *delta, int R, int T, int H, int D);

/* attention_back_sm90.cu: true where this GPU has a faster kernel for that head dimension; *rc is then its status */
bool attention_back_sm90(struct kern *, void *dqkv, const void *d_o, const void *qkv, const void *o, const float *lse,
                         float *delta, int R, int T, int H, int D, int *rc);

/* comm.cu */
void comm_free(struct cuda *);

/* the ops */
int cuda_linear_wrap(struct kern *, const struct kern_linear_spec *, const float *w, const float *b, struct kern_linear **);
int cuda_linear_refresh(struct kern *, struct kern_linear *);
int cuda_linear_live(struct kern *, const struct kern_linear *, float *y, const float *x, int units, float *save_pre); // way LIVE
int cuda_linear_backward(struct kern *, const struct kern_linear *, void *dx, float *dx_sum, const void *dy, enum kern_act before,
                         const void *x_pre, int units, bool add);
int cuda_linear_gradients(struct kern *, const struct kern_linear *, float *dw, float *db, const void *dy, const void *x,
                          int units, int first, int count, bool add);
int cuda_gate_norm_backward(struct kern *, const struct kern_norm_back *);
int cuda_attention_backward(struct kern *, void *dqkv, float *dqkv_sum, const void *d_o, const void *qkv, const void *o,
                            const float *lse, int R, int T, int H, int D, bool add);
int cuda_cross_attention_backward(struct kern *, void *dq, float *dkv, const void *d_o, const void *q, const float *kv, int ld,
                                  int R, int T, int S, int H, int D);
int cuda_take_token(struct kern *, float *v, const float *dx, int R, int T, int C, int at);
int cuda_condition_backward(struct kern *, float *dtable, const float *dc, const int32_t *y, int R, int C);
int cuda_unpatchify_backward(struct kern *, float *dtok, const float *dimg, int R, int Cout, int keep, int I, int P);
int cuda_mix(struct kern *, float *xt, float *x0, const float *x1, size_t numel, const struct kern_mix *, int R);
int cuda_loss(struct kern *, float *dout, float *loss, const float *out, size_t out_ld, const float *x1, const float *x0,
              const float *xt, size_t numel, const struct kern_loss *, int R);
int cuda_sum_squares(struct kern *, double *sum, const float *x, size_t n);
int cuda_adamw(struct kern *, float *p, float *m, float *v, float *const e[], const float *g, size_t n, const struct kern_adamw *,
               const double *norm2, double *moved2);
int cuda_comm_id(struct kern *, char id[KERN_COMM_ID]);
int cuda_comm_join(struct kern *, const char id[KERN_COMM_ID], int rank, int size);
int cuda_comm_sum(struct kern *, float *p, size_t n);
int cuda_comm_sum_double(struct kern *, double *p, size_t n);
int cuda_comm_scatter(struct kern *, float *p, size_t n);
int cuda_comm_gather(struct kern *, float *p, size_t n);
int cuda_comm_wait(struct kern *);
void cuda_comm_abort(struct kern *);

#endif
