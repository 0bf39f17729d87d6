// SPDX-License-Identifier: MIT
/*
 * linear_back: layers whose weights change. The caller's float32 weights are copied (linear_refresh) only where the forward
 * product wants another type: bfloat16 for cuBLASLt in a bfloat16 run, float16 for vectors with few weights. With many, the copy
 * would cost more than float16 saves.
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
    bool copy_w = l->way == VECTOR || (l->way == LT ? k->act == KERN_BF16 : !linear_exact(k, s)),
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
    if (l->way == WIDE) l->way = LIVE;
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

// What a layer's backward products take
struct factors {
    enum { BF16, F32, ANY } way; // ANY: rounded to bfloat16 in a plain kernel
    enum kern_dtype xt, yt;      // of x and dx; of dy as it comes
    const void *dy;              // as the products want it
    void *part;                  // scratch of `sums` bytes behind dy's copy
    long M;
};

static int prepare(struct kern *k, const struct cuda_linear *l, struct factors *f, const void *dy, int units, int columns) {
    const struct kern_linear_spec *s = &l->spec;
    const bool exact = linear_exact(k, s), round = !exact && l->way == LT && s->y_f32;
    void *scratch;
    if (!l->w_live) return cuda_fail(k, KERN_EUNSUPPORTED, "a linear layer whose weights were copied does not learn");
    *f = {.way = exact          ? factors::F32
                 : l->way == LT ? factors::BF16
                                : factors::ANY,
          .xt = s->x_f32 ? KERN_F32 : k->act,
          .yt = s->y_f32 ? KERN_F32 : k->act,
          .dy = dy,
          .part = NULL,
          .M = (long)units * s->unit};
    const size_t n = (size_t)f->M * (size_t)s->out, copy = round ? KERN_ROUND_UP(n * 2, (size_t)256) : 0;
    int rc = cuda_scratch(k, copy + column_scratch(f->M, columns), &scratch);
    if (rc < 0) return rc;
    f->part = (char *)scratch + copy;
    if (round) round_to_bf16(k, scratch, dy, n), f->dy = scratch;
    return cuda_launched(k, "linear_backward");
}

static struct product_key key_of(struct kern *k, const struct cuda_linear *l, const struct factors *f, enum product_kind kind,
                                 int N) {
    const bool f32 = f->way == factors::F32;
    return {kind,
            N,
            l->spec.in,
            f->M,
            f32 ? KERN_F32 : KERN_BF16,
            kind == PRODUCT_DW ? KERN_F32 : f->xt,
            f32 && (k->act == KERN_BF16 || cuda_of(k)->tf32),
            l->spec.out};
}

static int sloped(struct kern *k, const struct factors *f, void *dx, size_t n, enum kern_act before, const void *pre) {
    cudaStream_t s = cuda_of(k)->stream;
    if (f->xt == KERN_F32) times_slope<<<blocks_for(n), 256, 0, s>>>((float *)dx, (const float *)pre, n, before);
    else times_slope<<<blocks_for(n), 256, 0, s>>>((bf16 *)dx, (const bf16 *)pre, n, before);
    return cuda_launched(k, "linear_backward");
}

static int any_dx(struct kern *k, const struct cuda_linear *l, const struct factors *f, void *dx) {
    const struct kern_linear_spec *s = &l->spec;
    any_args a = {.out = dx, .a = f->dy, .b = l->w_live, .I = f->M, .P = s->out, .ai = s->out, .ap = 1, .J = s->in, .add = false};
    if (s->x_f32) return s->y_f32 ? run_any<float, float, float>(k, a) : run_any<bf16, float, float>(k, a);
    return s->y_f32 ? run_any<float, float, bf16>(k, a) : run_any<bf16, float, bf16>(k, a);
}

int cuda_linear_backward(struct kern *k, const struct kern_linear *opaque, void *dx, float *dx_sum, const void *dy,
                         enum kern_act before, const void *x_pre, int units, bool add) {
    const struct cuda_linear *l = (const struct cuda_linear *)opaque;
    const int in = l->spec.in;
    struct factors f = {};
    if (units == 0) return KERN_OK;
    int rc = prepare(k, l, &f, dy, units, in);
    if (rc < 0) return rc;
    const void *w = f.way == factors::F32 ? (const void *)l->w_live : l->w;
    const bool gelu = before == KERN_GELU_TANH && f.way == factors::BF16 && f.xt == KERN_BF16;
    struct product_key key = key_of(k, l, &f, PRODUCT_DX_GELU, l->spec.out);
    rc = gelu ? product_run(k, &key, dx, f.dy, w, NULL, (void *)x_pre, false) : KERN_EUNSUPPORTED;
    if (rc == KERN_EUNSUPPORTED) {
        key.kind = PRODUCT_DX;
        rc = f.way == factors::ANY ? any_dx(k, l, &f, dx) : product_run(k, &key, dx, f.dy, w, NULL, NULL, false);
        if (rc == KERN_OK && before != KERN_NONE) rc = sloped(k, &f, dx, (size_t)f.M * (size_t)in, before, x_pre);
    }
    if (rc < 0 || !dx_sum) return rc;
    return column_sums(k, dx_sum, (float *)f.part, dx, f.xt == KERN_F32, f.M, in, in, add);
}

// dy: from the first of the outputs on
static int any_dw(struct kern *k, const struct cuda_linear *l, const struct factors *f, float *dw, const void *dy, const void *x,
                  int count, bool add) {
    const struct kern_linear_spec *s = &l->spec;
    any_args a = {.out = dw, .a = dy, .b = x, .I = count, .P = f->M, .ai = 1, .ap = s->out, .J = s->in, .add = add};
    if (s->x_f32) return s->y_f32 ? run_any<float, float, float>(k, a) : run_any<bf16, float, float>(k, a);
    return s->y_f32 ? run_any<float, bf16, float>(k, a) : run_any<bf16, bf16, float>(k, a);
}

int cuda_linear_gradients(struct kern *k, const struct kern_linear *opaque, float *dw, float *db, const void *dy, const void *x,
                          int units, int first, int count, bool add) {
    const struct cuda_linear *l = (const struct cuda_linear *)opaque;
    struct factors f = {};
    if (units == 0 && !add) {
        int rc = k->zero(k, dw, (size_t)count * (size_t)l->spec.in * sizeof *dw);
        return rc < 0 || !db ? rc : k->zero(k, db, (size_t)count * sizeof *db);
    }
    if (units == 0) return KERN_OK;
    int rc = prepare(k, l, &f, dy, units, count);
    if (rc < 0) return rc;
    const size_t at = (size_t)first * kern_size(f.dy == dy ? f.yt : KERN_BF16);
    const void *from = (const char *)f.dy + at;
    if (f.way != factors::ANY && (size_t)from % 16)
        return cuda_fail(k, KERN_EUNSUPPORTED, "gradients of outputs from %d on, which do not begin on 16 bytes", first);
    struct product_key key = key_of(k, l, &f, PRODUCT_DW, count);
    rc = f.way == factors::ANY ? any_dw(k, l, &f, dw, from, x, count, add) : product_run(k, &key, dw, from, x, NULL, NULL, add);
    if (rc < 0 || !db) return rc;
    return column_sums(k, db, (float *)f.part, from, f.dy == dy && f.yt == KERN_F32, f.M, count, l->spec.out, add);
}

/* ---- forward of vectors with many weights: float32 as they are, rounded to TF32's 11 bits by the product ---- */

int cuda_linear_live(struct kern *k, const struct kern_linear *opaque, float *y, const float *x, int units, float *save_pre) {
    const struct cuda_linear *l = (const struct cuda_linear *)opaque;
    const struct kern_linear_spec *s = &l->spec;
    float *to = save_pre ? save_pre : y;
    const long M = (long)units * s->unit;
    struct product_key key = {PRODUCT_FORWARD, s->out, s->in, M, KERN_F32, KERN_F32, true, 0};
    int rc = product_run(k, &key, to, x, l->w_live, l->bias, NULL, false);
    if (rc < 0 || (s->act == KERN_NONE && !save_pre)) return rc;
    return plain_activate(k, y, to, (size_t)M * (size_t)s->out, KERN_F32, s->act);
}
