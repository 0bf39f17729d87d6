// SPDX-License-Identifier: MIT
/*
 * attention_f32: the float32 attention of exact runs. A warp takes four queries and walks the keys 32 at a time, one key a lane,
 * with keys and values in shared memory; the weights of the 32 keys then go round by shuffles while each lane sums its own
 * columns of V.
 */
#include "kernels/cuda/device.cuh"

#define WARPS 8
#define Q 4 // queries a warp
#define KEYS 32

template <int COLS>
__global__ void __launch_bounds__(WARPS * 32)
    attention_f32(float *o, const float *qkv, int T, int H, int D, float scale, float *lse) {
    extern __shared__ float shared[];
    const int stride = D + 1, lane = threadIdx.x & 31, warp = threadIdx.x / 32, t0 = (blockIdx.x * WARPS + warp) * Q;
    float *sk = shared, *sv = sk + KEYS * stride, *sq = sv + KEYS * stride + warp * Q * D;
    const size_t C = (size_t)H * D, ld = 3 * C, row = blockIdx.z;
    const float *q = qkv + row * T * ld + (size_t)blockIdx.y * D, *k = q + C, *v = k + C;
    for (int i = lane; i < Q * D; i += 32) sq[i] = t0 + i / D < T ? q[(size_t)(t0 + i / D) * ld + i % D] : 0;
    float acc[Q][COLS] = {}, top[Q], sum[Q] = {};
    for (int i = 0; i < Q; i++) top[i] = -INFINITY;
    for (int j0 = 0; j0 < T; j0 += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * D; i += WARPS * 32) {
            int line = i / D, d = i % D;
            bool inside = j0 + line < T;
            sk[line * stride + d] = inside ? k[(size_t)(j0 + line) * ld + d] : 0;
            sv[line * stride + d] = inside ? v[(size_t)(j0 + line) * ld + d] : 0;
        }
        __syncthreads();
        float s[Q] = {};
        for (int d = 0; d < D; d++) {
            float key = sk[lane * stride + d];
            for (int i = 0; i < Q; i++) s[i] = fmaf(sq[i * D + d], key, s[i]);
        }
        for (int i = 0; i < Q; i++) {
            float score = j0 + lane < T ? s[i] * scale : -INFINITY, best = fmaxf(top[i], score);
            for (int x = 16; x; x /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, x));
            float shrink = expf(top[i] - best);
            s[i] = expf(score - best);
            top[i] = best;
            sum[i] = fmaf(sum[i], shrink, s[i]);
            for (int c = 0; c < COLS; c++) acc[i][c] *= shrink;
        }
        for (int j = 0; j < KEYS; j++) {
            float value[COLS];
            for (int c = 0; c < COLS; c++) value[c] = lane + 32 * c < D ? sv[j * stride + lane + 32 * c] : 0;
            for (int i = 0; i < Q; i++) {
                float p = __shfl_sync(0xffffffffu, s[i], j);
                for (int c = 0; c < COLS; c++) acc[i][c] = fmaf(p, value[c], acc[i][c]);
            }
        }
    }
    for (int i = 0; i < Q; i++) {
        float total = warp_sum(sum[i]);
        if (t0 + i >= T) continue;
        for (int c = 0; c < COLS; c++)
            if (lane + 32 * c < D) o[(row * T + t0 + i) * C + (size_t)blockIdx.y * D + lane + 32 * c] = acc[i][c] / total;
        if (lse && lane == 0) lse[(row * H + blockIdx.y) * T + t0 + i] = top[i] + logf(total);
    }
}

template <int COLS> static int launch(struct kern *k, float *o, const float *qkv, int R, int T, int H, int D, float *lse) {
    int bytes = (2 * KEYS * (D + 1) + WARPS * Q * D) * 4;
    int rc =
        cuda_check(k, cudaFuncSetAttribute(attention_f32<COLS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "attention");
    if (rc < 0) return rc;
    dim3 grid((unsigned)((T + WARPS * Q - 1) / (WARPS * Q)), (unsigned)H, (unsigned)R);
    attention_f32<COLS><<<grid, WARPS * 32, (size_t)bytes, cuda_of(k)->stream>>>(o, qkv, T, H, D, 1 / sqrtf((float)D), lse);
    return cuda_launched(k, "attention");
}

int cuda_attention_f32(struct kern *k, float *o, const float *qkv, int R, int T, int H, int D, float *lse) {
    switch ((D + 31) / 32) {
    case 1:
        return launch<1>(k, o, qkv, R, T, H, D, lse);
    case 2:
        return launch<2>(k, o, qkv, R, T, H, D, lse);
    case 3:
        return launch<3>(k, o, qkv, R, T, H, D, lse);
    default:
        return launch<4>(k, o, qkv, R, T, H, D, lse);
    }
}
