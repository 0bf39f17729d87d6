// SPDX-License-Identifier: MIT
/*
 * linear_back: layers whose weights change. The caller's float32 weights are copied (linear_refresh) only where the forward
 * product wants another type: bfloat16 for cuBLASLt in a bfloat16 run, float16 for vectors.
 *
 * Backward goes through cuBLASLt: factors in bfloat16 where forward rounds them, else in float32, which a bfloat16 run may round
 * to TF32's 11 bits. A gradient in float32 of a layer with bfloat16 factors (the last one's) is rounded first. Shapes that
 * cuBLASLt's tensor kernels do not take run in a plain kernel.
 */
#include "kernels/cuda/train.cuh"

#include <stdlib.h>

typedef __nv_bfloat16 bf16;

static unsigned blocks_for(size_t n) { return (unsigned)((n + 255) / 256); }

/* ---- copies of weights ---- */

template <typename T> __global__ static void rounded(T *dst, const float *src, size_t n) {
    size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (i + 4 <= n) {
        float4 v = *(const float4 *)(src + i);
        struct alignas(4 * sizeof(T)) {
            T v[4];
        } out;
        store_f32(&out.v[0], v.x), store_f32(&out.v[1], v.y), store_f32(&out.v[2], v.z), store_f32(&out.v[3], v.w);
        *(decltype(out) *)(dst + i) = out;
        return;
    }
    for (; i < n; i++) store_f32(dst + i, src[i]);
}

__global__ static void rounded_f32(float *dst, const float *src, size_t n) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) dst[i] = __bfloat162float(__float2bfloat16_rn(src[i]));
}

// float32 to bfloat16; src on a 16-byte boundary
static void round_to_bf16(struct kern *k, void *dst, const void *src, size_t n) {
    rounded<<<blocks_for((n + 3) / 4), 256, 0, cuda_of(k)->stream>>>((bf16 *)dst, (const float *)src, n);
}

int cuda_linear_refresh(struct kern *k, struct kern_linear *opaque) {
    struct cuda_linear *l = (struct cuda_linear *)opaque;
    size_t n = (size_t)l->spec.out * (size_t)l->spec.in;
    cudaStream_t s = cuda_of(k)->stream;
    if (l->w != l->w_live) {
        if (l->way == LT) round_to_bf16(k, l->w, l->w_live, n);
        else if (l->way != PLAIN) rounded<<<blocks_for((n + 3) / 4), 256, 0, s>>>((__half *)l->w, l->w_live, n);
        else rounded_f32<<<blocks_for(n), 256, 0, s>>>((float *)l->w, l->w_live, n);
    }
    if (l->b_live && l->bias != l->b_live) round_to_bf16(k, l->bias, l->b_live, (size_t)l->spec.out);
    return cuda_launched(k, "linear_refresh");
}

static int make_room(struct kern *k, struct cuda_linear *l) {
    const struct kern_linear_spec *s = &l->spec;
    size_t n = (size_t)s->out * (size_t)s->in;
    bool copy_w = l->way == VECTOR || l->way == WIDE || (l->way == LT ? k->act == KERN_BF16 : !linear_exact(k, s)),
         copy_bias = !l->b_live || (l->way == LT && k->act == KERN_BF16 && !s->y_f32);
    int rc = KERN_OK;
    l->w = (void *)l->w_live, l->bias = (void *)l->b_live;
    if (copy_w) l->w = NULL, rc = cuda_check(k, cudaMalloc(&l->w, n * (l->way == PLAIN ? 4 : 2)), "copies of weights");
    if (copy_bias) l->bias = NULL;
    if (rc == KERN_OK && copy_bias) rc = cuda_check(k, cudaMalloc(&l->bias, (size_t)s->out * 4), "a bias");
    if (rc == KERN_OK && copy_bias)
        rc = cuda_check(k, cudaMemsetAsync(l->bias, 0, (size_t)s->out * 4, cuda_of(k)->stream), "a bias");
    return rc;
}

int cuda_linear_wrap(struct kern *k, const struct kern_linear_spec *s, const float *w, const float *b, struct kern_linear **out) {
    *out = NULL;
    int rc = cuda_of(k)->host->check_linear(k, s);
    if (rc == KERN_OK) rc = cuda_not_recorded(k, "linear_wrap");
    if (rc == KERN_OK && k->act != KERN_F32 && k->act != KERN_BF16)
        rc = cuda_fail(k, KERN_EUNSUPPORTED, "networks learn in float32 or bfloat16");
    if (rc == KERN_OK && ((size_t)w | (size_t)b) % 16)
        rc = cuda_fail(k, KERN_EUNSUPPORTED, "weights that learn begin on 16-byte boundaries");
    if (rc < 0) return rc;
    struct cuda_linear *l = (struct cuda_linear *)calloc(1, sizeof *l);
    if (!l) return cuda_fail(k, KERN_ENOMEM, "out of memory for a linear layer of %d x %d", s->out, s->in);
    l->spec = *s;
    l->w_live = w, l->b_live = b;
    l->way = linear_way(k, s);
    rc = make_room(k, l);
    if (rc == KERN_OK) rc = cuda_linear_refresh(k, (struct kern_linear *)l);
    if (rc == KERN_OK) rc = linear_ready(k, l);
    if (rc < 0) return cuda_linear_free(k, (struct kern_linear *)l), rc;
    *out = (struct kern_linear *)l;
    return KERN_OK;
}

/* ---- slopes of activations ---- */

__device__ static float slope(enum kern_act act, float u) {
    if (act == KERN_GELU_TANH) {
        float t = tanhf(0.7978845608028654f * (u + 0.044715f * u * u * u));
        return 0.5f * (1 + t) + 0.5f * u * (1 - t * t) * 0.7978845608028654f * (1 + 0.134145f * u * u);
    }
    float s = 1 / (1 + expf(-u)); // SiLU
    return s * (1 + u * (1 - s));
}

template <typename T> __global__ static void times_slope(T *dx, const T *pre, size_t n, enum kern_act act) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) store_f32(dx + i, load_f32(dx + i) * slope(act, load_f32(pre + i)));
}

/* ---- sums of columns: a warp takes every eighth line of a block's lines, 8 columns a lane where they are bfloat16 ---- */

#define CHUNK 256 // lines a block
#define WARPS 8

template <typename T, int VEC>
__global__ void __launch_bounds__(WARPS * 32) column_sums(float *part, const T *dy, long lines, int N) {
    struct alignas(VEC * sizeof(T)) piece {
        T v[VEC];
    };
    __shared__ float shared[WARPS][32 * VEC];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, n = (blockIdx.x * 32 + lane) * VEC;
    const long first = (long)blockIdx.y * CHUNK;
    float sum[VEC] = {};
    if (n < N)
#pragma unroll 8
        for (long m = first + warp; m < min(lines, first + CHUNK); m += WARPS) {
            const piece x = *(const piece *)(dy + (size_t)m * N + n);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[i] += load_f32(&x.v[i]);
        }
    for (int i = 0; i < VEC; i++) shared[warp][lane * VEC + i] = sum[i];
    __syncthreads();
    for (int c = threadIdx.x; c < 32 * VEC && blockIdx.x * 32 * VEC + c < N; c += WARPS * 32) {
        float total = 0;
        for (int w = 0; w < WARPS; w++) total += shared[w][c];
        part[(size_t)blockIdx.y * N + blockIdx.x * 32 * VEC + c] = total;
    }
}

// db += the sums of `count` parts
__global__ void __launch_bounds__(WARPS * 32) add_columns(float *db, const float *part, int count, int N) {
    __shared__ float shared[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, n = blockIdx.x * 32 + lane;
    float sum = 0;
    if (n < N)
#pragma unroll 8
        for (int i = warp; i < count; i += WARPS) sum += part[(size_t)i * N + n];
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp || n >= N) return;
    for (int w = 1; w < WARPS; w++) sum += shared[w][lane];
    db[n] += sum;
}

static int add_bias_gradient(struct kern *k, float *db, float *part, const void *dy, bool f32, long lines, int N) {
    const unsigned chunks = (unsigned)((lines + CHUNK - 1) / CHUNK);
    const bool eight = !f32 && N % 8 == 0 && (size_t)dy % 16 == 0;
    const dim3 grid((unsigned)((N + (eight ? 255 : 31)) / (eight ? 256 : 32)), chunks);
    cudaStream_t s = cuda_of(k)->stream;
    if (chunks > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "linear_backward of %ld lines", lines);
    if (f32) column_sums<float, 1><<<grid, WARPS * 32, 0, s>>>(part, (const float *)dy, lines, N);
    else if (eight) column_sums<bf16, 8><<<grid, WARPS * 32, 0, s>>>(part, (const bf16 *)dy, lines, N);
    else column_sums<bf16, 1><<<grid, WARPS * 32, 0, s>>>(part, (const bf16 *)dy, lines, N);
    add_columns<<<(unsigned)((N + 31) / 32), WARPS * 32, 0, s>>>(db, part, (int)chunks, N);
    return cuda_launched(k, "linear_backward");
}

/* ---- any shape ---- */

#define TILE 16

struct any_args { // out[i, j] (+)= sum over p of a[i*ai + p*ap] * b[p*J + j], factors rounded to bfloat16
    void *out;
    const void *a, *b;
    long I, P, ai, ap;
    int J;
    bool add;
};

template <typename A, typename B, typename Y> __global__ static void any_product(const any_args a) {
    __shared__ float sa[TILE][TILE + 1], sb[TILE][TILE + 1];
    const int x = threadIdx.x % TILE, y = threadIdx.x / TILE, j = blockIdx.x * TILE + x;
    const long i = (long)blockIdx.y * TILE + y;
    auto round = [](float v) { return __bfloat162float(__float2bfloat16_rn(v)); };
    float sum = 0;
    for (long p = 0; p < a.P; p += TILE) {
        sa[y][x] = i < a.I && p + x < a.P ? round(load_f32((const A *)a.a + i * a.ai + (p + x) * a.ap)) : 0;
        sb[y][x] = j < a.J && p + y < a.P ? round(load_f32((const B *)a.b + (p + y) * a.J + j)) : 0;
        __syncthreads();
        for (int q = 0; q < TILE; q++) sum = fmaf(sa[y][q], sb[q][x], sum);
        __syncthreads();
    }
    if (i < a.I && j < a.J) {
        Y *out = (Y *)a.out + i * a.J + j;
        store_f32(out, a.add ? load_f32(out) + sum : sum);
    }
}

template <typename A, typename B, typename Y> static int run_any(struct kern *k, const any_args &a) {
    if (a.I > 65535L * TILE) return cuda_fail(k, KERN_EUNSUPPORTED, "linear_backward of %ld lines", a.I);
    any_product<A, B, Y>
        <<<dim3((unsigned)((a.J + TILE - 1) / TILE), (unsigned)((a.I + TILE - 1) / TILE)), TILE * TILE, 0, cuda_of(k)->stream>>>(
            a);
    return cuda_launched(k, "linear_backward");
}

/* ---- backward ---- */

struct back { // one call; M lines
    const struct cuda_linear *l;
    void *dx;
    float *dw, *db;
    const void *dy, *x;
    enum kern_act before;
    const void *pre;
    long M;
    float *part; // scratch of sums
};

// Products of float32 or bfloat16 factors
static int back_lt(struct kern *k, const struct back *b, enum kern_dtype t) {
    const struct kern_linear_spec *s = &b->l->spec;
    struct product_key key = {
        PRODUCT_DW, s->out, s->in, b->M, t, KERN_F32, t == KERN_F32 && (k->act == KERN_BF16 || cuda_of(k)->tf32)};
    const enum kern_dtype xt = s->x_f32 ? KERN_F32 : k->act;
    int rc = product_run(k, &key, b->dw, b->dy, b->x, NULL, NULL);
    if (rc == KERN_OK && b->db) rc = add_bias_gradient(k, b->db, b->part, b->dy, t == KERN_F32, b->M, s->out);
    if (rc < 0 || !b->dx) return rc;
    const void *w = t == KERN_F32 ? (const void *)b->l->w_live : b->l->w;
    key.yt = xt;
    if (b->before == KERN_GELU_TANH && t == KERN_BF16 && xt == KERN_BF16) {
        key.kind = PRODUCT_DX_GELU;
        rc = product_run(k, &key, b->dx, b->dy, w, NULL, (void *)b->pre);
        if (rc != KERN_EUNSUPPORTED) return rc;
    }
    key.kind = PRODUCT_DX;
    rc = product_run(k, &key, b->dx, b->dy, w, NULL, NULL);
    const size_t n = (size_t)b->M * (size_t)s->in;
    if (rc < 0 || b->before == KERN_NONE) return rc;
    if (xt == KERN_F32)
        times_slope<<<blocks_for(n), 256, 0, cuda_of(k)->stream>>>((float *)b->dx, (const float *)b->pre, n, b->before);
    else times_slope<<<blocks_for(n), 256, 0, cuda_of(k)->stream>>>((bf16 *)b->dx, (const bf16 *)b->pre, n, b->before);
    return cuda_launched(k, "linear_backward");
}

// Factors rounded to bfloat16, any shape; dy of type Y, x and dx of type X
template <typename X, typename Y> static int back_any(struct kern *k, const struct back *b) {
    const struct kern_linear_spec *s = &b->l->spec;
    any_args dw = {.out = b->dw, .a = b->dy, .b = b->x, .I = s->out, .P = b->M, .ai = 1, .ap = s->out, .J = s->in, .add = true};
    any_args dx = {
        .out = b->dx, .a = b->dy, .b = b->l->w_live, .I = b->M, .P = s->out, .ai = s->out, .ap = 1, .J = s->in, .add = false};
    int rc = run_any<Y, X, float>(k, dw);
    if (rc == KERN_OK && b->db) rc = add_bias_gradient(k, b->db, b->part, b->dy, sizeof(Y) == 4, b->M, s->out);
    if (rc < 0 || !b->dx) return rc;
    rc = run_any<Y, float, X>(k, dx);
    const size_t n = (size_t)b->M * (size_t)s->in;
    if (rc < 0 || b->before == KERN_NONE) return rc;
    times_slope<<<blocks_for(n), 256, 0, cuda_of(k)->stream>>>((X *)b->dx, (const X *)b->pre, n, b->before);
    return cuda_launched(k, "linear_backward");
}

int cuda_linear_backward(struct kern *k, const struct kern_linear *opaque, void *dx, float *dw, float *db, const void *dy,
                         const void *x, enum kern_act before, const void *x_pre, int units) {
    const struct cuda_linear *l = (const struct cuda_linear *)opaque;
    const struct kern_linear_spec *s = &l->spec;
    struct back b = {
        .l = l, .dx = dx, .dw = dw, .db = db, .dy = dy, .x = x, .before = before, .pre = x_pre, .M = (long)units * s->unit};
    const size_t sums = KERN_ROUND_UP((size_t)(b.M + CHUNK - 1) / CHUNK * (size_t)s->out * 4, (size_t)256),
                 n = (size_t)b.M * (size_t)s->out;
    void *scratch;
    if (!l->w_live) return cuda_fail(k, KERN_EUNSUPPORTED, "a linear layer whose weights were copied does not learn");
    if (units == 0) return KERN_OK;
    const bool exact = linear_exact(k, s), round = !exact && l->way == LT && s->y_f32;
    int rc = cuda_scratch(k, sums + (round ? n * 2 : 0), &scratch);
    if (rc < 0) return rc;
    b.part = (float *)scratch;
    if (exact) return back_lt(k, &b, KERN_F32);
    if (l->way == LT) {
        if (round) round_to_bf16(k, (char *)scratch + sums, dy, n), b.dy = (char *)scratch + sums;
        return back_lt(k, &b, KERN_BF16);
    }
    if (s->x_f32) return s->y_f32 ? back_any<float, float>(k, &b) : back_any<float, bf16>(k, &b);
    return s->y_f32 ? back_any<bf16, float>(k, &b) : back_any<bf16, bf16>(k, &b);
}
