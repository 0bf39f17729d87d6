// SPDX-License-Identifier: MIT
/*
 * norm_back: backward of gated residual, LayerNorm and modulation in one pass over memory: 16 bytes an element in bfloat16 (dx
 * read and written in float32; dy, xhat, h read, dh written), 302 MB at 64 images of XL/2.
 *
 * A thread owns VEC neighbouring channels and walks a block's tokens, so the sums over tokens stay in its registers; four tokens
 * at a time, whose two means over channels share one round of shuffles and one barrier. A block writes its sums; a second kernel
 * adds a row's blocks (or, where the vectors are shared, those of all rows) in index order.
 */
#include "kernels/cuda/train.cuh"

#define GROUP 4   // tokens at a time
#define TOKENS 32 // tokens a block

struct back_args {
    float *dx;
    void *dh;
    const void *dy, *xhat, *h;
    const float *rstd, *gate, *scale;
    float *part; // [R, blocks, 3, C]: dshift, dscale, dgate
    int ld, T, C;
};

template <typename A, int VEC> struct alignas(sizeof(A) * VEC) pieces { A v[VEC]; };
template <int VEC, typename A> __device__ __forceinline__ void load(float (&v)[VEC], const void *p, size_t at) {
    pieces<A, VEC> x = *(const pieces<A, VEC> *)((const A *)p + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = load_f32(&x.v[i]);
}
template <int VEC, typename A> __device__ __forceinline__ void save(void *p, size_t at, const float (&v)[VEC]) {
    pieces<A, VEC> x;
#pragma unroll
    for (int i = 0; i < VEC; i++) store_f32(&x.v[i], v[i]);
    *(pieces<A, VEC> *)((A *)p + at) = x;
}

// The block's sums of eight numbers a thread; every thread gets all. shared: [8][32], another one in the next call
__device__ __forceinline__ void block_sums(float (&v)[8], float *shared) {
    const int lane = threadIdx.x & 31, warps = blockDim.x / 32;
#pragma unroll
    for (int half = 4, bit = 16; half; half /= 2, bit /= 2) { // lane keeps number lane/4
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float give = upper ? v[i] : v[i + half];
            v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(0xffffffffu, give, bit);
        }
    }
    float sum = v[0];
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if ((lane & 3) == 0) shared[lane / 4 * 32 + threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = lane & 3; w < warps; w += 4) sum += shared[lane / 4 * 32 + w];
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __shfl_sync(0xffffffffu, sum, i * 4);
}

template <typename A, int VEC, bool NORM, bool GATE>
__global__ void __launch_bounds__(VEC == 4 ? 320 : 512, VEC == 4 ? 2 : 1) norm_back(const back_args a) {
    __shared__ float shared[2][8 * 32];
    const int c = threadIdx.x * VEC, t0 = blockIdx.x * TOKENS;
    const size_t row = blockIdx.y, mod = row * (size_t)a.ld + c;
    const bool inside = c < a.C;
    const float per_channel = 1 / (float)a.C;
    float factor[VEC] = {}, gate[VEC] = {}, shift_sum[VEC] = {}, scale_sum[VEC] = {}, gate_sum[VEC] = {};
    if (NORM && inside) load<VEC, float>(factor, a.scale, mod);
    if (GATE && inside) load<VEC, float>(gate, a.gate, mod);
    for (int i = 0; i < VEC; i++) factor[i] += 1;
#pragma unroll 1
    for (int t = t0; t < min(a.T, t0 + TOKENS); t += GROUP) {
        const size_t token = row * (size_t)a.T + (size_t)t, at = token * a.C + c;
        float dx[GROUP][VEC], dy[GROUP][VEC], xhat[GROUP][VEC], h[GROUP][VEC], sums[8] = {};
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const bool here = inside && t + i < a.T;
#pragma unroll
            for (int j = 0; j < VEC; j++) dx[i][j] = dy[i][j] = xhat[i][j] = h[i][j] = 0;
            if (here) load<VEC, float>(dx[i], a.dx, at + (size_t)i * a.C);
            if (NORM && here)
                load<VEC, A>(dy[i], a.dy, at + (size_t)i * a.C), load<VEC, A>(xhat[i], a.xhat, at + (size_t)i * a.C);
            if (GATE && here) load<VEC, A>(h[i], a.h, at + (size_t)i * a.C);
        }
        if (NORM) {
#pragma unroll
            for (int i = 0; i < GROUP; i++)
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    const float d = dy[i][j] * factor[j];
                    shift_sum[j] += dy[i][j];
                    scale_sum[j] = fmaf(dy[i][j], xhat[i][j], scale_sum[j]);
                    sums[2 * i] += d;
                    sums[2 * i + 1] = fmaf(d, xhat[i][j], sums[2 * i + 1]);
                    dy[i][j] = d;
                }
            block_sums(sums, shared[t / GROUP & 1]);
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            if (!inside || t + i >= a.T) continue;
            if (NORM) {
                const float rstd = a.rstd[token + i], mean = sums[2 * i] * per_channel, along = sums[2 * i + 1] * per_channel;
#pragma unroll
                for (int j = 0; j < VEC; j++) dx[i][j] = fmaf(rstd, dy[i][j] - mean - xhat[i][j] * along, dx[i][j]);
                save<VEC, float>(a.dx, at + (size_t)i * a.C, dx[i]);
            }
            if (GATE) {
                float dh[VEC];
#pragma unroll
                for (int j = 0; j < VEC; j++) dh[j] = gate[j] * dx[i][j], gate_sum[j] = fmaf(dx[i][j], h[i][j], gate_sum[j]);
                save<VEC, A>(a.dh, at + (size_t)i * a.C, dh);
            }
        }
    }
    float *part = a.part + ((row * gridDim.x + blockIdx.x) * 3) * a.C + c;
    if (NORM && inside) save<VEC, float>(part, 0, shift_sum), save<VEC, float>(part, (size_t)a.C, scale_sum);
    if (GATE && inside) save<VEC, float>(part, 2 * (size_t)a.C, gate_sum);
}

// out[y] [C], rows ld apart (or added to the one there is), = the sum of a row's parts (of all)
__global__ static void add_parts(float *dshift, float *dscale, float *dgate, const float *part, int ld, int count, int C) {
    const int c = blockIdx.x * 128 + threadIdx.x;
    float *out = blockIdx.y == 0 ? dshift : blockIdx.y == 1 ? dscale : dgate;
    if (c >= C || !out) return;
    const size_t row = blockIdx.z;
    float sum = 0;
    for (int i = 0; i < count; i++) sum += part[((row * count + i) * 3 + blockIdx.y) * C + c];
    out[row * (size_t)ld + c] = ld ? sum : out[c] + sum;
}

template <typename A, int VEC> static void launch(const back_args &a, dim3 grid, int threads, cudaStream_t s) {
    if (a.dy && a.h) norm_back<A, VEC, true, true><<<grid, threads, 0, s>>>(a);
    else if (a.dy) norm_back<A, VEC, true, false><<<grid, threads, 0, s>>>(a);
    else norm_back<A, VEC, false, true><<<grid, threads, 0, s>>>(a);
}

int cuda_gate_norm_backward(struct kern *k, float *dx, void *dh, float *dshift, float *dscale, float *dgate, const void *dy,
                            const void *xhat, const float *rstd, const void *h, const float *gate, const float *scale, int ld,
                            int R, int T, int C) {
    back_args a = {
        .dx = dx, .dh = dh, .dy = dy, .xhat = xhat, .h = h, .rstd = rstd, .gate = gate, .scale = scale, .ld = ld, .T = T, .C = C};
    const int blocks = (T + TOKENS - 1) / TOKENS;
    void *part;
    if (R == 0 || (!dy && !h)) return KERN_OK;
    if (R > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "%d rows at once", R);
    int rc = cuda_scratch(k, (size_t)R * (size_t)blocks * 3 * (size_t)C * 4, &part);
    if (rc < 0) return rc;
    a.part = (float *)part;
    const bool four = C % 4 == 0 && ld % 4 == 0 &&
                      ((size_t)dx | (size_t)dh | (size_t)dy | (size_t)xhat | (size_t)h | (size_t)gate | (size_t)scale) % 16 == 0;
    const int vec = four ? C <= 1280 ? 4 : 8 : 1, threads = KERN_ROUND_UP((C + vec - 1) / vec, 32);
    if (threads > 512 || C % vec) return cuda_fail(k, KERN_EUNSUPPORTED, "backward of a norm of %d channels", C);
    const dim3 grid((unsigned)blocks, (unsigned)R);
    cudaStream_t s = cuda_of(k)->stream;
    bool f32 = k->act == KERN_F32;
    if (vec == 8) f32 ? launch<float, 8>(a, grid, threads, s) : launch<__nv_bfloat16, 8>(a, grid, threads, s);
    else if (vec == 4) f32 ? launch<float, 4>(a, grid, threads, s) : launch<__nv_bfloat16, 4>(a, grid, threads, s);
    else f32 ? launch<float, 1>(a, grid, threads, s) : launch<__nv_bfloat16, 1>(a, grid, threads, s);
    rc = cuda_launched(k, "gate_norm_backward");
    if (rc < 0) return rc;
    add_parts<<<dim3((unsigned)((C + 127) / 128), 3, ld ? (unsigned)R : 1u), 128, 0, s>>>(
        dy ? dshift : NULL, dy ? dscale : NULL, h ? dgate : NULL, a.part, ld, ld ? blocks : R * blocks, C);
    return cuda_launched(k, "gate_norm_backward");
}
