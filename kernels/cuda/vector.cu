// SPDX-License-Identifier: MIT
/*
 * vector: products of a few float32 lines (timestep, conditioning) with few weights. (Those with many, above all the one product
 * that gives every modulation vector, 451 MB of weights for XL, are cuBLASLt's: see linear.cu.)
 *
 * Weights are float16 (11 bits; a layer with a weight outside its range is not taken), all else float32. A warp makes one output
 * of KERN_VEC lines: reading the weights once is the cost, and a line's sum knows nothing of its neighbours.
 */
#include "kernels/cuda/linear.cuh"

#define WARPS 8

__global__ void __launch_bounds__(WARPS * 32)
    vector_kernel(float *y, const float *x, const __half *w, const float *bias, int N, int K, enum kern_act act) {
    const int lane = threadIdx.x & 31, n = blockIdx.x * WARPS + threadIdx.x / 32;
    if (n >= N) return;
    const size_t first = (size_t)blockIdx.y * KERN_VEC;
    float sum[KERN_VEC] = {};
    for (int k = lane * 8; k < K; k += 256) {
        __align__(16) __half2 h[4];
        float v[8];
        *(uint4 *)h = *(const uint4 *)(w + (size_t)n * K + k);
        for (int i = 0; i < 4; i++) ((float2 *)v)[i] = __half22float2(h[i]);
#pragma unroll
        for (int line = 0; line < KERN_VEC; line++) {
            const float4 *p = (const float4 *)(x + (first + line) * K + k), a = p[0], b = p[1];
            const float u[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 8; i++) sum[line] = fmaf(u[i], v[i], sum[line]);
        }
    }
#pragma unroll
    for (int line = 0; line < KERN_VEC; line++) {
        const float total = warp_sum(sum[line]);
        if (lane == line) y[(first + line) * N + n] = activate(act, total + bias[n]);
    }
}

int vector_linear(struct kern *k, float *y, const float *x, const __half *w, const float *bias, int N, int K, int lines,
                  enum kern_act act) {
    dim3 grid((unsigned)((N + WARPS - 1) / WARPS), (unsigned)(lines / KERN_VEC));
    vector_kernel<<<grid, WARPS * 32, 0, cuda_of(k)->stream>>>(y, x, w, bias, N, K, act);
    return cuda_launched(k, "linear of vectors");
}
