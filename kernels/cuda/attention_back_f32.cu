// SPDX-License-Identifier: MIT
/*
 * attention_back_f32: attention_back.cu's two passes in float32, for exact runs. A warp owns four lines and walks the others 32
 * at a time, one a lane; the 32 weights then go round by shuffles while each lane sums its own columns.
 */
#include "kernels/cuda/train.cuh"

#define WARPS 8
#define Q 4 // own lines a warp
#define OTHERS 32

// delta [R, H, T] = rowsum(dO * O), the first pass's estimate: a warp a line
__global__ static void row_sums(float *delta, const float *d_o, const float *o, size_t n, int T, int H, int D) {
    const size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) / 32; // (row, token, head)
    if (i >= n) return;
    float sum = 0;
    for (int d = threadIdx.x & 31; d < D; d += 32) sum = fmaf(d_o[i * D + d], o[i * D + d], sum);
    sum = warp_sum(sum);
    const size_t h = i % H, t = i / H % T, r = i / H / T;
    if ((threadIdx.x & 31) == 0) delta[(r * H + h) * T + t] = sum;
}

template <int COLS, bool KEYS>
__global__ void __launch_bounds__(WARPS * 32) back_f32(float *dqkv, const float *d_o, const float *qkv, const float *lse,
                                                       float *delta, int T, int H, int D, float scale) {
    extern __shared__ float shared[];
    const int stride = D + 1, lane = threadIdx.x & 31, warp = threadIdx.x / 32, t0 = (blockIdx.x * WARPS + warp) * Q;
    float *b1 = shared, *b2 = b1 + OTHERS * stride, *a1 = b2 + OTHERS * stride + warp * 2 * Q * D, *a2 = a1 + Q * D;
    const size_t C = (size_t)H * D, ld = 3 * C, row = blockIdx.z, head = row * H + blockIdx.y;
    const float *q = qkv + row * T * ld + (size_t)blockIdx.y * D, *k = q + C, *v = k + C,
                *g = d_o + row * T * C + (size_t)blockIdx.y * D;
    lse += head * T;
    delta += head * T;
    for (int i = lane; i < Q * D; i += 32) {
        const size_t t = (size_t)(t0 + i / D);
        a1[i] = t < (size_t)T ? (KEYS ? k : q)[t * ld + i % D] : 0;
        a2[i] = t < (size_t)T ? KEYS ? v[t * ld + i % D] : g[t * C + i % D] : 0;
    }
    float acc1[Q][COLS] = {}, acc2[Q][COLS] = {}, total[Q] = {}, along[Q] = {}; // of w and s, by column and of this lane's others
    for (int j0 = 0; j0 < T; j0 += OTHERS) {
        __syncthreads();
        for (int i = threadIdx.x; i < OTHERS * D; i += WARPS * 32) {
            const int line = i / D, d = i % D;
            const size_t t = (size_t)(j0 + line);
            b1[line * stride + d] = t < (size_t)T ? (KEYS ? q : k)[t * ld + d] : 0;
            b2[line * stride + d] = t < (size_t)T ? KEYS ? g[t * C + d] : v[t * ld + d] : 0;
        }
        __syncthreads();
        float s[Q] = {}, w[Q] = {};
        for (int d = 0; d < D; d++)
            for (int i = 0; i < Q; i++) {
                s[i] = fmaf(a1[i * D + d], b1[lane * stride + d], s[i]);
                w[i] = fmaf(a2[i * D + d], b2[lane * stride + d], w[i]);
            }
        for (int i = 0; i < Q; i++) {
            const int query = KEYS ? j0 + lane : t0 + i;
            const bool inside = j0 + lane < T && t0 + i < T;
            s[i] = inside ? expf(s[i] * scale - lse[query]) : 0;
            w[i] = inside ? s[i] * (w[i] - delta[query]) : 0;
            total[i] += s[i], along[i] += w[i];
        }
        for (int j = 0; j < OTHERS; j++)
            for (int c = 0; c < COLS; c++) {
                const bool inside = lane + 32 * c < D;
                const float x1 = inside ? b1[j * stride + lane + 32 * c] : 0,
                            x2 = !KEYS ? x1 : inside ? b2[j * stride + lane + 32 * c] : 0;
                for (int i = 0; i < Q; i++) {
                    acc1[i][c] = fmaf(__shfl_sync(0xffffffffu, w[i], j), x1, acc1[i][c]);
                    acc2[i][c] = fmaf(__shfl_sync(0xffffffffu, s[i], j), x2, acc2[i][c]);
                }
            }
    }
    for (int i = 0; !KEYS && i < Q && t0 + i < T; i++) {
        const float off = warp_sum(along[i]) / warp_sum(total[i]); // of the estimate
        if (lane == 0) delta[t0 + i] += off;
        for (int c = 0; c < COLS; c++) acc1[i][c] = fmaf(-off, acc2[i][c], acc1[i][c]);
    }
    float *out = dqkv + row * T * ld + (size_t)blockIdx.y * D + lane;
    for (int i = 0; i < Q && t0 + i < T; i++)
        for (int c = 0; c < COLS; c++) {
            if (lane + 32 * c >= D) continue;
            out[(size_t)(t0 + i) * ld + (KEYS ? C : 0) + 32 * c] = acc1[i][c] * scale;
            if (KEYS) out[(size_t)(t0 + i) * ld + 2 * C + 32 * c] = acc2[i][c];
        }
}

template <int COLS>
static int launch(struct kern *k, float *dqkv, const float *d_o, const float *qkv, const float *lse, float *delta, int R,
                  int T, int H, int D) {
    int bytes = (2 * OTHERS * (D + 1) + WARPS * 2 * Q * D) * 4;
    int rc = cuda_check(k, cudaFuncSetAttribute(back_f32<COLS, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                        "attention_backward");
    if (rc == KERN_OK)
        rc = cuda_check(k, cudaFuncSetAttribute(back_f32<COLS, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                        "attention_backward");
    if (rc < 0) return rc;
    dim3 grid((unsigned)((T + WARPS * Q - 1) / (WARPS * Q)), (unsigned)H, (unsigned)R);
    float scale = 1 / sqrtf((float)D);
    back_f32<COLS, false><<<grid, WARPS * 32, (size_t)bytes, cuda_of(k)->stream>>>(dqkv, d_o, qkv, lse, delta, T, H, D, scale);
    back_f32<COLS, true><<<grid, WARPS * 32, (size_t)bytes, cuda_of(k)->stream>>>(dqkv, d_o, qkv, lse, delta, T, H, D, scale);
    return cuda_launched(k, "attention_backward");
}

int attention_back_f32(struct kern *k, float *dqkv, const float *d_o, const float *qkv, const float *o, const float *lse,
                       float *delta, int R, int T, int H, int D) {
    size_t n = (size_t)R * (size_t)T * (size_t)H;
    row_sums<<<(unsigned)((n + 7) / 8), 256, 0, cuda_of(k)->stream>>>(delta, d_o, o, n, T, H, D);
    switch ((D + 31) / 32) {
    case 1:
        return launch<1>(k, dqkv, d_o, qkv, lse, delta, R, T, H, D);
    case 2:
        return launch<2>(k, dqkv, d_o, qkv, lse, delta, R, T, H, D);
    case 3:
        return launch<3>(k, dqkv, d_o, qkv, lse, delta, R, T, H, D);
    default:
        return launch<4>(k, dqkv, d_o, qkv, lse, delta, R, T, H, D);
    }
}
