// SPDX-License-Identifier: MIT
/*
 * linear: a layer made ready. Three ways:
 *   LT      token matrices in bfloat16 or float32 (no TF32): cuBLASLt with pinned algorithms (plan.cu), bias and, in bfloat16,
 * GELU in its epilogue; VECTOR  conditioning vectors of a bfloat16 run (vector.cu): float32 in and out, weights in float16; PLAIN
 * everything else (plain.cu): float32 vectors, the patch embedding, shapes that are not multiples of 8. Weights go up in pieces
 * in the type they are stored in and are converted on the device.
 */
#include "kernels/cuda/linear.cuh"

#include <stdlib.h>

enum way { LT, VECTOR, PLAIN };

struct cuda_linear { // what struct kern_linear is here
    struct kern_linear_spec spec;
    enum way way;
    void *w;      // LT: x's type; VECTOR: float16; PLAIN: float32
    void *bias;   // [out], LT: y's type, else float32
    __half *half; // VECTOR: rounded activations
    struct plan *plan;
};

#define PIECE ((size_t)32 << 20) // bytes of weights on their way at once

enum target { TO_F32, TO_F32_ROUNDED, TO_BF16, TO_F16 };

__global__ static void convert(void *dst, const void *src, size_t n, enum kern_dtype from, enum target to, unsigned *outside) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    float v = from == KERN_F32    ? ((const float *)src)[i]
              : from == KERN_BF16 ? load_f32((const __nv_bfloat16 *)src + i)
                                  : load_f32((const __half *)src + i);
    switch (to) {
    case TO_F32:
        ((float *)dst)[i] = v;
        break;
    case TO_F32_ROUNDED:
        ((float *)dst)[i] = __bfloat162float(__float2bfloat16_rn(v));
        break;
    case TO_BF16:
        ((__nv_bfloat16 *)dst)[i] = __float2bfloat16_rn(v);
        break;
    case TO_F16:
        ((__half *)dst)[i] = __float2half_rn(v);
        if (!(fabsf(v) < 65504)) *outside = 1;
        break;
    }
}

static size_t target_size(enum target t) { return t == TO_BF16 || t == TO_F16 ? 2 : 4; }

// A new device array of n elements converted from host memory. *outside: some value does not fit TO_F16
static int upload_as(struct kern *k, void **out, const void *host, size_t n, enum kern_dtype from, enum target to,
                     bool *outside) {
    cudaStream_t s = cuda_of(k)->stream;
    size_t size = kern_size(from), most = PIECE / size;
    char *piece = NULL;
    unsigned *flag = NULL, found = 0;
    int rc = cuda_check(k, cudaMalloc(out, n * target_size(to)), "weights");
    if (rc == KERN_OK)
        rc = cuda_check(k, cudaMalloc((void **)&piece, (n < most ? n : most) * size + 256), "weights on their way");
    if (rc == KERN_OK) flag = (unsigned *)(piece + KERN_ROUND_UP((n < most ? n : most) * size, (size_t)4));
    if (rc == KERN_OK) rc = cuda_check(k, cudaMemsetAsync(flag, 0, 4, s), "weights");
    for (size_t at = 0; at < n && rc == KERN_OK; at += most) {
        size_t m = n - at < most ? n - at : most;
        rc =
            cuda_check(k, cudaMemcpyAsync(piece, (const char *)host + at * size, m * size, cudaMemcpyHostToDevice, s), "weights");
        convert<<<(unsigned)((m + 255) / 256), 256, 0, s>>>((char *)*out + at * target_size(to), piece, m, from, to, flag);
        if (rc == KERN_OK) rc = cuda_launched(k, "converting weights");
    }
    if (rc == KERN_OK) rc = cuda_check(k, cudaMemcpyAsync(&found, flag, 4, cudaMemcpyDeviceToHost, s), "weights");
    if (rc == KERN_OK) rc = cuda_check(k, cudaStreamSynchronize(s), "weights");
    if (piece) cudaFree(piece);
    if (rc < 0 && *out) cudaFree(*out), *out = NULL;
    if (outside) *outside = found != 0;
    return rc;
}

void cuda_linear_free(struct kern *k, struct kern_linear *opaque) {
    struct cuda_linear *l = (struct cuda_linear *)opaque;
    if (!l) return;
    cudaStreamSynchronize(cuda_of(k)->stream);
    void *buffers[] = {l->w, l->bias, l->half};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) cudaFree(buffers[i]);
    free(l);
}

static bool product_f32(const struct kern *k, const struct kern_linear_spec *s) {
    return k->act == KERN_F32 || (s->x_f32 && s->y_f32);
}

static enum kern_dtype y_type(const struct kern *k, const struct kern_linear_spec *s) {
    return s->y_f32 ? s->y_stream ? k->stream : KERN_F32 : k->act;
}

static enum way choose_way(const struct kern *k, const struct kern_linear_spec *s) {
    if (k->act == KERN_F32) return s->unit != KERN_VEC && s->in % 4 == 0 && s->out % 4 == 0 && s->in >= 32 ? LT : PLAIN;
    if (product_f32(k, s)) return s->unit == KERN_VEC && s->in % 8 == 0 && !s->y_stream ? VECTOR : PLAIN;
    return !s->x_f32 && y_type(k, s) != KERN_F16 && s->in % 8 == 0 && s->out % 8 == 0 ? LT : PLAIN;
}

static struct plan_key key_of(const struct kern *k, const struct kern_linear_spec *s, bool plain) {
    struct plan_key key = {.N = s->out, .K = s->in, .unit = s->unit, .xt = k->act, .yt = y_type(k, s)};
    key.gelu = s->act == KERN_GELU_TANH && k->act == KERN_BF16 && !plain; // the epilogue's tanh is too coarse for float32
    return key;
}

static int upload_parts(struct kern *k, struct cuda_linear *l, const void *w, const float *b) {
    const struct kern_linear_spec *s = &l->spec;
    size_t N = (size_t)s->out, count = N * (size_t)s->in;
    bool outside = false, bf16 = k->act == KERN_BF16, bias16 = l->way == LT && bf16 && !s->y_f32;
    enum target to = l->way == VECTOR  ? TO_F16
                     : l->way == PLAIN ? product_f32(k, s) ? TO_F32 : TO_F32_ROUNDED
                     : bf16            ? TO_BF16
                                       : TO_F32;
    int rc = upload_as(k, &l->w, w, count, s->w_store, to, &outside);
    if (rc == KERN_OK && outside) { // a weight beyond float16: slower, but right
        cudaFree(l->w);
        l->w = NULL;
        l->way = PLAIN;
        rc = upload_as(k, &l->w, w, count, s->w_store, TO_F32, NULL);
    }
    if (rc == KERN_OK && b) return upload_as(k, &l->bias, b, N, KERN_F32, bias16 ? TO_BF16 : TO_F32, NULL);
    if (rc == KERN_OK) rc = cuda_check(k, cudaMalloc(&l->bias, N * 4), "a bias");
    return rc == KERN_OK ? cuda_check(k, cudaMemsetAsync(l->bias, 0, N * 4, cuda_of(k)->stream), "a bias") : rc;
}

int cuda_linear_new(struct kern *k, const struct kern_linear_spec *s, const void *w, const float *b, struct kern_linear **out) {
    *out = NULL;
    int rc = cuda_of(k)->host->check_linear(k, s);
    if (rc == KERN_OK) rc = cuda_not_recorded(k, "linear_new");
    if (rc < 0) return rc;
    struct cuda_linear *l = (struct cuda_linear *)calloc(1, sizeof *l);
    if (!l) return cuda_fail(k, KERN_ENOMEM, "out of memory for a linear layer of %d x %d", s->out, s->in);
    l->spec = *s;
    l->way = choose_way(k, s);
    rc = upload_parts(k, l, w, b);
    if (rc == KERN_OK && l->way == LT) {
        struct plan_key key = key_of(k, s, false);
        rc = plan_get(k, &l->plan, &key, l->w);
    }
    if (rc == KERN_OK && l->way == VECTOR) {
        rc = cuda_check(k, cudaMalloc((void **)&l->half, 64 * (size_t)s->in * 2), "rounded vectors");
    }
    if (rc < 0) return cuda_linear_free(k, (struct kern_linear *)l), rc;
    *out = (struct kern_linear *)l;
    return KERN_OK;
}

// The product into pre (or y), then the activation as a pass of its own
static int run_lt(struct kern *k, const struct cuda_linear *l, void *y, const void *x, long lines, void *pre) {
    const struct kern_linear_spec *s = &l->spec;
    struct plan *plan = l->plan;
    int rc = KERN_OK;
    if (pre && s->act != KERN_NONE) {
        struct plan_key key = key_of(k, s, true);
        rc = plan_get(k, &plan, &key, l->w);
    }
    struct plan_key key = key_of(k, s, pre != NULL);
    bool fused = s->act == KERN_NONE || key.gelu;
    size_t count = (size_t)lines * (size_t)s->out;
    if (rc == KERN_OK) rc = plan_run(k, plan, pre && !fused ? pre : y, x, l->w, l->bias, lines);
    if (rc < 0 || (fused && !pre)) return rc;
    if (!fused) return plain_activate(k, y, pre ? pre : y, count, key.yt, s->act);
    return cuda_check(k, cudaMemcpyAsync(pre, y, count * kern_size(key.yt), cudaMemcpyDeviceToDevice, cuda_of(k)->stream),
                      "linear");
}

int cuda_linear(struct kern *k, const struct kern_linear *opaque, void *y, const void *x, int units, void *save_pre) {
    const struct cuda_linear *l = (const struct cuda_linear *)opaque;
    const struct kern_linear_spec *s = &l->spec;
    long lines = (long)units * s->unit;
    if (units == 0) return KERN_OK;
    if (l->way == LT) return run_lt(k, l, y, x, lines, save_pre);
    if (l->way == VECTOR && !save_pre)
        return vector_linear(k, (float *)y, (const float *)x, (const __half *)l->w, (const float *)l->bias, l->half, s->out,
                             s->in, (int)lines, s->act);
    if (l->way == VECTOR) {
        int rc = vector_linear(k, (float *)save_pre, (const float *)x, (const __half *)l->w, (const float *)l->bias, l->half,
                               s->out, s->in, (int)lines, KERN_NONE);
        return rc < 0 ? rc : plain_activate(k, y, save_pre, (size_t)lines * (size_t)s->out, KERN_F32, s->act);
    }
    struct plain_args a = {.y = y,
                           .x = x,
                           .w = (const float *)l->w,
                           .bias = (const float *)l->bias,
                           .pre = save_pre,
                           .M = lines,
                           .N = s->out,
                           .K = s->in,
                           .x_f32 = s->x_f32 || k->act == KERN_F32,
                           .round_x = !product_f32(k, s),
                           .yt = y_type(k, s),
                           .act = s->act};
    return plain_linear(k, &a);
}
