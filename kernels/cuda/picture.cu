// SPDX-License-Identifier: MIT
/*
 * picture: convolutions, group norm and wide attention of pictures on the GPU.
 *
 * In bfloat16 on Hopper, layers whose input has a multiple of 8 channels run on the tensor cores (picture_sm90.cu); everything
 * else takes the plain way (picture_plain.cu): float32, the VAE's first layers of 3 or 4 channels, strided convolutions, other
 * cards. A layer is one strip: a GPU wants as much work as it can get.
 *
 * Group norm: sums of KERN_NORM_PARTS parts of each picture in a fixed order, then their sums in double.
 *
 * Attention of one head takes QUERIES lines of a picture at a time: scores in float32, softmax, product with the values. On the
 * tensor cores both products are convolutions of side 1 whose weights are the picture's own keys and values, brought into order
 * first.
 */
#include "kernels/cuda/picture.cuh"

#include <math.h>
#include <stdlib.h>

static enum kern_dtype type_of(const struct kern *k, bool f32) { return f32 ? KERN_F32 : k->picture; }

/* ---- convolutions ---- */

struct cuda_conv { // what struct kern_conv is here
    struct kern_conv_spec spec;
    int out_height, out_width;
    bool tensor;
    bf16 *w16;        // tensor
    float *w32, *bias; // w32 [out, side*side, in], not tensor; bias padded to TENSOR_N
};

void cuda_conv_free(struct kern *k, struct kern_conv *opaque) {
    struct cuda_conv *l = (struct cuda_conv *)opaque;
    if (!l) return;
    cudaStreamSynchronize(cuda_of(k)->stream);
    void *buffers[] = {l->w16, l->w32, l->bias};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) cudaFree(buffers[i]);
    free(l);
}

static int tensor_side(const struct kern_conv_spec *s) { return s->kind == KERN_CONV_UP ? 2 : s->side; }

static bool on_tensor_cores(const struct kern *k, const struct kern_conv_spec *s) {
    return tensor_here(k) && k->picture == KERN_BF16 && !s->x_f32 && s->kind != KERN_CONV_DOWN && s->in % 8 == 0;
}

__global__ static void channels_last(float *dst, const float *src, size_t n, int in, int taps) { // [out, taps, in] <- [out, in, taps]
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) dst[i] = src[(i / in / taps * in + i % in) * taps + i / in % taps];
}

static int load_weights(struct kern *k, struct cuda_conv *l, const float *w) {
    const struct kern_conv_spec *s = &l->spec;
    cudaStream_t stream = cuda_of(k)->stream;
    int taps = s->side * s->side;
    size_t count = (size_t)s->out * (size_t)s->in * (size_t)taps;
    float *piece = NULL;
    int rc = cuda_check(k, cudaMalloc((void **)&piece, count * 4), "weights on their way");
    if (rc == KERN_OK) rc = cuda_check(k, cudaMemcpyAsync(piece, w, count * 4, cudaMemcpyHostToDevice, stream), "weights");
    if (rc == KERN_OK && l->tensor) {
        rc = cuda_check(k, cudaMalloc((void **)&l->w16, tensor_weights_count(s->out, s->in, tensor_side(s)) * 2), "weights");
        if (rc == KERN_OK) rc = tensor_weights(k, l->w16, piece, s->out, s->in, tensor_side(s));
    } else if (rc == KERN_OK) {
        rc = cuda_check(k, cudaMalloc((void **)&l->w32, count * 4), "weights");
        if (rc == KERN_OK) channels_last<<<(unsigned)((count + 255) / 256), 256, 0, stream>>>(l->w32, piece, count, s->in, taps);
        if (rc == KERN_OK) rc = cuda_launched(k, "arranging weights");
    }
    if (rc == KERN_OK) rc = cuda_check(k, cudaStreamSynchronize(stream), "weights");
    if (piece) cudaFree(piece);
    return rc;
}

static int load_bias(struct kern *k, struct cuda_conv *l, const float *b) {
    size_t n = (size_t)l->spec.out, room = KERN_ROUND_UP(n, (size_t)TENSOR_N);
    cudaStream_t stream = cuda_of(k)->stream;
    int rc = cuda_check(k, cudaMalloc((void **)&l->bias, room * 4), "a bias");
    if (rc == KERN_OK) rc = cuda_check(k, cudaMemsetAsync(l->bias, 0, room * 4, stream), "a bias");
    if (rc == KERN_OK && b) rc = cuda_check(k, cudaMemcpyAsync(l->bias, b, n * 4, cudaMemcpyHostToDevice, stream), "a bias");
    return rc == KERN_OK ? cuda_check(k, cudaStreamSynchronize(stream), "a bias") : rc;
}

int cuda_conv_new(struct kern *k, const struct kern_conv_spec *s, const float *w, const float *b, struct kern_conv **out) {
    *out = NULL;
    int rc = cuda_of(k)->host->check_conv(k, s);
    if (rc == KERN_OK) rc = cuda_not_recorded(k, "conv_new");
    if (rc < 0) return rc;
    struct cuda_conv *l = (struct cuda_conv *)calloc(1, sizeof *l);
    if (!l) return cuda_fail(k, KERN_ENOMEM, "out of memory for a convolution from %d to %d channels", s->in, s->out);
    l->spec = *s;
    l->tensor = on_tensor_cores(k, s);
    l->out_height = s->kind == KERN_CONV_UP ? 2 * s->height : s->kind == KERN_CONV_DOWN ? s->height / 2 : s->height;
    l->out_width = s->kind == KERN_CONV_UP ? 2 * s->width : s->kind == KERN_CONV_DOWN ? s->width / 2 : s->width;
    rc = load_weights(k, l, w);
    if (rc == KERN_OK) rc = load_bias(k, l, b);
    if (rc < 0) return cuda_conv_free(k, (struct kern_conv *)l), rc;
    *out = (struct kern_conv *)l;
    return KERN_OK;
}

int cuda_conv_strips(struct kern *, const struct kern_conv *) { return 1; }

int cuda_conv(struct kern *k, const struct kern_conv *opaque, void *y, const void *x, const float *coef, int pictures, int, int n) {
    const struct cuda_conv *l = (const struct cuda_conv *)opaque;
    const struct kern_conv_spec *s = &l->spec;
    if (n == 0 || pictures == 0) return KERN_OK;
    if (!l->tensor) {
        struct plain_conv a = {.x = x,
                               .y = y,
                               .w = l->w32,
                               .bias = l->bias,
                               .coef = s->norm ? coef : NULL,
                               .spec = *s,
                               .pictures = pictures,
                               .out_height = l->out_height,
                               .out_width = l->out_width,
                               .xt = type_of(k, s->x_f32),
                               .yt = type_of(k, s->y_f32)};
        return plain_conv_run(k, &a);
    }
    struct tensor_conv a = {.x = (const bf16 *)x,
                            .y = y,
                            .w = l->w16,
                            .bias = l->bias,
                            .coef = s->norm ? coef : NULL,
                            .next_x = (size_t)s->height * (size_t)s->width * (size_t)s->in,
                            .next_y = (size_t)l->out_height * (size_t)l->out_width * (size_t)s->out,
                            .height = s->height,
                            .width = s->width,
                            .in = s->in,
                            .out = s->out,
                            .x_line = s->in,
                            .y_line = s->out,
                            .side = tensor_side(s),
                            .pictures = pictures,
                            .silu = s->act == KERN_SILU,
                            .add = s->add,
                            .y_f32 = s->y_f32};
    return tensor_conv_run(k, &a);
}

/* ---- group norm ---- */

#define SUMMERS 256

// One part of one picture: sums and sums of squares a channel. Threads share pieces of VEC channels, several lines of pixels of them.
template <typename X, typename Sum, int VEC>
__global__ static void __launch_bounds__(SUMMERS) norm_sums(double *sums, const X *x, size_t n, int C) {
    __shared__ Sum shared[SUMMERS][2 * VEC];
    const size_t part = (n + KERN_NORM_PARTS - 1) / KERN_NORM_PARTS, from = blockIdx.x * part, to = min(from + part, n), picture = blockIdx.y;
    double *out = sums + (picture * KERN_NORM_PARTS + blockIdx.x) * 2 * C;
    for (int u0 = 0; u0 < C / VEC; u0 += SUMMERS) {
        const int units = min(C / VEC - u0, SUMMERS), lines = SUMMERS / units, unit = threadIdx.x % units, line = threadIdx.x / units;
        Sum sum[VEC] = {}, squares[VEC] = {};
        for (size_t i = from + line; line < lines && i < to; i += lines) {
            __align__(16) X v[VEC];
            const X *p = x + (picture * n + i) * C + (u0 + unit) * VEC;
            if constexpr (VEC == 8) *(uint4 *)v = __ldg((const uint4 *)p);
            else v[0] = *p;
            for (int e = 0; e < VEC; e++) {
                const Sum f = (Sum)load_f32(v + e);
                sum[e] += f, squares[e] = fma(f, f, squares[e]);
            }
        }
        for (int e = 0; e < VEC; e++) shared[threadIdx.x][e] = sum[e], shared[threadIdx.x][VEC + e] = squares[e];
        __syncthreads();
        for (int i = threadIdx.x; i < units * 2 * VEC; i += SUMMERS) {
            const int u = i / (2 * VEC), e = i % (2 * VEC);
            double total = 0;
            for (int l = 0; l < lines; l++) total += (double)shared[l * units + u][e];
            out[(e < VEC ? 0 : C) + (u0 + u) * VEC + e % VEC] = total;
        }
        __syncthreads();
    }
}

// One group of one picture
__global__ static void __launch_bounds__(128) norm_finish(float *coef, const double *sums, const float *gamma, const float *beta, size_t n,
                                                          int C, int width, float eps) {
    __shared__ double shared[2][128];
    const size_t picture = blockIdx.y;
    const int first = blockIdx.x * width, tid = threadIdx.x;
    const double *from = sums + picture * KERN_NORM_PARTS * 2 * C;
    double sum = 0, squares = 0;
    for (int i = tid; i < KERN_NORM_PARTS * width; i += 128) {
        const double *at = from + (size_t)(i / width) * 2 * C + first + i % width;
        sum += at[0], squares += at[C];
    }
    shared[0][tid] = sum, shared[1][tid] = squares;
    __syncthreads();
    for (int half = 64; half; half /= 2) {
        if (tid < half) shared[0][tid] += shared[0][tid + half], shared[1][tid] += shared[1][tid + half];
        __syncthreads();
    }
    const double count = (double)n * width, mean = shared[0][0] / count;
    double variance = shared[1][0] / count - mean * mean;
    if (variance < 0) variance = 0; // rounding; a NaN stays
    for (int c = first + tid; c < first + width; c += 128) {
        const double scale = (double)gamma[c] / sqrt(variance + (double)eps);
        coef[picture * 2 * C + c] = (float)scale;
        coef[picture * 2 * C + C + c] = (float)((double)beta[c] - scale * mean);
    }
}

int cuda_group_norm(struct kern *k, float *coef, double *sums, const void *x, const float *gamma, const float *beta, int pictures, size_t n,
                    int C, int groups, float eps) {
    cudaStream_t s = cuda_of(k)->stream;
    if (pictures > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "%d pictures at once", pictures);
    dim3 parts(KERN_NORM_PARTS, (unsigned)pictures);
    if (k->picture == KERN_F32) norm_sums<float, double, 1><<<parts, SUMMERS, 0, s>>>(sums, (const float *)x, n, C);
    else if (C % 8) norm_sums<bf16, float, 1><<<parts, SUMMERS, 0, s>>>(sums, (const bf16 *)x, n, C);
    else norm_sums<bf16, float, 8><<<parts, SUMMERS, 0, s>>>(sums, (const bf16 *)x, n, C);
    int rc = cuda_launched(k, "group_norm");
    if (rc < 0) return rc;
    norm_finish<<<dim3((unsigned)groups, (unsigned)pictures), 128, 0, s>>>(coef, sums, gamma, beta, n, C, C / groups, eps);
    return cuda_launched(k, "group_norm");
}

/* ---- attention of one wide head ---- */

#define QUERIES 1024

struct cuda_wide { // what struct kern_wide is here
    int T, C, pictures, queries;
    bool tensor;
    float *scores;      // [pictures, queries, T]; after the softmax probabilities, unless tensor
    bf16 *probabilities, *keys, *values; // tensor: [pictures, queries, T]; in order as weights
};

void cuda_wide_free(struct kern *k, struct kern_wide *opaque) {
    struct cuda_wide *a = (struct cuda_wide *)opaque;
    if (!a) return;
    cudaStreamSynchronize(cuda_of(k)->stream);
    void *buffers[] = {a->scores, a->probabilities, a->keys, a->values};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) cudaFree(buffers[i]);
    free(a);
}

int cuda_wide_new(struct kern *k, int T, int C, int pictures, struct kern_wide **out) {
    *out = NULL;
    int rc = cuda_of(k)->host->check_wide(k, T, C, pictures);
    if (rc == KERN_OK) rc = cuda_not_recorded(k, "wide_new");
    if (rc < 0) return rc;
    struct cuda_wide *a = (struct cuda_wide *)calloc(1, sizeof *a);
    if (!a) return cuda_fail(k, KERN_ENOMEM, "out of memory for attention over %d tokens", T);
    *a = {.T = T, .C = C, .pictures = pictures, .queries = T < QUERIES ? T : QUERIES};
    a->tensor = tensor_here(k) && k->picture == KERN_BF16 && T % 8 == 0 && C % 8 == 0 && T > 8 && C > 8;
    size_t n = (size_t)pictures, scores = n * (size_t)a->queries * (size_t)T;
    rc = cuda_check(k, cudaMalloc((void **)&a->scores, scores * 4), "scores of attention");
    if (a->tensor) {
        if (rc == KERN_OK) rc = cuda_check(k, cudaMalloc((void **)&a->probabilities, scores * 2), "scores of attention");
        if (rc == KERN_OK) rc = cuda_check(k, cudaMalloc((void **)&a->keys, n * tensor_weights_count(T, C, 1) * 2), "keys");
        if (rc == KERN_OK) rc = cuda_check(k, cudaMalloc((void **)&a->values, n * tensor_weights_count(C, T, 1) * 2), "values");
    }
    if (rc < 0) return cuda_wide_free(k, (struct kern_wide *)a), rc;
    *out = (struct kern_wide *)a;
    return KERN_OK;
}

int cuda_wide_strips(struct kern *, const struct kern_wide *) { return 1; }

// One line a block: p <- softmax(scale*s); p may be s
template <typename P> __global__ static void __launch_bounds__(256) softmax(P *p, const float *s, int T, float scale) {
    __shared__ float shared[8];
    const size_t line = blockIdx.x + (size_t)blockIdx.y * gridDim.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    s += line * T, p += line * T;
    float top = -INFINITY, sum = 0;
    for (int i = threadIdx.x; i < T; i += 256) top = fmaxf(top, s[i]);
    for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, i));
    if (lane == 0) shared[warp] = top;
    __syncthreads();
    for (int i = 0; i < 8; i++) top = fmaxf(top, shared[i]);
    for (int i = threadIdx.x; i < T; i += 256) sum += expf((s[i] - top) * scale); // a NaN among the scores comes through here
    sum = warp_sum(sum);
    __syncthreads();
    if (lane == 0) shared[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < 8; i++) sum += shared[i];
    for (int i = threadIdx.x; i < T; i += 256) store_f32(p + i, expf((s[i] - top) * scale) / sum);
}

// Queries first .. first+n-1 of every picture
static int on_tensors(struct kern *k, const struct cuda_wide *a, bf16 *o, const bf16 *qkv, int first, int n, int pictures) {
    size_t T = (size_t)a->T, C = (size_t)a->C, lines = (size_t)n * T;
    struct tensor_conv product = {.x = qkv + (size_t)first * 3 * C,
                                  .y = a->scores,
                                  .w = a->keys,
                                  .next_x = 3 * C * T,
                                  .next_y = lines,
                                  .next_w = tensor_weights_count(a->T, a->C, 1),
                                  .height = n / 8,
                                  .width = 8,
                                  .in = a->C,
                                  .out = a->T,
                                  .x_line = 3 * a->C,
                                  .y_line = a->T,
                                  .side = 1,
                                  .pictures = pictures,
                                  .y_f32 = true};
    int rc = tensor_conv_run(k, &product);
    if (rc < 0) return rc;
    softmax<<<dim3((unsigned)n, (unsigned)pictures), 256, 0, cuda_of(k)->stream>>>(a->probabilities, a->scores, a->T, 1 / sqrtf((float)C));
    rc = cuda_launched(k, "attention");
    if (rc < 0) return rc;
    product = {.x = a->probabilities,
               .y = o + (size_t)first * C,
               .w = a->values,
               .next_x = lines,
               .next_y = C * T,
               .next_w = tensor_weights_count(a->C, a->T, 1),
               .height = n / 8,
               .width = 8,
               .in = a->T,
               .out = a->C,
               .x_line = a->T,
               .y_line = a->C,
               .side = 1,
               .pictures = pictures};
    return tensor_conv_run(k, &product);
}

static int plainly(struct kern *k, const struct cuda_wide *a, char *o, const char *qkv, int first, int n, int pictures) {
    size_t T = (size_t)a->T, C = (size_t)a->C, lines = (size_t)n * T, size = kern_size(k->picture);
    struct plain_matrix queries = {qkv + (size_t)first * 3 * C * size, 3 * C, 1, 3 * C * T, k->picture},
                        keys = {qkv + C * size, 3 * C, 1, 3 * C * T, k->picture},
                        values = {qkv + 2 * C * size, 1, 3 * C, 3 * C * T, k->picture},
                        probabilities = {a->scores, T, 1, lines, KERN_F32};
    int rc = plain_product(k, a->scores, T, lines, KERN_F32, &queries, &keys, pictures, n, a->T, a->C);
    if (rc < 0) return rc;
    softmax<<<dim3((unsigned)n, (unsigned)pictures), 256, 0, cuda_of(k)->stream>>>(a->scores, a->scores, a->T, 1 / sqrtf((float)C));
    rc = cuda_launched(k, "attention");
    return rc < 0 ? rc
                  : plain_product(k, o + (size_t)first * C * size, C, C * T, k->picture, &probabilities, &values, pictures, n, a->C, a->T);
}

int cuda_wide(struct kern *k, const struct kern_wide *opaque, void *o, const void *qkv, int pictures, int, int n) {
    const struct cuda_wide *a = (const struct cuda_wide *)opaque;
    size_t T = (size_t)a->T, C = (size_t)a->C;
    const bf16 *in = (const bf16 *)qkv;
    int rc = KERN_OK;
    if (n == 0) return KERN_OK;
    if (pictures > a->pictures) return cuda_fail(k, KERN_EUNSUPPORTED, "attention of %d pictures, not %d", pictures, a->pictures);
    if (a->tensor) rc = tensor_weights_of_rows(k, a->keys, in + C, 3 * C, 1, 3 * C * T, pictures, a->T, a->C);
    if (a->tensor && rc == KERN_OK) rc = tensor_weights_of_rows(k, a->values, in + 2 * C, 1, 3 * C, 3 * C * T, pictures, a->C, a->T);
    for (int first = 0; first < a->T && rc == KERN_OK; first += a->queries) {
        int queries = a->T - first < a->queries ? a->T - first : a->queries;
        rc = a->tensor ? on_tensors(k, a, (bf16 *)o, in, first, queries, pictures)
                       : plainly(k, a, (char *)o, (const char *)qkv, first, queries, pictures);
    }
    return rc;
}
