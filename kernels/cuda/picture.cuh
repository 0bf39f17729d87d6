// SPDX-License-Identifier: MIT
// Pictures on the GPU: what picture.cu (layers, norms, attention) has from picture_plain.cu (any card, type and shape) and from
// picture_sm90.cu (bfloat16 on Hopper's tensor cores).
#ifndef KERN_CUDA_PICTURE_CUH
#define KERN_CUDA_PICTURE_CUH
#include "kernels/cuda/device.cuh"

typedef __nv_bfloat16 bf16;

/* picture_plain.cu: float32 sums in the order (tap, channel) */
struct plain_conv {
    const void *x;
    void *y;
    const float *w, *bias; // [out, side*side*in], [out]
    const float *coef;     // NULL: no norm
    struct kern_conv_spec spec;
    int pictures, out_height, out_width;
    enum kern_dtype xt, yt;
};
int plain_conv_run(struct kern *, const struct plain_conv *);
// y [M, N] of float32 or bfloat16 = a [M, K] b [N, K]^T, n of them; an operand's element (line, k) is at line*lines + k*ks + which*next
struct plain_matrix {
    const void *p;
    size_t line, k, next;
    enum kern_dtype t;
};
int plain_product(struct kern *, void *y, size_t y_line, size_t y_next, enum kern_dtype yt, const struct plain_matrix *a,
                  const struct plain_matrix *b, int n, int M, int N, int K);

/* picture_sm90.cu */
#define TENSOR_K 64   // channels a step
#define TENSOR_N 128  // outputs a block; of layers with 8 and less: 8
struct tensor_conv {
    const bf16 *x;
    void *y;
    const bf16 *w;     // [next_w apart for each picture][phase][block of outputs][step][tap] tiles, see tensor_weights
    const float *bias; // padded to whole blocks; NULL: none
    const float *coef; // [pictures, 2, in]; NULL: no norm
    size_t next_x, next_y, next_w; // elements from one picture to the next
    int height, width, in, out, x_line, y_line; // of a phase's pixels; elements from one pixel to the next
    int side;                      // 1, 3, or 2: the four phases of KERN_CONV_UP
    int pictures;
    bool silu, add, y_f32;
};
bool tensor_here(const struct kern *);                // on this card
size_t tensor_weights_count(int out, int in, int side); // bfloat16 elements
// dst <- w [out, in, side, side] (side 3 also for KERN_CONV_UP: side 2) in float32 on the device
int tensor_weights(struct kern *, bf16 *dst, const float *w, int out, int in, int side);
// The same for side 1 from `pictures` matrices: weight (n, k) is at n*n_step + k*k_step, the next one's next further on
int tensor_weights_of_rows(struct kern *, bf16 *dst, const bf16 *src, size_t n_step, size_t k_step, size_t next, int pictures, int out,
                           int in);
int tensor_conv_run(struct kern *, const struct tensor_conv *);

#endif
