// SPDX-License-Identifier: MIT
/*
 * linear: a layer made ready. Four ways:
 *   LT      token matrices: cuBLASLt with pinned algorithms (plan.cu), bias and, in 16 bits, GELU in its epilogue. Behind norms
 *           and in MLPs they are e4m3 products where the run is (spec.x_fp8, fp8.cu).
 *   WIDE    conditioning vectors of a 16-bit run with many weights: the same with activations and weights rounded to float16
 *           and float32 results. 11 bits are an eighth of bfloat16's error for the same bytes, and reading the weights is the
 *           cost. (A second float16 number for the rest of each activation was tried: 1.01e-3 over 50 steps of XL where this
 *           gives 0.93e-3.)
 *   VECTOR  those with few weights (vector.cu).
 *   PLAIN   everything else (plain.cu): float32 vectors, the patch embedding, shapes that are not multiples of 8.
 * Weights go up through the staging ring in the type they are stored in and are converted on the device.
 */
#include "kernels/cuda/train.cuh"

#include <stdlib.h>

#define WIDE_WEIGHTS ((size_t)4 << 20) // fewer are VECTOR's
#define WIDE_LINES 128                 // at once

enum target { TO_F32, TO_F32_BF16, TO_F32_F16, TO_BF16, TO_F16 }; // TO_F32_BF16: float32 that bfloat16 holds

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
    case TO_F32_BF16:
        ((float *)dst)[i] = __bfloat162float(__float2bfloat16_rn(v));
        break;
    case TO_F32_F16:
        ((float *)dst)[i] = __half2float(__float2half_rn(v));
        break;
    case TO_BF16:
        ((__nv_bfloat16 *)dst)[i] = __float2bfloat16_rn(v);
        break;
    case TO_F16:
        ((__half *)dst)[i] = __float2half_rn(v);
        if (outside && !(fabsf(v) < 65504)) *outside = 1;
        break;
    }
}

static size_t target_size(enum target t) { return t == TO_BF16 || t == TO_F16 ? 2 : 4; }

struct host_array { // elements of one type in n pieces, one behind the other
    const void *const *piece;
    const size_t *count;
    int n;
    enum kern_dtype type;
};

// One piece, through the staging ring in the type that it has, to out[at...]
static int send(struct kern *k, void *out, const void *host, size_t count, enum kern_dtype from, enum target to, unsigned *outside) {
    size_t size = kern_size(from), most = RING_BYTES / size;
    int rc = KERN_OK;
    for (size_t at = 0, m; at < count && rc == KERN_OK; at += m) {
        void *staged;
        m = count - at < most ? count - at : most;
        rc = cuda_stage(k, (const char *)host + at * size, m * size, &staged);
        if (rc < 0) break;
        convert<<<(unsigned)((m + 255) / 256), 256, 0, cuda_of(k)->stream>>>((char *)out + at * target_size(to), staged, m, from, to, outside);
        rc = cuda_launched(k, "converting weights");
    }
    return rc;
}

// A new device array converted from host memory; complete in stream order. *outside: some value does not fit TO_F16
static int upload_as(struct kern *k, void **out, const struct host_array *from, enum target to, bool *outside) {
    size_t n = 0, at = 0;
    unsigned *flag = NULL, found = 0;
    for (int i = 0; i < from->n; i++) n += from->count[i];
    int rc = cuda_check(k, cudaMalloc(out, n * target_size(to)), "weights");
    if (rc == KERN_OK && outside) rc = k->alloc(k, sizeof *flag, (void **)&flag);
    for (int i = 0; i < from->n && rc == KERN_OK; at += from->count[i++])
        rc = send(k, (char *)*out + at * target_size(to), from->piece[i], from->count[i], from->type, to, flag);
    if (rc == KERN_OK && outside) rc = k->download(k, &found, flag, sizeof found);
    if (flag) k->free(k, flag);
    if (rc < 0 && *out) cudaFree(*out), *out = NULL;
    if (outside) *outside = found != 0;
    return rc;
}

void cuda_linear_free(struct kern *k, struct kern_linear *opaque) {
    struct cuda_linear *l = (struct cuda_linear *)opaque;
    if (!l) return;
    cudaStreamSynchronize(cuda_of(k)->stream);
    void *buffers[] = {l->w != l->w_live ? l->w : NULL, l->bias != l->b_live ? l->bias : NULL, l->half, l->scales, l->fixed};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) cudaFree(buffers[i]);
    free(l);
}

bool linear_exact(const struct kern *k, const struct kern_linear_spec *s) {
    return k->act == KERN_F32 || (s->x_f32 && s->y_f32);
}

static enum kern_dtype y_type(const struct kern *k, const struct kern_linear_spec *s) {
    return s->y_f32 ? s->y_stream ? k->stream : KERN_F32 : k->act;
}

enum way linear_way(const struct kern *k, const struct kern_linear_spec *s) {
    if (k->act == KERN_F32) return s->unit != KERN_VEC && s->in % 4 == 0 && s->out % 4 == 0 && s->in >= 32 ? LT : PLAIN;
    bool vectors = s->unit == KERN_VEC && s->in % 8 == 0 && s->out % 8 == 0 && !s->y_stream;
    if (linear_exact(k, s)) return !vectors ? PLAIN : (size_t)s->in * (size_t)s->out < WIDE_WEIGHTS ? VECTOR : WIDE;
    return !s->x_f32 && !s->y_stream && s->in % 8 == 0 && s->out % 8 == 0 ? LT : PLAIN;
}

static bool is_fp8(const struct kern *k, const struct kern_linear_spec *s) { return s->x_fp8 && k->gate_norm_fp8; }

// e4m3 with a scale a token: GELU is a pass of its own, as only then a token's largest number is known
static bool gelu_apart(const struct kern *k, const struct kern_linear_spec *s) {
    return is_fp8(k, s) && s->y_for && !cuda_of(k)->fp8_fixed;
}

static struct plan_key key_of(const struct kern *k, const struct kern_linear_spec *s, bool plain) {
    struct plan_key key = {.N = s->out, .K = s->in, .unit = s->unit, .xt = k->act, .yt = y_type(k, s)};
    if (linear_way(k, s) == WIDE) return key.xt = KERN_F16, key;
    if (is_fp8(k, s)) key.xt = KERN_F8, key.fixed = cuda_of(k)->fp8_fixed;
    if (is_fp8(k, s) && s->y_for && key.fixed) key.yt = KERN_F8;
    plain = plain || gelu_apart(k, s);
    key.gelu = s->act == KERN_GELU_TANH && k->act != KERN_F32 && !plain; // the epilogue's tanh is too coarse for float32
    return key;
}

static int upload_parts(struct kern *k, struct cuda_linear *l, const struct host_array *w, const float *b) {
    const struct kern_linear_spec *s = &l->spec;
    const size_t N = (size_t)s->out;
    const void *const bias_piece = b;
    const struct host_array bias = {.piece = &bias_piece, .count = &N, .n = 1, .type = KERN_F32};
    bool outside = false, bf16 = k->act == KERN_BF16, bias16 = l->way == LT && k->act != KERN_F32 && !s->y_f32,
         vectors = l->way == WIDE || l->way == VECTOR;
    enum target act = bf16 ? TO_BF16 : k->act == KERN_F16 ? TO_F16 : TO_F32;
    enum target to = vectors ? TO_F16 : l->way != PLAIN ? act : linear_exact(k, s) ? TO_F32 : bf16 ? TO_F32_BF16 : TO_F32_F16;
    int rc = upload_as(k, &l->w, w, is_fp8(k, s) ? TO_F32 : to, vectors ? &outside : NULL);
    if (rc == KERN_OK && is_fp8(k, s)) rc = fp8_weights(k, l);
    if (rc == KERN_OK && outside) { // a weight beyond float16: slower, but right
        cudaFree(l->w);
        l->w = NULL;
        l->way = PLAIN;
        rc = upload_as(k, &l->w, w, TO_F32, NULL);
    }
    if (rc == KERN_OK && b) return upload_as(k, &l->bias, &bias, bias16 ? act : TO_F32, NULL);
    if (rc == KERN_OK) rc = cuda_check(k, cudaMalloc(&l->bias, N * 4), "a bias");
    return rc == KERN_OK ? cuda_check(k, cudaMemsetAsync(l->bias, 0, N * 4, cuda_of(k)->stream), "a bias") : rc;
}

int linear_ready(struct kern *k, struct cuda_linear *l) {
    struct plan_key key = key_of(k, &l->spec, false);
    int rc = l->way == LT || l->way == WIDE ? plan_get(k, &l->plan, &key, l->w) : KERN_OK;
    if (rc < 0 || l->way != WIDE) return rc;
    return cuda_check(k, cudaMalloc((void **)&l->half, WIDE_LINES * (size_t)l->spec.in * 2), "rounded vectors");
}

int cuda_linear_new(struct kern *k, const struct kern_linear_spec *s, const void *w, const float *b, struct kern_linear **out) {
    const size_t count = (size_t)s->out * (size_t)s->in;
    return cuda_linear_new_pieces(k, s, &w, &count, 1, b, out);
}

int cuda_linear_new_pieces(struct kern *k, const struct kern_linear_spec *s, const void *const *w, const size_t *count, int n, const float *b,
                           struct kern_linear **out) {
    const struct host_array weights = {.piece = w, .count = count, .n = n, .type = s->w_store};
    *out = NULL;
    int rc = cuda_of(k)->host->check_linear(k, s);
    if (rc == KERN_OK) rc = cuda_not_recorded(k, "linear_new");
    if (rc == KERN_OK && is_fp8(k, s) && (s->in % 128 != 0 || s->out % 16 != 0))
        rc = cuda_fail(k, KERN_EUNSUPPORTED, "fp8 wants a width that is a multiple of 128, not %d", s->in);
    if (rc < 0) return rc;
    struct cuda_linear *l = (struct cuda_linear *)calloc(1, sizeof *l);
    if (!l) return cuda_fail(k, KERN_ENOMEM, "out of memory for a linear layer of %d x %d", s->out, s->in);
    l->spec = *s;
    l->way = linear_way(k, s);
    rc = upload_parts(k, l, &weights, b);
    if (rc == KERN_OK) rc = linear_ready(k, l);
    if (rc < 0) return cuda_linear_free(k, (struct kern_linear *)l), rc;
    *out = (struct kern_linear *)l;
    return KERN_OK;
}

static int run_plan(struct kern *k, const struct cuda_linear *l, const struct plan *plan, void *y, const void *x, long lines) {
    const struct kern_linear_spec *s = &l->spec;
    if (!l->scales) return plan_run(k, plan, y, x, l->w, l->bias, NULL, lines);
    struct plan_scales scales = {l->scales, l->fixed ? &l->fixed->scale : fp8_token_scales(x, lines, s->in), NULL};
    if (s->y_for && l->fixed) scales.y = &((const struct cuda_linear *)s->y_for)->fixed->inverse;
    int rc = plan_run(k, plan, y, x, l->w, l->bias, &scales, lines);
    if (rc < 0 || !cuda_of(k)->calibrating || !l->fixed) return rc;
    return fp8_observe(k, l->fixed, x, (size_t)lines * (size_t)s->in);
}

// The product into pre (or y), then the activation as a pass of its own
static int run_lt(struct kern *k, const struct cuda_linear *l, void *y, const void *x, long lines, void *pre) {
    const struct kern_linear_spec *s = &l->spec;
    struct plan *plan = l->plan;
    int rc = KERN_OK;
    const bool gelu = s->act == KERN_GELU_TANH;
    if (l->w_live && k->act == KERN_BF16 && !s->y_f32 &&
        (gelu ? pre != NULL : s->act == KERN_NONE && !pre)) { // a layer that learns need not be invariant
        struct product_key free = {
            gelu ? PRODUCT_FORWARD_GELU : PRODUCT_FORWARD, s->out, s->in, lines, KERN_BF16, KERN_BF16, false, 0};
        rc = product_run(k, &free, y, x, l->w, l->bias, pre, false);
        if (rc != KERN_EUNSUPPORTED) return rc;
        rc = KERN_OK;
    }
    if (gelu_apart(k, s) && !pre) return cuda_fail(k, KERN_EUNSUPPORTED, "fp8: GELU wants memory for the value before");
    if (pre && s->act != KERN_NONE) {
        struct plan_key key = key_of(k, s, true);
        rc = plan_get(k, &plan, &key, l->w);
    }
    struct plan_key key = key_of(k, s, pre != NULL);
    bool fused = s->act == KERN_NONE || key.gelu;
    size_t count = (size_t)lines * (size_t)s->out;
    if (rc == KERN_OK) rc = run_plan(k, l, plan, pre && !fused ? pre : y, x, lines);
    if (rc < 0 || (fused && !pre)) return rc;
    if (gelu_apart(k, s)) return fp8_gelu(k, y, pre, lines, s->out);
    if (!fused) return plain_activate(k, y, pre ? pre : y, count, key.yt, s->act);
    return cuda_check(k, cudaMemcpyAsync(pre, y, count * kern_size(key.yt), cudaMemcpyDeviceToDevice, cuda_of(k)->stream),
                      "linear");
}

__global__ static void to_half(__half *half, const float *x, size_t n) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) half[i] = __float2half_rn(x[i]);
}

static int run_wide(struct kern *k, const struct cuda_linear *l, float *y, const float *x, long lines, float *pre) {
    const struct kern_linear_spec *s = &l->spec;
    float *to = pre ? pre : y;
    int rc = KERN_OK;
    for (long at = 0; at < lines && rc == KERN_OK; at += WIDE_LINES) {
        long n = lines - at < WIDE_LINES ? lines - at : WIDE_LINES;
        size_t count = (size_t)n * (size_t)s->in;
        to_half<<<(unsigned)((count + 255) / 256), 256, 0, cuda_of(k)->stream>>>(l->half, x + (size_t)at * (size_t)s->in, count);
        rc = cuda_launched(k, "linear of vectors");
        if (rc == KERN_OK) rc = plan_run(k, l->plan, to + (size_t)at * (size_t)s->out, l->half, l->w, l->bias, NULL, n);
    }
    if (rc < 0 || (s->act == KERN_NONE && !pre)) return rc;
    return plain_activate(k, y, to, (size_t)lines * (size_t)s->out, KERN_F32, s->act);
}

int cuda_linear(struct kern *k, const struct kern_linear *opaque, void *y, const void *x, int units, void *save_pre) {
    const struct cuda_linear *l = (const struct cuda_linear *)opaque;
    const struct kern_linear_spec *s = &l->spec;
    long lines = (long)units * s->unit;
    if (units == 0) return KERN_OK;
    if (l->way == LT) return run_lt(k, l, y, x, lines, save_pre);
    if (l->way == WIDE) return run_wide(k, l, (float *)y, (const float *)x, lines, (float *)save_pre);
    if (l->way == LIVE) return cuda_linear_live(k, opaque, (float *)y, (const float *)x, units, (float *)save_pre);
    if (l->way == VECTOR) {
        int rc = vector_linear(k, (float *)(save_pre ? save_pre : y), (const float *)x, (const __half *)l->w,
                               (const float *)l->bias, s->out, s->in, (int)lines, save_pre ? KERN_NONE : s->act);
        return rc < 0 || !save_pre ? rc : plain_activate(k, y, save_pre, (size_t)lines * (size_t)s->out, KERN_F32, s->act);
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
                           .round_x = linear_exact(k, s) ? KERN_F32 : k->act,
                           .yt = y_type(k, s),
                           .act = s->act};
    return plain_linear(k, &a);
}
