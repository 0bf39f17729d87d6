// SPDX-License-Identifier: MIT
// Linear layers of any shape: for the odd sizes that the fast ways do not take, for the tiny patch embedding, for float32
// vectors.
#include "kernels/cuda/linear.cuh"

#define TILE 64
#define STEP 16
#define PAD 4

template <typename X> __device__ __forceinline__ float factor(const X *x, size_t at, enum kern_dtype round) {
    float v = load_f32(x + at);
    return round == KERN_BF16  ? __bfloat162float(__float2bfloat16_rn(v))
           : round == KERN_F16 ? __half2float(__float2half_rn(v))
                               : v;
}

// A block makes 64 x 64 outputs, a thread 4 x 4; every output is one chain of fmaf over K in index order
template <typename X, typename Y> __global__ void __launch_bounds__(256) plain(const plain_args a) {
    __shared__ __align__(16) float sx[STEP][TILE + PAD], sw[STEP][TILE + PAD];
    const int tid = threadIdx.x, tn = tid % 16 * 4, tm = tid / 16 * 4, n0 = blockIdx.x * TILE;
    const long m0 = (long)blockIdx.y * TILE;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < a.K; k0 += STEP) {
        for (int i = tid; i < TILE * STEP; i += 256) {
            int line = i / STEP, k = i % STEP;
            bool inside = k0 + k < a.K;
            sx[k][line] = inside && m0 + line < a.M ? factor((const X *)a.x, (size_t)(m0 + line) * a.K + k0 + k, a.round_x) : 0;
            sw[k][line] = inside && n0 + line < a.N ? a.w[(size_t)(n0 + line) * a.K + k0 + k] : 0;
        }
        __syncthreads();
        const int most = min(STEP, a.K - k0);
        for (int k = 0; k < most; k++) {
            float4 x = *(const float4 *)&sx[k][tm], w = *(const float4 *)&sw[k][tn];
            const float xs[4] = {x.x, x.y, x.z, x.w}, ws[4] = {w.x, w.y, w.z, w.w};
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(xs[i], ws[j], acc[i][j]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++) {
        if (m0 + tm + i >= a.M) continue;
        const size_t at = (size_t)(m0 + tm + i) * a.N + n0 + tn;
        struct alignas(4 * sizeof(Y)) {
            Y v[4];
        } pre, y;
        for (int j = 0; j < 4; j++) {
            float u = acc[i][j] + (n0 + tn + j < a.N ? a.bias[n0 + tn + j] : 0);
            store_f32(&pre.v[j], u);
            store_f32(&y.v[j], activate(a.act, u));
        }
        if (a.N % 4 == 0 && n0 + tn < a.N) { // four at once
            if (a.pre) *(decltype(pre) *)((Y *)a.pre + at) = pre;
            *(decltype(y) *)((Y *)a.y + at) = y;
            continue;
        }
        for (int j = 0; j < 4 && n0 + tn + j < a.N; j++) {
            if (a.pre) ((Y *)a.pre)[at + j] = pre.v[j];
            ((Y *)a.y)[at + j] = y.v[j];
        }
    }
}

template <typename X> static void launch(const plain_args &a, dim3 grid, cudaStream_t s) {
    if (a.yt == KERN_F32) plain<X, float><<<grid, 256, 0, s>>>(a);
    else if (a.yt == KERN_F16) plain<X, __half><<<grid, 256, 0, s>>>(a);
    else plain<X, __nv_bfloat16><<<grid, 256, 0, s>>>(a);
}

int plain_linear(struct kern *k, const struct plain_args *a) {
    if (a->M > 65535L * TILE) return cuda_fail(k, KERN_EUNSUPPORTED, "a product of %ld lines", a->M);
    dim3 grid((unsigned)((a->N + TILE - 1) / TILE), (unsigned)((a->M + TILE - 1) / TILE));
    if (a->x_f32) launch<float>(*a, grid, cuda_of(k)->stream);
    else if (k->act == KERN_F16) launch<__half>(*a, grid, cuda_of(k)->stream);
    else launch<__nv_bfloat16>(*a, grid, cuda_of(k)->stream);
    return cuda_launched(k, "linear");
}

template <typename T> __global__ void activation(T *y, const T *pre, size_t n, enum kern_act act) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) store_f32(y + i, activate(act, load_f32(pre + i)));
}

int plain_activate(struct kern *k, void *y, const void *pre, size_t n, enum kern_dtype t, enum kern_act act) {
    unsigned blocks = (unsigned)((n + 255) / 256);
    cudaStream_t s = cuda_of(k)->stream;
    if (n == 0) return KERN_OK;
    if (t == KERN_F32) activation<<<blocks, 256, 0, s>>>((float *)y, (const float *)pre, n, act);
    else if (t == KERN_F16) activation<<<blocks, 256, 0, s>>>((__half *)y, (const __half *)pre, n, act);
    else activation<<<blocks, 256, 0, s>>>((__nv_bfloat16 *)y, (const __nv_bfloat16 *)pre, n, act);
    return cuda_launched(k, "activation");
}
