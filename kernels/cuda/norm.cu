// SPDX-License-Identifier: MIT
/*
 * norm: LayerNorm with modulation, alone or behind a gated residual. Bound by memory: per element 8 bytes with the residual
 * stream x in float16 (x read and written, h read, y written), 151 MB at 64 rows of XL/2; 12 bytes and 226 MB with x in float32.
 *
 * A warp holds one token in registers: C = 32 lanes x NV vectors of VEC floats, loaded once, mean and then squared deviations
 * summed from registers (two passes over registers cost nothing beside one pass over memory), every sum by the same lanes in the
 * same order, so a token's bits do not depend on where it stands. A block takes some tokens of one row with that row's gate,
 * shift and scale in shared memory: without that their reads would equal the main traffic. Widths that are no multiple of 64 take
 * a plain loop.
 */
#include "kernels/cuda/linear.cuh"

#include <type_traits>

#define WARPS 4
#define HALF_MOST 65504.0f // the largest number of float16

template <int VEC> struct vec; // VEC floats, and VEC 16-bit numbers, as one load
template <> struct vec<4> {
    typedef float4 f;
    typedef uint2 h;
};
template <> struct vec<2> {
    typedef float2 f;
    typedef unsigned h;
};

template <typename T, int VEC> using raw = std::conditional_t<sizeof(T) == 4, typename vec<VEC>::f, typename vec<VEC>::h>;

template <int VEC> __device__ __forceinline__ void load(float *v, const float *p) {
    *(typename vec<VEC>::f *)v = *(const typename vec<VEC>::f *)p;
}
template <int VEC> __device__ __forceinline__ void load(float *v, const __nv_bfloat16 *p) {
    __align__(8) __nv_bfloat162 h[VEC / 2];
    *(typename vec<VEC>::h *)h = *(const typename vec<VEC>::h *)p;
    for (int i = 0; i < VEC / 2; i++) ((float2 *)v)[i] = __bfloat1622float2(h[i]);
}
template <int VEC> __device__ __forceinline__ void load(float *v, const __half *p) {
    __align__(8) __half2 h[VEC / 2];
    *(typename vec<VEC>::h *)h = *(const typename vec<VEC>::h *)p;
    for (int i = 0; i < VEC / 2; i++) ((float2 *)v)[i] = __half22float2(h[i]);
}
template <int VEC> __device__ __forceinline__ void save(float *p, const float *v) {
    *(typename vec<VEC>::f *)p = *(const typename vec<VEC>::f *)v;
}
template <int VEC> __device__ __forceinline__ void save(__nv_bfloat16 *p, const float *v) {
    __align__(8) __nv_bfloat162 h[VEC / 2];
    for (int i = 0; i < VEC / 2; i++) h[i] = __float22bfloat162_rn(((const float2 *)v)[i]);
    *(typename vec<VEC>::h *)p = *(const typename vec<VEC>::h *)h;
}

template <int VEC> __device__ __forceinline__ void save(__half *p, const float *v) {
    __align__(8) __half2 h[VEC / 2];
    for (int i = 0; i < VEC / 2; i++) h[i] = __float22half2_rn(((const float2 *)v)[i]);
    *(typename vec<VEC>::h *)p = *(const typename vec<VEC>::h *)h;
}

/*
 * A token in e4m3, y = q*scale: with a fixed scale, or one of its own that puts the largest |y| on 448. All numbers of the token
 * are in the warp.
 */
template <int VEC, int NV>
__device__ __forceinline__ void save_token(__nv_fp8_e4m3 *p, float *token_scale, const struct fixed_scale *fixed,
                                           const float (&y)[NV][VEC], int lane) {
    float scale = 1, up;
    if (fixed) up = fixed->inverse;
    else {
        float most = 0;
        for (int i = 0; i < NV; i++)
            for (int j = 0; j < VEC; j++) most = fmaxf(most, fabsf(y[i][j]));
        for (int i = 16; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
        scale = most > 0 ? most / FP8_MOST : 1, up = 1 / scale;
    }
    for (int i = 0; i < NV; i++) {
        __nv_fp8x4_e4m3 q(make_float4(y[i][0] * up, y[i][1] * up, y[i][2] * up, y[i][3] * up));
        *(__nv_fp8x4_e4m3 *)(p + i * 32 * VEC) = q;
    }
    if (lane == 0 && !fixed) *token_scale = scale;
}

struct norm_args {
    void *y; // NULL: only the gated residual
    void *x; // written when gate is given
    const void *h;
    const float *gate, *shift, *scale;
    int ld, T, C, tokens; // tokens a block
    float eps;
    void *xhat;
    float *rstd, *scales;            // scales: one a token, where y is e4m3 and
    const struct fixed_scale *fixed; // is NULL
    unsigned *overflows, *told;      // numbers of x that float16 did not hold; the same for the host
};

// Counts numbers beyond float16 in a token's x, n a lane, and lets the host know. (Adding to host memory itself is not possible on
// every machine.)
__device__ static void count_overflows(const norm_args &a, int n, int lane) {
    for (int i = 16; i; i /= 2) n += __shfl_xor_sync(0xffffffffu, n, i);
    if (lane == 0 && n) *(volatile unsigned *)a.told = atomicAdd(a.overflows, (unsigned)n) + (unsigned)n;
}

// A: the branch h (and xhat); Y: y, A or e4m3; X: the residual stream
template <typename A, typename Y, typename X, int VEC, int NV, bool GATE>
__global__ void __launch_bounds__(WARPS * 32, 4) norm_kernel(const norm_args a) {
    constexpr int C = 32 * VEC * NV;
    __shared__ __align__(16) float vectors[3][C];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const size_t row = blockIdx.y, mod = row * (size_t)a.ld;
    const int end = min(a.T, (int)(blockIdx.x + 1) * a.tokens);
    constexpr bool AHEAD = sizeof(A) + sizeof(X) == 4; // the next token is on its way while this one is worked on; float32 has not the registers
    raw<X, VEC> next_x[NV];
    raw<A, VEC> next_h[NV];
    auto place = [&](int t) { return (row * (size_t)a.T + (size_t)t) * C + (size_t)lane * VEC; };
    auto fetch = [&](int t) {
#pragma unroll
        for (int i = 0; i < NV; i++) next_x[i] = *(const raw<X, VEC> *)((const X *)a.x + place(t) + i * 32 * VEC);
#pragma unroll
        for (int i = 0; GATE && i < NV; i++) next_h[i] = *(const raw<A, VEC> *)((const A *)a.h + place(t) + i * 32 * VEC);
    };
    int t = blockIdx.x * a.tokens + warp;
    wait_for_previous();
    if (AHEAD && t < end) fetch(t);
    for (int i = threadIdx.x * VEC; i < C; i += WARPS * 32 * VEC) {
        if (GATE) load<VEC>(&vectors[2][i], a.gate + mod + i);
        if (!a.y) continue;
        float s[VEC];
        load<VEC>(&vectors[0][i], a.shift + mod + i);
        load<VEC>(s, a.scale + mod + i);
        for (int j = 0; j < VEC; j++) vectors[1][i + j] = 1 + s[j];
    }
    __syncthreads();
    for (; t < end; t += WARPS) {
        const size_t token = row * (size_t)a.T + (size_t)t, at = place(t);
        __align__(16) float x[NV][VEC];
        if (!AHEAD) fetch(t);
#pragma unroll
        for (int i = 0; i < NV; i++) {
            load<VEC>(x[i], (const X *)&next_x[i]);
            if (!GATE) continue;
            __align__(16) float g[VEC], h[VEC];
            load<VEC>(h, (const A *)&next_h[i]);
            load<VEC>(g, &vectors[2][(i * 32 + lane) * VEC]);
            for (int j = 0; j < VEC; j++) x[i][j] = fmaf(g[j], h[j], x[i][j]);
        }
        if (AHEAD && t + WARPS < end) fetch(t + WARPS);
        if (GATE)
#pragma unroll
            for (int i = 0; i < NV; i++) save<VEC>((X *)a.x + at + i * 32 * VEC, x[i]);
        if (!a.y) continue;
        float sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < NV; i++)
            for (int j = 0; j < VEC; j++) sum += x[i][j];
        const float mean = warp_sum(sum) / C;
#pragma unroll
        for (int i = 0; i < NV; i++)
            for (int j = 0; j < VEC; j++) squares = fmaf(x[i][j] - mean, x[i][j] - mean, squares);
        const float variance = warp_sum(squares) / C, rstd = 1 / sqrtf(variance + a.eps);
        if (GATE && is_half<X> && !(C * (variance + mean * mean) < HALF_MOST * HALF_MOST)) { // a sum of squares: none is larger
            int n = 0;
#pragma unroll
            for (int i = 0; i < NV; i++)
                for (int j = 0; j < VEC; j++) n += fabsf(x[i][j]) > HALF_MOST;
            count_overflows(a, n, lane);
        }
#pragma unroll
        for (int i = 0; i < NV; i++) {
            __align__(16) float shift[VEC], scale[VEC], y[VEC];
            load<VEC>(shift, &vectors[0][(i * 32 + lane) * VEC]);
            load<VEC>(scale, &vectors[1][(i * 32 + lane) * VEC]);
            for (int j = 0; j < VEC; j++) x[i][j] = (x[i][j] - mean) * rstd;
            if (a.xhat) save<VEC>((A *)a.xhat + at + i * 32 * VEC, x[i]);
            for (int j = 0; j < VEC; j++) y[j] = fmaf(x[i][j], scale[j], shift[j]);
            if constexpr (sizeof(Y) == 1)
                for (int j = 0; j < VEC; j++) x[i][j] = y[j];
            else save<VEC>((Y *)a.y + at + i * 32 * VEC, y);
        }
        if constexpr (sizeof(Y) == 1) save_token<VEC, NV>((Y *)a.y + at, a.scales + token, a.fixed, x, lane);
        if (lane == 0 && a.rstd) a.rstd[token] = rstd;
    }
}

// Any width: a warp a token, reading it again for each pass
template <typename A, typename X> __global__ void __launch_bounds__(WARPS * 32) norm_any(const norm_args a) {
    const int lane = threadIdx.x & 31, t = blockIdx.x * WARPS + threadIdx.x / 32;
    const size_t row = blockIdx.y, mod = row * (size_t)a.ld, token = row * (size_t)a.T + (size_t)t;
    if (t >= a.T) return;
    X *x = (X *)a.x + token * a.C;
    float sum = 0, squares = 0;
    int beyond = 0;
    for (int i = lane; a.gate && i < a.C; i += 32) {
        const float v = fmaf(a.gate[mod + i], load_f32((const A *)a.h + token * a.C + i), load_f32(x + i));
        store_f32(x + i, v);
        beyond += is_half<X> && fabsf(v) > HALF_MOST;
    }
    if (is_half<X>) count_overflows(a, beyond, lane);
    if (!a.y) return;
    for (int i = lane; i < a.C; i += 32) sum += load_f32(x + i);
    const float mean = warp_sum(sum) / a.C;
    for (int i = lane; i < a.C; i += 32) squares = fmaf(load_f32(x + i) - mean, load_f32(x + i) - mean, squares);
    const float rstd = 1 / sqrtf(warp_sum(squares) / a.C + a.eps);
    for (int i = lane; i < a.C; i += 32) {
        const float xhat = (load_f32(x + i) - mean) * rstd;
        if (a.xhat) store_f32((A *)a.xhat + token * a.C + i, xhat);
        store_f32((A *)a.y + token * a.C + i, fmaf(xhat, 1 + a.scale[mod + i], a.shift[mod + i]));
    }
    if (lane == 0 && a.rstd) a.rstd[token] = rstd;
}

template <typename A, typename Y, typename X, int VEC, int NV>
static void launch(const norm_args &a, dim3 grid, const struct kern *k) {
    if (a.gate) launch_early(k, norm_kernel<A, Y, X, VEC, NV, true>, grid, WARPS * 32, 0, a);
    else launch_early(k, norm_kernel<A, Y, X, VEC, NV, false>, grid, WARPS * 32, 0, a);
}

// False: no kernel for this width
template <typename A, typename Y, typename X> static bool launch_width(const norm_args &a, dim3 grid, const struct kern *k) {
#define TWO(n)                                                                                                                   \
    case 64 * n:                                                                                                                 \
        if constexpr (sizeof(Y) > 1) return launch<A, Y, X, 2, n>(a, grid, k), true;                                             \
        return false
#define FOUR(n)                                                                                                                  \
    case 128 * n:                                                                                                                \
        return launch<A, Y, X, 4, n>(a, grid, k), true
    switch (a.C) {
        TWO(1);
        TWO(3);
        TWO(5);
        FOUR(1);
        FOUR(2);
        FOUR(3);
        FOUR(4);
        FOUR(5);
        FOUR(6);
        FOUR(7);
        FOUR(8);
        FOUR(9);
        FOUR(10);
        FOUR(12);
    }
#undef TWO
#undef FOUR
    return false;
}

template <typename A, typename Y, typename X> static int run(struct kern *k, norm_args a, int R) {
    const struct cuda *c = cuda_of(k);
    bool aligned =
        a.ld % 4 == 0 &&
        ((size_t)a.x | (size_t)a.y | (size_t)a.h | (size_t)a.gate | (size_t)a.shift | (size_t)a.scale | (size_t)a.xhat) % 16 == 0;
    a.tokens = 32; // a block; fewer where there would not be enough blocks for the multiprocessors
    while (a.tokens > WARPS && (long)R * a.T / a.tokens < 8L * c->sms) a.tokens /= 2;
    if (R == 0) return KERN_OK;
    if (R > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "%d rows at once", R);
    dim3 grid((unsigned)((a.T + a.tokens - 1) / a.tokens), (unsigned)R);
    if (!aligned || !launch_width<A, Y, X>(a, grid, k)) {
        if constexpr (sizeof(Y) == 1) return cuda_fail(k, KERN_EUNSUPPORTED, "fp8 of a network of width %d", a.C);
        else norm_any<A, X><<<dim3((unsigned)((a.T + WARPS - 1) / WARPS), (unsigned)R), WARPS * 32, 0, c->stream>>>(a);
    }
    return cuda_launched(k, a.gate ? "gate_norm" : "norm_modulate");
}

static int run_any(struct kern *k, norm_args a, int R) {
    a.overflows = cuda_of(k)->overflows, a.told = cuda_of(k)->told;
    const bool half = k->stream == KERN_F16;
    if (k->act == KERN_F32) return run<float, float, float>(k, a, R);
    if (k->act == KERN_F16) return half ? run<__half, __half, __half>(k, a, R) : run<__half, __half, float>(k, a, R);
    if (a.scales)
        return half ? run<__nv_bfloat16, __nv_fp8_e4m3, __half>(k, a, R) : run<__nv_bfloat16, __nv_fp8_e4m3, float>(k, a, R);
    return half ? run<__nv_bfloat16, __nv_bfloat16, __half>(k, a, R) : run<__nv_bfloat16, __nv_bfloat16, float>(k, a, R);
}

static int run_fp8(struct kern *k, norm_args a, int R, const struct kern_linear *reader) {
    a.scales = fp8_token_scales(a.y, (long)R * a.T, a.C);
    a.fixed = ((const struct cuda_linear *)reader)->fixed;
    return run_any(k, a, R);
}

int cuda_norm_modulate_fp8(struct kern *k, void *y, const void *x, const float *shift, const float *scale, int ld, int R, int T,
                           int C, float eps, const struct kern_linear *reader) {
    norm_args a = {.y = y, .x = (void *)x, .shift = shift, .scale = scale, .ld = ld, .T = T, .C = C, .eps = eps};
    return run_fp8(k, a, R, reader);
}

int cuda_gate_norm_fp8(struct kern *k, void *y, void *x, const void *h, const float *gate, const float *shift, const float *scale,
                       int ld, int R, int T, int C, float eps, const struct kern_linear *reader) {
    norm_args a = {.y = y, .x = x, .h = h, .gate = gate, .shift = shift, .scale = scale, .ld = ld, .T = T, .C = C, .eps = eps};
    return run_fp8(k, a, R, reader);
}

int cuda_norm_modulate(struct kern *k, void *y, const void *x, const float *shift, const float *scale, int ld, int R, int T,
                       int C, float eps, void *save_xhat, float *save_rstd) {
    return run_any(k,
                   {.y = y,
                    .x = (void *)x,
                    .shift = shift,
                    .scale = scale,
                    .ld = ld,
                    .T = T,
                    .C = C,
                    .eps = eps,
                    .xhat = save_xhat,
                    .rstd = save_rstd},
                   R);
}

int cuda_gate_norm(struct kern *k, void *y, void *x, const void *h, const float *gate, const float *shift, const float *scale,
                   int ld, int R, int T, int C, float eps, void *save_xhat, float *save_rstd) {
    return run_any(k,
                   {.y = y,
                    .x = x,
                    .h = h,
                    .gate = gate,
                    .shift = shift,
                    .scale = scale,
                    .ld = ld,
                    .T = T,
                    .C = C,
                    .eps = eps,
                    .xhat = save_xhat,
                    .rstd = save_rstd},
                   R);
}
